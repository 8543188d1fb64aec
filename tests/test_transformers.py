# SPDX-License-Identifier: Apache-2.0
"""Models of Hugging Face with this attention: against their own, against the reference, and piece by piece."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from combiner import Axial, AxialMixture, Dense, Fixed, LogSparse, Mixture, Tree, reference

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():  # of its own dependencies
    warnings.simplefilter("ignore")
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
    from transformers.masking_utils import flash_attention_mask

    import combiner.transformers

VOCABULARY, L = 61, 23
SIZES = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


@pytest.fixture(autouse=True)
def one_thread():
    """These sizes are none for several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with combiner.num_threads(1):
        yield
    torch.set_num_threads(before)


def llama(**options):
    config = transformers.LlamaConfig(
        **SIZES
        | {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        | options
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(**options):
    config = transformers.GPT2Config(**SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | options)
    return transformers.GPT2LMHeadModel(config)


def bert(**options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES | sizes | options))


def make(model, pattern=Fixed(4), **options):  # noqa: B008
    """A model in float64, whose errors are of rounding only, with larger weights than new ones have: they attend to
    something."""
    torch.manual_seed(0)
    combiner.transformers.register(pattern)
    made = model(**options).double().eval()
    with torch.no_grad():
        for name, x in made.named_parameters():
            if x.ndim > 1 and "emb" not in name:
                x.mul_(8)
    made.set_attn_implementation("combiner")
    return made


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


LEFT = torch.arange(L) >= torch.tensor([[0], [5], [9]])
MASKS = {"none": torch.ones(3, L, dtype=torch.bool), "left": LEFT, "right": LEFT.flip(1)}
MASKS["holes"] = MASKS["left"] & (torch.arange(L) % 7 != 3)


def masked(name: str) -> dict[str, torch.Tensor]:
    """attention_mask, and position_ids as generation has them."""
    if name == "none":
        return {}
    return {"attention_mask": MASKS[name].long(), "position_ids": (MASKS[name].long().cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def logits(model, ids, **options) -> torch.Tensor:
    return model(ids, **options).logits


def close(actual: torch.Tensor, expected: torch.Tensor, within: float = 1e-9) -> None:
    """float64 through two layers of weights about 1: 1e-16 grows to 1e-12 at most."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error < within, f"{error:.3g} from the expected"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("model", [llama, gpt2, bert], ids=lambda f: f.__name__)
def test_dense_is_the_models_own_attention(model, mask):
    """Of the same positions: BERT alone has none of its own for padding."""
    made, ids, options = make(model, Dense()), tokens(3, L), masked(mask)
    actual = logits(made, ids, **options)
    made.set_attn_implementation("sdpa")
    close(actual[MASKS[mask]], logits(made, ids, **options)[MASKS[mask]])


def test_dense_in_float32():
    made, ids = make(llama, Dense()).float(), tokens(3, L)
    actual = logits(made, ids)
    made.set_attn_implementation("sdpa")
    close(actual, logits(made, ids), 1e-5)


def test_bfloat16():
    """As far from float32 as the model's own attention in bfloat16, give or take: 8 bits, two layers."""
    pytest.importorskip("ml_dtypes")
    made, ids = make(llama, Dense()), tokens(3, L)
    options = masked("left")
    exact = logits(made.float(), ids, **options)
    error = {}
    for name in ("combiner", "sdpa"):
        made.bfloat16().set_attn_implementation(name)
        actual = logits(made, ids, **options)
        assert actual.dtype == torch.bfloat16
        error[name] = (actual - exact)[MASKS["left"]].abs().max().item()
    assert 0 < error["combiner"] < 2 * error["sdpa"]
    made.set_attn_implementation("combiner")
    cache = DynamicCache(config=made.config)
    steps = [logits(made, ids[:, a:b], cache=cache) for a, b in ((0, 20), (20, 21), (21, L))]
    assert (torch.cat(steps, 1) - logits(made, ids)).abs().max() < 2 * error["sdpa"]
    assert train(made.train(), 2)[0] > 0


def reference_attention(pattern):
    """The definition, in NumPy, of each row without its padding."""

    def forward(module, query, key, value, attention_mask, scaling=None, is_causal=None, **_):
        is_causal = module.is_causal if is_causal is None else is_causal
        B, Hq, length, _ = query.shape
        out = torch.zeros(B, length, Hq, value.shape[-1], dtype=query.dtype)
        for b in range(B):
            keep = torch.ones(length, dtype=torch.bool) if attention_mask is None else attention_mask[b]
            rows = (x[b][:, keep].numpy() for x in (query, key, value))
            row = reference.attention(*rows, pattern, is_causal=is_causal, scale=scaling)
            out[b, keep] = torch.from_numpy(row).transpose(0, 1)
        return out, None

    return forward


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("model", [llama, gpt2, bert], ids=lambda f: f.__name__)
def test_against_the_reference(model, mask):
    for pattern in (Fixed(4), LogSparse()):
        made, ids, options = make(model, pattern), tokens(3, L), masked(mask)
        actual = logits(made, ids, **options)
        AttentionInterface.register("reference", reference_attention(pattern))
        AttentionMaskInterface.register("reference", flash_attention_mask)
        made.set_attn_implementation("reference")
        close(actual[MASKS[mask]], logits(made, ids, **options)[MASKS[mask]])


@pytest.mark.parametrize("model", [llama, gpt2], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", [{}, {"attention_mask": MASKS["right"].long()}], ids=["no mask", "right"])
def test_the_future_does_not_leak(model, options):
    """Not one bit of a logit depends on later tokens, whether or not the model asks for a mask."""
    made, ids = make(model), tokens(3, L)
    for position in (1, 6, 8, 13):
        other = ids.clone()
        other[:, position:] = (other[:, position:] + 7) % VOCABULARY
        before, after = (logits(made, x, **options) for x in (ids, other))
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=0)
        assert not torch.equal(after[:, position:], before[:, position:])


def test_without_a_mask_attention_is_causal():
    """As a model without mask functions calls it: what the module does not say is causal."""
    combiner.transformers.register(Fixed(4))
    attend = AttentionInterface()["combiner"]
    x = torch.randn(1, 2, L, 8)
    causal = combiner.torch.attention(x, x, x, Fixed(4), is_causal=True).transpose(1, 2)
    module = torch.nn.Module()
    assert torch.equal(attend(module, x, x, x, None)[0], causal)
    module.is_causal = False
    assert torch.equal(attend(module, x, x, x, None, is_causal=True)[0], causal)
    full = combiner.torch.attention(x, x, x, Fixed(4)).transpose(1, 2)
    assert torch.equal(attend(module, x, x, x, None)[0], full) and not torch.equal(full, causal)


@pytest.mark.parametrize("mask", ["left", "right", "holes"])
def test_padding_counts_for_nothing(mask):
    """A padded row has the logits of its tokens alone, whatever the padding holds."""
    made, ids = make(llama), tokens(3, L)
    padded = logits(made, ids, **masked(mask))
    for row, keep in enumerate(MASKS[mask]):
        close(padded[row][keep], logits(made, ids[row : row + 1, keep])[0])
    other = torch.where(MASKS[mask], ids, 5)
    assert torch.equal(logits(made, other, **masked(mask))[MASKS[mask]], padded[MASKS[mask]])


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("model", [llama, gpt2], ids=lambda f: f.__name__)
def test_packed_sequences_are_alone(model, use_cache):
    """Rows of several sequences, not the same in each: position_ids that restart are all that says so."""
    made, ids = make(model), tokens(2, L)
    lengths = [[9, 1, 13], [L]]
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    actual = logits(made, ids, position_ids=position_ids, use_cache=use_cache)
    for row, parts in enumerate(lengths):
        for each, expected in zip(ids[row].split(parts), actual[row].split(parts), strict=True):
            close(logits(made, each[None])[0], expected)


def train(model, steps: int, **options) -> list[float]:
    ids, losses = tokens(4, L), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(ids, labels=ids, **options).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("model", [llama, gpt2, bert], ids=lambda f: f.__name__)
def test_training(model):
    dropout = {
        llama: {"attention_dropout": 0.1},
        gpt2: {"attn_pdrop": 0.1},
        bert: {"attention_probs_dropout_prob": 0.1},
    }
    made = make(model, **dropout[model]).float().train()
    losses = train(made, 12)
    assert losses[-1] < losses[0] - 0.5, losses  # of about 4.1, log(61)


@pytest.mark.parametrize("mask", ["none", "left"])
def test_gradients_are_those_of_the_models_own_attention(mask):
    made, ids = make(llama, Dense()), tokens(3, L)
    labels = torch.where(MASKS[mask], ids, -100)
    gradients = []
    for name in ("combiner", "sdpa"):
        made.set_attn_implementation(name)
        made.zero_grad()
        made(ids, labels=labels, **masked(mask)).loss.backward()
        gradients.append([x.grad for x in made.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        close(actual, expected, 1e-8)


def test_dropout_is_the_models():
    """In training only, of the share the model has, from PyTorch's generator."""
    made, ids = make(llama, attention_dropout=0.5), tokens(1, L)
    plain = logits(made, ids)
    made.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(logits(made, ids))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2]) and not torch.allclose(found[0], plain)


def test_checkpointed_layers_drop_the_same_again():
    made, ids = make(llama, attention_dropout=0.5).train(), tokens(1, L)
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            made.activation_checkpointing_enable()
        torch.manual_seed(1)
        made.zero_grad()
        made(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([x.grad for x in made.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        close(actual, expected)


def test_scaling_is_the_models():
    made, ids = make(gpt2, Dense(), scale_attn_by_inverse_layer_idx=True), tokens(1, L)
    actual = logits(made, ids)
    made.set_attn_implementation("sdpa")
    close(actual, logits(made, ids))


def test_a_pattern_for_each_layer_and_name():
    made, ids = make(llama, Dense()), tokens(1, L)
    combiner.transformers.register(lambda module: (Dense(), Fixed(4))[module.layer_idx], "by-layer")
    combiner.transformers.register(Fixed(4), "combiner-fixed")
    found = {}
    for name in ("combiner", "by-layer", "combiner-fixed"):
        made.set_attn_implementation(name)
        found[name] = logits(made, ids)
    assert len({x.sum().item() for x in found.values()}) == 3
    for pattern in (Fixed, None, 3):
        with pytest.raises(TypeError, match=r"pattern must be a pattern such as combiner.Fixed"):
            combiner.transformers.register(pattern)


# ---- generation


def greedy(model, ids: torch.Tensor, new: int, **options) -> torch.Tensor:
    """The whole text through the model for every token, without a cache."""
    mask = options.get("attention_mask", torch.ones_like(ids))
    for _ in range(new):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        chosen = logits(model, ids, attention_mask=mask, position_ids=position_ids, use_cache=False)[:, -1].argmax(-1)
        ids, mask = (torch.cat([x, y[:, None]], 1) for x, y in ((ids, chosen), (mask, torch.ones_like(chosen))))
    return ids


GENERATING = [
    Dense(),
    Fixed(4),
    Fixed(4, pooling="mean", size_bias=True),
    LogSparse(),
    LogSparse(hierarchical=True),
    Tree(3),
    Axial(4),
    Axial(4, "rowmajor"),
    Fixed(4).sparse(),
]


@pytest.mark.parametrize("pattern", GENERATING, ids=repr)
def test_generation_is_the_argmax_of_the_whole_text(pattern):
    made, ids = make(llama, pattern), tokens(3, L)
    mask = MASKS["left"].long()
    actual = made.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(actual, greedy(made, ids, 10, attention_mask=mask))
    assert len(set(actual[:, L:].flatten().tolist())) > 2  # it says something


def test_generation_of_gpt2_and_of_one_token():
    made = make(gpt2)
    for ids in (tokens(2, L), tokens(1, 1)):
        actual = made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert torch.equal(actual, greedy(made, ids, 10))


def test_beams_and_samples():
    """Caches are reordered and repeated."""
    made, ids = make(llama), tokens(2, L)
    mask = MASKS["left"][1:].long()
    for options in ({"num_beams": 3, "do_sample": False}, {"num_return_sequences": 3, "do_sample": True}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(made.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **options))
        assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("steps", [[1] * 12, [7, 1, 4], [12]], ids=str)
@pytest.mark.parametrize("mask", ["none", "left", "holes"])
def test_steps_with_a_cache(steps, mask):
    """Any number of tokens at a time, padding among them."""
    made, ids = make(llama), tokens(3, L)
    keep = MASKS[mask]
    position_ids = (keep.cumsum(1) - 1).clamp(min=0)
    expected = logits(made, ids, attention_mask=keep.long(), position_ids=position_ids)
    cache, end, found = DynamicCache(config=made.config), 0, []
    for n in (L - sum(steps), *steps):
        first, end = end, end + n
        found.append(
            logits(
                made,
                ids[:, first:end],
                cache=cache,
                use_cache=True,
                attention_mask=keep[:, :end].long(),
                position_ids=position_ids[:, first:end],
            )
        )
    close(torch.cat(found, 1)[keep], expected[keep])


@torch.no_grad()
def test_a_cache_keeps_what_is_attended():
    """Not all keys and values: for `Fixed`, spans' summaries and the last span."""
    made, ids = make(llama), tokens(1, L)
    cache = DynamicCache(config=made.config)
    logits(made, ids[:, :-1], cache=cache)
    logits(made, ids[:, -1:], cache=cache)
    layer = cache.layers[0]
    assert isinstance(layer, combiner.transformers.CombinerLayer) and cache.get_seq_length() == L
    assert layer.keys.numel() == layer.values.numel() == 0 and layer.queries is None
    assert layer._decoders[0].length == L
    with pytest.raises(NotImplementedError, match="tokens of a cache must stay"):
        cache.crop(-1)
    cache.reset()
    close(logits(made, ids, cache=cache), logits(made, ids))


@torch.no_grad()
def test_a_prompt_may_be_cropped_and_chosen_from():
    made, ids = make(llama), tokens(3, L)
    cache = DynamicCache(config=made.config)
    logits(made, ids, cache=cache)
    cache.crop(-5)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 0, 0])
    for end in (L - 2, L):  # the rest in two steps, the rows exchanged in between
        first = cache.get_seq_length()
        close(logits(made, ids[rows, first:end], cache=cache), logits(made, ids[rows, :end])[:, first:])
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        rows = rows[torch.tensor([3, 0, 1, 2])]
    cache.batch_repeat_interleave(2)
    assert cache.layers[0]._decoders[0] is not cache.layers[0]._decoders[1]


@torch.no_grad()
def test_other_attention_has_its_cache():
    """As it was; and from a cache that combiner has taken over it gets NaN, not another attention's past."""
    made, ids = make(llama), tokens(2, L)
    made.set_attn_implementation("sdpa")
    cache = DynamicCache(config=made.config)
    expected = logits(made, ids)
    parts = [logits(made, ids[:, a:b], cache=cache) for a, b in ((0, 9), (9, 10), (10, L))]
    close(torch.cat(parts, 1), expected)
    made.set_attn_implementation("combiner")
    with pytest.raises(NotImplementedError, match="generation must go on from tokens that combiner attended"):
        logits(made, ids[:, :1], cache=cache)
    cache = DynamicCache(config=made.config)
    for a, b in ((0, 9), (9, 10)):
        logits(made, ids[:, a:b], cache=cache)
    made.set_attn_implementation("sdpa")
    assert logits(made, ids[:, 10:11], cache=cache).isnan().all()


# ---- what is refused


def attend(**options):
    """A direct call, as models make it."""
    combiner.transformers.register(Fixed(4))
    x = torch.randn(1, 2, L, 8)
    return AttentionInterface()["combiner"](torch.nn.Module(), x, x, x, options.pop("attention_mask", None), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 30.0},
        {"sliding_window": 8},
        {"s_aux": torch.zeros(2)},
        {"position_bias": torch.zeros(1, 2, L, L)},
        {"output_attentions": True},
        {"head_mask": torch.ones(2)},
        {"cu_seq_lens_q": torch.tensor([0, L])},
        {"anything": 1},
    ],
    ids=lambda x: next(iter(x)),
)
def test_what_there_is_not_is_named(options):
    attend(**dict.fromkeys(options), use_cache=True, num_items_in_batch=3)
    with pytest.raises(NotImplementedError, match=f"{next(iter(options))} must be left out with combiner attention"):
        attend(**options)


def test_masks_that_are_not_taken():
    with pytest.raises(NotImplementedError, match=r"attention_mask must be \[B, L\] or None, got one of shape \[1, 1"):
        attend(attention_mask=torch.ones(1, 1, L, L))
    made, ids = make(llama), tokens(1, L)
    with pytest.raises(NotImplementedError, match=r"attention_mask must be \[B, L\]"):
        made(ids, attention_mask=torch.ones(1, 1, L, L))
    sliding = transformers.MistralForCausalLM(
        transformers.MistralConfig(**made.config.to_dict() | {"sliding_window": 8})
    )
    sliding.set_attn_implementation("combiner")
    with pytest.raises(NotImplementedError, match=r"a mask must be causal .* got sliding_window_overlay"):
        sliding(ids)


def test_output_attentions_is_refused():
    made, ids = make(llama), tokens(1, L)
    with pytest.raises(NotImplementedError, match="output_attentions must be left out"):
        made(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        made.config.output_attentions = True


def test_cross_attention_is_refused():
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
    made = make(lambda: transformers.BartModel(transformers.BartConfig(**SIZES | sizes | heads)))
    with pytest.raises(NotImplementedError, match="got a model with cross-attention"):
        made(tokens(1, L))


@torch.no_grad()
def test_caches_and_patterns_that_cannot_generate():
    made, ids = make(llama), tokens(1, L)
    for cache, message in [
        (DynamicCache(), "generation takes a DynamicCache made with the model's config"),
        (StaticCache(made.config, max_cache_len=40), "query and key must have the same positions, got 22 and 40"),
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
    logits(made, ids, cache=cache, position_ids=(torch.arange(L) % 9)[None])
    with pytest.raises(NotImplementedError, match="one sequence in each batch entry"):
        logits(made, ids[:, :1], cache=cache)


def test_steps_have_no_gradients_and_no_dropout():
    made, ids = make(llama, attention_dropout=0.5), tokens(1, L)
    cache = DynamicCache(config=made.config)
    made(ids, cache=cache)
    with pytest.raises(NotImplementedError, match=r"without dropout and under torch.no_grad"):
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
    root = Path(__file__).parent.parent
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, root / "examples" / "transformers_swap.py", "--steps=3", "--length=128", "--new=8"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for line in ("training with sdpa", "training with combiner", "bits per byte", "generated with a cache"):
        assert line in done.stdout
