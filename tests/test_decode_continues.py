# SPDX-License-Identifier: Apache-2.0
"""A decoder has the bits of attention of the whole sequence, however its tokens are divided between calls; drafts are
forgotten; sequences have lengths of their own; a call that fails changes nothing."""

import copy
import gc
import itertools
import os
import pickle
import re
import signal
import threading
import time

import numpy as np
import pytest
from cases import draw_cancelling, each_isa
from fresh import fresh_process

import combiner
from combiner import Axial, AxialMixture, Decoder, Dense, Fixed, HeavilyCompressed, LogSparse, Tree, Window, _core
from combiner.patterns import Sparse

PATTERNS = (
    Dense(),
    Fixed(1),
    Fixed(7),
    Fixed(16, pooling="mean"),
    Fixed(100, size_bias=True),
    Fixed(7, window=3),
    Fixed(16, window=20, pooling="sum"),
    Fixed(100, window=30),
    Fixed(16).sparse(),
    Fixed(16, window=20).sparse(),
    LogSparse(pooling="mean"),
    LogSparse(hierarchical=True, size_bias=True),
    LogSparse().sparse(),
    Tree(2, pooling="mean"),
    Tree(3),
    Tree(4, 2),
    Tree(9, 1),
    Tree(80),
    Tree(5).sparse(),
    Window(1),
    Window(7),
    Window(100),
    Window(1500),
    HeavilyCompressed(16, 7, pooling="mean"),
    HeavilyCompressed(7, 100),
    HeavilyCompressed(100, 130, size_bias=True),
    HeavilyCompressed(16, 9).sparse(),
    Axial(1),
    Axial(16, pooling="mean"),
    Axial(100, size_bias=True),
    Axial(1, "horizontal", pooling="mean"),
    Axial(7, "horizontal", pooling="sum"),
    Axial(100, "horizontal", size_bias=True),
    Axial(1, "rowmajor"),
    Axial(16, "rowmajor", size_bias=True),
    Axial(100, "rowmajor"),
    Axial(170, "rowmajor"),
    Axial(16, "rowmajor", "weighted"),
    Axial(100, "rowmajor", "weighted", size_bias=True),
    Axial(16).sparse(),
    AxialMixture(100).sparse(),
)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)


def draw(rng, length, dtype=np.float32, B=1, Hq=4, Hk=2, D=8, Dv=5):
    """query, key and value."""
    sizes = (Hq, D), (Hk, D), (Hk, Dv)
    return [rng.standard_normal((B, heads, length, features)).astype(dtype) for heads, features in sizes]


def tokens(inputs, first, end):
    return [x[..., first:end, :] for x in inputs]


def draw_terms(rng, inputs, names):
    """The terms of a logit that are named: "softcap", "key_bias", "head_bias" (one for each query head), "sink"."""
    B, Hq, L, _ = inputs[0].shape
    wide = np.float64 if inputs[0].dtype == np.float64 else np.float32
    terms = {}
    if "softcap" in names:
        terms["softcap"] = 1.5
    if "bias" in names:
        terms["key_bias"] = rng.standard_normal((B, Hq if "head_bias" in names else inputs[1].shape[1], L)).astype(wide)
    if "sink" in names:
        terms["sink"] = rng.standard_normal((B, Hq)).astype(wide)
    return terms


every_terms = pytest.mark.parametrize("terms", ("", "key_bias", "sink", "softcap head_bias sink"))


def make(pattern, terms, **options):
    """A decoder with the terms, but for biases, which come with the tokens."""
    return Decoder(pattern, **options, **{name: x for name, x in terms.items() if name != "key_bias"})


def biases(terms, first, end):
    """The biases of the tokens [first, end), as `step` takes them."""
    return {"key_bias": terms["key_bias"][..., first:end]} if "key_bias" in terms else {}


def step_by(decoder, inputs, cuts, terms=()):
    steps = [decoder.step(*tokens(inputs, a, b), **biases(terms, a, b)) for a, b in itertools.pairwise(cuts)]
    return np.concatenate(steps, axis=-2)


def attention(inputs, pattern, **options):
    return combiner.attention(*inputs, pattern, is_causal=True, **options)


# ---- bits


@every_pattern
@every_terms
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_bits_of_attention_however_tokens_come(pattern, dtype, terms, rng):
    """One by one, in sevens, after a prefill of any kind: queries share tiles with others, or have one alone."""
    L = 700
    inputs = draw(rng, L, dtype)
    given = draw_terms(rng, inputs, terms)
    expected = attention(inputs, pattern, scale=0.3, **given)
    random_cuts = [0, *np.unique(rng.integers(1, L, 12)).tolist(), L]
    for cuts in (range(L + 1), [0, *range(3, L, 7), L], [0, 1, 65, 64 * 5, L], [0, 300, *range(301, L + 1)],
                 random_cuts, [0, L]):  # fmt: skip
        out = step_by(make(pattern, given, scale=0.3), inputs, list(cuts), given)
        assert np.array_equal(out, expected), list(cuts)[:9]


@pytest.mark.parametrize(
    "pattern",
    (Fixed(16, window=20), LogSparse(), Tree(3), Window(100), Dense(), Axial(16), Axial(16, "horizontal"),
     Axial(16, "rowmajor"), Axial(100, "rowmajor", "weighted"), Axial(16).sparse()),
    ids=repr,
)  # fmt: skip
@every_terms
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_bits_of_attention_in_16_bit_dtypes(pattern, dtype, terms, rng):
    """Regions and biases are kept in float32, as attention keeps them."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    inputs = draw(rng, 300, dtype, D=7)
    given = draw_terms(rng, inputs, terms)
    expected = attention(inputs, pattern, **given).view(np.uint16)
    for cuts in (range(301), [0, 130, 300]):
        assert np.array_equal(step_by(make(pattern, given), inputs, list(cuts), given).view(np.uint16), expected)


@pytest.mark.parametrize(
    "pattern",
    (Fixed(16), Fixed(16, window=20), LogSparse(), LogSparse(hierarchical=True), Tree(4), Window(7), Window(100),
     Dense(), Axial(16), Axial(16, "rowmajor")),
    ids=repr,
)  # fmt: skip
def test_bits_of_pairs(pattern, rng):
    """Products of bfloat16 pairs add words in groups: a row has the same place in them in every step."""
    inputs = draw_cancelling(rng, 1, 2, 300, 8)
    for isa in each_isa(pairing=True):
        expected = attention(inputs, pattern)
        for cuts in (range(301), [0, 130, 300]):
            out = step_by(make(pattern, {}), inputs, list(cuts), {})
            assert out.tobytes() == expected.tobytes(), (isa, list(cuts)[:9])


@pytest.mark.parametrize(
    "pattern",
    (Fixed(32), LogSparse(hierarchical=True), Tree(16), Dense(), Window(70), Axial(32), Axial(32, "horizontal"),
     Axial(100, "rowmajor"), Axial(32, "rowmajor", "weighted")),
    ids=repr,
)  # fmt: skip
@every_terms
def test_bits_for_any_threads_and_instruction_set(pattern, terms, rng):
    """Long steps go wave by wave, short ones head by head. `base` has no fused multiply-add: it has bits of its own."""
    inputs = draw(rng, 1200, B=2, D=32, Dv=32)
    given = draw_terms(rng, inputs, terms)
    cuts = [0, 600, 601, 617, 900, 1200]
    before = _core.get_isa()
    try:
        for isa in _core.isas():
            _core.set_isa(isa)
            expected = attention(inputs, pattern, **given)
            for threads in (1, 2, 3):
                with combiner.num_threads(threads):
                    out = step_by(make(pattern, given), inputs, cuts, given)
                    assert np.array_equal(out, expected), (isa, threads)
    finally:
        _core.set_isa(before)


@pytest.mark.parametrize(
    "pattern",
    (Dense(), Window(70), Fixed(16).sparse(), Fixed(16), Fixed(16, window=20, pooling="mean", size_bias=True),
     LogSparse(), LogSparse(hierarchical=True, pooling="sum"), Tree(3), HeavilyCompressed(7, 20), Axial(16),
     Axial(7, "horizontal", pooling="mean"), Axial(16, "rowmajor", size_bias=True), Axial(16, "rowmajor", "weighted"),
     Axial(16).sparse()),
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("group", (1, 3, 8, 16, 64, 70))
@every_terms
def test_query_heads_that_share_a_key_head(pattern, group, terms, rng):
    """In a step of one token they are lanes of one tile: up to 64 of them, or, where each summarizes regions, up to 16;
    not where each has biases of its own. Each has a sink of its own."""
    inputs = draw(rng, 150, B=2, Hq=2 * group, Hk=2, D=4, Dv=3)
    given = draw_terms(rng, inputs, terms)
    layout = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in inputs]
    inputs[2][0, 0, 77, 1] = layout[2][0, 77, 0, 1] = np.nan
    expected = attention(inputs, pattern, **given)
    assert np.array_equal(
        step_by(make(pattern, given), inputs, [0, 90, *range(91, 151)], given), expected, equal_nan=True
    )
    decoder = make(pattern, given, layout="BLHD")
    cuts = (0, 90), *itertools.pairwise(range(90, 151))
    out = [decoder.step(*(x[:, a:b] for x in layout), **biases(given, a, b)) for a, b in cuts]
    assert np.array_equal(np.concatenate(out, axis=1).swapaxes(1, 2), expected, equal_nan=True)


@pytest.mark.parametrize("pattern", (Dense(), Window(8000), Fixed(2).sparse(), Fixed(2)), ids=repr)
@pytest.mark.parametrize("Hq", (8, 6))
def test_fewer_key_heads_than_threads(pattern, Hq, rng):
    """A step over so many rows wakes threads; the heads of a tile's lanes are one item of work, not one for each, and
    so few of them that no thread is idle."""
    inputs = draw(rng, 8200, Hq=Hq, Hk=1, D=16, Dv=16)
    expected = attention(inputs, pattern)
    for threads in (1, 2, 5):
        with combiner.num_threads(threads):
            out = step_by(Decoder(pattern), inputs, [0, *range(8190, 8201)])
            assert np.array_equal(out, expected), threads


@every_pattern
def test_nan_reaches_the_rows_that_it_reaches_in_attention(pattern, rng):
    """Rows that are gone have a stand-in under an empty mask: its values reach no query."""
    inputs = draw(rng, 300)
    inputs[1][..., 130, 3] = np.nan
    inputs[2][..., 77, 1] = np.inf
    expected = attention(inputs, pattern)
    for cuts in (range(301), [0, 131, 133, 190, 300]):
        assert np.array_equal(step_by(Decoder(pattern), inputs, list(cuts)), expected, equal_nan=True)


@every_pattern
@pytest.mark.parametrize("poison", (np.nan, np.inf))
def test_a_poisoned_bias_reaches_the_rows_that_it_reaches_in_attention(pattern, poison, rng):
    """And no others: these keep their bits, though a row with the bias stands in for one that is gone."""
    inputs = draw(rng, 300)
    given = draw_terms(rng, inputs, "key_bias sink")
    clean = attention(inputs, pattern, **given)
    given["key_bias"][..., 77] = given["key_bias"][..., 130] = poison
    expected = attention(inputs, pattern, **given)
    reached = ~np.isfinite(expected).all(axis=-1)
    assert reached.any() and not reached[..., :77].any()
    assert np.array_equal(expected[..., :77, :], clean[..., :77, :])
    for cuts in (range(301), [0, 131, 133, 190, 300]):
        out = step_by(make(pattern, given), inputs, list(cuts), given)
        assert np.array_equal(out, expected, equal_nan=True)


def test_biases_and_sinks_are_those_of_attention_in_every_shape(rng):
    """Broadcast along batch entries and heads, of strided memory, and without heads."""
    inputs = draw(rng, 60, B=3)
    wide = rng.standard_normal((60, 3, 2)).astype(np.float32).transpose(1, 2, 0)
    for bias, sink in (
        (wide, np.float32(0.5) * np.ones(4, np.float32)),
        (wide[..., ::-1], rng.standard_normal((1, 4)).astype(np.float32)),
        (wide[0, :1], rng.standard_normal((8, 3)).astype(np.float32)[::2].T),
        (wide[1, 1], None),
    ):
        expected = attention(inputs, Fixed(16), key_bias=bias, sink=sink)
        decoder = Decoder(Fixed(16), sink=sink)
        if sink is not None:
            sink += 1  # it was copied
        assert np.array_equal(step_by(decoder, inputs, [0, 30, 31, 60], {"key_bias": bias}), expected)
    alone = [x[0, 0] for x in inputs]
    given = {"key_bias": wide[0, 0], "sink": np.array(0.3, np.float32)}
    out = step_by(make(Fixed(16), given), alone, [0, 30, 31, 60], given)
    assert np.array_equal(out, attention(alone, Fixed(16), **given))


def test_biases_and_sinks_refused(rng):
    """After an error the decoder goes on as if the call had not been."""
    inputs, bias = draw(rng, 6), rng.standard_normal((1, 2, 6)).astype(np.float32)
    for sink, error, message in (
        ([1.0], TypeError, "sink must be a float32, float64, bfloat16 or float16 NumPy array, got list"),
        (np.ones(4), TypeError, "sink must be float32"),
        (np.ones(3, np.float32), ValueError, "sink must have shape"),
    ):
        with pytest.raises(error, match=message):
            Decoder(Fixed(4), sink=sink).step(*inputs)
    for before, now, error, message in (
        (True, None, ValueError, "key_bias must be given like for the tokens before, got None"),
        (False, bias, ValueError, "key_bias must be None like for the tokens before, got an array"),
        (True, bias[..., :5], ValueError, "key_bias must have shape"),
        (True, np.repeat(bias, 2, axis=1), ValueError, r"key_bias must have shape \(1, 2, 6\), got \(1, 4, 6\)"),
        (True, bias.astype(np.float64), TypeError, "key_bias must be float32"),
        (None, bias.astype(np.float64), TypeError, "key_bias must be float32"),
        (None, bias[..., :5], ValueError, "key_bias must have shape"),
        (None, [1.0], TypeError, "key_bias must be a NumPy array, got list"),
    ):
        decoder = Decoder(Fixed(4))
        first = {"key_bias": bias} if before else {}
        if before is not None:
            decoder.step(*inputs, **first)
        with pytest.raises(error, match=message):
            decoder.step(*inputs, key_bias=now)
        assert decoder.length == 6 * (before is not None)
        twice = [np.concatenate([x, x], axis=-2) for x in inputs] if before is not None else inputs
        given = {"key_bias": np.concatenate([bias, bias], axis=-1)} if before else {}
        out = decoder.step(*inputs, **first)
        assert np.array_equal(out, attention(twice, Fixed(4), **given)[..., -6:, :])


@pytest.mark.parametrize("name", ("region_bias", "region_key", "region_query"))
def test_arrays_of_regions_have_no_meaning_while_a_sequence_grows(name, rng):
    """Their number is not known: a decoder pools them."""
    inputs, given = draw(rng, 6), {name: np.ones((4, 2), np.float32)}
    with pytest.raises(TypeError, match=rf"Decoder\(\) has no '{name}': a decoder pools those of its tokens"):
        Decoder(Fixed(4), **given)
    with pytest.raises(TypeError, match=rf"Decoder.step\(\) has no '{name}': a decoder pools those of its tokens"):
        Decoder(Fixed(4)).step(*inputs, **given)


@pytest.mark.parametrize("pattern", (Fixed(16, window=20), LogSparse(), Window(100), Dense(), Axial(16)), ids=repr)
def test_softcap(pattern, rng):
    inputs = draw(rng, 300)
    expected = attention(inputs, pattern, scale=2.0, softcap=1.5)
    for cuts in (range(301), [0, 130, 300]):
        assert np.array_equal(step_by(Decoder(pattern, scale=2.0, softcap=1.5), inputs, list(cuts)), expected)
    for softcap, error in ((0, ValueError), (np.inf, ValueError), ("a", TypeError)):
        with pytest.raises(error, match="softcap must be"):
            Decoder(pattern, softcap=softcap)


# ---- rollback


@every_pattern
@every_terms
def test_rollback_forgets_a_draft(pattern, terms, rng):
    """Drafts of other tokens, of which some are accepted, leave no trace in the bits that follow."""
    L, most = 400, 40
    inputs = draw(rng, L)
    draft = [np.concatenate([x, x[..., :most, :]], axis=-2) for x in draw(rng, L)]
    given, wrongly = draw_terms(rng, inputs, terms), draw_terms(rng, draft, terms)
    expected = attention(inputs, pattern, **given)
    decoder, at = make(pattern, given, rollback=most), 0
    while at < L:
        accepted = min(int(rng.integers(1, 30)), L - at)
        out = decoder.step(*tokens(inputs, at, at + accepted), **biases(given, at, at + accepted))
        assert np.array_equal(out, expected[..., at : at + accepted, :])
        at += accepted
        wrong = int(rng.integers(1, most + 1))
        for n in (wrong // 2, wrong - wrong // 2):
            decoder.step(*tokens(draft, at, at + n), **biases(wrongly, at, at + n))
        decoder.rollback(wrong)
        assert decoder.length == at


def test_rollback_is_bounded(rng):
    """By the constructor's number before the longest length, and by the sequence."""
    inputs = draw(rng, 60)
    decoder = Decoder(Fixed(7), rollback=10)
    decoder.rollback(0)
    with pytest.raises(ValueError, match="n must be 0 where the constructor's rollback is 0 or there are no tokens"):
        decoder.rollback(1)
    decoder.step(*tokens(inputs, 0, 3))
    with pytest.raises(ValueError, match="n must be between 0 and 3, got 4"):
        decoder.rollback(4)
    decoder.step(*tokens(inputs, 3, 50))
    for n, message in ((11, "0 and 10, got 11"), (-1, "0 and 10, got -1")):
        with pytest.raises(ValueError, match=f"n must be between {message}"):
            decoder.rollback(n)
    with pytest.raises(TypeError, match="n must"):
        decoder.rollback(1.5)
    decoder.rollback(6)
    with pytest.raises(ValueError, match="n must be between 0 and 4, got 5"):
        decoder.rollback(5)
    decoder.rollback(4)
    out = decoder.step(*tokens(inputs, 40, 60))
    assert np.array_equal(out, attention(inputs, Fixed(7))[..., 40:, :])
    for wrong in (-1, 1.5, "a"):
        with pytest.raises((TypeError, ValueError), match="rollback must"):
            Decoder(Fixed(7), rollback=wrong)


def test_rollback_costs_as_many_positions(rng):
    inputs = [x.astype(np.float64) for x in draw(rng, 3000, Hq=1, Hk=1, D=2, Dv=2)]
    sizes = []
    for rollback in (0, 100):
        decoder = Decoder(Window(20), rollback=rollback)
        step_by(decoder, inputs, list(range(0, 3001, 3)))
        sizes.append(decoder.nbytes)
    assert sizes[0] <= 4 * 8 * 1.5 * (20 + 16 + 3) and sizes[1] <= 4 * 8 * 1.5 * (120 + 16 + 3)


# ---- sequences with lengths of their own


@every_pattern
@every_terms
def test_ragged_batches(pattern, terms, rng):
    """Each sequence has the bits that it has alone; what is ignored may hold anything, and gives 0."""
    B, calls, most = 3, 25, 20
    taken = rng.integers(0, most + 1, (calls, B))
    taken[3] = 0
    taken[4, 1] = 0
    ends = np.concatenate([np.zeros((1, B), int), np.cumsum(taken, axis=0)])
    inputs = draw(rng, int(ends.max()), B=B)
    options = draw_terms(rng, inputs, terms)
    decoder = make(pattern, options, rollback=3)
    bias = options.pop("key_bias", None)
    arrays = inputs if bias is None else [*inputs, bias[..., None]]
    for call in range(calls):
        given = [np.full((B, x.shape[1], most, x.shape[3]), np.nan, x.dtype) for x in arrays]
        for b, n in enumerate(taken[call]):
            for x, to in zip(arrays, given, strict=True):
                to[b, :, :n] = x[b, :, ends[call, b] : ends[call, b] + n]
        out = decoder.step(*given[:3], lengths=taken[call], key_bias=None if bias is None else given[3][..., 0])
        assert np.array_equal(decoder.lengths, ends[call + 1]) and decoder.length == ends[call + 1].max()
        for b, n in enumerate(taken[call]):
            alone = [x[b, :, : ends[call + 1, b]] for x in arrays]
            own = {name: x if name == "softcap" else x[b] for name, x in options.items()}
            if bias is not None:
                own["key_bias"] = alone[3][..., 0]
            assert np.array_equal(out[b, :, :n], attention(alone[:3], pattern, **own)[:, ends[call, b] :])
            assert (out[b, :, n:] == 0).all()
        back = np.minimum(taken[call], rng.integers(0, 4, B))
        decoder.rollback(back)
        ends[call + 1 :] -= back


def test_lengths_refused(rng):
    inputs = draw(rng, 5, B=2)
    for pattern in (Fixed(4), Axial(4)):
        decoder = Decoder(pattern)
        decoder.step(*inputs)
        for lengths, error, message in (
            ([1], ValueError, r"lengths must have shape \(2,\), got \(1,\)"),
            ([1, 6], ValueError, r"lengths must be between 0 and 5, got \[1 6\]"),
            ([-1, 5], ValueError, "lengths must be between 0 and 5"),
            ([1.5, 2.0], TypeError, "lengths must"),
        ):
            with pytest.raises(error, match=message):
                decoder.step(*inputs, lengths=lengths)
        assert decoder.length == 5


@pytest.mark.parametrize("pattern", [Fixed(4), Axial(4)], ids=str)
def test_a_first_call_that_fails_decides_nothing(pattern, rng):
    """Its dtype and shapes were those of the sequence from then on, which had no tokens."""
    decoder = Decoder(pattern)
    with pytest.raises(ValueError, match="lengths must"):
        decoder.step(*draw(rng, 5, B=2), lengths=[1, 9])
    inputs = draw(rng, 7, dtype=np.float32, B=3)
    assert decoder.step(*inputs).dtype == np.float32 and decoder.length == 7


def test_lengths_of_numpy_beside_another_library(rng):
    """What `lengths` returns may be given back."""
    torch = pytest.importorskip("torch")
    inputs = draw(rng, 5, B=2)
    decoder = Decoder(Fixed(4))
    out = decoder.step(*map(torch.from_numpy, inputs), lengths=np.array([3, 5]))
    assert decoder.lengths.tolist() == [3, 5]
    assert np.array_equal(out.numpy(), Decoder(Fixed(4)).step(*inputs, lengths=[3, 5]))


def test_no_heads(rng):
    """Biases of no heads were refused by the first step, and rollback was not bounded."""
    q, k = rng.standard_normal((0, 9, 4)), rng.standard_normal((0, 9, 4))
    decoder = Decoder(Fixed(4), rollback=2)
    for _ in range(3):
        assert decoder.step(q, k, k, key_bias=np.zeros((0, 9))).shape == (0, 9, 4)
    with pytest.raises(ValueError, match="n must be between 0 and 2, got 3"):
        decoder.rollback(3)


# ---- copies, memory, faults


def test_a_copy_goes_its_own_way(rng):
    inputs, others = draw(rng, 200), draw(rng, 200)
    for pattern in (Fixed(16), LogSparse(), Fixed(16).sparse(), Dense(), Axial(16), Axial(16, "rowmajor")):
        given = draw_terms(rng, inputs, "key_bias sink")
        decoder = make(pattern, given)
        decoder.step(*tokens(inputs, 0, 100), **biases(given, 0, 100))
        twin = copy.deepcopy(decoder)
        decoder.step(*tokens(others, 100, 150), **biases(given, 100, 150))
        length = decoder.length
        del decoder
        out = step_by(twin, inputs, [100, 101, 170, 200], given)
        assert np.abs(out - attention(inputs, pattern, **given)[..., 100:, :]).max() <= 2e-6
        assert (length, twin.length) == (150, 200)


def test_chosen_sequences_go_on(rng):
    """In another order, several times or not at all: with their tokens, lengths and sinks; the decoder goes on too."""
    inputs = draw(rng, 90, B=3)
    for pattern in (Fixed(16), Fixed(8, window=5), LogSparse(), Fixed(16).sparse(), Dense(), Window(9), Axial(8),
                    Axial(8, "horizontal"), Axial(8, "rowmajor"), Axial(8).sparse()):  # fmt: skip
        for sink in (rng.standard_normal((3, inputs[0].shape[1])), rng.standard_normal(inputs[0].shape[1])):
            sink = sink.astype(np.float32)
            whole = attention(inputs, pattern, sink=sink)
            decoder = Decoder(pattern, sink=sink, rollback=4)
            decoder.step(*tokens(inputs, 0, 50))
            chosen = np.array([2, 0, 2, 2])
            taken = decoder.take(chosen)
            assert taken.lengths.tolist() == [50] * 4 and taken.pattern == pattern
            taken.rollback([4, 0, 2, 1])
            ends = 50 - np.array([4, 0, 2, 1])
            given = [np.stack([x[b, :, end : end + 30] for b, end in zip(chosen, ends, strict=True)]) for x in inputs]
            out = taken.step(*given)
            for n, (b, end) in enumerate(zip(chosen, ends, strict=True)):
                assert np.array_equal(out[n], whole[b, :, end : end + 30])
            assert np.array_equal(decoder.step(*tokens(inputs, 50, 90)), whole[:, :, 50:])
            assert decoder.take([]).lengths.size == 0
            taken.reset()
            first = [x[chosen, :, :20] for x in inputs]
            assert np.array_equal(taken.step(*first), whole[chosen, :, :20])


def test_what_cannot_be_chosen(rng):
    inputs = draw(rng, 9, B=2)
    decoder = Decoder(Fixed(4))
    with pytest.raises(ValueError, match="tokens must have one axis before the heads, got no tokens"):
        decoder.take([0])
    decoder.step(*inputs)
    for sequences, error, message in (
        ([0, 2], ValueError, "sequences must be between 0 and 1, got [0 2]"),
        ([-1], ValueError, "sequences must be between 0 and 1, got [-1]"),
        ([[0]], ValueError, "sequences must have shape (N,), got (1, 1)"),
        (0, ValueError, "sequences must have shape (N,), got ()"),
        ([0.0], TypeError, "sequences must hold integers, got float64"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            decoder.take(sequences)
    decoder = Decoder(Fixed(4))
    decoder.step(*(x[0] for x in inputs))
    with pytest.raises(ValueError, match="tokens must have one axis before the heads, got 0"):
        decoder.take([0])


@pytest.mark.parametrize("pattern", (Fixed(4), Axial(4)), ids=repr)
@pytest.mark.parametrize("begun", (False, True))
def test_what_would_share_or_lose_the_sequence_is_refused(pattern, begun, rng):
    """A shallow copy and a pickle, of a decoder with tokens or without; the decoder goes on."""
    inputs = draw(rng, 9)
    decoder = Decoder(pattern)
    if begun:
        decoder.step(*tokens(inputs, 0, 5))
    with pytest.raises(TypeError, match=r"cannot be copied without its sequence: copy\.deepcopy\(decoder\) makes"):
        copy.copy(decoder)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be pickled: pickle its pattern and the tokens, and prefill"):
            pickle.dumps({"decoder": decoder}, protocol)
    first, twin = copy.deepcopy([decoder, decoder])
    assert first is twin
    out = decoder.step(*tokens(inputs, 5 * begun, 9))
    assert np.array_equal(twin.step(*tokens(inputs, 5 * begun, 9)), out)


def test_memory_of_a_long_prefill_is_given_back(rng):
    inputs = draw(rng, 20000, np.float64, Hq=1, Hk=1, D=2, Dv=2)
    for pattern, rows in ((Tree(4), 4 * 8), (Fixed(128), 128 + 20000 / 128), (Window(40), 40)):
        decoder = Decoder(pattern)
        decoder.prefill(*inputs)
        assert decoder.nbytes <= 52 * (4 * rows + 64 + 64)  # regions have a count of 4 bytes beside six numbers


@pytest.mark.parametrize(
    "pattern",
    (Fixed(8), Fixed(8, window=9), LogSparse(), Tree(3), Dense(), Fixed(8).sparse(), Axial(8), Axial(8, "horizontal"),
     Axial(8, "rowmajor")),
    ids=repr,
)  # fmt: skip
@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_every_allocation_failing_leaves_the_decoder_as_it_was(pattern):
    rng = np.random.default_rng(0)
    inputs = draw(rng, 300, B=2)
    given = draw_terms(rng, inputs, "key_bias sink")
    expected = attention(inputs, pattern, **given)
    cuts = [0, 1, 2, 9, 40, 41, 130, 131, 290, 300]
    for keeps_failing in (False, True):
        decoder, failures = make(pattern, given), 0
        for a, b in itertools.pairwise(cuts):
            for k in itertools.count(1):
                _core._fail_allocation(k, keeps_failing)
                try:
                    out = decoder.step(*tokens(inputs, a, b), **biases(given, a, b))
                except MemoryError as error:
                    _core._fail_allocation(0)
                    assert str(error)
                    assert decoder.length == a
                    failures += 1
                else:
                    _core._fail_allocation(0)
                    assert np.array_equal(out, expected[..., a:b, :])
                    break
        for k in itertools.count(1):
            _core._fail_allocation(k, keeps_failing)
            try:
                twin = copy.deepcopy(decoder)
            except MemoryError:
                failures += 1
            else:
                break
            finally:
                _core._fail_allocation(0)
        assert failures > 20 and twin.length == 300
        del decoder, twin
    gc.collect()
    combiner.patterns.made_plan.clear()
    assert _core._live_bytes() == 0


@pytest.mark.alone
def test_an_interrupted_call_changes_nothing(rng):
    """Ctrl-C ends a step of many tokens within 0.1 s; the decoder goes on from where it was."""
    pattern = Dense()
    inputs = draw(rng, 150, D=16, Dv=16)
    decoder = Decoder(pattern)
    out = [decoder.step(*tokens(inputs, 0, 100))]
    many = draw(rng, 100_000, D=16, Dv=16)
    sent = []

    def send():
        time.sleep(1)
        sent.append((time.perf_counter(), time.process_time()))
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sender = threading.Thread(target=send)
    try:
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            decoder.step(*many)
            time.sleep(5)
        waited = min(time.perf_counter() - sent[0][0], time.process_time() - sent[0][1])
    finally:
        sender.join()
        signal.signal(signal.SIGINT, before)
    assert waited < 0.1
    assert decoder.length == 100
    out.append(decoder.step(*tokens(inputs, 100, 150)))
    assert np.array_equal(np.concatenate(out, axis=-2), attention(inputs, pattern))


def test_one_thread_at_a_time(rng):
    """A second call while one runs is refused, and the first one ends as if it had not been."""
    inputs = draw(rng, 20_000, D=16, Dv=16)
    decoder, outcome = Decoder(Dense()), []
    decoder.step(*tokens(inputs, 0, 1))
    worker = threading.Thread(target=lambda: outcome.append(decoder.step(*tokens(inputs, 1, 20_000))))
    worker.start()
    refused = 0
    while worker.is_alive():
        try:
            decoder.step(*tokens(inputs, 0, 0))
        except RuntimeError as error:
            assert "one thread at a time may use a decoder" in str(error)
            refused += 1
        time.sleep(0.001)
    worker.join()
    assert refused and outcome[0].shape == (1, 4, 19_999, 16) and decoder.length == 20_000


def test_patterns_are_whole():
    """Every pattern that the core continues is among those tested here, sparse and not."""
    kinds = {type(pattern.pattern if isinstance(pattern, Sparse) else pattern) for pattern in PATTERNS}
    assert kinds == {Axial, AxialMixture, Dense, Fixed, HeavilyCompressed, LogSparse, Tree, Window}
