# SPDX-License-Identifier: Apache-2.0
"""Laws that hold whatever the numbers are."""

import numpy as np
from cases import Clustered, Opened, of_length
from hypothesis import given, settings
from hypothesis import strategies as st

import combiner
from combiner import Axial, AxialMixture, Dense, Fixed, HeavilyCompressed, LogSparse, Tree, Window, reference

spans = st.one_of(st.none(), st.integers(1, 80))
poolings = st.sampled_from(["max", "mean", "sum"])
flags = st.fixed_dictionaries({"pooling": poolings, "size_bias": st.booleans()})
orders = st.sampled_from([("vertical",), ("horizontal",), ("rowmajor",), ("rowmajor", "weighted")])
partitions = st.one_of(
    st.builds(lambda flags: Dense(**flags), flags),
    st.builds(lambda span, flags: Fixed(span, **flags), spans, flags),
    st.builds(lambda span, window, flags: Fixed(span, window=window, **flags), spans, st.integers(1, 70), flags),
    st.builds(lambda tree, flags: LogSparse(hierarchical=tree, **flags), st.booleans(), flags),
    st.builds(lambda width, order, flags: Axial(width, *order, **flags), spans, orders, flags),
    st.builds(
        lambda b, levels, flags: Tree(b, levels, **flags), st.integers(2, 70), st.sampled_from([None, 1, 2]), flags
    ),
    st.builds(lambda clusters, flags: Clustered(clusters, **flags), st.integers(1, 40), flags),
    st.builds(
        lambda span, block, count, flags: Opened(Fixed(span, **flags), block, count),
        *(spans, st.integers(1, 80), st.integers(0, 5), flags),
    ),
    st.builds(lambda b, block, flags: Opened(Tree(b, **flags), block), st.integers(2, 9), st.integers(1, 80), flags),
)
mixtures = st.builds(lambda width, flags: AxialMixture(width, **flags), spans, flags)
windows = st.builds(lambda size, flags: Window(size, **flags), st.integers(1, 70), flags)
heavy = st.builds(lambda *sizes, flags: HeavilyCompressed(*sizes, **flags), *2 * [st.integers(1, 70)], flags=flags)
patterns = st.one_of(partitions, mixtures, windows, heavy, partitions.map(lambda pattern: pattern.sparse()))
lengths = st.one_of(st.integers(1, 20), st.integers(21, 150))
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([np.float32, np.float64])
many = settings(max_examples=60)


def normal(seed, *shapes, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@many
@given(patterns, lengths, st.booleans(), seeds, dtypes, st.sampled_from([None, 0.2, 0.9]))
def test_weights(pattern, L, is_causal, seed, dtype, masked):
    """Not negative, on exactly the unmasked support, of sum 1 (or 0 with nothing to attend to), and W @ v == out."""
    q, k, v = normal(seed, (2, L, 6), (1, L, 6), (1, L, 5), dtype=dtype)
    mask = None if masked is None else np.random.default_rng(seed).random(L) >= masked
    options = {"is_causal": is_causal, "key_mask": mask}
    W = combiner.attention_weights(q, k, pattern, **options)
    out, lse = combiner.attention(q, k, v, pattern, return_lse=True, **options)
    eps = float(np.finfo(dtype).eps)
    assert (W >= 0).all()
    np.testing.assert_allclose(W.sum(-1), np.isfinite(lse), rtol=0, atol=64 * eps)
    np.testing.assert_allclose(W @ v, out, rtol=0, atol=256 * eps * np.abs(v).max())
    parts = parts_of(pattern, L, is_causal)
    support = np.zeros((L, L), bool)
    for i in range(L):
        support[i, parts.direct[i]] = True
        for r in parts.regions[i]:
            support[i, [j for j in positions_below(parts, L, r)]] = True
    support &= True if mask is None else mask
    assert not W[:, ~support].any()
    np.testing.assert_array_equal((W > 0).any(axis=0) | ~support, True)


@many
@given(patterns, lengths, st.booleans(), seeds, dtypes, st.sampled_from([None, 0.2, 0.9]))
def test_weights_with_terms(pattern, L, is_causal, seed, dtype, masked):
    """The sink has the rest of each row's sum, and W @ v == out."""
    q, k, v, bias, sink = normal(seed, (2, L, 6), (1, L, 6), (1, L, 5), (1, L), (2,), dtype=dtype)
    mask = None if masked is None else np.random.default_rng(seed).random(L) >= masked
    options = {"is_causal": is_causal, "key_mask": mask, "softcap": 2.0, "key_bias": bias, "sink": sink}
    W = combiner.attention_weights(q, k, pattern, **options)
    out, lse = combiner.attention(q, k, v, pattern, return_lse=True, **options)
    eps = float(np.finfo(dtype).eps)
    # "sum" pools a bias of up to L normal numbers: lse is as large, and its exponential has L times the rounding.
    slack = 64 * eps * (1 + np.abs(lse).max())
    assert (W >= 0).all()
    np.testing.assert_allclose(W.sum(-1) + np.exp(sink[:, None] - lse), 1, rtol=0, atol=slack)
    np.testing.assert_allclose(W @ v, out, rtol=0, atol=256 * eps * np.abs(v).max())


def parts_of(pattern, L, is_causal):
    return reference.parts(of_length(pattern, L), L, is_causal)


def positions_below(parts, L, r):
    for row in parts.members[r]:
        yield from [row] if row < L else positions_below(parts, L, row - L)


@many
@given(st.integers(1, 90), st.integers(0, 40), st.booleans(), seeds, dtypes)
def test_one_span_is_dense(L, more, is_causal, seed, dtype):
    q, k, v = normal(seed, (2, L, 8), (2, L, 8), (2, L, 8), dtype=dtype)
    a, b = (combiner.attention_forward(q, k, v, pattern, is_causal=is_causal) for pattern in (Fixed(L + more), Dense()))
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(a[0], b[0], rtol=0, atol=64 * eps)
    a, b = (combiner.attention_backward(v, saved) for _, saved in (a, b))
    for x, y in zip(a[:3], b[:3], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1024 * eps * max(1, np.abs(y).max()))


@many
@given(st.integers(1, 20), st.integers(1, 130), st.booleans(), st.booleans(), seeds, st.sampled_from(["max", "mean"]))
def test_equal_keys_in_a_region_with_size_bias_are_dense(span, L, is_causal, logsparse, seed, pooling):
    """out, lse, W, dq and dv; not dk. LogSparse's largest regions are half of everything: all keys are equal then."""
    pattern = LogSparse(pooling=pooling, size_bias=True) if logsparse else Fixed(span, pooling=pooling, size_bias=True)
    q, k, v, grad_lse = normal(seed, (2, L, 6), (2, L, 6), (2, L, 6), (2, L))
    k = k[:, np.zeros(L, int) if logsparse else np.arange(L) // span]
    mask = np.random.default_rng(seed).random(L) < 0.8
    options = {"is_causal": is_causal, "key_mask": mask}
    for x, y in zip(
        combiner.attention(q, k, v, pattern, return_lse=True, **options),
        combiner.attention(q, k, v, Dense(), return_lse=True, **options),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        combiner.attention_weights(q, k, pattern, **options),
        combiner.attention_weights(q, k, Dense(), **options),
        rtol=0,
        atol=1e-13,
    )
    a, b = (
        combiner.attention_backward(v, combiner.attention_forward(q, k, v, which, **options)[1], grad_lse=grad_lse)
        for which in (pattern, Dense())
    )
    np.testing.assert_allclose(a.query, b.query, rtol=0, atol=1e-11)
    np.testing.assert_allclose(a.value, b.value, rtol=0, atol=1e-11)


@many
@given(partitions, lengths, st.booleans(), seeds, dtypes, st.floats(-100, 100, width=32))
def test_a_constant_comes_back(pattern, L, is_causal, seed, dtype, constant):
    q, k = normal(seed, (2, L, 6), (2, L, 6), dtype=dtype)
    out = combiner.attention(q, k, np.full((2, L, 3), constant, dtype), pattern, is_causal=is_causal)
    np.testing.assert_allclose(out, constant, rtol=32 * np.finfo(dtype).eps, atol=0)


@many
@given(patterns, lengths, st.booleans(), seeds, dtypes)
def test_out_lies_between_the_values(pattern, L, is_causal, seed, dtype):
    q, k, v = normal(seed, (2, L, 6), (2, L, 6), (2, L, 4), dtype=dtype)
    out = combiner.attention(3 * q, k, v, pattern, is_causal=is_causal)
    slack = 32 * np.finfo(dtype).eps * np.abs(v).max()
    assert (out <= v.max(1, keepdims=True) + slack).all() and (out >= v.min(1, keepdims=True) - slack).all()


@many
@given(patterns, st.integers(2, 120), st.data(), seeds, dtypes)
def test_nothing_comes_from_the_future(pattern, L, data, seed, dtype):
    """Other numbers from position j on leave every bit before it: of out and lse, and of the gradients there."""
    j = data.draw(st.integers(1, L - 1))
    arrays = normal(seed, *[(2, L, 6)] * 4, dtype=dtype)
    others = [np.where(np.arange(L)[:, None] < j, x, y) for x, y in zip(arrays, arrays[::-1], strict=True)]
    results = []
    for q, k, v, grad in (arrays, others):
        out, saved = combiner.attention_forward(q, k, v, pattern, is_causal=True)
        gradients = combiner.attention_backward(np.where(np.arange(L)[:, None] < j, grad, 0), saved)
        results.append((out[:, :j], saved["lse"][:, :j], gradients.query[:, :j]))
        assert not any(x[:, j:].any() for x in gradients[:3])
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


@many
@given(patterns, lengths, st.booleans(), seeds)
def test_linear_in_v(pattern, L, is_causal, seed):
    q, k, v, w = normal(seed, *[(2, L, 5)] * 4)
    a, b, both = (combiner.attention(q, k, x, pattern, is_causal=is_causal) for x in (v, w, 2 * v - 3 * w))
    np.testing.assert_allclose(both, 2 * a - 3 * b, rtol=0, atol=1e-12)


@many
@given(patterns, lengths, st.booleans(), seeds, dtypes, st.integers(-20, 20))
def test_powers_of_two_scale_bits(pattern, L, is_causal, seed, dtype, power):
    q, k, v, grad = normal(seed, *[(2, L, 5)] * 4, dtype=dtype)
    factor = dtype(2.0**power)
    (a, saved), (b, scaled) = (
        combiner.attention_forward(q, k, x, pattern, is_causal=is_causal) for x in (v, factor * v)
    )
    np.testing.assert_array_equal(factor * a, b)
    a, b = combiner.attention_backward(grad, saved), combiner.attention_backward(factor * grad, saved)
    for x, y in zip(a[:3], b[:3], strict=True):
        np.testing.assert_array_equal(factor * x, y)
    np.testing.assert_array_equal(a.value, combiner.attention_backward(grad, scaled).value)
