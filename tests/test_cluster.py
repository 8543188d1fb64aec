# SPDX-License-Identifier: Apache-2.0
"""Spherical k-means, its balanced assignment and its online step, judged by the reference in float64.

Labels are decisions: they must be the reference's wherever the similarities that decide are further apart than
rounding. In float64, on inputs drawn at random, that is everywhere.
"""

import re
import sys
import time

import numpy as np
import pytest
from cases import content, each_isa
from test_bits import layouts

import combiner
from combiner import Routing, assign_clusters, cluster, fit_centroids, reference, update_centroids

both_dtypes = pytest.mark.parametrize("dtype", (np.float32, np.float64))
either = pytest.mark.parametrize("balanced", (False, True))

# L, D, n: around the sizes of tiles (64 rows, 48 or 96 centroids), tasks (512 rows, 8 clusters) and samples (16 n)
SIZES = [
    (1, 1, 1),
    (2, 3, 2),
    (5, 1, 3),
    (63, 8, 4),
    (64, 16, 64),
    (65, 17, 7),
    (130, 33, 49),
    (200, 5, 97),
    (512, 4, 8),
    (513, 64, 9),
    (1300, 12, 200),
]


def normal(rng, *shape: int, dtype: type = np.float64) -> np.ndarray:
    """Numbers that float32 holds, whatever the dtype, so that one reference judges both."""
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def similarity_of(x, centroids, clusters) -> np.ndarray:
    """Of each row to the centroid of its cluster, by the reference's arithmetic."""
    similarity = reference.directions(x) @ reference.directions(centroids).swapaxes(-1, -2)
    return np.take_along_axis(similarity, clusters[..., None], -1)[..., 0]


# ---- the definition


@either
@pytest.mark.parametrize("L, D, n", SIZES)
def test_clusters_and_centroids_are_the_references(rng, L, D, n, balanced):
    x = normal(rng, 2, L, D)
    for iterations, seed in ((0, 0), (1, 7), (10, 2**63 - 1)):
        expected = reference.fit_centroids(x, n, iterations=iterations, seed=seed)
        actual = fit_centroids(x, n, iterations=iterations, seed=seed)
        assert actual.dtype == x.dtype and actual.shape == (2, n, D)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)
        clusters = cluster(x, n, iterations=iterations, seed=seed, balanced=balanced)
        assert clusters.dtype == np.int64 and clusters.shape == (2, L)
        again = assign_clusters(x, actual, balanced=balanced)
        assert clusters.tobytes() == again.tobytes(), "cluster is not fit_centroids and assign_clusters"
        if not balanced:
            np.testing.assert_array_equal(clusters, reference.assign_clusters(x, expected))
    # Two rows alone in a cluster are as similar to its centroid: rounding decides their turns. Not so with any other.
    given = normal(rng, 2, n, D)
    np.testing.assert_array_equal(
        assign_clusters(x, given, balanced=balanced), reference.assign_clusters(x, given, balanced=balanced)
    )


@pytest.mark.parametrize("L, D, n", SIZES)
def test_float32_labels_within_rounding(rng, L, D, n):
    x, centroids = normal(rng, 3, L, D, dtype=np.float32), normal(rng, 3, n, D, dtype=np.float32)
    similarity = np.sort(reference.directions(x) @ reference.directions(centroids).swapaxes(-1, -2), axis=-1)
    actual, expected = assign_clusters(x, centroids), reference.assign_clusters(x, centroids)
    # D products of unit vectors: errors of directions and of the sum, each within D eps of sum |a||b| <= 1
    slack = (2 * D + 8) * np.finfo(np.float32).eps
    assert (similarity[..., -1] - similarity_of(x, centroids, actual) <= slack).all()
    if n > 1:
        sure = similarity[..., -1] - similarity[..., -2] > slack
        np.testing.assert_array_equal(actual[sure], expected[sure])


@both_dtypes
@pytest.mark.parametrize("decay", (0, 0.5, 0.999, 1))
def test_online_step_is_the_references(rng, decay, dtype):
    x, given = normal(rng, 2, 3, 700, 20, dtype=dtype), normal(rng, 2, 3, 11, 20, dtype=dtype)
    given /= np.linalg.norm(given, axis=-1, keepdims=True)
    clusters = rng.integers(0, 10, (2, 3, 700))  # the last cluster has no rows
    before = [a.tobytes() for a in (x, given, clusters)]
    moved = update_centroids(given, x, clusters, decay=decay)
    # 70 unit rows a cluster, whose mean may be as short as 1 / sqrt(70)
    atol = 1e-12 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(moved, reference.update_centroids(given, x, clusters, decay=decay), rtol=0, atol=atol)
    assert moved.dtype == dtype and moved[..., 10, :].tobytes() == given[..., 10, :].tobytes()
    assert [a.tobytes() for a in (x, given, clusters)] == before
    assert update_centroids(given, x, clusters.astype(np.uint8), decay=decay).tobytes() == moved.tobytes()


def test_online_steps_approach_the_centroids_of_a_fit(rng):
    """What the Routing Transformer relies on: with small steps the centroids become k-means's own."""
    x = normal(rng, 2000, 16)
    fitted = fit_centroids(x, 12, iterations=1000)
    centroids = reference.directions(fitted + 0.02 * normal(rng, 12, 16))
    for _ in range(300):
        centroids = update_centroids(centroids, x, assign_clusters(x, centroids), decay=0.9)
    objective = [similarity_of(x, c, assign_clusters(x, c)).mean() for c in (centroids, fitted)]
    assert abs(objective[0] - objective[1]) < 0.01 * objective[1]


# ---- what k-means promises


@both_dtypes
@pytest.mark.parametrize("n", (1, 5, 40))
def test_objective_never_falls(rng, n, dtype):
    x = normal(rng, 600, 10, dtype=dtype)
    centroids = [fit_centroids(x, n, iterations=t) for t in range(15)]
    objective = [similarity_of(x, c, assign_clusters(x, c)).mean() for c in centroids]
    assert (np.diff(objective) >= -4 * np.finfo(dtype).eps).all(), objective
    assert n == 1 or objective[-1] > objective[0]
    for c in centroids:
        np.testing.assert_allclose(np.linalg.norm(c, axis=-1), 1, rtol=0, atol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("n", (3, 16))
def test_groups_far_apart_are_found(rng, n):
    """k-means++ begins in every one of them, where rows drawn alike would miss a third."""
    center = np.linalg.qr(rng.standard_normal((20, 20)))[0][:n]
    group = rng.integers(0, n, 3000)
    x = (rng.uniform(0.1, 10, (3000, 1)) * (center[group] + 0.001 * rng.standard_normal((3000, 20)))).astype(np.float32)
    for seed in range(5):
        clusters = cluster(x, n, seed=seed)
        assert len(set(zip(clusters.tolist(), group.tolist(), strict=True))) == n


def test_rounds_end_where_nothing_changes(rng):
    x = normal(rng, 3, 300, 6)
    start = time.process_time()
    many = fit_centroids(x, 9, iterations=2**63 - 1)
    assert time.process_time() - start < 5
    np.testing.assert_array_equal(many, fit_centroids(x, 9, iterations=1000))
    clusters = assign_clusters(x, many)
    assert update_centroids(many, x, clusters, decay=0).tobytes() == many.tobytes()
    assert cluster(x, 9, iterations=1000).tobytes() == clusters.tobytes()
    assert cluster(x, 9, iterations=1000, balanced=True).tobytes() == assign_clusters(x, many, balanced=True).tobytes()


@both_dtypes
@pytest.mark.parametrize("L, n", [(1, 1), (7, 7), (7, 3), (64, 5), (700, 128), (700, 130), (3, 5), (0, 2)])
def test_balanced_sizes(rng, L, n, dtype):
    x, centroids = normal(rng, 3, L, 5, dtype=dtype), normal(rng, 3, n, 5, dtype=dtype)
    for rows in (x, np.abs(x), 0 * x):  # spread, on one side, all equal
        clusters = assign_clusters(rows, centroids, balanced=True)
        for one in clusters:
            sizes = np.bincount(one, minlength=n)
            assert sorted(sizes) == sorted([L // n] * (n - L % n) + [L // n + 1] * (L % n))
    np.testing.assert_array_equal(clusters, np.sort(clusters))  # of equals the first row takes the first cluster


def test_seeds_differ(rng):
    x = normal(rng, 400, 8)
    assert len({fit_centroids(x, 6, iterations=0, seed=seed).tobytes() for seed in (0, 1, 2, 2**32, 2**63 - 1)}) == 5


@pytest.mark.parametrize("is_causal", (False, True))
@either
def test_routing_takes_them(rng, balanced, is_causal):
    q, k, v = normal(rng, 3, 2, 4, 96, 8)
    clusters = cluster(k, 6, balanced=balanced)
    out = combiner.attention(q, k, v, Routing(clusters), is_causal=is_causal)
    for b, h in np.ndindex(2, 4):
        expected = reference.attention(q[b, h], k[b, h], v[b, h], Routing(clusters[b, h]), is_causal=is_causal)
        np.testing.assert_allclose(out[b, h], expected, rtol=0, atol=1e-10)


# ---- rows without a direction, of any length, and alike


@both_dtypes
def test_rows_without_a_direction(rng, dtype):
    """Zeros, NaN and Inf get the first cluster and move nothing: the other rows are as if these had been left out."""
    x = normal(rng, 300, 7, dtype=dtype)
    odd = np.array([0, 50, 131, 299])
    x[odd] = [[0] * 7, [np.nan] * 7, [1, np.inf, 0, 0, 0, 0, 0], [0, 0, -np.inf, np.nan, 1, 1, 1]]
    rest = np.delete(x, odd, axis=0)
    centroids = normal(rng, 9, 7, dtype=dtype)
    clusters = assign_clusters(x, centroids)
    assert (clusters[odd] == 0).all()
    np.testing.assert_array_equal(np.delete(clusters, odd), assign_clusters(rest, centroids))
    moved = update_centroids(centroids, x, clusters, decay=0.3)
    assert moved.tobytes() == update_centroids(centroids, rest, np.delete(clusters, odd), decay=0.3).tobytes()
    assert np.isfinite(fit_centroids(x, 9)).all()
    assert np.isfinite(moved).all()
    if dtype is np.float64:
        for balanced in (False, True):
            np.testing.assert_array_equal(cluster(x, 9, balanced=balanced), reference.cluster(x, 9, balanced=balanced))
        np.testing.assert_array_equal(
            assign_clusters(x, centroids, balanced=True), reference.assign_clusters(x, centroids, balanced=True)
        )


@pytest.mark.parametrize("value", (0, np.nan, np.inf))
def test_nothing_has_a_direction(value):
    x = np.full((70, 3), float(value))
    np.testing.assert_array_equal(fit_centroids(x, 4), 0)
    np.testing.assert_array_equal(cluster(x, 4), 0)
    assert np.bincount(cluster(x, 4, balanced=True)).tolist() == [18, 18, 17, 17]
    given = np.eye(3)
    np.testing.assert_array_equal(update_centroids(given, x, cluster(x, 3)), given)


@both_dtypes
def test_centroids_without_a_direction(rng, dtype):
    """They are as similar, 0, to every row; the step leaves them, and those whose rows cancel, as they are."""
    x = normal(rng, 100, 4, dtype=dtype)
    centroids = np.array([[np.nan, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, np.inf, 0, 0]], dtype)
    clusters = assign_clusters(x, centroids)
    np.testing.assert_array_equal(clusters, np.where(x.astype(np.float64).sum(-1) > 0, 2, 0))
    np.testing.assert_array_equal(clusters, reference.assign_clusters(x, centroids))
    moved = update_centroids(centroids, x, clusters)
    np.testing.assert_array_equal(moved[[0, 1, 3]], centroids[[0, 1, 3]])
    opposite = np.array([[1, 2, 3, 4], [-1, -2, -3, -4]], dtype)
    np.testing.assert_array_equal(update_centroids(centroids[2:3], opposite, np.array([0, 0]), decay=0), centroids[2:3])


@both_dtypes
def test_lengths_make_no_difference(rng, dtype):
    """Rows times powers of two, from one end of the type to the other, have the same bits in all that comes out."""
    x = normal(rng, 200, 6, dtype=dtype)
    info = np.finfo(dtype)
    lowest, highest = info.minexp + 30, info.maxexp - 4  # no product is subnormal: none loses bits
    scaled = np.ldexp(x, rng.integers(lowest, highest, (200, 1)))
    scaled[:2] = np.ldexp(x[:2], [[lowest], [highest]])
    assert np.isfinite(scaled).all() and (scaled != 0).all()
    for balanced in (False, True):
        np.testing.assert_array_equal(cluster(scaled, 7, balanced=balanced), cluster(x, 7, balanced=balanced))
    assert fit_centroids(scaled, 7).tobytes() == fit_centroids(x, 7).tobytes()
    tiny = np.full((4, 6), np.finfo(dtype).smallest_subnormal)  # even these
    tiny[1:3] *= -1
    np.testing.assert_array_equal(assign_clusters(tiny, np.array([[1] * 6, [-1] * 6], dtype)), [0, 1, 1, 0])


@both_dtypes
def test_fewer_rows_than_clusters(rng, dtype):
    """Equal rows stay together; what is left of n centroids repeats rows, without any of their own."""
    few = normal(rng, 5, 8, dtype=dtype)
    which = rng.integers(0, 5, 200)
    which[:5] = range(5)
    clusters = cluster(few[which], 20)
    assert len(set(zip(clusters.tolist(), which.tolist(), strict=True))) == 5
    np.testing.assert_allclose(np.linalg.norm(fit_centroids(few[which], 20), axis=-1), 1, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(cluster(np.ones((9, 3), dtype), 4), 0)
    x = np.zeros((9, 3), dtype)
    x[4] = [0, -2, 0]
    centroids = fit_centroids(x, 3)
    np.testing.assert_array_equal(centroids, [[0, -1, 0]] * 3)
    np.testing.assert_array_equal(cluster(x, 3), 0)


def test_rows_are_assigned_alone(rng):
    """What a causal model relies on: a row's cluster depends on no other row."""
    x, centroids = normal(rng, 600, 9, dtype=np.float32), normal(rng, 120, 9, dtype=np.float32)
    clusters = assign_clusters(x, centroids)
    for rows in (slice(0, 1), slice(0, 599), slice(70, 133), slice(None, None, -7)):
        np.testing.assert_array_equal(assign_clusters(x[rows], centroids), clusters[rows])


def test_ties_go_to_the_first_centroid(rng):
    x, centroids = normal(rng, 300, 4, dtype=np.float32), normal(rng, 150, 4, dtype=np.float32)
    twice = np.concatenate([centroids, centroids[::-1], centroids])
    np.testing.assert_array_equal(assign_clusters(x, twice), assign_clusters(x, centroids))


def test_empty():
    for shape in ((0, 5, 3), (2, 0, 5, 3), (2, 3, 0, 3), (0, 3)):
        x = np.zeros(shape, np.float32)
        for balanced in (False, True):
            assert cluster(x, 2, balanced=balanced).shape == shape[:-1]
        centroids = fit_centroids(x, 2)
        assert centroids.shape == (*shape[:-2], 2, 3) and not centroids.any()
        assert assign_clusters(x, centroids).shape == shape[:-1]
        given = np.ones((*shape[:-2], 2, 3), np.float32)
        np.testing.assert_array_equal(update_centroids(given, x, np.zeros(shape[:-1], np.int8)), given)


def test_heads_without_positions_take_no_time():
    """2^40 of them were gone through, one by one."""
    x = np.broadcast_to(np.float32(1), (2**40, 0, 3))
    assert cluster(x, 3).shape == cluster(x, 3, balanced=True).shape == (2**40, 0)


# ---- bits


def everything(x, n: int = 50) -> list[bytes]:
    """All that the functions make of x."""
    centroids = fit_centroids(x, n, iterations=3)
    clusters = assign_clusters(x, centroids)
    made = [centroids, clusters, assign_clusters(x, centroids, balanced=True)]
    made += [cluster(x, n, iterations=3), cluster(x, n, iterations=3, balanced=True)]
    return content((*made, update_centroids(centroids, x, clusters, decay=0.7)))


@both_dtypes
def test_bits_whatever_the_threads(rng, dtype):
    x = normal(rng, 2, 3, 1600, 20, dtype=dtype)
    with combiner.num_threads(1):
        expected = everything(x)
    for threads in (2, 3, 7):
        with combiner.num_threads(threads):
            for _ in range(3):
                assert everything(x) == expected


@pytest.mark.skipif(len(combiner.info()["isas"]) < 3, reason="needs two instruction sets with FMA")
@both_dtypes
@pytest.mark.parametrize("L, D, n", [(300, 37, 50), (130, 5, 7), (200, 64, 130)])
def test_bits_whatever_the_instruction_set(rng, L, D, n, dtype):
    x = normal(rng, 2, L, D, dtype=dtype)
    results = [everything(x, n) for isa in each_isa() if isa != "base"]
    assert results[1:] == results[:-1]


def test_every_instruction_set_is_right(rng):
    x = normal(rng, 2, 300, 21)
    expected = reference.cluster(x, 9)
    for isa in each_isa():
        np.testing.assert_array_equal(cluster(x, 9), expected, err_msg=isa)


@both_dtypes
def test_bits_whatever_the_strides(rng, dtype):
    x = normal(rng, 2, 3, 150, 12, dtype=dtype)
    centroids, clusters = fit_centroids(x, 5), cluster(x, 5)
    moved = update_centroids(centroids, x, clusters)
    for name, view in layouts(x).items():
        before = view.tobytes()
        assert everything(view) == everything(x), name
        assert view.tobytes() == before, "an input was written"
        for other in layouts(centroids).values():
            assert assign_clusters(view, other).tobytes() == clusters.tobytes(), name
            assert update_centroids(other, view, clusters[::-1][::-1]).tobytes() == moved.tobytes(), name
    once = np.broadcast_to(x[:1, :1], x.shape)
    assert everything(once) == everything(np.ascontiguousarray(once))
    shared = np.broadcast_to(centroids[0, 0], centroids.shape)  # one set for all, as the docstring has it
    assert assign_clusters(x, shared).tobytes() == assign_clusters(x, np.ascontiguousarray(shared)).tobytes()


def test_bits_alone_and_in_company(rng):
    """Every [L, D] as if it were alone, more of them than are worked on at once among them."""
    x = normal(rng, 5, 60, 64, 9, dtype=np.float32)
    centroids, clusters, balanced = fit_centroids(x, 4), cluster(x, 4), cluster(x, 4, balanced=True)
    for b, h in ((0, 0), (2, 31), (4, 59)):
        assert fit_centroids(x[b, h], 4).tobytes() == centroids[b, h].tobytes()
        assert cluster(x[b, h], 4).tobytes() == clusters[b, h].tobytes()
        assert cluster(x[b, h], 4, balanced=True).tobytes() == balanced[b, h].tobytes()
    assert cluster(x[:, None], 4).tobytes() == clusters.tobytes()
    large = normal(rng, 3, 30000, 64, dtype=np.float32)  # of which one fills the memory in flight
    with combiner.num_threads(1):
        assert cluster(large, 2, iterations=1)[2].tobytes() == cluster(large[2], 2, iterations=1).tobytes()


# ---- arguments

B, H, L, D, N = 2, 3, 12, 4, 5


def good() -> dict:
    x = np.random.default_rng(0).standard_normal((B, H, L, D))
    return {
        "x": x,
        "n": N,
        "iterations": 2,
        "balanced": True,
        "seed": 1,
        "centroids": x[..., :N, :],
        "clusters": np.zeros((B, H, L), np.int32),
        "decay": 0.5,
    }


CALLS = {
    cluster: ("x", "n", "iterations", "balanced", "seed"),
    fit_centroids: ("x", "n", "iterations", "seed"),
    assign_clusters: ("x", "centroids", "balanced"),
    update_centroids: ("centroids", "x", "clusters", "decay"),
}
X = good()["x"]
SWAPPED = X.dtype.newbyteorder()
WRONG = [
    *(
        ("x", x, TypeError, f"x must be a float32, float64, bfloat16 or float16 NumPy array, got {name}")
        for x, name in (
            (X.tolist(), "list"),
            (None, "NoneType"),
            (np.ma.masked_array(X), "MaskedArray"),
            (X.astype(np.int64), "int64"),
            (X.astype(complex), "complex128"),
        )
    ),
    ("centroids", X.astype(np.float16), TypeError, "centroids must be float64 like x, got float32"),
    ("x", X.astype(SWAPPED), TypeError, "x must be in native byte order"),
    ("x", X[0, 0, 0], ValueError, r"x must have shape \(..., L, D\), got 1 axes"),
    ("x", X[..., :0], ValueError, "x must have 1 to 1024 features, got 0"),
    ("x", np.zeros((6, 1025)), ValueError, "x must have 1 to 1024 features, got 1025"),
    ("n", 0, ValueError, "n must be at least 1, got 0"),
    ("n", -3, ValueError, "n must be at least 1, got -3"),
    ("n", L + 1, ValueError, "n must be at most the length of x, 12, got 13"),
    ("n", 2**62, ValueError, f"n must be at most the length of x, 12, got {2**62}"),
    ("n", 2**63, ValueError, r"n must be below 2\^63"),
    ("n", 2.0, TypeError, "n must be an integer, got float"),
    ("n", True, TypeError, "n must be an integer, got bool"),
    ("n", None, TypeError, "n must be an integer, got NoneType"),
    ("iterations", -1, ValueError, "iterations must be at least 0, got -1"),
    ("iterations", 1.5, TypeError, "iterations must be an integer, got float"),
    ("seed", -1, ValueError, "seed must be at least 0, got -1"),
    ("seed", 2**64, ValueError, r"seed must be below 2\^63"),
    ("seed", "1", TypeError, "seed must be an integer, got str"),
    ("seed", None, TypeError, "seed must be an integer, got NoneType"),
    ("balanced", 1, TypeError, "balanced must be a bool, got int"),
    ("balanced", None, TypeError, "balanced must be a bool, got NoneType"),
    (
        "centroids",
        X.tolist(),
        TypeError,
        "centroids must be a float32, float64, bfloat16 or float16 NumPy array, got list",
    ),
    ("centroids", X.astype(np.float32), TypeError, "centroids must be float64 like x, got float32"),
    ("centroids", X[0], ValueError, r"centroids must have shape \(2, 3, n, 4\), got \(3, 12, 4\)"),
    ("centroids", X[:, :2], ValueError, r"centroids must have shape \(2, 3, n, 4\), got \(2, 2, 12, 4\)"),
    ("centroids", X[..., :3], ValueError, r"centroids must have shape \(2, 3, n, 4\), got \(2, 3, 12, 3\)"),
    ("centroids", X[..., :0, :], ValueError, "centroids must be at least 1 for each head, got 0"),
    ("clusters", [0] * L, TypeError, "clusters must be a NumPy array of integers, got list"),
    ("clusters", X[..., 0], TypeError, "clusters must be a NumPy array of integers, got float64"),
    ("clusters", np.zeros((B, H, L), bool), TypeError, "clusters must be a NumPy array of integers, got bool"),
    ("clusters", np.zeros((H, L), int), ValueError, r"clusters must have shape \(2, 3, 12\), got \(3, 12\)"),
    ("clusters", np.zeros((B, H, L + 1), int), ValueError, r"clusters must have shape \(2, 3, 12\), got"),
    ("clusters", np.full((B, H, L), N), ValueError, "clusters must lie between 0 and 4, got 5 at position 0"),
    ("clusters", np.full((B, H, L), -1, np.int8), ValueError, "clusters must lie between 0 and 4, got -1 at position"),
    ("clusters", np.full((B, H, L), 2**64 - 1, np.uint64), ValueError, "clusters must lie between 0 and 4"),
    ("decay", float("nan"), ValueError, "decay must be between 0 and 1, got nan"),
    ("decay", -0.1, ValueError, "decay must be between 0 and 1, got -0.1"),
    ("decay", 1.5, ValueError, "decay must be between 0 and 1, got 1.5"),
    ("decay", 10**400, ValueError, "decay must be finite"),
    ("decay", "1", TypeError, "decay must be a number, got str"),
    ("decay", None, TypeError, "decay must be a number, got NoneType"),
    ("decay", 1j, TypeError, "decay must be a number, got complex"),
]


@pytest.mark.parametrize("name, value, error, message", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_argument_is_named(name, value, error, message):
    arguments = good() | {name: value}
    for function, names in CALLS.items():
        if name not in names:
            continue
        chosen = {name: arguments[name] for name in names}
        before = {key: x.tobytes() for key, x in chosen.items() if isinstance(x, np.ndarray)}
        counts = {key: sys.getrefcount(chosen[key]) for key in before}
        with pytest.raises(error, match=message) as caught:
            function(**chosen)
        del caught
        assert {key: chosen[key].tobytes() for key in before} == before, "an argument was written to"
        assert {key: sys.getrefcount(chosen[key]) for key in before} == counts, "a reference was lost"


def test_a_bad_cluster_is_found_wherever_it_is():
    arguments = good()
    for wrong in (N, -1, 2**31, -(2**40)):
        clusters = np.zeros((B, H, L), np.int64)
        clusters[1, 2, 7] = wrong
        with pytest.raises(ValueError, match=re.escape(f"between 0 and 4, got {wrong} at position 7")):
            update_centroids(arguments["centroids"], arguments["x"], clusters)


@pytest.mark.parametrize("shape", [(2**45, 4, 8), (2**20, 2**25, 8), (2**31, 8), (2**21, 2**21, 1, 4, 8)])
def test_sizes_that_no_machine_has(shape):
    x = np.broadcast_to(np.float32(1), shape)
    for call in (lambda: cluster(x, 2), lambda: fit_centroids(x, 2), lambda: assign_clusters(x, x[..., :2, :])):
        with pytest.raises((ValueError, OverflowError, MemoryError)):
            call()
