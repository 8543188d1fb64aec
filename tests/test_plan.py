# SPDX-License-Identifier: Apache-2.0
"""Plans against docs/mathematics.md, section 3: the arrays, decoded by brute force, list what the reference lists."""

import concurrent.futures
import copy
import itertools
import multiprocessing
import pickle
import time

import numpy as np
import pytest
from cases import PATTERNS, below, random_parts

import combiner
from combiner import (
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Mixture,
    Plan,
    Routing,
    Tree,
    Window,
    reference,
)
from combiner.patterns import Sparse

EVERY = [
    *PATTERNS.values(),
    lambda **options: Fixed(1, **options),
    lambda **options: Fixed(64, **options),
    *(
        lambda width=width, order=order, **options: Axial(width, order, **options)
        for width in (1, 2, 64, 65, 100)
        for order in ("vertical", "horizontal", "rowmajor")
    ),
    *(lambda width=width, **options: AxialMixture(width, **options) for width in (1, 2, 64, 100)),
    *(lambda b=b, **options: Tree(b, **options) for b in (4, 16, 17, 64, 65)),
    *(lambda b=b, **options: Tree(b, 1, **options) for b in (2, 100)),
    *(
        lambda own=own, **options: Fixed(own[0], window=own[1], **options)
        for own in ((1, 2), (2, 100), (16, 16), (63, 3), (64, 64), (65, 64), (100, 65))
    ),
    *(lambda size=size, **options: Window(size, **options) for size in (2, 64, 65, 100)),
    *(
        lambda own=own, **options: HeavilyCompressed(*own, **options)
        for own in ((1, 1), (2, 100), (16, 16), (63, 3), (64, 64), (65, 64), (128, 65))
    ),
]


def decode(plan):
    """The parts that a plan's arrays spell out: direct[i], regions[i], members[r], positions[r] that region r pools."""
    a, L, R = plan.arrays, plan.length, len(plan.regions)

    def rows(start: int, step: int, count: int) -> list[int]:
        return [start + step * n for n in range(count)] if step else a["index"][start : start + count].tolist()

    attended = [[] for _ in range(L + R)]
    pooled = {j: [j] for j in range(L)}
    for wave, end in itertools.pairwise(a["wave"]):
        for task in range(wave, end):
            (pool, tile), (last_pool, last_tile) = a["task"][task], a["task"][task + 1]
            for row, *child in a["pool"][pool:last_pool]:
                pooled[row] = [j for c in rows(*child) for j in pooled[c]]
            for n in range(tile, last_tile):
                *query, run, width = a["tile"][n]
                assert width == 1 or (width % 16 == 0 and query[2] <= width)
                for *row, mask in a["run"][run : a["tile"][n + 1][3]]:
                    for k, key in enumerate(rows(*row)):
                        for t, i in enumerate(rows(*query)):
                            if mask < 0 or int(a["mask"][mask + k]) >> t & 1:
                                attended[i].append(int(key))
    direct = [sorted(t for t in rows if t < L) for rows in attended[:L]]
    regions = [sorted(t - L for t in rows if t >= L) for rows in attended[:L]]
    return direct, regions, [sorted(rows) for rows in attended[L:]], [sorted(pooled.get(L + r, [])) for r in range(R)]


def check(plan, parts, L: int, is_causal: bool) -> None:
    direct, regions, members, pooled = decode(plan)
    positions = below(parts, L)
    assert direct == [sorted(rows) for rows in parts.direct]
    # A region with nothing below it may be left out wherever it is listed.
    assert regions == [sorted(r for r in rows if positions[r]) for rows in parts.regions]
    needed = {r for rows in parts.regions for r in rows}
    for r in reversed(range(len(parts.members))):
        if r in needed:
            needed |= {t - L for t in parts.members[r] if t >= L}
            assert members[r] == sorted(t for t in parts.members[r] if t < L or positions[t - L]), r
    assert pooled == positions
    assert [rows.tolist() for rows in plan.regions] == [sorted(set(rows)) for rows in positions]
    assert plan.pairs == sum(map(len, direct)) + sum(map(len, regions))
    covered = [sorted(direct[i] + [j for r in regions[i] for j in positions[r]]) for i in range(L)]
    support = [list(range(i + 1 if is_causal else L)) for i in range(L)]
    assert plan.is_partition == (covered == support)
    assert plan.is_full == all(set(row) == set(whole) for row, whole in zip(covered, support, strict=True))
    assert plan.length == L and plan.is_causal == is_causal


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("make", EVERY, ids=lambda make: str(make()))
def test_plans_say_what_the_spec_says(make, is_causal):
    for L in [*range(71), 127, 128, 129, 200]:
        check(make().plan(L, is_causal), reference.parts(make(), L, is_causal), L, is_causal)


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("C", (1, 2, 9, 200))
def test_routing_says_what_the_spec_says(C, is_causal):
    rng = np.random.default_rng(C)
    for L in [*range(1, 71), 127, 128, 129, 200]:
        clusters = rng.integers(0, min(C, L), L)
        for pattern in (Routing(clusters), Routing(np.sort(clusters)), Routing(clusters).sparse()):
            check(pattern.plan(L, is_causal), reference.parts(pattern, L, is_causal), L, is_causal)
    empty = Routing(np.zeros(0, int))
    check(empty.plan(0, is_causal), reference.parts(empty, 0, is_causal), 0, is_causal)


def test_routing_has_a_plan_for_each_batch_entry_and_key_head():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 5, (2, 3, 30))
    q, k, v = rng.standard_normal((3, 2, 3, 30, 4))
    plans = Routing(clusters).plan(30, True)
    assert len(plans) == 6
    out = combiner.attention(q, k, v, Routing(clusters), is_causal=True)
    for b in range(2):
        for h in range(3):
            alone = combiner.attention(q[b, h], k[b, h], v[b, h], Routing(clusters[b, h]), is_causal=True)
            assert out[b, h].tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: Routing([0, 2**30, 1]), ValueError, r"clusters must lie between 0 and 2\^30 - 1, got 1073741824"),
        (lambda: Routing([0, -1, 1]), ValueError, r"clusters must lie between 0 and 2\^30 - 1, got -1"),
        (lambda: Routing([[0], [1, 0]]), ValueError, "clusters must be an array of integers, got list"),
        (lambda: Routing(np.zeros(3, "m8[s]")), TypeError, "clusters must hold integers, got timedelta64"),
        (lambda: Routing([True, False]), TypeError, "clusters must hold integers, got bool"),
        (lambda: Routing(8), ValueError, r"clusters must have shape .*, as combiner.cluster makes them, got \(\)"),
        (lambda: Routing([0.0, 1.0]), TypeError, "clusters must hold integers"),
        (lambda: Routing(1), ValueError, "clusters must have shape"),
        (lambda: Routing([0, 0]).plan(3), ValueError, "clusters are of 2 positions, got length 3"),
        (lambda: Axial(0), ValueError, "width must be at least 1"),
        (lambda: AxialMixture(0), ValueError, "width must be at least 1"),
        (lambda: Axial(4, "diagonal"), ValueError, "order must be one of"),
        (lambda: Axial(4, 1), TypeError, "order must be a str"),
        (lambda: Axial(4, "rowmajor", "mean"), ValueError, "row_key must be one of"),
        (lambda: Axial(4, row_key="weighted"), ValueError, "row_key may be 'weighted' only"),
        (lambda: Tree(1), ValueError, "branching must be at least 2"),
        (lambda: Fixed(4, window=0), ValueError, "window must be at least 1"),
        (lambda: Fixed(4, window=None), TypeError, "window must be an integer"),
        (lambda: Window(0), ValueError, "size must be at least 1"),
        (lambda: Window(2.5), TypeError, "size must be an integer"),
        (lambda: HeavilyCompressed(0), ValueError, "rate must be at least 1"),
        (lambda: HeavilyCompressed(None), TypeError, "rate must be an integer"),
        (lambda: HeavilyCompressed(4, 0), ValueError, "window must be at least 1"),
        (lambda: Tree(2, 0), ValueError, "levels must be at least 1"),
    ],
)
def test_bad_patterns(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("make", EVERY, ids=lambda make: str(make()))
def test_long_plans_say_what_the_spec_says(make, is_causal):
    for L in (1023, 2100) if make is Dense else (1023, 2100, 4200):
        check(make().plan(L, is_causal), reference.parts(make(), L, is_causal), L, is_causal)


@pytest.mark.parametrize("seed", range(60))
def test_plans_from_parts(seed):
    rng = np.random.default_rng(seed)
    L, R, is_causal = int(rng.integers(0, 90)), int(rng.integers(0, 30)), bool(seed % 2)
    parts = random_parts(rng, L, R, is_causal)
    check(Plan.from_parts(parts.direct, parts.regions, parts.members, is_causal=is_causal), parts, L, is_causal)


# ---- how many pairs, how they grow, and what a plan takes


def root(L: int) -> int:
    """The default span and width, and here also the clusters: sqrt(L) where that is a power of two."""
    return 1 << (L.bit_length() // 2)


def balanced(L: int) -> np.ndarray:
    """Clusters of one size, met in turn."""
    return np.arange(L) % root(L)


def upto(n: int) -> int:
    """1 + 2 + .. + n."""
    return n * (n + 1) // 2


# Pairs in closed form, causal and bidirectional, of L = n * m positions in n spans, rows or clusters of m.


def pairs_of_spans(L: int, m: int) -> tuple[int, int]:
    """The own span and something of each other: a summary, one position, or the place in the own column."""
    n = L // m
    return n * upto(m) + m * upto(n - 1), L * (m + n - 1)


def pairs_of_vertical(L: int, m: int) -> tuple[int, int]:
    cross, above = pairs_of_spans(L, m), (L - m) * (m - 1)  # the other columns, but for queries of the first row
    return cross[0] + above, cross[1] + 2 * above


def pairs_of_horizontal(L: int, m: int) -> tuple[int, int]:
    cross, n = pairs_of_spans(L, m), L // m
    return cross[0] + m * upto(n - 1), cross[1] + L * (n - 1)


def pairs_of_mixture(L: int, m: int) -> tuple[int, int]:
    vertical, halves = pairs_of_vertical(L, m), upto(L // m - 1) * (2 * m - 2)  # the end columns have one half
    return vertical[0] + halves, vertical[1] + 2 * halves


def pairs_of_tree(L: int, b: int, levels: int) -> tuple[int, int]:
    others = L * ((b - 1) * levels + L // b**levels - 1)  # leaf's and nodes' siblings, and the highest level's nodes
    return L + others // 2, L + others


def pairs_of_clusters(L: int, m: int) -> tuple[int, int]:
    n = L // m
    return n * upto(m) + upto(n - 1) + (L - n) * (n - 1), L * (m + n - 1)  # the first n queries meet the others


def pairs_of_window(L: int, size: int) -> tuple[int, int]:
    causal = L * size - upto(size - 1)  # the first queries have fewer positions before them
    return causal, 2 * causal - L


def pairs_of_fixed_window(L: int, span: int, window: int) -> tuple[int, int]:
    i = np.arange(L)
    first, last = np.maximum(i - window + 1, 0) // span, np.minimum(i + window - 1, L - 1) // span
    near = last - first + 1
    return int((i + 1 - first * (span - 1)).sum()), int((near * (span - 1) + L // span).sum())


def pairs_of_heavily_compressed(L: int, rate: int, window: int) -> tuple[int, int]:
    causal, whole = pairs_of_window(L, window)
    n = L // rate
    return causal + rate * upto(n - 1) + n, whole + L * n  # spans before the own one, and the own one's last query


COUNTS = {  # pattern of L; its pairs; the law by which they grow; how many the tiles compute for one of use, at most
    "dense": (lambda L: Dense(), lambda L: (upto(L), L * L), "L^2", 1.05),
    "fixed": (lambda L: Fixed(), lambda L: pairs_of_spans(L, root(L)), "L sqrt(L)", 1.3),
    "fixed32": (lambda L: Fixed(32), lambda L: pairs_of_spans(L, 32), None, 1.3),
    "sparse fixed": (lambda L: Fixed().sparse(), lambda L: pairs_of_spans(L, root(L)), "L sqrt(L)", 1.3),
    "logsparse": (lambda L: LogSparse(), lambda L: pairs_of_tree(L, 2, L.bit_length() - 2), "L log(L)", 5),
    "hierarchical": (
        lambda L: LogSparse(hierarchical=True),
        lambda L: pairs_of_tree(L, 2, L.bit_length() - 2),
        "L log(L)",
        7,
    ),
    "sparse logsparse": (
        lambda L: LogSparse().sparse(),
        lambda L: pairs_of_tree(L, 2, L.bit_length() - 2),
        "L log(L)",
        3,
    ),
    "vertical": (lambda L: Axial(), lambda L: pairs_of_vertical(L, root(L)), "L sqrt(L)", 1.3),
    "vertical16": (lambda L: Axial(16), lambda L: pairs_of_vertical(L, 16), None, 1.3),
    "horizontal": (lambda L: Axial(order="horizontal"), lambda L: pairs_of_horizontal(L, root(L)), "L sqrt(L)", 1.3),
    "rowmajor": (lambda L: Axial(order="rowmajor"), lambda L: pairs_of_spans(L, root(L)), "L sqrt(L)", 1.3),
    "sparse axial": (lambda L: Axial().sparse(), lambda L: pairs_of_spans(L, root(L)), "L sqrt(L)", 1.3),
    "mixture": (lambda L: AxialMixture(), lambda L: pairs_of_mixture(L, root(L)), "L sqrt(L)", 1.3),
    "tree4": (lambda L: Tree(4), lambda L: pairs_of_tree(L, 4, L.bit_length() // 2 - 1), "L log(L)", 4.5),
    "tree4.2": (lambda L: Tree(4, 2), lambda L: pairs_of_tree(L, 4, 2), None, 2),
    "sparse tree": (lambda L: Tree(16).sparse(), lambda L: (L * 17 // 2, L * 16), "L", 2),
    "window16": (lambda L: Window(16), lambda L: pairs_of_window(L, 16), "L", 2),
    "window128": (lambda L: Window(128), lambda L: pairs_of_window(L, 128), None, 1.2),
    "fixed window": (lambda L: Fixed(root(L), window=32), lambda L: pairs_of_fixed_window(L, root(L), 32), None, 1.3),
    "fixed32 window32": (lambda L: Fixed(32, window=32), lambda L: pairs_of_fixed_window(L, 32, 32), None, 1.3),
    "heavily compressed": (
        lambda L: HeavilyCompressed(),
        lambda L: pairs_of_heavily_compressed(L, 128, 128),
        None,
        1.2,
    ),
    "heavily compressed 16": (
        lambda L: HeavilyCompressed(16, 32),
        lambda L: pairs_of_heavily_compressed(L, 16, 32),
        None,
        1.2,
    ),
    "routing": (lambda L: Routing(balanced(L)), lambda L: pairs_of_clusters(L, root(L)), "L sqrt(L)", 1.3),
    "routing in order": (
        lambda L: Routing(np.sort(balanced(L))),
        lambda L: pairs_of_spans(L, root(L)),
        "L sqrt(L)",
        1.4,
    ),
    "sparse routing": (
        lambda L: Routing(balanced(L)).sparse(),
        lambda L: (L * (root(L) + 1) // 2, L * root(L)),
        "L sqrt(L)",
        1.3,
    ),
}
LAWS = {
    "L": lambda L: L,
    "L log(L)": lambda L: L * np.log(L),
    "L sqrt(L)": lambda L: L * np.sqrt(L),
    "L^2": lambda L: L * L,
}


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("name", COUNTS)
def test_pairs_are_as_many_as_the_formula_says(name, is_causal):
    """And grow by their law, and are not much fewer than the tiles compute."""
    make, pairs, law, factor = COUNTS[name]
    lengths = (1024, 4096, 16384)
    counts = []
    for L in lengths:
        plan = make(L).plan(L, is_causal)
        counts.append(plan.pairs)
        assert plan.pairs == pairs(L)[not is_causal]
    for (L, few), (longer, many) in itertools.pairwise(zip(lengths, counts, strict=True)):
        if law:
            assert many / few == pytest.approx(LAWS[law](longer) / LAWS[law](L), rel=0.03)
    plan = make(4096).plan(4096, is_causal)
    attended, summarized, computed, is_partition, is_full = plan._measure()
    assert attended + summarized <= computed <= factor * (attended + summarized)
    assert is_full == (not name.startswith(("sparse", "window")))
    assert is_partition == (is_full and name != "mixture" and "heavily" not in name)


def clusters_of_heads(L: int) -> np.ndarray:
    """A set of clusters of one size for each of 8 heads, in no order."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(balanced(L)) for _ in range(8)])


MADE = {name: make for name, (make, *_) in COUNTS.items()} | {
    "rowmajor weighted": lambda L: Axial(None, "rowmajor", "weighted"),
    "tree2": lambda L: Tree(2),
    "tree16": lambda L: Tree(16),
    "routing in no order": lambda L: Routing(clusters_of_heads(L)[0]),
    "routing of heads": lambda L: Routing(clusters_of_heads(L)),
}


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("name", MADE)
def test_plans_are_small(name, is_causal):
    """Beside q, k, v and out of 8 heads of 64 features in float32: under 2%; 8% where each head has its own plan."""
    L = 65536
    plans = MADE[name](L).plan(L, is_causal)
    nbytes = sum(plan.nbytes for plan in plans) if isinstance(plans, tuple) else plans.nbytes
    assert nbytes < (0.08 if isinstance(plans, tuple) else 0.02) * (4 * 8 * L * 64 * 4)


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("name", MADE)
def test_plans_are_quick_to_make(rng, name, is_causal):
    """Beside a forward of 8 heads of 64 features on two threads: under 10%; 25% where each head has its own plan."""
    L = 16384
    q, k, v = rng.standard_normal((3, 8, L, 64), np.float32)
    pattern = MADE[name](L)
    plan = pattern.plan(L, is_causal)

    def seconds(call, rounds: int) -> float:
        """The least of some rounds: what else the machine does only adds."""
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    with combiner.num_threads(2):
        forward = seconds(lambda: combiner.attention(q, k, v, plan), 1 if name == "dense" else 5)
    is_sparse = isinstance(pattern, Sparse)
    factorization = pattern.pattern if is_sparse else pattern
    making = seconds(lambda: factorization._build(L, is_causal, is_sparse), 15)
    assert making < (0.25 if isinstance(plan, tuple) else 0.1) * forward


def test_parts_as_pairs_of_arrays():
    """A CSR pair (offsets, items) is the same as the lists."""
    parts = reference.parts(Fixed(4), 14, True)

    def pair(lists):
        return np.cumsum([0, *map(len, lists)]), np.array([j for row in lists for j in row], np.int64)

    a = Plan.from_parts(parts.direct, parts.regions, parts.members, is_causal=True)
    b = Plan.from_parts(pair(parts.direct), pair(parts.regions), pair(parts.members), length=14, is_causal=True)
    assert decode(a) == decode(b)
    for name, x in a.arrays.items():
        np.testing.assert_array_equal(x, b.arrays[name])


@pytest.mark.parametrize("pattern", [Axial(), Routing(np.arange(4000) % 2)], ids=["Axial", "Routing"])
def test_regions_that_grow_share_memory(pattern):
    """One position for each region, however many positions lie below the regions."""
    regions = pattern.plan(4000, True).regions
    assert [rows[-1] for rows in regions] == list(range(4000)) and sum(map(len, regions)) > 2**16
    kept = {id(rows.base): rows.base.size for rows in regions}
    assert sum(kept.values()) == 4000


def test_plans_do_not_change():
    plan = Fixed(4).plan(14, True)
    for x in [*plan.arrays.values(), *plan.regions]:
        with pytest.raises(ValueError):
            x[:] = 0
    with pytest.raises((AttributeError, TypeError)):
        plan.length = 3
    assert Fixed(4).plan(14, True) is plan  # cached


@pytest.mark.parametrize(
    "parts, says",
    [
        (dict(direct=[[0], [2]]), ("2", "2")),
        (dict(direct=[[0], [-1]]), ("-1",)),
        (dict(direct=[[1], [1]], is_causal=True), ("query 0", "1")),
        (dict(direct=[[0], [1]], regions=[[0], []], members=[[1]], is_causal=True), ("query 0", "1")),
        (dict(direct=[[0], [1]], regions=[[], [1]], members=[[0]]), ("regions", "1")),
        (dict(direct=[[0], [1]], regions=[[], [0]], members=[[2]]), ("members[0]", "region 0")),
        (dict(direct=[[0], [1]], regions=[[], [0]], members=[[3], [0]]), ("members[0]", "region 1")),
        (dict(direct=[[0], [1]], regions=[[0]], members=[[0]]), ("regions", "1", "2")),
        (dict(direct=[[0], [1]], length=3), ("direct", "2", "3")),
        (dict(direct=[[0], [1]], pooling="median"), ("pooling", "median")),
    ],
    ids=str,
)
def test_bad_parts(parts, says):
    with pytest.raises(ValueError) as error:
        Plan.from_parts(**parts)
    for word in says:
        assert word in str(error.value)


def test_a_causal_call_refuses_a_plan_that_is_not():
    q = np.ones((1, 3, 4))
    plan = Plan.from_parts([[0], [1], [2]])
    combiner.attention(q, q, q, plan)
    with pytest.raises(ValueError, match="is_causal"):
        combiner.attention(q, q, q, plan, is_causal=True)
    with pytest.raises(ValueError, match="length"):
        combiner.attention(q[:, :2], q[:, :2], q[:, :2], plan)


def test_a_plan_without_pools_attends_regions_that_are_given():
    L, R, D = 3, 70, 8
    tile = [[0, 1, L, 0, 16], [0, 0, 0, 2, 0]]
    plan = Plan.from_arrays(
        [0, 1], [[0, 0], [0, 1]], [], tile, [[L, 1, R, -1], [0, 1, L, -1]], [], [], length=L, regions=R
    )
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, L, D))
    region_key, region_value = rng.standard_normal((2, 2, R, D))
    for mask in (None, np.array([True, False, True])):
        seen = slice(None) if mask is None else mask
        keys, values = (np.concatenate([x[:, seen], y], 1) for x, y in ((k, region_key), (v, region_value)))
        weights = np.exp(q @ keys.swapaxes(-1, -2) / np.sqrt(D))
        expected = weights @ values / weights.sum(-1, keepdims=True)
        out = combiner.attend(q, k, v, region_key, region_value, plan, key_mask=mask)
        np.testing.assert_allclose(out, expected, rtol=1e-12)
    for call in (combiner.attention, combiner.summarize):
        with pytest.raises(ValueError, match="plan must pool the regions it attends"):
            call(q, k, v, plan)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_clusters_of_few_positions(is_causal, sparse, rng):
    """A sequence shorter than the number of clusters has numbers beyond its length, as a segment has."""
    q, k, v = rng.standard_normal((3, 2, 4, 8))
    pattern = Routing([4, 0, 4, 2])
    dense = Routing([2, 0, 2, 1])  # the same clusters, numbered without gaps
    if sparse:
        pattern, dense = pattern.sparse(), dense.sparse()
    np.testing.assert_allclose(
        combiner.attention(q, k, v, pattern, is_causal=is_causal),
        reference.attention(q, k, v, dense, is_causal=is_causal),
        atol=1e-12,
    )
    assert pattern.plan(4, is_causal).region_count == (0 if sparse else 4 if is_causal else 5)


def test_cluster_numbers_cost_nothing_when_causal():
    """Memory goes by the positions: 2^30 - 1 would be gigabytes of counters."""
    clusters = np.array([2**30 - 1, 5, 2**30 - 1, 7])
    few = Routing([2, 0, 2, 1])
    for made in (Routing(clusters), Routing(clusters).sparse()):
        expected = (few if isinstance(made, Routing) else few.sparse()).plan(4, True)
        plan = made.plan(4, True)
        assert plan.nbytes == expected.nbytes and decode(plan) == decode(expected)


COPIES = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", [name for name in MADE if name != "routing of heads"])
def test_plans_and_patterns_are_copied(name, how, rng):
    """Plans were none of it, and with them what holds one: modules, mixtures, `saved`."""
    L, pattern = 37, MADE[name](37)
    q, k, v = rng.standard_normal((3, 2, L, 4)).astype(np.float32)
    for is_causal in (False, True):
        plan = pattern.plan(L, is_causal)
        again = COPIES[how](plan)
        assert again is plan or how == "pickle"
        for a, b in zip(plan.arrays.items(), again.arrays.items(), strict=True):
            assert a[0] == b[0] and a[1].dtype == b[1].dtype
            np.testing.assert_array_equal(a[1], b[1])
        assert repr(again) == repr(plan) and again.weighted == plan.weighted
        expected = combiner.attention(q, k, v, plan)
        assert combiner.attention(q, k, v, again).tobytes() == expected.tobytes()
        assert combiner.attention(q, k, v, COPIES[how](pattern), is_causal=is_causal).tobytes() == expected.tobytes()
        mixture = COPIES[how](Mixture(plan, Fixed(4)))
        np.testing.assert_array_equal(
            combiner.attention(q, k, v, mixture, is_causal=is_causal),
            combiner.attention(q, k, v, Mixture(plan, Fixed(4)), is_causal=is_causal),
        )
        out, saved = combiner.attention_forward(q, k, v, plan)
        for a, b in zip(
            combiner.attention_backward(out, COPIES[how](saved)), combiner.attention_backward(out, saved), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_copied_clusters_cannot_be_changed():
    for make in COPIES.values():
        pattern = make(Routing([0, 1, 1], pooling="sum", size_bias=True))
        assert not pattern.clusters.flags.writeable and repr(pattern) == repr(
            Routing([0, 1, 1], pooling="sum", size_bias=True)
        )


def test_a_forged_pickle_of_a_plan_is_refused():
    make, arrays = Fixed(4).plan(8).__reduce__()
    with pytest.raises(ValueError, match="its rows lie outside the table"):
        make(*arrays[:4], arrays[4] + 100, *arrays[5:])


def _attend_in_worker(plan, pattern, x):
    return combiner.attention(x, x, x, plan), pattern.plan(len(x)).pairs


def test_plans_in_spawned_workers(rng):
    """What a DataLoader or a process pool sends them."""
    plan, pattern, x = Plan.from_mask(np.tri(9, dtype=bool)), Mixture(Fixed(4).plan(9), LogSparse()), rng.random((9, 4))
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        out, pairs = pool.submit(_attend_in_worker, plan, Fixed(4), x).result(60)
        mean, _ = pool.submit(_attend_in_worker, pattern, Fixed(4), x).result(60)
    np.testing.assert_array_equal(out, combiner.attention(x, x, x, plan))
    np.testing.assert_array_equal(mean, combiner.attention(x, x, x, pattern))
    assert pairs == Fixed(4).plan(9).pairs


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_patterns_that_pool_nothing(pooling, rng):
    """Their pooling is taken, and makes no difference."""
    q, k, v = rng.standard_normal((3, 2, 30, 4))
    for make in (
        Dense,
        lambda **options: Axial(5, "rowmajor", **options),
        lambda **options: Axial(5, "rowmajor", "weighted", **options),
        lambda **options: Fixed(5, **options).sparse(),
    ):
        np.testing.assert_array_equal(
            combiner.attention(q, k, v, make(pooling=pooling)), combiner.attention(q, k, v, make())
        )
