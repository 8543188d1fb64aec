# SPDX-License-Identifier: Apache-2.0
"""A decoder that selects has the bits of `select` and `Selected` of the whole sequence, for blocks of one query."""

import copy
import itertools

import numpy as np
import pytest
from test_decode_continues import biases, draw, draw_terms, make, step_by, tokens

import combiner
from combiner import (
    Axial,
    Decoder,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Selected,
    Tree,
    Window,
    _core,
    reference,
)

PATTERNS = (
    Fixed(1),
    Fixed(7),
    Fixed(16, pooling="mean", size_bias=True),
    Fixed(100),
    Fixed(7, window=3),
    Fixed(16, window=20, pooling="sum"),
    HeavilyCompressed(16, 7, pooling="mean"),
    HeavilyCompressed(7, 100),
    HeavilyCompressed(100, 130, size_bias=True),
    LogSparse(pooling="mean"),
    LogSparse(hierarchical=True, size_bias=True),
    Tree(3, size_bias=True),
    Tree(4, 2),
    Tree(80),
)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
some_patterns = pytest.mark.parametrize(
    "pattern", (Fixed(16), HeavilyCompressed(7, 20), LogSparse(), Tree(3)), ids=repr
)
every_terms = pytest.mark.parametrize("terms", ("", "softcap head_bias sink"))


def attention(inputs, pattern, k, scale=None, **options):
    """Of the whole sequence, each query with its k regions opened."""
    regions = combiner.select(*inputs[:2], pattern, k, block=1, is_causal=True, scale=scale)
    return combiner.attention(*inputs, Selected(pattern, regions, block=1), is_causal=True, scale=scale, **options)


# ---- bits


@every_pattern
@every_terms
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_bits_however_tokens_come(pattern, terms, dtype, rng):
    L = 300
    inputs = draw(rng, L, dtype)
    given = draw_terms(rng, inputs, terms)
    for k in (1, 3, 30):
        expected = attention(inputs, pattern, k, 0.3, **given)
        for cuts in (range(L + 1), [0, *range(3, L, 7), L], [0, 1, 65, L], [0, 200, *range(201, L + 1)], [0, L]):
            out = step_by(make(pattern, given, scale=0.3, select=k), inputs, list(cuts), given)
            assert np.array_equal(out, expected), (k, list(cuts)[:9])


@some_patterns
@every_terms
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_bits_in_16_bit_dtypes(pattern, terms, dtype, rng):
    """Results are float32 between a query's two tiles."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    inputs = draw(rng, 300, dtype, D=7)
    given = draw_terms(rng, inputs, terms)
    expected = attention(inputs, pattern, 3, **given).view(np.uint16)
    for cuts in (range(301), [0, 130, 300]):
        out = step_by(make(pattern, given, select=3), inputs, list(cuts), given)
        assert np.array_equal(out.view(np.uint16), expected)


@some_patterns
def test_bits_for_any_threads_and_instruction_set(pattern, rng):
    inputs = draw(rng, 1000, B=2, D=32, Dv=32)
    before = _core.get_isa()
    try:
        for isa in _core.isas():
            _core.set_isa(isa)
            expected = attention(inputs, pattern, 4)
            for threads in (1, 3):
                with combiner.num_threads(threads):
                    out = step_by(Decoder(pattern, select=4), inputs, [0, 600, 601, 617, 1000])
                    assert np.array_equal(out, expected), (isa, threads)
    finally:
        _core.set_isa(before)


@some_patterns
@every_terms
@pytest.mark.parametrize("group", (1, 3, 8, 16, 70))
def test_query_heads_that_share_a_key_head_share_a_choice(pattern, terms, group, rng):
    """The largest logit of the group chooses, whether its heads are lanes of one tile or not."""
    inputs = draw(rng, 150, B=2, Hq=2 * group, Hk=2, D=4, Dv=3)
    given = draw_terms(rng, inputs, terms)
    inputs[2][0, 0, 77, 1] = np.nan
    expected = attention(inputs, pattern, 2, **given)
    for threads in (1, 3):
        with combiner.num_threads(threads):
            out = step_by(make(pattern, given, select=2), inputs, [0, 90, *range(91, 151)], given)
            assert np.array_equal(out, expected, equal_nan=True)


def test_threads_that_join_a_step(rng):
    """A step that opens so many rows wakes them."""
    inputs = draw(rng, 3100, Hq=8, Hk=1, D=80, Dv=80)
    expected = attention(inputs, Fixed(1024), 2)[..., 3090:, :]
    decoder = Decoder(Fixed(1024), select=2)
    decoder.prefill(*tokens(inputs, 0, 3090))
    for threads in (1, 2, 5):
        with combiner.num_threads(threads):
            assert np.array_equal(step_by(copy.deepcopy(decoder), inputs, list(range(3090, 3101))), expected), threads


@every_pattern
def test_nan_reaches_the_rows_that_it_reaches_in_attention(pattern, rng):
    inputs = draw(rng, 300)
    inputs[1][..., 130, 3] = np.nan
    inputs[2][..., 77, 1] = np.inf
    inputs[0][..., 201, 2] = np.nan
    expected = attention(inputs, pattern, 2)
    for cuts in (range(301), [0, 131, 133, 190, 300]):
        out = step_by(Decoder(pattern, select=2), inputs, list(cuts))
        assert np.array_equal(out, expected, equal_nan=True)


# ---- beside the definition


@every_pattern
def test_beside_the_reference(pattern, rng):
    """Float64 against the definition: another order of the same sums."""
    inputs = draw(rng, 90, np.float64)
    regions = reference.select(*inputs[:2], pattern, 3, block=1, is_causal=True)
    expected = reference.attention(*inputs, Selected(pattern, regions, block=1), is_causal=True)
    out = step_by(Decoder(pattern, select=3), inputs, [0, 20, 21, 22, 60, 90])
    assert np.abs(out - expected).max() < 1e-10 * max(1, np.abs(expected).max())


def test_ties_go_to_the_first_region():
    """Equal keys: every region scores the same, and the first ones are opened, whose values are ones."""
    L, span = 64, 4
    inputs = [np.ones((L, 2)), np.ones((L, 2)), np.zeros((L, 1))]
    inputs[2][: 2 * span] = 1
    out = step_by(Decoder(Fixed(span, size_bias=False), select=2), inputs, [0, 63, 64])
    assert out[-1, 0] == pytest.approx(2 * span / (2 * span + 13 + span))  # their positions, 13 summaries, own span
    assert np.array_equal(out, attention(inputs, Fixed(span), 2))


def test_opening_nothing_is_the_pattern_and_everything_is_dense(rng):
    inputs = draw(rng, 200, np.float64)
    for pattern in PATTERNS:
        none = step_by(Decoder(pattern, select=0), inputs, [0, 50, 51, 200])
        assert np.array_equal(none, combiner.attention(*inputs, pattern, is_causal=True))
        if not pattern.plan(200, True).is_full:
            continue
        every = step_by(Decoder(pattern, select=1000), inputs, [0, 50, 51, 200])
        np.testing.assert_allclose(every, combiner.attention(*inputs, Dense(), is_causal=True), rtol=0, atol=1e-12)


# ---- sequences


@every_pattern
@every_terms
def test_rollback_forgets_a_draft(pattern, terms, rng):
    L, longest = 300, 40
    inputs = draw(rng, L)
    draft = [np.concatenate([x, x[..., :longest, :]], axis=-2) for x in draw(rng, L)]
    given, wrongly = draw_terms(rng, inputs, terms), draw_terms(rng, draft, terms)
    expected = attention(inputs, pattern, 2, **given)
    decoder, at = make(pattern, given, rollback=longest, select=2), 0
    while at < L:
        accepted = min(int(rng.integers(1, 30)), L - at)
        out = decoder.step(*tokens(inputs, at, at + accepted), **biases(given, at, at + accepted))
        assert np.array_equal(out, expected[..., at : at + accepted, :])
        at += accepted
        wrong = int(rng.integers(1, longest + 1))
        decoder.step(*tokens(draft, at, at + wrong), **biases(wrongly, at, at + wrong))
        decoder.rollback(wrong)


@every_pattern
def test_ragged_batches(pattern, rng):
    """Each sequence has the bits that it has alone; what is ignored may hold anything, and gives 0."""
    B, calls, longest = 3, 12, 70
    taken = rng.integers(0, longest + 1, (calls, B))
    ends = np.concatenate([np.zeros((1, B), int), np.cumsum(taken, axis=0)])
    inputs = draw(rng, int(ends.max()), B=B)
    alone = [attention([x[b, :, : ends[-1, b]] for x in inputs], pattern, 3) for b in range(B)]
    decoder = Decoder(pattern, select=3)
    for call in range(calls):
        given = [np.full((B, x.shape[1], longest, x.shape[3]), np.nan, x.dtype) for x in inputs]
        for b, n in enumerate(taken[call]):
            for x, to in zip(inputs, given, strict=True):
                to[b, :, :n] = x[b, :, ends[call, b] : ends[call + 1, b]]
        out = decoder.step(*given, lengths=taken[call])
        for b, n in enumerate(taken[call]):
            assert np.array_equal(out[b, :, :n], alone[b][:, ends[call, b] : ends[call + 1, b]])
            assert (out[b, :, n:] == 0).all()


@some_patterns
def test_a_copy_goes_its_own_way(pattern, rng):
    inputs, others = draw(rng, 200), draw(rng, 200)
    decoder = Decoder(pattern, select=2, layout="BLHD")
    turned, elsewhere = ([np.ascontiguousarray(x.swapaxes(1, 2)) for x in each] for each in (inputs, others))
    decoder.step(*(x[:, :100] for x in turned))
    twin = copy.deepcopy(decoder)
    decoder.step(*(x[:, 100:150] for x in elsewhere))
    del decoder
    out = [twin.step(*(x[:, a:b] for x in turned)) for a, b in itertools.pairwise((100, 101, 170, 200))]
    assert np.array_equal(np.concatenate(out, axis=1).swapaxes(1, 2), attention(inputs, pattern, 2)[..., 100:, :])


def test_some_of_the_sequences_are_taken(rng):
    inputs = draw(rng, 120, B=3)
    expected = attention(inputs, Fixed(7), 2)
    decoder = Decoder(Fixed(7), select=2)
    decoder.step(*tokens(inputs, 0, 90))
    chosen = [2, 0, 2]
    out = step_by(decoder.take(chosen), [x[chosen] for x in inputs], [90, 91, 120])
    assert np.array_equal(out, expected[chosen][..., 90:, :])


def test_keys_and_values_are_kept_and_queries_are_not(rng):
    """16 query heads on one key head: a table of queries as long as that of keys would be 8 times as large."""
    L, features, heads = 4000, 4, 16
    inputs = draw(rng, L, np.float64, Hq=heads, Hk=1, D=features, Dv=features)
    for pattern in (Fixed(64), HeavilyCompressed(64, 32), Tree(8)):
        decoder = Decoder(pattern, select=2)
        step_by(decoder, inputs, [0, *range(3, L, 7), L])
        kept, regions = L * 2 * features * 8, L // 60 * heads * (3 * features * 8 + 4)
        assert kept <= decoder.nbytes <= 1.5 * (kept + regions) + heads * features * 8 * 200


# ---- what is refused


@pytest.mark.parametrize(
    "pattern", (Dense(), Window(4), Axial(4), Fixed(4).sparse(), HeavilyCompressed(4, 4).sparse()), ids=repr
)
def test_patterns_without_shared_regions_are_refused(pattern):
    with pytest.raises(ValueError, match=r"pattern must have regions that queries share \(Fixed, HeavilyCompressed, "):
        Decoder(pattern, select=1)


@pytest.mark.parametrize(
    "select, error, message",
    [
        (-1, ValueError, "select must be at least 0, got -1"),
        (1.5, TypeError, "select must be an integer, got float"),
        (True, TypeError, "select must be an integer, got bool"),
        (2**31, ValueError, "select must"),
    ],
)
def test_numbers_refused(select, error, message):
    with pytest.raises((error, OverflowError), match=message):
        Decoder(Fixed(4), select=select)
