# SPDX-License-Identifier: Apache-2.0
"""Layers with a sliding window run `Window`, with a softcap or sinks or without: the model's own results, in training
and generation."""

import copy
import itertools
import warnings

import pytest

import combiner
from combiner import Dense, Fixed, HeavilyCompressed, Window

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():  # of its own dependencies
    warnings.simplefilter("ignore")
    import transformers
    from transformers import AttentionInterface, DynamicCache

    import combiner.transformers
from fresh import run_file  # noqa: E402
from transformers_problems import FLOAT32, MASKS, L, close, greedy, logits, make, masked, own_logits, small, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = ["sliding_attention", "full_attention"]


def mistral(**options):
    return transformers.MistralForCausalLM(small(transformers.MistralConfig, **options))


def qwen3(**options):
    config = small(transformers.Qwen3Config, use_sliding_window=True, layer_types=BOTH, **options)
    return transformers.Qwen3ForCausalLM(config)


def gemma3(**options):
    return transformers.Gemma3ForCausalLM(small(transformers.Gemma3TextConfig, layer_types=BOTH, **options))


def gemma2(**options):
    options = {"layer_types": BOTH, "attn_logit_softcapping": 2.0, **options}  # at which it moves many logits
    return transformers.Gemma2ForCausalLM(small(transformers.Gemma2Config, **options))


def gpt_oss(**options):
    config = small(transformers.GptOssConfig, num_local_experts=4, num_experts_per_tok=2, layer_types=BOTH, **options)
    return transformers.GptOssForCausalLM(config)


def modernbert(**options):
    sizes = {"local_attention": 8, "global_attn_every_n_layers": 2, "embedding_dropout": 0.0, **options}
    return transformers.ModernBertForMaskedLM(small(transformers.ModernBertConfig, **sizes))


DECODERS = [mistral, qwen3, gemma3]
every_mask = pytest.mark.parametrize("mask", MASKS)


@every_mask
@pytest.mark.parametrize("size", [1, 5, L - 1, L, 40])
@pytest.mark.parametrize("model", DECODERS)
def test_logits_are_the_models_own(model, size, mask):
    """With tokens hidden between others too: a window counts them."""
    made, ids = make(model, Dense(), sliding_window=size), tokens(3, L)
    expected = own_logits(made, ids, **masked(mask))
    close(logits(made, ids, **masked(mask))[MASKS[mask]], expected[MASKS[mask]])


@every_mask
@pytest.mark.parametrize("model", [*DECODERS, gemma2, gpt_oss])
def test_gradients_are_those_of_eager_attention(model, mask):
    """In float32, where eager attention rounds: 1e-7, after two layers with weights about 1."""
    made, ids, found = make(model, Dense(), sliding_window=5).float(), tokens(3, L), {}
    for name in ("combiner", "eager"):
        made.set_attn_implementation(name)
        made.zero_grad()
        out = made(ids, **masked(mask)).logits[MASKS[mask]]
        torch.nn.functional.cross_entropy(out, ids[MASKS[mask]]).backward()
        found[name] = out.detach(), [x.grad.clone() for x in made.parameters()]
    close(found["combiner"][0], found["eager"][0], FLOAT32)
    for actual, expected in zip(found["combiner"][1], found["eager"][1], strict=True):
        close(actual, expected, 1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("mask", ["none", "right"])
def test_windows_of_an_encoder(mask):
    made, ids = make(modernbert, Dense()), tokens(3, L)
    options = {} if mask == "none" else {"attention_mask": MASKS[mask].long()}
    report = combiner.transformers.swap(made)
    close(logits(made, ids, **options)[MASKS[mask]], own_logits(made, ids, **options)[MASKS[mask]])
    assert sorted(map(repr, report.taken.values())) == ["Dense()", "Window(size=5)"]  # 4 positions on each side


def eagerly(made, ids, **options):
    """The text that the model's eager attention generates with a cache. In float32, as eager attention computes its
    softmax: a mask of float64's least number is NaN there for padding."""
    twin = copy.deepcopy(made).float()
    twin.set_attn_implementation("eager")
    return twin.generate(ids, **options, max_new_tokens=9, do_sample=False)


@pytest.mark.parametrize("mask", ["none", "left", "holes"])
@pytest.mark.parametrize("model", DECODERS)
def test_generation_with_a_cache(model, mask):
    """Tokens, and the logits of several tokens at a time, from before the window is full."""
    made, ids = make(model, Dense(), sliding_window=5), tokens(3, L)
    options = {"attention_mask": MASKS[mask].long()}
    actual = made.generate(ids, **options, max_new_tokens=9, do_sample=False)
    assert torch.equal(actual, greedy(made, ids, 9, **options))
    assert torch.equal(actual, eagerly(made, ids, **options))
    beams = [made.generate(ids, **options, max_new_tokens=5, num_beams=2, use_cache=x) for x in (True, False)]
    assert torch.equal(*beams)
    cache, found = DynamicCache(config=made.config), []
    for a, b in ((0, 3), (3, 4), (4, 11), (11, 12), (12, L)):
        found.append(logits(made, ids[:, a:b], cache=cache))
    close(torch.cat(found, 1), logits(made, ids))


@pytest.mark.parametrize("mask", ["none", "left", "holes"])
@pytest.mark.parametrize("model", [gemma2, gpt_oss])
def test_generation_with_softcaps_and_sinks(model, mask):
    """In float32: experts have no float64."""
    made, ids = make(model, Dense(), sliding_window=5).float(), tokens(3, L)
    options = {"attention_mask": MASKS[mask].long()}
    actual = made.generate(ids, **options, max_new_tokens=9, do_sample=False)
    assert torch.equal(actual, greedy(made, ids, 9, **options))
    assert torch.equal(actual, eagerly(made, ids, **options))
    for pattern in (Fixed(4), Window(4)):  # Window(4) of the full layer is not the model's own attention
        combiner.transformers.register(pattern)
        actual = made.generate(ids, **options, max_new_tokens=9, do_sample=False)
        assert torch.equal(actual, greedy(made, ids, 9, **options))


@pytest.mark.parametrize("pattern", [Fixed(4), Fixed(4, window=6), HeavilyCompressed(4, 5)], ids=str)
@pytest.mark.parametrize("model", [gemma2, gpt_oss])
def test_cached_logits_with_softcaps_and_sinks(model, pattern):
    """Of one token after a past, and of several."""
    made, ids = make(model, pattern, sliding_window=5).float(), tokens(2, L)
    cache = DynamicCache(config=made.config)
    parts = itertools.pairwise((0, 9, 10, 16, L))
    found = [logits(made, ids[:, first:end], cache=cache) for first, end in parts]
    close(torch.cat(found, 1), logits(made, ids, use_cache=False), FLOAT32)


def test_a_cache_without_layer_types_serves_windows():
    """It keeps the keys of all positions; the mask leaves out those beyond the window."""
    made, ids, cache = make(mistral, Dense(), sliding_window=5), tokens(2, L), DynamicCache()
    found = [logits(made, ids[:, a:b], cache=cache) for a, b in ((0, 11), (11, 12), (12, L))]
    close(torch.cat(found, 1), logits(made, ids))


def test_packed_sequences_are_alone():
    made, ids = make(gemma3, Fixed(4), sliding_window=5), tokens(1, L)
    options = {"position_ids": (torch.arange(L) % 12)[None], "use_cache": False}
    packed = logits(made, ids, **options)
    for part, found in zip(ids.split(12, 1), packed.split(12, 1), strict=True):
        assert torch.equal(logits(made, part), found)
    assert torch.equal(logits(made, ids, cu_seq_lens_q=torch.tensor([0, 12, L]), **options), packed)


def test_the_pattern_is_that_of_the_other_layers():
    made, ids = make(gemma3, sliding_window=5), tokens(1, L)
    report = combiner.transformers.swap(made, Fixed(4))
    changed = logits(made, ids)
    assert report.taken == {"model.layers.0.self_attn": Window(5), "model.layers.1.self_attn": Fixed(4)}
    assert not report.left and not torch.allclose(changed, own_logits(made, ids))
    report = combiner.transformers.swap(made, lambda module: None if module.layer_idx == 0 else Dense())
    close(logits(made, ids), own_logits(made, ids))
    assert list(report.left) == ["model.layers.0.self_attn"]


def test_direct_calls():
    """Without a mask the layer says its window; after a past there must be a mask."""
    combiner.transformers.register()
    attend, (q, k, v) = AttentionInterface()["combiner"], torch.randn(3, 1, 2, L, 8, dtype=torch.float64)
    for is_causal in (True, False):
        out = attend(torch.nn.Module(), q, k, v, None, sliding_window=8, is_causal=is_causal)[0]
        expected = combiner.attention(*(x.numpy() for x in (q, k, v)), Window(8), is_causal=is_causal)
        assert torch.equal(out.transpose(1, 2), torch.from_numpy(expected))
    with pytest.raises(NotImplementedError, match="with a window and no mask, got a window of 8 positions"):
        attend(torch.nn.Module(), q[..., -1:, :], k, v, None, sliding_window=8)


def test_example():
    said = run_file("examples/sliding_window_model.py", "--length=300", "--rounds=1")
    for line in ("4 layers took the pattern", "largest difference", "sdpa", "combiner"):
        assert line in said
