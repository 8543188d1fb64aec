# SPDX-License-Identifier: Apache-2.0
"""The decoder against full causal attention, row by row."""

import gc
import itertools
import weakref

import numpy as np
import pytest

import combiner
from combiner import (
    Axial,
    AxialMixture,
    Decoder,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Mixture,
    Routing,
    Tree,
    Window,
)

PATTERNS = {
    "dense": Dense,
    "fixed1": lambda **options: Fixed(1, **options),
    "fixed7": lambda **options: Fixed(7, **options),
    "fixed16": lambda **options: Fixed(16, **options),
    "logsparse": LogSparse,
    "hierarchical": lambda **options: LogSparse(hierarchical=True, **options),
    "tree3": lambda **options: Tree(3, **options),
    "tree4.2": lambda **options: Tree(4, 2, **options),
    "tree9.1": lambda **options: Tree(9, 1, **options),
    "vertical7": lambda **options: Axial(7, **options),
    "horizontal7": lambda **options: Axial(7, "horizontal", **options),
    "rowmajor7": lambda **options: Axial(7, "rowmajor", **options),
    "weighted8": lambda **options: Axial(8, "rowmajor", "weighted", **options),
    "vertical1": lambda **options: Axial(1, **options),
    "horizontal1": lambda **options: Axial(1, "horizontal", **options),
    "rowmajor1": lambda **options: Axial(1, "rowmajor", **options),
    "sparse axial": lambda **options: Axial(7, "horizontal", **options).sparse(),
    "sparse mixture": lambda **options: AxialMixture(5, **options).sparse(),
    "sparse fixed": lambda **options: Fixed(7, **options).sparse(),
    "sparse logsparse": lambda **options: LogSparse(**options).sparse(),
    "sparse tree": lambda **options: Tree(5, **options).sparse(),
    "window1": lambda **options: Window(1, **options),
    "window7": lambda **options: Window(7, **options),
    "window100": lambda **options: Window(100, **options),
    "sparse heavy": lambda **options: HeavilyCompressed(4, 7, **options).sparse(),
    "heavy": lambda **options: HeavilyCompressed(4, 7, **options),
    "fixed7 window3": lambda **options: Fixed(7, window=3, **options),
    "fixed7 window30": lambda **options: Fixed(7, window=30, **options),
    "sparse window": lambda **options: Fixed(7, window=5, **options).sparse(),
}
OPTIONS = [
    {"pooling": pooling, "size_bias": size_bias}
    for pooling, size_bias in itertools.product(("max", "mean", "sum"), (False, True))
]
SPAN = {
    "weighted8": 8,
    "vertical1": 1,
    "horizontal1": 1,
    "rowmajor1": 1,
    "fixed1": 1,
    "fixed16": 16,
    "tree3": 9,
    "tree4.2": 16,
    "tree9.1": 9,
    "sparse tree": 5,
    "dense": 8,
    "window1": 1,
}
L = 70  # crosses several nodes of each size


def draw(rng, dtype, heads=(2, 2, 2), length=L, D=8, Dv=5):
    """query, key and value of (B, Hq, Hk) heads, or of none."""
    B, Hq, Hk = heads or (0, 0, 0)
    lead = [((B, H) if heads else ()) for H in (Hq, Hk, Hk)]
    return [rng.standard_normal((*n, length, d)).astype(dtype) for n, d in zip(lead, (D, D, Dv), strict=True)]


def tokens(inputs, first, end):
    return [x[..., first:end, :] for x in inputs]


def decode(decoder, inputs, prefill, chunk, length=L):
    """Rows of all tokens: a prefill, then steps of so many."""
    out = [decoder.prefill(*tokens(inputs, 0, prefill))] if prefill is not None else []
    for first in range(prefill or 0, length, chunk):
        out.append(decoder.step(*tokens(inputs, first, min(first + chunk, length))))
    assert decoder.length == length
    return np.concatenate(out, axis=-2)


def accept(out, inputs, pattern, **options):
    """Two orders of the same sums: a logit's rounding, which moves its weight by that share, grows with the logit, as
    those of sums of keys and queries do."""
    expected = combiner.attention(*inputs, pattern, is_causal=True, **options)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    largest = 1.0  # logit, up to a factor
    if (
        isinstance(pattern, combiner.patterns.Factorization)
        and pattern.pooling == "sum"
        and pattern.plan(L, True).region_count
    ):
        summary = combiner.summarize(*inputs, pattern, is_causal=True, **options)
        largest = max(1.0, np.abs(summary.key).max())
    tolerance = {np.float32: 2e-6, np.float64: 1e-12}[out.dtype.type]  # both round, each from plans of its own
    assert np.abs(out - expected).max(initial=0) <= tolerance * largest


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("name", PATTERNS)
def test_equals_full_attention(name, options, dtype, rng):
    """Every pattern, pooling, bias and grouping, from every kind of prefill, in steps of one and of several."""
    pattern = PATTERNS[name](**options)
    span = SPAN.get(name, 7)
    for heads in ((2, 2, 2), (1, 4, 2)):
        inputs = draw(rng, dtype, heads)
        accept(decode(Decoder(pattern), inputs, None, 1), inputs, pattern)
        for prefill, chunk in zip((0, 1, span - 1, span, span + 1, 53, L), (2, 3, 1, 20, 2, 5, 1), strict=True):
            accept(decode(Decoder(pattern), inputs, prefill, chunk), inputs, pattern)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_prefill(name, rng):
    pattern = PATTERNS[name](pooling="mean", size_bias=True)
    inputs = draw(rng, np.float64, (1, 2, 1))
    for prefill in range(L + 1):
        accept(decode(Decoder(pattern), inputs, prefill, 4), inputs, pattern)


@pytest.mark.parametrize("name", PATTERNS)
def test_prefill_has_the_bits_of_attention(name, rng):
    pattern = PATTERNS[name]()
    inputs = draw(rng, np.float32, (1, 4, 2), 300)
    decoder = Decoder(pattern, scale=0.3)
    out = decoder.prefill(*inputs)
    assert np.array_equal(out, combiner.attention(*inputs, pattern, is_causal=True, scale=0.3))


@pytest.mark.parametrize("name", PATTERNS)
def test_steps_of_several_have_the_bits_of_single_steps(name, rng):
    inputs = draw(rng, np.float32, (1, 4, 2))
    pattern = PATTERNS[name](size_bias=True)
    single = decode(Decoder(pattern), inputs, 5, 1)
    for chunk in (2, 7, 64, 65):
        assert np.array_equal(decode(Decoder(pattern), inputs, 5, chunk), single)


def test_threads_that_join_a_step_change_no_bit(rng):
    """A step over so many rows wakes them."""
    inputs = draw(rng, np.float32, (1, 8, 8), 4200, 64, 64)
    out = []
    for threads in (1, 3):
        with combiner.num_threads(threads):
            decoder = Decoder(Dense())
            decoder.prefill(*tokens(inputs, 0, 4198))
            out.append(decoder.step(*tokens(inputs, 4198, 4200)))
    assert np.array_equal(*out)


@pytest.mark.parametrize("name", ("dense", "fixed16", "logsparse", "tree3"))
def test_shapes_without_heads_and_with_more_axes(name, rng):
    pattern = PATTERNS[name]()
    inputs = draw(rng, np.float64, None)
    accept(decode(Decoder(pattern), inputs, 9, 2), inputs, pattern)
    inputs = [rng.standard_normal((2, 1, 3, heads, L, 4)) for heads in (4, 2, 2)]
    accept(decode(Decoder(pattern), inputs, 9, 2), inputs, pattern)
    inputs = [rng.standard_normal((0, 2, L, 4)) for _ in range(3)]
    assert decode(Decoder(pattern), inputs, 9, 2).shape == (0, 2, L, 4)


@pytest.mark.parametrize(
    "pattern",
    (Dense(), Fixed(32), LogSparse(), LogSparse(hierarchical=True), Tree(5), Tree(4, 3), Fixed(16).sparse(),
     LogSparse().sparse(), Axial(32), Axial(32, "horizontal"), Axial(32, "rowmajor", "weighted"), Window(1500)),
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("prefill", (2048, 2999))
def test_long_sequences(pattern, prefill, rng):
    """Nodes of all sizes, more regions than a tile holds, behind a prefill of several tasks."""
    inputs = draw(rng, np.float64, (1, 2, 1), prefill + 140, D=4, Dv=3)
    decoder = Decoder(pattern)
    decoder.prefill(*tokens(inputs, 0, prefill))
    out = np.concatenate([decoder.step(*tokens(inputs, n, n + 7)) for n in range(prefill, prefill + 140, 7)], axis=-2)
    expected = combiner.attention(*inputs, pattern, is_causal=True)[..., prefill:, :]
    assert np.abs(out - expected).max() <= 1e-12


def test_scale_and_strides(rng):
    """A view `[B, L, H, D]` as transposed, backwards in its features' order or not."""
    inputs = [np.swapaxes(rng.standard_normal((2, L, 4, 6)), 1, 2)[..., ::-1] for _ in range(3)]
    for name in ("fixed7", "hierarchical"):
        pattern = PATTERNS[name]()
        accept(decode(Decoder(pattern, scale=0.7), inputs, 10, 3), inputs, pattern, scale=0.7)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_past_is_copied(name, rng):
    """Inputs are neither written nor kept: they may change or go as soon as a call is over."""
    pattern = PATTERNS[name]()
    inputs = draw(rng, np.float64)
    expected = combiner.attention(*inputs, pattern, is_causal=True)
    decoder, out, before = Decoder(pattern), [], [x.copy() for x in inputs]
    for n, (first, end) in enumerate(itertools.pairwise((0, 20, 21, 22, 50, L))):
        given = [x.copy() for x in tokens(inputs, first, end)]
        out.append((decoder.step if n else decoder.prefill)(*given).copy())
        assert all(np.array_equal(x, y) for x, y in zip(given, tokens(before, first, end), strict=True))
        alive = [weakref.ref(x) for x in given]
        for x in given:
            x.fill(np.nan)
        del given, x
        gc.collect()
        assert not any(reference() is not None for reference in alive)
    assert np.abs(np.concatenate(out, axis=-2) - expected).max() < 1e-12


def test_nan_stays_with_what_reads_it(rng):
    inputs = draw(rng, np.float64)
    inputs[2][..., 40, :] = np.nan
    pattern = Fixed(16).sparse()  # 40 is seen by its own span alone
    out = decode(Decoder(pattern), inputs, 10, 1)
    assert np.isnan(out[..., 40:48, :]).all() and np.isfinite(np.delete(out, range(40, 48), axis=-2)).all()


def test_reset_begins_anew(rng):
    decoder = Decoder(LogSparse())
    decode(decoder, draw(rng, np.float32), 9, 4)
    decoder.reset()
    assert (decoder.length, decoder.nbytes) == (0, 0)
    inputs = draw(rng, np.float64, (1, 3, 1), D=3)  # other shapes and another dtype
    accept(decode(decoder, inputs, None, 4), inputs, LogSparse())


@pytest.mark.parametrize(
    "pattern, rows",
    [
        (Dense(), lambda n: n),
        (Fixed(32), lambda n: 32 + n / 32),
        (LogSparse(), lambda n: n + 16),
        (LogSparse(hierarchical=True), lambda n: 16),
        (Tree(4), lambda n: 4 * 8),
        (Tree(8).sparse(), lambda n: 8),
        (Axial(8), lambda n: n + 200),  # the least size is that of 8 columns
        (Axial(8, "horizontal"), lambda n: 2 * n + 200),
        (Axial(8, "rowmajor"), lambda n: n + 200),
        (LogSparse().sparse(), lambda n: 16),
        (Window(40), lambda n: 80),
    ],
    ids=lambda x: "rows" if callable(x) else repr(x),
)
def test_memory_grows_geometrically(pattern, rows, rng):
    """The caches are what later queries need, with at most half as much again, and change log(L) times."""
    decoder = Decoder(pattern)
    inputs = draw(rng, np.float64, None, 3000, D=2, Dv=2)
    sizes = []
    for first in range(3000):
        decoder.step(*tokens(inputs, first, first + 1))
        sizes.append(decoder.nbytes)
        assert decoder.nbytes <= 6 * 8 * (1.5 * rows(first + 1) + 2 * 24)  # q, k, v of 2 features; the least size is 16
    assert len(set(sizes)) <= 2 * (2 + np.log(3000 / 16) / np.log(1.5))  # two tables
    assert sizes == sorted(sizes)


ONE = np.zeros((2, 4, 1, 8), np.float32)


@pytest.mark.parametrize(
    "pattern, error, message",
    [
        (Fixed(), ValueError, "pattern must have a span, the default depends on the length, got Fixed()"),
        (Axial(), ValueError, "pattern must have a width, the default depends on the length, got Axial()"),
        (
            Fixed().sparse(),
            ValueError,
            "pattern must have a span, the default depends on the length, got Fixed().sparse()",
        ),
        (AxialMixture(4), ValueError, "pattern must be Dense, Fixed, LogSparse, Tree, Axial or Window"),
        (Mixture(Dense()), ValueError, "pattern must be Dense, Fixed, LogSparse, Tree, Axial or Window"),
        (Routing(np.zeros(8, int)), ValueError, "pattern must be Dense, Fixed, LogSparse, Tree, Axial or Window"),
        (
            Routing(np.zeros(8, int)).sparse(),
            ValueError,
            "pattern must be Dense, Fixed, LogSparse, Tree, Axial or Window",
        ),
        (Fixed(4).plan(8, True), ValueError, "pattern must be of any length, got a Plan"),
        (Fixed(4).plan(8), ValueError, "pattern must be of any length, got a Plan"),
        ((Fixed(4).plan(8),), ValueError, "pattern must be of any length, got a tuple"),
        (Fixed, TypeError, "pattern must be a pattern such as combiner.Fixed(64), got Fixed"),
        ("fixed", TypeError, "pattern must be a pattern such as combiner.Fixed(64), got str"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_patterns_refused(pattern, error, message):
    with pytest.raises(error) as caught:
        Decoder(pattern)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "scale, error, message",
    [
        (np.nan, ValueError, "scale must be finite, got nan"),
        (-np.inf, ValueError, "scale must be finite, got -inf"),
        ("a", TypeError, "scale must be a number or None, got str"),
    ],
)
def test_scales_refused(scale, error, message):
    with pytest.raises(error, match=message):
        Decoder(Dense(), scale=scale)


FIRST = [  # what the first call is refused; each is the library's own error
    ((ONE[0, 0, 0], ONE, ONE), ValueError, "query must have shape"),
    (([1.0], ONE, ONE), TypeError, "query must be a float32, float64, bfloat16 or float16 NumPy array, got list"),
    (
        (ONE, np.ma.masked_array(ONE), ONE),
        TypeError,
        "key must be a float32, float64, bfloat16 or float16 NumPy array, got MaskedArray",
    ),
    ((ONE.astype(int), ONE, ONE), TypeError, "query must be a float32, float64"),
    ((ONE, ONE.astype(np.float64), ONE), TypeError, "key must be float32 like query, got float64"),
    ((ONE, ONE[:, :3], ONE[:, :3]), ValueError, "the heads of query must be a multiple of the heads of key"),
    ((ONE, ONE[..., :7], ONE), ValueError, "key must have shape"),
    ((ONE, ONE, ONE[:, :2]), ValueError, "value must have shape"),
    ((ONE, ONE[:1], ONE), ValueError, "key must have shape"),
    ((ONE, ONE[:, :, :0], ONE), ValueError, "key must have shape"),
    ((ONE[..., :0],) * 3, ValueError, "query must have 1 to 1024 features, got 0"),
]
LATER = [  # and the next one
    ((ONE.astype(np.float64),) * 3, TypeError, "query must be float32 like the tokens before, got float64"),
    ((ONE, ONE, ONE.astype(np.float64)), TypeError, "value must be float32 like the tokens before, got float64"),
    ((ONE[:, :2], ONE, ONE), ValueError, "query must have shape (2, 4, 1, 8) like the tokens before, got (2, 2, 1, 8)"),
    ((ONE, ONE[:, :2], ONE[:, :2]), ValueError, "key must have shape (2, 4, 1, 8) like the tokens before, got"),
    ((ONE, ONE, ONE[..., :3]), ValueError, "value must have shape (2, 4, 1, 8) like the tokens before, got"),
    ((ONE, ONE[:, :, :0], ONE), ValueError, "key must have shape (2, 4, 1, 8) like the tokens before, got"),
    ((ONE[0], ONE[0], ONE[0]), ValueError, "query must have shape (2, 4, 1, 8) like the tokens before, got (4, 1, 8)"),
    ((ONE[0, 0, 0],) * 3, ValueError, "query must have shape"),
    (([1.0], ONE, ONE), TypeError, "query must be a float32, float64, bfloat16 or float16 NumPy array, got list"),
]


@pytest.mark.parametrize("begun", (False, True))
def test_arguments_refused(begun, rng):
    """After an error the decoder goes on as if the call had not been."""
    for given, error, message in LATER if begun else FIRST:
        for call in ("prefill", "step"):
            if begun and call == "prefill":
                continue
            decoder = Decoder(Fixed(2))
            before = [x.astype(np.float32) for x in draw(rng, np.float32, (2, 4, 4), 3, 8, 8)] if begun else None
            if begun:
                decoder.prefill(*before)
            with pytest.raises(error) as caught:
                getattr(decoder, call)(*given)
            assert str(caught.value).startswith(message), str(caught.value)
            inputs = [np.concatenate([x, ONE], axis=-2) for x in before] if begun else [ONE] * 3
            out = decoder.step(ONE, ONE, ONE)
            assert decoder.length == 1 + 3 * begun
            expected = combiner.attention(*inputs, Fixed(2), is_causal=True)[..., -1:, :]
            assert np.abs(out - expected).max() <= 1e-6


def test_prefill_comes_at_any_time(rng):
    inputs = draw(rng, np.float32)
    decoder = Decoder(Fixed(4))
    assert decoder.prefill(*tokens(inputs, 0, 0)).shape == (2, 2, 0, 5)
    out = [decoder.prefill(*tokens(inputs, 0, 3)), decoder.prefill(*tokens(inputs, 3, 60))]
    assert decoder.step(*tokens(inputs, 60, 60)).shape == (2, 2, 0, 5)
    assert decoder.length == 60
    assert repr(decoder) == "<Decoder(Fixed(span=4)) of length 60>"
    out.append(decoder.prefill(*tokens(inputs, 60, L)))
    assert np.array_equal(np.concatenate(out, axis=-2), combiner.attention(*inputs, Fixed(4), is_causal=True))


@pytest.mark.parametrize(
    "pattern", [Dense(), Fixed(4), LogSparse(), Tree(2), Axial(4), Axial(4, "rowmajor"), Window(4)], ids=str
)
@pytest.mark.parametrize("lead", [(), (2,), (0,)], ids=str)
def test_no_query_heads(pattern, lead):
    """Keys and values without a query: an empty result, as `attention` gives it, was a failed broadcast."""
    q, k = np.ones((*lead, 0, 9, 4)), np.ones((*lead, 2, 9, 4))
    decoder = Decoder(pattern)
    assert decoder.prefill(q, k, k).shape == (*lead, 0, 9, 4) == combiner.attention(q, k, k, pattern).shape
    for n in (1, 0, 7):
        assert decoder.step(q[..., :n, :], k[..., :n, :], k[..., :n, :]).shape == (*lead, 0, n, 4)
    assert decoder.length == 17 and decoder.nbytes == 0


def test_a_step_without_an_axis_of_tokens():
    """`q[:, 1]` is a token of [heads, D]; its heads were taken for tokens."""
    q = np.ones((3, 8, 4))
    decoder = Decoder(Fixed(4))
    decoder.prefill(q, q, q)
    with pytest.raises(
        ValueError, match=r"query must have an axis of tokens, \(3, 1, 4\) for one of them, got \(3, 4\)"
    ):
        decoder.step(q[:, 1], q[:, 1], q[:, 1])
    with pytest.raises(
        ValueError, match=r"value must have an axis of tokens, \(3, 1, 4\) for one of them, got \(3, 4\)"
    ):
        decoder.step(q[:, :1], q[:, :1], q[:, 1])
