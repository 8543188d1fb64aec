# SPDX-License-Identifier: Apache-2.0
"""Which layers take a pattern, and which are left to the model's own attention."""

import copy
import warnings

import pytest

from combiner import Dense, Fixed

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():  # of its own dependencies
    warnings.simplefilter("ignore")
    import transformers
    from transformers import DynamicCache

    import combiner.transformers
from transformers_problems import LEFT, MASKS, L, close, greedy, llama, logits, make, masked, own_logits, small, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- layers that are left to the model's own attention -------------------------------------------


def gemma3(**options):
    options = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, **options}
    return transformers.Gemma3ForCausalLM(small(transformers.Gemma3TextConfig, **options))


def mistral(**options):
    return transformers.MistralForCausalLM(small(transformers.MistralConfig, **options))


def gpt_oss(**options):
    config = small(transformers.GptOssConfig, num_local_experts=4, num_experts_per_tok=2, **options)
    return transformers.GptOssForCausalLM(config)


def bart(**options):
    return transformers.BartForConditionalGeneration(small(transformers.BartConfig, **options))


def qwen2_moe(**options):
    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return transformers.Qwen2MoeForCausalLM(small(transformers.Qwen2MoeConfig, **sizes, **options))


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize(
    "model, own, has_taken", [(gemma3, "sdpa", True), (mistral, "sdpa", False), (gpt_oss, "eager", False)]
)
def test_layers_with_windows_and_sinks_are_left_where_asked(model, own, has_taken, mask):
    """Full layers take the pattern."""
    made, ids, options = make(model, sliding_window=5).float(), tokens(3, L), masked(mask)
    expected = own_logits(made, ids, own, **options)[MASKS[mask]]
    combiner.transformers.register(Dense(), fallback=True)
    close(logits(made, ids, **options)[MASKS[mask]], expected, 1e-4)
    combiner.transformers.register(Fixed(4), fallback=True)
    changed = (logits(made, ids, **options)[MASKS[mask]] - expected).abs().max() > 1e-2
    assert changed == has_taken


@pytest.mark.parametrize("fallback", [False, True])
def test_a_pattern_that_is_none_leaves_the_layer(fallback):
    """Whatever it has: as in register(lambda module: None if module.is_sliding else Fixed(4))."""
    made, ids = make(gemma3), tokens(3, L)
    combiner.transformers.register(lambda m: None if m.is_sliding else Dense(), fallback=fallback)
    close(logits(made, ids, **masked("left"))[LEFT], own_logits(made, ids, **masked("left"))[LEFT])
    combiner.transformers.register(lambda m: None, fallback=fallback)
    assert torch.equal(logits(made, ids), own_logits(made, ids))
    combiner.transformers.register(lambda m: None if m.is_sliding else Fixed(4), fallback=fallback)
    assert not torch.allclose(logits(made, ids), own_logits(made, ids))


@pytest.mark.parametrize("window", [L, L + 40])
def test_a_window_as_long_as_the_sequence_is_none(window):
    made, ids = make(mistral, Dense(), sliding_window=window), tokens(2, L)
    close(logits(made, ids), own_logits(made, ids))
    close(logits(made, tokens(1, window + 1)), own_logits(made, tokens(1, window + 1)))
    ids = ids[:, :-2]
    text = made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert torch.equal(text, greedy(made, ids, 2))


def test_packed_sequences_are_alone_in_layers_of_both_kinds():
    made, ids = make(gemma3), tokens(1, L)
    combiner.transformers.register(Fixed(4), fallback=True)
    options = {"position_ids": (torch.arange(L) % 12)[None], "use_cache": False}
    packed = logits(made, ids, **options)
    for part, found in zip(ids.split(12, 1), packed.split(12, 1), strict=True):
        close(logits(made, part), found)
    assert torch.equal(logits(made, ids, cu_seq_lens_q=torch.tensor([0, 12, L]), **options), packed)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q must come with position_ids that restart"):
        logits(made, ids, cu_seq_lens_q=torch.tensor([0, 12, L]))


def test_masks_of_layers_that_are_not_there_do_not_matter():
    """Models make the masks of every kind of layer before the first layer runs."""
    for model, options in ((qwen2_moe, {}), (gemma3, {"layer_types": ["full_attention"] * 2})):
        made, ids = make(model, Dense(), **options).float(), tokens(2, L)  # experts have no float64
        close(logits(made, ids), own_logits(made, ids), 1e-4)


@pytest.mark.parametrize("pattern", [Dense(), Fixed(4)], ids=repr)
def test_generation_of_a_model_with_windows(pattern):
    made, ids = make(gemma3), tokens(3, L)
    combiner.transformers.register(pattern, fallback=True)
    mask = MASKS["left"].long()
    actual = made.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(actual, greedy(made, ids, 10, attention_mask=mask))


@torch.no_grad()
def test_a_layer_is_not_left_in_the_midst_of_its_tokens():
    made, ids = make(llama), tokens(1, L)
    cache = DynamicCache(config=made.config)
    for a, b in ((0, 9), (9, 10)):
        logits(made, ids[:, a:b], cache=cache)
    combiner.transformers.register(lambda m: None)
    with pytest.raises(ValueError, match="pattern must be the same for all tokens, got None"):
        logits(made, ids[:, 10:11], cache=cache)


# ---- cross-attention -----------------------------------------------------------------------------


@torch.no_grad()
def test_cross_attention_of_equal_lengths_is_not_pooled():
    """Sixteen queries of sixteen image tokens are no sequence with a past: the layer has PyTorch's attention."""
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

    combiner.transformers.register(Fixed(4))
    config = transformers.Blip2QFormerConfig(hidden_size=32, num_attention_heads=4, encoder_hidden_size=32)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1, "vocab_size": 61}
    mllama = MllamaTextConfig(hidden_size=32, **heads, cross_attention_layers=[0])
    x, y = torch.randn(2, 1, 16, 32)
    for attend, cross in [
        (Blip2QFormerMultiHeadAttention(config, is_cross_attention=True), {"encoder_hidden_states": y}),
        (MllamaTextCrossAttention(mllama, layer_idx=0), {"cross_attention_states": y, "attention_mask": None}),
    ]:
        attend.eval()
        found = {}
        for name in ("combiner", "sdpa"):
            attend.config._attn_implementation = name
            found[name] = attend(x, **cross)[0]
        assert torch.equal(found["combiner"], found["sdpa"])
    attend = Blip2QFormerMultiHeadAttention(config).eval()
    attend.config._attn_implementation = "combiner"
    found = attend(x)[0]
    attend.config._attn_implementation = "sdpa"
    assert not torch.allclose(found, attend(x)[0])


def test_encoder_and_decoder_take_the_pattern_and_cross_attention_does_not():
    made, ids = make(bart, Dense()), tokens(2, L)
    options = {"decoder_input_ids": tokens(2, L).flip(1), "attention_mask": MASKS["right"][:2].long()}
    close(logits(made, ids, **options), own_logits(made, ids, **options))
    report = combiner.transformers.swap(made, Fixed(4))
    mixed = logits(made, ids, **options)
    assert not torch.allclose(mixed, own_logits(made, ids, **options))
    assert len(report.taken) == 4 and len(report.left) == 2
    assert all(name.endswith("encoder_attn") for name in report.left)
    assert set(report.left.values()) == {"cross-attention"}


@torch.no_grad()
def test_generation_of_an_encoder_and_a_decoder():
    made, ids = make(bart), tokens(2, L)
    mask = MASKS["right"][1:].long()
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "num_beams": 2}
    found = [made.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False)]
    assert torch.equal(*found) and len(set(found[0].flatten().tolist())) > 2


# ---- which layers took a pattern -----------------------------------------------------------------


def test_swap_says_which_layers_took_the_pattern():
    made, other = make(gemma3), make(llama)
    report = combiner.transformers.swap(made, lambda module: Fixed(4 + module.layer_idx), fallback=True)
    assert repr(report) == f"Gemma3ForCausalLM with attention {report.name!r}: no layer has called it"
    logits(made, tokens(1, L))
    assert report.taken == {"model.layers.1.self_attn": Fixed(5)}
    assert report.left == {"model.layers.0.self_attn": "a window of 5 positions"}
    assert "1 layers took the pattern, 1 are left" in repr(report)
    combiner.transformers.swap(made, Dense(), fallback=True)
    logits(copy.deepcopy(made), tokens(1, L))  # which says nothing of the model itself
    made.set_attn_implementation(report.name)
    second = combiner.transformers.swap(other, Dense())
    assert second.name != report.name and made.config._attn_implementation == report.name
    close(logits(other, tokens(1, L)), own_logits(other, tokens(1, L)))


def test_a_swap_that_swaps_nothing_fails():
    """When it is made or, where only the layers know, in the first forward pass."""
    kind = transformers.DebertaV2ForMaskedLM
    deberta = kind(small(transformers.DebertaV2Config, relative_attention=True))
    with pytest.raises(NotImplementedError, match="got DebertaV2ForMaskedLM, which has its own"):
        combiner.transformers.swap(deberta, Fixed(4))
    made = make(mistral, sliding_window=5)
    combiner.transformers.swap(made, Fixed(4), fallback=True)
    with pytest.raises(
        NotImplementedError, match=r"(?s)model must have a layer that takes .* 0 layers took .* 2 are left"
    ):
        logits(made, tokens(1, L))
    with pytest.raises(TypeError, match="model must be a PreTrainedModel of transformers, got Linear"):
        combiner.transformers.swap(torch.nn.Linear(2, 2), Fixed(4))
    with pytest.raises(TypeError, match="pattern must be a pattern"):
        combiner.transformers.swap(made, Fixed)


@pytest.mark.parametrize("kind", ["DebertaV2", "Falcon", "GPTNeo", "Bloom"])
def test_models_that_do_not_ask_for_an_attention_are_refused_when_they_are_made(kind):
    """Others took the name and went on with their own attention, or failed with a KeyError."""
    combiner.transformers.register(Fixed(4))
    config = getattr(transformers, f"{kind}Config")()
    with pytest.raises(NotImplementedError, match=f"got {kind}Model, which has its own"):
        getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation="combiner")


# ---- selection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "left", "holes"])
def test_a_model_that_opens_every_region_is_dense(mask):
    """Padded, packed and alone; layers with windows open nothing."""
    made, ids = make(gemma3, Dense()), tokens(3, L)
    options, packed = masked(mask), {"position_ids": (torch.arange(L) % 12)[None], "use_cache": False}
    expected, of_packed = logits(made, ids, **options), logits(made, ids[:1], **packed)
    combiner.transformers.register(Fixed(4), select=L)
    close(logits(made, ids, **options)[MASKS[mask]], expected[MASKS[mask]])
    close(logits(made, ids[:1], **packed), of_packed)
    swapped = make(gemma3, Dense())
    combiner.transformers.swap(swapped, lambda module: Fixed(4), select=L)
    close(logits(swapped, ids, **options)[MASKS[mask]], expected[MASKS[mask]])


def test_selections_that_are_refused():
    for pattern, select, error, says in (
        (Fixed(4), -1, ValueError, "select must be at least 0, got -1"),
        (Fixed(4), 1.5, TypeError, "select must be an integer, got float"),
        (Dense(), 2, ValueError, r"pattern must have regions that queries share .*, got Dense\(\)"),
    ):
        with pytest.raises(error, match=says):
            combiner.transformers.register(pattern, select=select)
    made = make(llama)
    combiner.transformers.register(lambda module: Dense(), select=2)
    with pytest.raises(ValueError, match="pattern must have regions that queries share"):
        logits(made, tokens(1, L))
