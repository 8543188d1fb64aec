# SPDX-License-Identifier: Apache-2.0
"""combiner.select: the regions that its definition chooses, whatever the threads, layouts and instruction sets."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from cases import each_isa

import combiner
from combiner import Axial, Dense, Fixed, LogSparse, Mixture, Routing, Selected, Tree, reference

PATTERNS = [
    Fixed(7),
    Fixed(16, pooling="mean", size_bias=True),
    Fixed(8, window=12),
    LogSparse(pooling="sum"),
    LogSparse(hierarchical=True),
    Tree(3, size_bias=True),
    Tree(5, 2),
    Axial(7, "rowmajor", "weighted"),
    Dense(),
]


def draw(rng, L=150, B=2, Hq=4, Hk=2, D=8, dtype=np.float64) -> tuple[np.ndarray, np.ndarray]:
    """query and key, of float32 numbers."""
    return tuple(rng.standard_normal((B, H, L, D)).astype(np.float32).astype(dtype) for H in (Hq, Hk))


@pytest.mark.parametrize("score, causal_score", (("max", True), ("mean", True), ("max", False), ("mean", False)))
@pytest.mark.parametrize("block", (1, 7, 64, 100))
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_against_the_definition(rng, pattern, block, score, causal_score):
    for L, is_causal, masked in ((1, True, 0), (40, False, 0.5), (130, True, 0.5), (130, False, 0)):
        query, key = draw(rng, L)
        options = {"block": block, "is_causal": is_causal, "score": score, "causal_score": causal_score, "scale": 0.7}
        if masked:
            options["key_mask"] = rng.random((2, L)) >= masked
        exact = reference.select(query, key, pattern, 5, **options)
        assert exact.shape == (2, 2, -(-L // block), 5)
        np.testing.assert_array_equal(combiner.select(query, key, pattern, 5, **options), exact)


def test_a_plan_for_each_head(rng):
    query, key = draw(rng)
    pattern = Routing(rng.integers(0, 9, (2, 2, 150)))
    regions = combiner.select(query, key, pattern, 3, block=16)
    np.testing.assert_array_equal(regions, reference.select(query, key, pattern, 3, block=16))
    selected = Selected(pattern, regions, block=16)
    assert combiner.attention(query, key, key, selected).shape == query.shape


CU_SEQLENS = [0, 40, 40, 41, 110, 150]


@pytest.mark.parametrize("block", (1, 7, 64))
@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("pattern", (*PATTERNS, Fixed()), ids=str)
def test_packed_sequences_choose_as_if_alone(rng, pattern, is_causal, block):
    """With region numbers of their own; and, with what they open, they are attended as if alone."""
    options = {"block": block, "is_causal": is_causal}
    for dtype, score, has_keys in ((np.float32, "max", False), (np.float64, "mean", True)):
        query, key = draw(rng, dtype=dtype)
        mask = rng.random((2, 150)) < 0.8
        counts = [pattern.plan(b - a, is_causal).region_count for a, b in itertools.pairwise(CU_SEQLENS)]
        starts = [0, *itertools.accumulate(counts)]
        keys = rng.standard_normal((2, 2, starts[-1], 8)).astype(dtype) if has_keys else None
        given = {"score": score, "key_mask": mask, "cu_seqlens": CU_SEQLENS, "region_key": keys, **options}
        regions = combiner.select(query, key, pattern, 3, **given)
        np.testing.assert_array_equal(regions, reference.select(query, key, pattern, 3, **given))
        if isinstance(pattern, Axial | Dense):
            continue
        out, saved = combiner.attention_forward(
            query, key, key, Selected(pattern, regions, block=block), is_causal=is_causal, cu_seqlens=CU_SEQLENS
        )
        gradients = combiner.attention_backward(query, saved)
        first = 0
        for s, (a, b) in enumerate(itertools.pairwise(CU_SEQLENS)):
            q, k, g = query[..., a:b, :], key[..., a:b, :], query[..., a:b, :]
            own = None if keys is None else keys[..., starts[s] : starts[s + 1], :]
            given = {"score": score, "key_mask": mask[:, a:b], "region_key": own, **options}
            lists = combiner.select(q, k, pattern, 3, **given)
            assert (regions[..., first : first + lists.shape[-2], :] == lists).all()
            first += lists.shape[-2]
            alone, saved = combiner.attention_forward(
                q, k, k, Selected(pattern, lists, block=block), is_causal=is_causal
            )
            assert out[..., a:b, :].tobytes() == alone.tobytes()
            for x, y in zip(gradients[:3], combiner.attention_backward(g, saved)[:3], strict=True):
                assert x[..., a:b, :].tobytes() == y.tobytes()
        assert first == regions.shape[-2]


def test_packed_sequences_with_a_plan_for_each_head(rng):
    query, key = draw(rng)
    clusters = rng.integers(0, 9, (2, 2, 150))
    regions = combiner.select(query, key, Routing(clusters), 3, block=16, cu_seqlens=CU_SEQLENS)
    each = [
        combiner.select(query[..., a:b, :], key[..., a:b, :], Routing(clusters[..., a:b]), 3, block=16)
        for a, b in itertools.pairwise(CU_SEQLENS)
    ]
    np.testing.assert_array_equal(regions, np.concatenate(each, axis=-2))
    exact = reference.select(query, key, Routing(clusters), 3, block=16, cu_seqlens=CU_SEQLENS)
    np.testing.assert_array_equal(regions, exact)


@pytest.mark.parametrize("cu_seqlens, length", (([0], 0), ([0, 0, 0], 0), ([0, 9], 9), ([0, 0, 9], 9)))
def test_packed_sequences_that_are_empty(rng, cu_seqlens, length):
    query, key = (x[..., :length, :] for x in draw(rng))
    for options in ({}, {"is_causal": True}):
        regions = combiner.select(query, key, Fixed(4), 2, block=4, cu_seqlens=cu_seqlens, **options)
        np.testing.assert_array_equal(regions, combiner.select(query, key, Fixed(4), 2, block=4, **options))
        without_heads = combiner.select(query[0, 0], key[0, 0], Fixed(4), 2, block=4, cu_seqlens=cu_seqlens)
        assert without_heads.shape == regions.shape[2:]


def test_bits_of_threads_instruction_sets_and_layouts(rng):
    query, key = draw(rng, L=700, D=40, dtype=np.float32)
    key[:, :, 300:] = key[:, :, :400]  # equal scores
    for pattern, block, score in itertools.product((Fixed(16), LogSparse()), (1, 50), ("max", "mean")):
        options = {"block": block, "is_causal": True, "score": score, "causal_score": False}
        expected = combiner.select(query, key, pattern, 6, **options)
        for threads in (1, 3):
            with combiner.num_threads(threads):
                assert (combiner.select(query, key, pattern, 6, **options) == expected).all()
        for isa in each_isa():
            if isa != "base":  # whose sums may be rounded otherwise on a machine without FMA
                assert (combiner.select(query, key, pattern, 6, **options) == expected).all()
        apart = np.empty((2, 4, 700, 80), np.float32)[..., ::-1, :40]
        apart[...] = query
        assert (combiner.select(apart, key, pattern, 6, **options) == expected).all()
        alone = [[combiner.select(query[b, 2 * h : 2 * h + 2], key[b, h : h + 1], pattern, 6, **options)[0]
                  for h in range(2)] for b in range(2)]  # fmt: skip
        assert (np.array(alone) == expected).all()


@pytest.mark.parametrize("block", (1, 16, 64))
def test_a_causal_choice_knows_nothing_of_later_positions(rng, block):
    """Whatever comes after the first query of a block."""
    query, key = draw(rng, L=200)
    for pattern in (Fixed(8), LogSparse(), Tree(4)):
        chosen = combiner.select(query, key, pattern, 4, block=block, is_causal=True)
        for t in (1, 200 // block // 2, 200 // block):
            other_query, other_key = query.copy(), key.copy()
            other_query[:, :, t * block + 1 :] = rng.standard_normal((2, 4, max(0, 199 - t * block), 8))
            other_key[:, :, t * block + 1 :] = 100
            other = combiner.select(other_query, other_key, pattern, 4, block=block, is_causal=True)
            assert (other[:, :, : t + 1] == chosen[:, :, : t + 1]).all()


def test_the_choice_finds_the_key_that_a_query_looks_for():
    """Block t looks for feature t, which one key of region t has; block 0 holds its own region."""
    query, key = np.zeros((2, 1, 256, 64), np.float32)
    for t in range(4):
        query[0, 64 * t : 64 * t + 64, t] = 1
        key[0, 5 + 16 * t, t] = 1
    regions = combiner.select(query, key, Fixed(16), 1, block=64)
    assert regions[0, 1:, 0].tolist() == [1, 2, 3]


def test_region_keys_that_are_given(rng):
    query, key = draw(rng)
    given = rng.standard_normal((2, 2, Fixed(16).plan(150).region_count, 8))
    for heads in (2, 4):
        own = given if heads == 2 else given.repeat(2, axis=1)
        chosen = combiner.select(query, key, Fixed(16), 3, region_key=own)
        np.testing.assert_array_equal(chosen, reference.select(query, key, Fixed(16), 3, region_key=own))
    options = {"region_query": rng.standard_normal((2, 4, given.shape[2], 8))}
    weighted = combiner.select(query, key, Axial(16, "rowmajor", "weighted"), 2)
    assert weighted.shape == (2, 2, 3, 2)
    assert combiner.select(query, key, Fixed(16), 2, **options).shape == (2, 2, 3, 2)


@pytest.mark.parametrize("dtype", (ml_dtypes.bfloat16, np.float16, np.float32))
def test_dtypes(rng, dtype):
    """The choice of 16-bit arrays is that of the same numbers in float32."""
    query, key = (x.astype(dtype) for x in draw(rng))
    chosen = combiner.select(query, key, Fixed(16), 3, is_causal=True)
    wide = combiner.select(query.astype(np.float32), key.astype(np.float32), Fixed(16), 3, is_causal=True)
    assert chosen.dtype == np.int64 and (chosen == wide).all()
    given = rng.standard_normal((2, 4, 19, 8)).astype(dtype)
    for name, heads in (("region_query", 4), ("region_key", 2)):
        pattern = Axial(8, "rowmajor", "weighted")
        own = given[:, :heads].repeat(8, axis=2)[:, :, :150]
        chosen = combiner.select(query, key, pattern, 3, **{name: own})
        wide = combiner.select(
            query.astype(np.float32), key.astype(np.float32), pattern, 3, **{name: own.astype(np.float32)}
        )
        assert (chosen == wide).all()


def test_nan_scores_come_last(rng):
    query, key = draw(rng)
    key[:, :, 20] = np.nan
    regions = combiner.select(query, key, Fixed(16), 10)
    assert (regions[..., -1] == 1).all()


def test_shapes_without_heads_and_without_positions(rng):
    query, key = draw(rng)
    assert combiner.select(query[0, 0], key[0, 0], Fixed(16), 3).shape == (3, 3)
    assert combiner.select(query[..., :0, :], key[..., :0, :], Fixed(16), 3).shape == (2, 2, 0, 3)
    assert combiner.select(query[:0], key[:0], Fixed(16), 3).shape == (0, 2, 3, 3)
    assert combiner.select(query, key, Fixed(16), 0).shape == (2, 2, 3, 0)
    assert (combiner.select(query, key, Dense(), 2) == -1).all()


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"k": 2.5}, TypeError, "k must be an integer, got float"),
        ({"block": 0}, ValueError, "block must be at least 1, got 0"),
        ({"score": "sum"}, ValueError, "score must be one of 'max', 'mean', got 'sum'"),
        ({"causal_score": 1}, TypeError, "causal_score must be a bool, got int"),
        ({"query": [1.0]}, TypeError, "query must be a float32, float64, bfloat16 or float16 NumPy array, got list"),
        ({"key": np.zeros((2, 3, 150, 8))}, ValueError, "the heads of query must be a multiple of the heads of key"),
        ({"key": np.zeros((2, 2, 150, 9))}, ValueError, "key must have shape"),
        ({"pattern": Fixed}, TypeError, "pattern must be a pattern such as"),
        ({"pattern": Mixture(Fixed(4))}, ValueError, "pattern must have one softmax, got a Mixture"),
        ({"region_key": np.zeros((2, 2, 9, 8))}, ValueError, r"region_key must have shape \(2, Hk or Hq, 10, 8\)"),
        ({"key_mask": np.zeros(9, bool)}, ValueError, r"key_mask must have shape \(2, 150\), got \(9,\)"),
        ({"scale": np.inf}, ValueError, "scale must be finite, got inf"),
        ({"cu_seqlens": [0, 9]}, ValueError, "cu_seqlens must run from 0 to the length of query, 150"),
        ({"cu_seqlens": [0, 150], "key": np.zeros((2, 2, 151, 8))}, ValueError, "key must have shape"),
        ({"cu_seqlens": [0, 150], "pattern": Fixed(16).plan(150)}, ValueError, "pattern must make a plan for each"),
        (
            {"cu_seqlens": [0, 50, 150], "region_key": np.zeros((2, 2, 12, 8))},
            ValueError,
            r"region_key must have shape \(2, Hk or Hq, 11, 8\), got \(2, 2, 12, 8\)",
        ),
    ],
    ids=str,
)
def test_bad_arguments(rng, change, error, says):
    query, key = draw(rng)
    given = {"query": query, "key": key, "pattern": Fixed(16), "k": 2} | change
    with pytest.raises(error, match=says):
        combiner.select(**given)
