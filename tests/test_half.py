# SPDX-License-Identifier: Apache-2.0
"""bfloat16 and float16: exact inputs, float32 inside, and results that are at most rounded on their way out."""

import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest
from cases import Judge, close, each_isa, grid, problem, unit

import combiner
from combiner import Decoder, Fixed, LogSparse, Mixture

DTYPES = (ml_dtypes.bfloat16, np.float16)
GRID = [case for case in grid() if case.L in (2, 17, 64, 97)]


def exactly(p, dtype):
    """The problem with every number rounded to the dtype, in float64: what both sides compute from."""

    def rounded(x):
        return x.astype(dtype).astype(np.float64) if isinstance(x, np.ndarray) and x.dtype != bool else x

    options = {name: rounded(x) for name, x in p.options.items()}
    inputs = tuple(map(rounded, p.inputs))
    return dataclasses.replace(p, inputs=inputs, options=options, grad_out=rounded(p.grad_out))


def narrowed(p, dtype):
    """The same numbers in the dtype itself; but for the cotangent of lse, which is float32 as lse is."""
    half = p.as_type(dtype)
    return dataclasses.replace(half, grad_lse=p.grad_lse.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_attention(case, dtype):
    judge = Judge(exactly(problem(case), dtype))
    for _ in each_isa(pairing=True):
        p = narrowed(judge.problem, dtype)
        out, saved = combiner.attention_forward(*p.inputs, p.pattern, **p.options)
        assert out.dtype == dtype and saved["lse"].dtype == np.float32
        judge.accepts_forward(out, saved["lse"])
        gradients = combiner.attention_backward(p.grad_out, saved, grad_lse=p.grad_lse)
        assert all(x.dtype == dtype for x in gradients if x is not None)
        judge.accepts_backward(gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in GRID if case.L == 64], ids=str)
def test_stages_are_the_whole(case, dtype):
    """Each stage alone, with summaries that are rounded in between."""
    p = narrowed(exactly(problem(case), dtype), dtype)
    summary, first = combiner.summarize_forward(*p.inputs, p.pattern, **p.of_summarize)
    assert summary.key.dtype == summary.value.dtype == dtype and summary.lse.dtype == np.float32
    out, second = combiner.attend_forward(*p.inputs, *summary[:2], p.pattern, **p.of_attend)
    whole, saved = combiner.attention_forward(*p.inputs, p.pattern, **p.options)
    near(out, whole, 8 * unit(dtype), "out")
    given = combiner.attend_backward(p.grad_out, second, grad_lse=p.grad_lse)
    below = combiner.summarize_backward(given.region_key, given.region_value, first)
    expected = combiner.attention_backward(p.grad_out, saved, grad_lse=p.grad_lse)
    for name, x, y, exact in zip("qkv", given, below, expected, strict=False):
        assert x.dtype == y.dtype == dtype
        near(x.astype(np.float32) + y.astype(np.float32), exact, 16 * unit(dtype), f"gradient of {name}")


def near(actual, expected, within: float, name: str) -> None:
    """To a share of the largest."""
    expected = expected.astype(np.float64)
    close(actual.astype(np.float64), expected, within * (np.abs(expected).max(initial=0) + 1e-3), name)


@pytest.fixture(params=DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def arrays(request, rng):
    """query, key, value and the cotangent of out, with float64 copies."""
    q, g = rng.standard_normal((2, 2, 4, 100, 17)).astype(request.param)
    k, v = rng.standard_normal((2, 2, 2, 100, 17)).astype(request.param)
    return [q, k, v, g], [x.astype(np.float64) for x in (q, k, v, g)]


def test_a_mixture_rounds_its_mean_alone(arrays):
    """Nearly: its components' outputs are rounded, the sum is not."""
    (q, k, v, g), (*exact, exact_g) = arrays
    pattern = Mixture(Fixed(8), LogSparse(), Fixed(20))
    out, saved = combiner.attention_forward(q, k, v, pattern)
    expected, exactly_saved = combiner.attention_forward(*exact, pattern)
    near(out, expected, 2 * unit(q.dtype), "out")
    expected = combiner.attention_backward(exact_g, exactly_saved)
    for name, x, y in zip("qkv", combiner.attention_backward(g, saved), expected, strict=False):
        assert x.dtype == q.dtype
        near(x, y, 8 * unit(q.dtype), f"gradient of {name}")
    given = np.empty_like(out)
    assert combiner.attention(q, k, v, pattern, out=given) is given and given.tobytes() == out.tobytes()


def test_merge(arrays):
    (q, k, v, _), exact = arrays
    halves = [np.arange(100) < 50, np.arange(100) >= 50]
    parts = [
        combiner.attention(q, k, v, Fixed(8).sparse(), key_mask=np.tile(half, (2, 1)), return_lse=True)
        for half in halves
    ]
    out, lse = combiner.merge(*parts[0], *parts[1])
    assert out.dtype == q.dtype and lse.dtype == np.float32
    near(out, combiner.attention(*exact[:3], Fixed(8).sparse()), 2 * unit(q.dtype), "out")


def test_decoder(arrays):
    (q, k, v, _), exact = arrays
    decoder = Decoder(Fixed(8))
    steps = [decoder.prefill(q[..., :50, :], k[..., :50, :], v[..., :50, :])]
    steps += [decoder.step(*(x[..., i : i + 1, :] for x in (q, k, v))) for i in range(50, 100)]
    expected = combiner.attention(*exact[:3], Fixed(8), is_causal=True)
    near(np.concatenate(steps, axis=-2), expected, 4 * unit(q.dtype), "out")


def test_packed_and_strided(arrays):
    """A packed sequence's bits, and those of rows at odd addresses, are what each has alone."""
    (q, k, v, g), _ = arrays
    bounds = [0, 33, 100]
    wide = [np.concatenate([x, x], axis=-1) for x in (q, k, v, g)]
    views = [x[..., 17:] for x in wide]
    out, saved = combiner.attention_forward(*views[:3], Fixed(8), cu_seqlens=bounds, is_causal=True)
    gradients = combiner.attention_backward(views[3], saved)
    for first, end in itertools.pairwise(bounds):
        alone = [np.ascontiguousarray(x[..., first:end, :]) for x in (q, k, v, g)]
        expected, saved = combiner.attention_forward(*alone[:3], Fixed(8), is_causal=True)
        assert np.ascontiguousarray(out[..., first:end, :]).tobytes() == expected.tobytes()
        for x, y in zip(gradients[:3], combiner.attention_backward(alone[3], saved), strict=False):
            assert np.ascontiguousarray(x[..., first:end, :]).tobytes() == y.tobytes()


@pytest.mark.parametrize("is_causal", (True, False))
def test_poison_stays(arrays, is_causal):
    """NaN and Inf in one value reach the rows that depend on it; the others keep their bits."""
    (q, k, v, g), _ = arrays
    for poison in (np.nan, np.inf):
        bad = v.copy()
        bad[..., 40, :] = poison
        for _ in each_isa(pairing=True):
            for pattern in (Fixed(16).sparse(), LogSparse().sparse()):
                reached = combiner.attention_weights(q, k, pattern, is_causal=is_causal)[..., 40] > 0
                clean, saved = combiner.attention_forward(q, k, v, pattern, is_causal=is_causal)
                out, bad_saved = combiner.attention_forward(q, k, bad, pattern, is_causal=is_causal)
                assert not np.isfinite(out.astype(np.float32)[reached]).any()
                assert out[~reached].tobytes() == clean[~reached].tobytes()
                expected = combiner.attention_backward(g, saved).query
                actual = combiner.attention_backward(g, bad_saved).query
                assert np.isnan(actual.astype(np.float32)[reached]).any(axis=-1).all()
                assert actual[~reached].tobytes() == expected[~reached].tobytes()


def test_poison_for_any_threads(rng):
    """Threads that share a head add gradients in slices of a chunk's rows. A slice holds whole windows of the products
    that are tested for NaN: the NaN of a query reaches no row beside the one that it attends."""
    first, second, far = [*range(16)], [*range(16, 32)], 150
    lists = [first] * 16 + [[far]] * 32 + [second] * 16 + [[i] for i in range(64, 200)]
    plan = combiner.Plan.from_parts(lists)
    q, k, v, g = (rng.standard_normal((1, 1, 200, 8)).astype(ml_dtypes.bfloat16) for _ in range(4))
    g[..., 20, :] = np.nan
    for isa in each_isa(pairing=True):
        found = set()
        for threads in (1, 3):
            with combiner.num_threads(threads):
                _, saved = combiner.attention_forward(q, k, v, plan)
                dk, dv = combiner.attention_backward(g, saved)[1:3]
            for x in (dk, dv):
                assert np.isfinite(np.delete(x.astype(np.float32), far, axis=-2)).all(), f"{isa}, {threads} threads"
            found.add(dk.tobytes() + dv.tobytes())
        assert len(found) == 1, isa


def test_clusters_are_of_float32(arrays):
    (x, *_), _ = arrays
    wide = x.astype(np.float32)
    centroids = combiner.fit_centroids(x, 5)
    assert centroids.dtype == np.float32
    np.testing.assert_array_equal(centroids, combiner.fit_centroids(wide, 5))
    clusters = combiner.assign_clusters(x, centroids)
    np.testing.assert_array_equal(clusters, combiner.assign_clusters(wide, centroids))
    np.testing.assert_array_equal(clusters, combiner.cluster(x, 5))
    moved = combiner.update_centroids(centroids, x, clusters, decay=0.5)
    np.testing.assert_array_equal(moved, combiner.update_centroids(centroids, wide, clusters, decay=0.5))


def test_dtypes_are_not_mixed(arrays):
    (q, k, v, g), _ = arrays
    other = DTYPES[q.dtype == DTYPES[0]]
    with pytest.raises(TypeError, match=f"key must be {q.dtype} like query, got {np.dtype(other)}"):
        combiner.attention(q, k.astype(other), v, Fixed())
    with pytest.raises(TypeError, match=f"value must be {q.dtype} like query, got float32"):
        combiner.attention(q, k, v.astype(np.float32), Fixed())
    _, saved = combiner.attention_forward(q, k, v, Fixed())
    with pytest.raises(TypeError, match=f"grad_lse must be float32 like query, got {q.dtype}"):
        combiner.attention_backward(g, saved, grad_lse=g[..., 0])
    with pytest.raises(TypeError, match=r"query must be .*, got float8_e5m2"):
        combiner.attention(q.astype(ml_dtypes.float8_e5m2), k, v, Fixed())
