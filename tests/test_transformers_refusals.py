# SPDX-License-Identifier: Apache-2.0
"""What the attention of Hugging Face's models cannot do is named."""

import warnings

import pytest
from fresh import run_file

from combiner import AxialMixture, Dense, Fixed, LogSparse, Mixture

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():  # of its own dependencies
    warnings.simplefilter("ignore")
    import transformers
    from transformers import AttentionInterface, DynamicCache, StaticCache

    import combiner.transformers
from transformers_problems import L, attend, bert, close, gpt2, greedy, llama, logits, make, own_logits, small, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "options",
    [
        {"position_bias": torch.zeros(1, 2, L, L)},
        {"head_mask": torch.ones(2)},
        {"anything": 1},
    ],
    ids=lambda x: next(iter(x)),
)
def test_what_there_is_not_is_named(options):
    attend(**dict.fromkeys(options), use_cache=True, num_items_in_batch=3)
    with pytest.raises(NotImplementedError, match=f"Module asks for {next(iter(options))}=(a tensor of shape|[0-9])"):
        attend(**options)


def test_chunks():
    """Of a sequence that is longer than one."""
    config = small(transformers.Llama4TextConfig, attention_chunk_size=8, layer_types=["chunked_attention"] * 2)
    made = make(lambda: transformers.Llama4ForCausalLM(config), Dense()).float()
    close(logits(made, tokens(1, 8)), own_logits(made, tokens(1, 8)), 1e-4)
    with pytest.raises(NotImplementedError, match=f"Attention asks for chunks of 8 positions in a sequence of {L}"):
        logits(made, tokens(1, L))
    ids = tokens(1, 5)
    with pytest.raises(NotImplementedError, match="must go without a cache in layers with chunks"):
        made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)


MASK = combiner.transformers.masks.mask(
    batch_size=1,
    q_length=L,
    kv_length=L,
    q_offset=0,
    kv_offset=0,
    mask_function=transformers.masking_utils.causal_mask_function,
)
USES = {
    "dtype": lambda mask: mask.dtype,
    "ndim": lambda mask: mask.ndim,
    "size": lambda mask: mask.size(-1),
    "__getitem__": lambda mask: mask[:, :, :, :3],
    "__eq__": lambda mask: mask == 0,
    "__bool__": lambda mask: 1 if mask else 0,
    "__invert__": lambda mask: ~mask,
    "__add__": lambda mask: mask + 1,
    "__radd__": lambda mask: 1 + mask,
    "add|__radd__": lambda mask: torch.ones(3) + mask,
    "where": lambda mask: torch.where(mask, 0.0, 1.0),
    "to": lambda mask: mask.to("cpu"),
}


@pytest.mark.parametrize("use", USES)
def test_a_models_own_code_cannot_take_the_mask_for_a_tensor(use):
    with pytest.raises(
        NotImplementedError, match=f"attention_mask must reach combiner attention as it was .*'({use})'"
    ):
        USES[use](MASK)


def test_masks_that_are_not_taken():
    with pytest.raises(
        NotImplementedError, match=r"attention_mask must be \[B, L\] or None, .* got one of shape \[1, 1"
    ):
        attend(attention_mask=torch.ones(1, 1, L, L))
    made, ids = make(llama), tokens(1, L)
    with pytest.raises(NotImplementedError, match=r"attention_mask must be \[B, L\]"):
        made(ids, attention_mask=torch.ones(1, 1, L, L))
    with pytest.raises(
        NotImplementedError, match=rf"attention_mask must be \[B, L\] or None, got one of shape \[1, {L}, {L}"
    ):
        make(bert)(ids, attention_mask=torch.ones(1, L, L))


def test_output_attentions_is_refused():
    made, ids = make(llama), tokens(1, L)
    with pytest.raises(NotImplementedError, match="output_attentions must be left out"):
        made(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        made.config.output_attentions = True


def diffllama(**options):
    return transformers.DiffLlamaForCausalLM(small(transformers.DiffLlamaConfig, num_key_value_heads=4, **options))


def deepseek_v2(**options):
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    sizes |= {"first_k_dense_replace": 2, "num_key_value_heads": 4, "head_dim": 8}
    return transformers.DeepseekV2ForCausalLM(small(transformers.DeepseekV2Config, **sizes, **options))


@torch.no_grad()
@pytest.mark.parametrize(
    "model, message",
    [(diffllama, "query and key must have the same positions"), (deepseek_v2, "query and key must have the same")],
    ids=["diffllama", "deepseek_v2"],
)
def test_keys_and_values_changed_after_the_cache_do_not_generate(model, message):
    """They would be attended as they were before the change, once or twice: wrong tokens, without an error."""
    made, ids = make(model, Dense()), tokens(1, L)
    close(logits(made, ids), own_logits(made, ids))
    cache = DynamicCache(config=made.config)
    logits(made, ids[:, :12], cache=cache)
    with pytest.raises(NotImplementedError, match=f"{message}.*use_cache=False"):
        logits(made, ids[:, 12:16], cache=cache)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(made.generate(ids, use_cache=False, **options), greedy(made, ids, 3))


@torch.no_grad()
def test_two_attentions_of_a_layer_do_not_generate():
    """Each token would be taken twice, and the first tokens' queries would be those of the second."""
    combiner.transformers.register(Dense())
    attend, module = AttentionInterface()["combiner"], torch.nn.Module()
    x = torch.randn(1, 2, L, 8)
    for calls in ((2, 1), (1, 2)):
        layer = combiner.transformers.CombinerLayer()
        with pytest.raises(NotImplementedError, match=r"once in each layer|once for each update"):
            for part, times in zip((x[..., :9, :], x[..., 9:10, :]), calls, strict=True):
                key, value = layer.update(part, part)
                for _ in range(times):
                    attend(module, part, key, value, None)


@torch.no_grad()
def test_caches_and_patterns_that_cannot_generate():
    made, ids = make(llama), tokens(1, L)
    for cache, message in [
        (DynamicCache(), "or come from a causal model's DynamicCache made with its config after register"),
        (StaticCache(made.config, max_cache_len=40), "cache must be a DynamicCache made with the model's config"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            made(ids[:, :-1], cache=cache)
            made(ids[:, -1:], cache=cache)
    for pattern, message in [
        (Fixed(), "pattern must have a span, the default depends on the length"),
        (AxialMixture(4), "pattern must be Dense, Fixed"),
        (Mixture(Fixed(4), LogSparse()), "pattern must be Dense, Fixed"),
    ]:
        made, cache = make(llama, pattern), DynamicCache(config=made.config)
        made(ids[:, :-1], cache=cache)
        with pytest.raises(ValueError, match=message):
            made(ids[:, -1:], cache=cache)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
        assert torch.equal(made.generate(ids, use_cache=False, **options), greedy(made, ids, 3))


@torch.no_grad()
def test_packed_sequences_do_not_generate():
    made, ids = make(llama), tokens(1, L)
    cache = DynamicCache(config=made.config)
    logits(made, ids, cache=cache, cu_seq_lens_q=torch.tensor([0, 9, L]))
    with pytest.raises(NotImplementedError, match="one sequence in each batch entry"):
        logits(made, ids[:, :1], cache=cache)


@torch.no_grad()
def test_a_static_cache_is_named():
    made, ids = make(llama), tokens(1, L)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3}
    with pytest.raises(NotImplementedError, match="cache_implementation must be left out"):
        made.generate(ids, cache_implementation="static", **options)


def test_generation_in_training_mode_says_what_to_do():
    made, ids = make(gpt2).train(), tokens(1, L)
    with pytest.raises(NotImplementedError, match=r"call model.eval\(\)"):
        made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)


def test_steps_have_no_gradients_and_no_dropout():
    made, ids = make(llama, attention_dropout=0.5), tokens(1, L)
    cache = DynamicCache(config=made.config)
    made(ids, cache=cache)
    with pytest.raises(NotImplementedError, match=r"without gradients: call model.eval\(\) and use torch.no_grad"):
        made(ids[:, :1], cache=cache)
    cache = DynamicCache(config=made.config)
    logits(made, ids, cache=cache)
    with pytest.raises(NotImplementedError, match=r"without dropout"):
        logits(made.train(), ids[:, :1], cache=cache)


def test_a_pattern_that_changes():
    made, ids = make(llama), tokens(1, L)
    cache = DynamicCache(config=made.config)
    logits(made, ids[:, :9], cache=cache)
    logits(made, ids[:, 9:10], cache=cache)
    combiner.transformers.register(Fixed(8))
    with pytest.raises(
        ValueError, match=r"pattern must be the same for all tokens, got Fixed\(span=8\) after .*span=4"
    ):
        logits(made, ids[:, 10:11], cache=cache)


def test_example():
    """All of it, at a size at which nothing is learned."""
    said = run_file("examples/transformers_swap.py", "--steps=3", "--more=2", "--length=128", "--new=8")
    for line in ("training with sdpa", "2 layers took the pattern", "bits per byte", "generated with a cache"):
        assert line in said
