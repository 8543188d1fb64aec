# SPDX-License-Identifier: Apache-2.0
"""A NaN or an infinity reaches what depends on it, as the reference says, and moves no bit of anything else."""

import ml_dtypes
import numpy as np
import pytest
from cases import each_isa

import combiner
from combiner import (
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Routing,
    Selected,
    Tree,
    Window,
    reference,
)

L = 39
PATTERNS = [
    Dense(),
    Fixed(6),
    Fixed(6, pooling="mean"),
    LogSparse(),
    LogSparse(hierarchical=True),
    Fixed(6).sparse(),
    Axial(6),
    Axial(6, "horizontal"),
    Axial(6, "rowmajor"),
    Axial(6, "rowmajor", "weighted"),
    AxialMixture(6),
    Tree(3),
    Routing(np.arange(L) * 7 % 5 * 2),  # every other cluster is empty
    Axial(6).sparse(),
    Tree(3).sparse(),
    Routing(np.arange(L) * 7 % 5).sparse(),
    Window(6),
    Fixed(6, window=8),
    Fixed(6, window=4).sparse(),
    Selected(Fixed(6), [[0, 2], [1, 0], [3, 4]], block=16),
    Selected(Tree(3), [0, 5, 13, 14], rest=False),
    Selected(Fixed(6), [[1, 3], [2, 4]], block=32, open=False, rest=False),
    HeavilyCompressed(6, 8),
    HeavilyCompressed(5, 4),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
both_directions = pytest.mark.parametrize("is_causal", (True, False))


def depends(pattern, is_causal: bool, tensor: int) -> np.ndarray:
    """[i, j]: whether query i reads position j of query (0), key (1) or value (2), directly or through a region."""
    parts = reference.parts(pattern, L, is_causal)
    below = [{j} for j in range(L)]
    for members in parts.members:
        below.append(set().union(*(below[m] for m in members)))
    reads = np.zeros((L, L), bool)
    for i in range(L):
        reads[i, i if tensor == 0 else parts.direct[i]] = True
        for r in parts.regions[i]:
            reads[i, list(below[L + r])] = True
    return reads


def backward(module, inputs, pattern, is_causal):
    """out, lse and the gradients of a module's attention."""
    with np.errstate(all="ignore"):
        out, saved = module.attention_forward(*inputs, pattern, is_causal=is_causal)
        grad_out = np.cos(np.arange(out[0].size)).astype(out.dtype).reshape(out[0].shape)
        gradients = module.attention_backward(np.broadcast_to(grad_out, out.shape), saved)
        return out, saved["lse"], *gradients[:3]


@pytest.mark.parametrize("dtype", (np.float32, np.float64, ml_dtypes.bfloat16))
@pytest.mark.parametrize("tensor", (0, 1, 2), ids=("query", "key", "value"))
@both_directions
@every_pattern
def test_poison(rng, pattern, is_causal, tensor, dtype):
    """The poisoned positions, one to a batch entry, and a clean entry before them."""
    poisons = [(j, poison) for j in range(L) for poison in (np.nan, np.inf, -np.inf)]
    if dtype != np.float32:
        poisons = poisons[::4]
    clean = [rng.standard_normal((1, 1, L, 4)).astype(dtype) for _ in range(3)]
    inputs = [np.repeat(x, 1 + len(poisons), axis=0) for x in clean]
    for n, (j, poison) in enumerate(poisons):
        inputs[tensor][1 + n, 0, j, j % 4] = poison
    reads, keys = depends(pattern, is_causal, tensor), depends(pattern, is_causal, 1)
    expected = backward(reference, inputs, pattern, is_causal)
    for isa in each_isa(pairing=dtype == ml_dtypes.bfloat16):
        actual = backward(combiner, inputs, pattern, is_causal)
        for name, x, exact in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
            spoiled, exactly = (~np.isfinite(y.reshape(1 + len(poisons), L, -1)) for y in (x, exact))
            for n, (j, poison) in enumerate(poisons):
                wrong = np.argwhere(spoiled[1 + n] != exactly[1 + n])
                assert not len(wrong), f"{isa}: {poison} at {j}: {wrong.tolist()} of {name}"
        for n, (j, poison) in enumerate(poisons):
            kept = ~reads[:, j]  # the queries that do not read the position
            untouched = kept & ~keys[reads[:, j]].any(axis=0)  # and the positions that no other query reads
            for x, rows in zip(actual, (kept, kept, untouched, untouched, untouched), strict=True):
                assert x[1 + n, 0, rows].tobytes() == x[0, 0, rows].tobytes(), f"{isa}: {poison} at {j}"


@pytest.mark.parametrize("poison", (np.nan, np.inf, -np.inf), ids=str)
@both_directions
@every_pattern
def test_masked_poison_reaches_nothing(rng, pattern, is_causal, poison):
    """Masked keys and values are never read, nor are masked queries by a pool; gradients neither."""
    mask = rng.random(L) < 0.6
    for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
        q, k, v, grad_out = rng.standard_normal((4, 2, L, 5)).astype(dtype)
        options = {"is_causal": is_causal, "key_mask": mask}

        def everything(q, k, v, options=options, grad_out=grad_out):
            out, saved = combiner.attention_forward(q, k, v, pattern, **options)
            return out, saved["lse"], *combiner.attention_backward(grad_out, saved)[:3]

        for _ in each_isa(pairing=dtype == ml_dtypes.bfloat16):
            clean = everything(q, k, v)
            poisoned = [np.where(mask[:, None], x, poison).astype(dtype) for x in (k, v)]
            for x, y in zip(everything(q, *poisoned), clean, strict=True):
                assert x.tobytes() == y.tobytes()
            assert not clean[3][:, ~mask].any() and not clean[4][:, ~mask].any()
            # A masked position's own query still attends: its poison stays in its own row.
            q_poisoned = np.where(mask[:, None], q, poison).astype(dtype)
            out = combiner.attention(q_poisoned, k, v, pattern, **options)
            assert out[:, mask].tobytes() == clean[0][:, mask].tobytes()


@both_directions
@every_pattern
def test_nothing_to_attend_to(pattern, is_causal):
    """Fully masked: zeros, -inf and zero gradients, whatever lies under the mask."""
    for dtype in (np.float32, np.float64):
        q = k = v = np.full((2, 3, L, 4), np.nan, dtype)
        q = np.ones_like(q)
        mask = np.zeros((2, L), bool)
        mask[1, 20:] = True
        k, v = (np.where(mask[:, None, :, None], x, np.nan).astype(dtype) for x in (q, q))
        out, saved = combiner.attention_forward(q, k, v, pattern, is_causal=is_causal, key_mask=mask)
        gradients = combiner.attention_backward(q, saved, grad_lse=np.ones((2, 3, L), dtype))
        assert not out[0].any() and np.isneginf(saved["lse"][0]).all()
        assert all(not x[0].any() and np.isfinite(x).all() for x in gradients[:3])
        if is_causal:
            assert not out[1, :, :20].any() and np.isneginf(saved["lse"][1, :, :20]).all()
            assert not any(x[1, :, :20].any() for x in gradients[:3])
        if pattern.plan(L, is_causal).is_full:  # a query that resumes its softmax rounds its log
            np.testing.assert_allclose(out[1, :, 20:], 1, rtol=0, atol=8 * np.finfo(dtype).eps)


@both_directions
@every_pattern
def test_poison_of_a_query_that_attends_nothing(rng, pattern, is_causal):
    """Its query, and the cotangents of its out and lse, reach nothing: it has no gradient to pass on."""
    blocked = 11 if is_causal else L
    mask = np.arange(L) >= blocked
    for dtype in (np.float32, np.float64):
        q, k, v, grad_out, grad_lse = (rng.standard_normal((2, L, 5)).astype(dtype) for _ in range(5))
        grad_lse = grad_lse[..., 0]

        def everything(q, grad_out, grad_lse, k=k, v=v):
            out, saved = combiner.attention_forward(q, k, v, pattern, is_causal=is_causal, key_mask=mask)
            return out, saved["lse"], *combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)[:3]

        for _ in each_isa():
            clean = everything(q, grad_out, grad_lse)
            spoiled = []
            for x in (q, grad_out, grad_lse):
                x = x.copy()
                x[:, :blocked] = np.nan
                spoiled.append(x)
            for x, y in zip(everything(*spoiled), clean, strict=True):
                assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("which", ("grad_out", "grad_lse"))
@both_directions
@every_pattern
def test_poisoned_cotangents(rng, pattern, is_causal, which):
    """A NaN in the gradient of one query reaches the gradients of what it reads, as the reference says."""
    keys = depends(pattern, is_causal, 1)
    for dtype in (np.float32, np.float64):
        q, k, v = (np.repeat(rng.standard_normal((1, 1, L, 4)).astype(dtype), 1 + L, axis=0) for _ in range(3))
        grad_out = np.repeat(rng.standard_normal((1, 1, L, 4)).astype(dtype), 1 + L, axis=0)
        grad_lse = np.repeat(rng.standard_normal((1, 1, L)).astype(dtype), 1 + L, axis=0)
        for i in range(L):
            poisoned = grad_out[1 + i, 0, i] if which == "grad_out" else grad_lse[1 + i, 0]
            poisoned[i % 4 if which == "grad_out" else i] = (np.nan, np.inf, -np.inf)[i % 3]
        with np.errstate(all="ignore"):
            _, exact = reference.attention_forward(q, k, v, pattern, is_causal=is_causal)
            expected = reference.attention_backward(grad_out, exact, grad_lse=grad_lse)
        for isa in each_isa():
            _, saved = combiner.attention_forward(q, k, v, pattern, is_causal=is_causal)
            actual = combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)
            for name, x, y in zip(("dq", "dk", "dv"), actual[:3], expected[:3], strict=True):
                spoiled, exactly = (~np.isfinite(z[1:, 0]) for z in (x, y))
                np.testing.assert_array_equal(spoiled, exactly, err_msg=f"{isa}: {name}")
                for i in range(L):
                    untouched = ~keys[i] & (np.arange(L) != i)
                    assert x[1 + i, 0, untouched].tobytes() == x[0, 0, untouched].tobytes(), f"{isa}: {name}, {i}"


@both_directions
@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern.plan(L).region_count], ids=str)
def test_rows_of_regions_out_of_use_are_not_read(rng, pattern, is_causal):
    """Given keys, queries and values of a region that nobody attends, or that is masked whole, may hold anything."""
    mask = ~((np.arange(L) >= 6) & (np.arange(L) < 18))
    for dtype in (np.float32, np.float64):
        q, k, v, grad = (rng.standard_normal((2, L, 5)).astype(dtype) for _ in range(4))
        options = {"is_causal": is_causal, "key_mask": mask}
        summary = combiner.summarize(q, k, v, pattern, **options)
        unused = np.isneginf(summary.lse)
        assert unused.any() and not unused.all()
        given = [rng.standard_normal(summary.key.shape).astype(dtype) for _ in range(2)]
        spoiled = [np.where(unused[..., None], np.nan, x).astype(dtype) for x in given]
        for _ in each_isa():
            results = []
            for region_query, region_key in (given, spoiled):
                regions = {"region_query": region_query, "region_key": region_key}
                out, saved = combiner.attention_forward(q, k, v, pattern, **options, **regions)
                again = combiner.summarize(q, k, v, pattern, **options, **regions)
                results.append([out, *combiner.attention_backward(grad, saved)[:5], *again[:3]])
            for x, y in zip(*results, strict=True):
                assert x.tobytes() == y.tobytes()
            assert not results[1][4][unused].any() and not results[1][5][unused].any()
            results = []
            for region_key, region_value in (summary[:2], spoiled):
                region_key, region_value = (
                    np.where(unused[..., None], x, y)
                    for x, y in zip((region_key, region_value), summary[:2], strict=True)
                )
                out, saved = combiner.attend_forward(q, k, v, region_key, region_value, pattern, **options)
                results.append([out, *combiner.attend_backward(grad, saved)[:5]])
            for x, y in zip(*results, strict=True):
                assert x.tobytes() == y.tobytes()


@both_directions
@every_pattern
def test_all_logits_minus_infinity_are_nan(pattern, is_causal):
    """As in dense attention: there is something to attend to, and no weight to give it."""
    q, v = np.ones((L, 1)), np.ones((L, 1))
    k = np.full((L, 1), -np.inf)
    out = combiner.attention(q, k, v, pattern, is_causal=is_causal)
    assert np.isnan(out).all()


@every_pattern
def test_subnormals_and_negative_zeros(rng, pattern):
    for dtype in (np.float32, np.float64):
        tiny = np.finfo(dtype).smallest_subnormal
        q, k, v = (rng.choice([-0.0, 0.0, tiny, -tiny, 1.0], (L, 4)).astype(dtype) for _ in range(3))
        for isa in each_isa():
            out = combiner.attention(q, k, v, pattern)
            np.testing.assert_allclose(out, reference.attention(q, k, v, pattern), rtol=0, atol=1e-6, err_msg=isa)
