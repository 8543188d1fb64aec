# SPDX-License-Identifier: Apache-2.0
"""Plans against the spec's table: what the arrays say, decoded by brute force, is what the reference lists."""

import itertools

import numpy as np
import pytest
from cases import PATTERNS, below, random_parts

import combiner
from combiner import Axial, AxialMixture, Dense, Fixed, LogSparse, Plan, Routing, Tree, reference

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
        (lambda: Routing([0, 3, 1]), ValueError, "clusters must lie between 0 and 2, got 3"),
        (lambda: Routing([0, -1, 1]), ValueError, "clusters must lie between 0 and 2, got -1"),
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


def test_counts_of_large_plans():
    """Pairs by formula, and a plan's bytes, where brute force would take too long."""
    L, s = 1 << 14, 128
    fixed = Fixed(s).plan(L, True)
    assert fixed.pairs == L * (s + 1) // 2 + s * (L // s) * (L // s - 1) // 2
    assert Dense().plan(L, True).pairs == L * (L + 1) // 2
    assert Dense().plan(L, False).pairs == L * L
    log = LogSparse().plan(L, True)
    assert log.pairs == L * (1 + 14 / 2)  # itself, and a block for each set bit
    assert LogSparse().plan(L, False).pairs == L * (1 + 14)
    for plan in (fixed, log, LogSparse(hierarchical=True).plan(L, True)):
        assert plan.is_partition and plan.is_full
        assert plan.nbytes <= 0.01 * (4 * L * 64 * 8 * 4)  # 1% of q, k, v and out at 8 heads of 64 in float32
    assert not Fixed(s).sparse().plan(L, True).is_full


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
