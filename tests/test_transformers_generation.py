# SPDX-License-Identifier: Apache-2.0
"""Generation with a cache."""

import warnings

import pytest

from combiner import Axial, Dense, Fixed, HeavilyCompressed, LogSparse, Tree

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():  # of its own dependencies
    warnings.simplefilter("ignore")
    from transformers import DynamicCache

    import combiner.transformers
from transformers_problems import MASKS, L, close, gpt2, greedy, llama, logits, make, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert layer.past._decoder.length == L
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
    rows = rows.repeat_interleave(2)
    text = torch.cat([ids[rows], tokens(len(rows), 3)], 1)  # copies go on with tokens of their own
    close(logits(made, text[:, L:], cache=cache), logits(made, text)[:, L:])


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


@pytest.mark.parametrize("pattern", (Fixed(4), HeavilyCompressed(4, 6), Tree(3)), ids=repr)
def test_generation_with_selection_is_the_argmax_of_the_whole_text(pattern):
    made, ids, mask = make(llama, pattern), tokens(3, L), MASKS["left"].long()
    plain = logits(made, ids)
    combiner.transformers.register(pattern, select=2)
    assert not torch.allclose(logits(made, ids), plain)
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        given = {"attention_mask": mask, "max_new_tokens": 10, **options}
        assert torch.equal(made.generate(ids, **given), made.generate(ids, use_cache=False, **given))
    actual = made.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(actual, greedy(made, ids, 10, attention_mask=mask))
