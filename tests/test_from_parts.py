# SPDX-License-Identifier: Apache-2.0
"""The engine is general: plans without rhyme, from parts and from raw arrays, against the reference."""

import numpy as np
import pytest
from cases import PATTERNS, Case, Judge, below, close, draw, each_isa, random_parts
from hypothesis import given, settings
from hypothesis import strategies as st

import combiner
from combiner import Plan, reference


def plan_of(parts, is_causal: bool):
    return Plan.from_parts(
        parts.direct,
        parts.regions,
        parts.members,
        is_causal=is_causal,
        pooling=parts.pooling,
        size_bias=parts.size_bias,
    )


def check(problem, plan) -> None:
    """Forward, backward and both stages of a plan, against the parts in problem.pattern."""
    judge = Judge(problem)
    for dtype in (np.float64, np.float32):
        p = problem.as_type(dtype)
        out, saved = combiner.attention_forward(*p.inputs, plan, **p.options)
        judge.accepts_forward(out)
        judge.accepts_backward(combiner.attention_backward(p.grad_out, saved, grad_lse=p.grad_lse))
        summary = combiner.summarize(*p.inputs, plan, **p.of_summarize)
        expected = combiner.reference.summarize(*p.inputs, problem.pattern, **p.of_summarize)
        for name, x, exact in zip(summary._fields[:3], summary[:3], expected[:3], strict=True):
            size = 1 + np.abs(np.where(np.isfinite(exact), exact, 0)).max(initial=0)
            close(x, exact, (1e-10 if dtype == np.float64 else 1e-4) * size, f"summary {name}")
        rest = p.of_attend
        judge.accepts_forward(*combiner.attend(*p.inputs, *summary[:2], plan, return_lse=True, **rest))


@pytest.mark.parametrize("seed", range(80))
def test_random_parts(seed):
    rng = np.random.default_rng(seed)
    is_causal = bool(rng.integers(2))
    L, R = int(rng.integers(1, 100)), int(rng.integers(0, 40))
    parts = random_parts(
        rng, L, R, is_causal, pooling=rng.choice(["max", "mean", "sum"]).item(), size_bias=bool(rng.integers(2))
    )
    Hk, group = rng.integers(1, 3, 2).tolist()
    case = Case(
        "random",
        L,
        int(rng.integers(1, 3)),
        Hk * group,
        Hk,
        int(rng.integers(1, 20)),
        int(rng.integers(1, 20)),
        is_causal,
        masked=float(rng.choice([0, 0, 0.3, 0.8])),
        given=rng.choice(["", "", "query", "key", "query key"]).item(),
    )
    problem = draw(rng, parts, case)
    plan = plan_of(parts, is_causal)
    for _ in each_isa():
        check(problem, plan)


class Arrays:
    """A plan drawn as its arrays: every way that combiner.h allows to say the same parts.

    Regions pooled through scratch rows, queries met again in later tiles, lanes in any order, masks and full runs,
    tables of indices and of steps.
    """

    def __init__(self, rng, parts, is_causal: bool):
        self.rng, self.parts, self.L, self.R = rng, parts, len(parts.direct), len(parts.members)
        self.wave, self.task, self.pool, self.tile, self.run, self.index, self.mask = ([] for _ in range(7))
        self.scratch = 0
        self.summarize()
        self.attend()
        self.wave.append(len(self.task))
        self.task.append((len(self.pool), len(self.tile)))
        self.tile.append((0, 1, 0, len(self.run), 0))
        self.plan = Plan.from_arrays(
            np.array(self.wave, np.int32),
            np.array(self.task, np.int32).reshape(-1, 2),
            np.array(self.pool, np.int32).reshape(-1, 4),
            np.array(self.tile, np.int32).reshape(-1, 5),
            np.array(self.run, np.int32).reshape(-1, 4),
            np.array(self.index, np.int32),
            np.array(self.mask, np.uint64),
            length=self.L,
            regions=self.R,
            scratch=self.scratch,
            is_causal=is_causal,
            pooling="first" if parts.pick else parts.pooling,
            size_bias=parts.size_bias,
            weighted=parts.weighted,
        )

    def row_list(self, rows: list[int]) -> tuple[int, int, int]:
        steps = set(np.diff(rows).tolist())
        if len(rows) > 1 and len(steps) == 1 and 0 not in steps and self.rng.random() < 0.7:
            return rows[0], steps.pop(), len(rows)
        if len(rows) == 1 and self.rng.random() < 0.5:
            return rows[0], 1, 1
        self.index += rows
        return len(self.index) - len(rows), 0, len(rows)

    def start_wave(self) -> None:
        self.wave.append(len(self.task))

    def start_task(self) -> None:
        self.task.append((len(self.pool), len(self.tile)))

    def summarize(self) -> None:
        """A wave for each depth of nesting, and sometimes a second one that goes on with the same queries."""
        positions = below(self.parts, self.L)
        depth = {}
        for r, members in enumerate(self.parts.members):
            depth[r] = 1 + max((depth[t - self.L] for t in members if t >= self.L), default=0)
        needed = {r for rows in self.parts.regions for r in rows}
        for r in reversed(range(self.R)):
            needed |= {t - self.L for t in self.parts.members[r] if t >= self.L} if r in needed else set()
        for level in sorted(set(depth.values())):
            regions = [r for r in range(self.R) if depth[r] == level and positions[r]]
            wanted = {
                self.L + r: [t for t in self.parts.members[r] if t < self.L or positions[t - self.L]]
                for r in regions
                if r in needed
            }
            first, then = self.halves(wanted)
            self.start_wave()
            for group in self.groups(regions, 5):
                self.start_task()
                scratch = self.L + self.R
                for r in group:
                    scratch = self.pool_region(r, positions[r], scratch)
                self.tiles({row: first[row] for r in group if (row := self.L + r) in first})
            self.start_wave()
            for group in self.groups(list(then), 9):
                self.start_task()
                self.tiles({row: then[row] for row in group})

    def pool_region(self, r: int, positions: list[int], scratch: int) -> int:
        """From its positions, some of them through scratch rows that stand in their order; or from its members."""
        children = list(self.parts.pick[r]) if self.parts.pick else list(positions)
        members = self.parts.members[r]
        if not self.parts.pick and min(members) >= self.L and self.rng.random() < 0.5:
            children = [t for t in members if below(self.parts, self.L)[t - self.L]]
        while len(children) > 1 and self.rng.random() < 0.5:
            a, b = sorted(self.rng.choice(len(children) + 1, 2, replace=False).tolist())
            self.pool.append((scratch, *self.row_list(children[a:b])))
            children[a:b] = [scratch]
            scratch += 1
        self.scratch = max(self.scratch, scratch - self.L - self.R)
        self.pool.append((self.L + r, *self.row_list(children)))
        return scratch

    def attend(self) -> None:
        positions = below(self.parts, self.L)
        regions = [[self.L + r for r in rows if positions[r]] for rows in self.parts.regions]
        for wanted in self.halves({i: self.parts.direct[i] + regions[i] for i in range(self.L)}):
            self.start_wave()
            for group in self.groups(list(wanted), 70):
                self.start_task()
                self.tiles({row: wanted[row] for row in group})

    def halves(self, wanted: dict[int, list[int]]) -> tuple[dict, dict]:
        """Some of each query's rows now and the others in the next wave; or all of them now."""
        share = self.rng.choice([1.0, 0.6])
        first, then = {}, {}
        for row, keys in wanted.items():
            now = self.rng.random(len(keys)) < share
            first[row] = [key for key, x in zip(keys, now, strict=True) if x]
            then[row] = [key for key, x in zip(keys, now, strict=True) if not x]
        return first, {row: keys for row, keys in then.items() if keys}

    def groups(self, rows: list[int], most: int) -> list[list[int]]:
        if self.rng.random() < 0.5:
            self.rng.shuffle(rows)
        size = int(self.rng.integers(1, most))
        return [rows[n : n + size] for n in range(0, len(rows), size)]

    def tiles(self, wanted: dict[int, list[int]]) -> None:
        queries = list(wanted)
        while queries:
            width = int(self.rng.choice([1, 16, 32, 48, 64]))
            count = min(len(queries), int(self.rng.integers(1, width + 1)))
            lanes, queries = queries[:count], queries[count:]
            entries = {}  # (row, the how manieth of its kind) -> lanes
            for t, query in enumerate(lanes):
                for n, row in enumerate(sorted(wanted[query])):
                    key = row, sorted(wanted[query])[:n].count(row)
                    entries[key] = entries.get(key, 0) | 1 << t
            rows = list(entries.items())
            self.rng.shuffle(rows)
            for part in np.array_split(np.arange(len(rows)), self.rng.integers(1, 4)):
                self.one_tile(lanes, [(rows[n][0][0], int(rows[n][1])) for n in part], width)

    def one_tile(self, lanes: list[int], rows: list[tuple[int, int]], width: int) -> None:
        if not rows:
            return
        self.tile.append((*self.row_list(lanes), len(self.run), width))
        everyone, full, masked = (1 << len(lanes)) - 1, [], []
        for row, mask in rows:
            if mask == everyone and self.rng.random() < 0.7:
                full.append(row)
            else:
                masked.append((row, mask))
                if self.rng.random() < 0.1:  # a row that no lane sees
                    masked.append((int(self.rng.integers(self.L)), 0))
        if full:
            self.run.append((*self.row_list(full), -1))
        if masked:
            self.run.append((*self.row_list([row for row, _ in masked]), len(self.mask)))
            self.mask += [mask for _, mask in masked]


@pytest.mark.parametrize("seed", range(120))
def test_random_arrays(seed):
    rng = np.random.default_rng([seed, 1])
    is_causal = bool(rng.integers(2))
    parts = random_parts(
        rng,
        L=int(rng.integers(1, 100)),
        R=int(rng.integers(0, 30)),
        is_causal=is_causal,
        pick=bool(rng.random() < 0.3),
        weighted=bool(rng.random() < 0.3),
        pooling=rng.choice(["max", "mean", "sum"]).item(),
        size_bias=bool(rng.integers(2)),
    )
    Hk, group = rng.integers(1, 3, 2).tolist()
    masked, given = rng.choice([0, 0, 0.3, 0.8]), rng.choice(["", "", "query", "key", "query key"])
    D, Dv = rng.choice([1, 5, 16, 33, 70], 2).tolist()
    case = Case(
        "arrays", len(parts.direct), 1, Hk * group, Hk, D, Dv, is_causal, masked=float(masked), given=given.item()
    )
    problem = draw(rng, parts, case)
    plan = Arrays(rng, parts, is_causal).plan
    for _ in each_isa():
        check(problem, plan)


def test_a_scratch_row_is_written_once():
    """Backward pools a task again, whole: an earlier value of a row would be lost."""
    L, region, scratch = 4, 4, 6
    arrays = {
        "wave": [0, 1],
        "task": [[0, 0], [4, 0]],
        "pool": [[scratch, 0, 1, 2], [region, scratch, 1, 1], [scratch, 2, 1, 2], [region + 1, scratch, 1, 1]],
        "tile": [[0, 1, 0, 0, 0]],
        "run": np.zeros((0, 4), np.int32),
        "index": np.zeros(0, np.int32),
        "mask": np.zeros(0, np.uint64),
    }
    with pytest.raises(ValueError, match="scratch row 0 a second time"):
        Plan.from_arrays(**arrays, length=L, regions=2, scratch=1)
    arrays["pool"][2][0] = arrays["pool"][3][1] = scratch + 1
    assert [rows.tolist() for rows in Plan.from_arrays(**arrays, length=L, regions=2, scratch=2).regions] == [
        [0, 1],
        [2, 3],
    ]


@pytest.mark.parametrize("seed", range(10))
def test_a_plan_for_every_key_head(seed):
    """Each batch entry and key head its own plan, with R the largest: the rows past a plan's own are left alone."""
    rng = np.random.default_rng(seed)
    B, Hk, L, is_causal = 2, 2, 50, bool(seed % 2)
    each = [random_parts(rng, L, int(R), is_causal) for R in rng.integers(0, 20, B * Hk)]
    plans = tuple(plan_of(parts, is_causal) for parts in each)
    q, grad_out = rng.standard_normal((2, B, 2 * Hk, L, 6))
    k, v = rng.standard_normal((2, B, Hk, L, 6))
    R = max(len(parts.members) for parts in each)
    region_key = rng.standard_normal((B, Hk, R, 6)) if seed % 3 else None
    out, saved = combiner.attention_forward(q, k, v, plans, region_key=region_key)
    gradients = combiner.attention_backward(grad_out, saved)
    summary = combiner.summarize(q, k, v, plans, region_key=region_key)
    for n, parts in enumerate(each):
        b, h = divmod(n, Hk)
        group, own = (slice(b, b + 1), slice(2 * h, 2 * h + 2)), (slice(b, b + 1), slice(h, h + 1))
        R = len(parts.members)
        given = None if region_key is None else region_key[own][:, :, :R]
        expected, exact = combiner.reference.attention_forward(q[group], k[own], v[own], parts, region_key=given)
        close(out[group], expected, 1e-11, "out")
        derivatives = combiner.reference.attention_backward(grad_out[group], exact)
        for name, where in (("query", group), ("key", own), ("value", own)):
            close(getattr(gradients, name)[where], getattr(derivatives, name), 1e-10, name)
        if given is not None:
            close(gradients.region_key[own][:, :, :R], derivatives.region_key, 1e-10, "region_key")
            assert not gradients.region_key[own][:, :, R:].any()
        shorter = combiner.reference.summarize(q[group], k[own], v[own], parts, region_key=given)
        for name, where in (("key", own), ("value", group), ("lse", group)):
            rows = getattr(summary, name)[where]
            close(rows[:, :, :R], getattr(shorter, name), 1e-11, name)
            assert (rows[:, :, R:] == (-np.inf if name == "lse" else 0)).all(), name


@st.composite
def small_parts(draw):
    """Few positions and everything that lists may do: repeats, orders, holes, nests."""
    L, R = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    is_causal = draw(st.booleans())
    rows = [[j] for j in range(L)]
    members = []
    for r in range(R):
        members.append(draw(st.lists(st.integers(0, L + r - 1), max_size=4)))
        rows.append([j for t in members[-1] for j in rows[t]])
    direct, regions = [], []
    for i in range(L):
        support = range(i + 1 if is_causal else L)
        seen = [r for r in range(R) if all(j in support for j in rows[L + r])]
        direct.append(draw(st.lists(st.sampled_from(support), max_size=3)))
        regions.append(draw(st.lists(st.sampled_from(seen), max_size=3)) if seen else [])
    pooling, size_bias = draw(st.sampled_from(["max", "mean", "sum"])), draw(st.booleans())
    return combiner.reference.Parts(direct, regions, members, pooling, size_bias), is_causal


@settings(max_examples=150)
@given(small_parts(), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.4]), st.booleans())
def test_small_parts(parts_and_direction, seed, masked, ties):
    parts, is_causal = parts_and_direction
    case = Case("small", len(parts.direct), Hq=2, Hk=1, D=3, Dv=2, is_causal=is_causal, masked=masked)
    problem = draw(np.random.default_rng(seed), parts, case)
    if ties:
        q, k, v = problem.inputs
        problem = type(problem)((np.sign(q), np.sign(k), v), parts, problem.options, problem.grad_out, problem.grad_lse)
    check(problem, plan_of(parts, is_causal))


# ---- what parts must cover


def complaint(parts, is_causal: bool, cover: str) -> str | None:
    """What is to be said of the first query whose parts do not cover what they must, and its first such key."""
    L = len(parts.direct)
    positions = below(parts, L)
    demand = {"full": "at least once", "partition": "exactly once"}[cover]
    for i in range(L):
        for j in range(i + 1 if is_causal else L):
            holders = [f"direct[{i}]"] * parts.direct[i].count(j)
            holders += [f"region {r}" for r in parts.regions[i] for x in positions[r] if x == j]
            if len(holders) == 1 or (holders and cover == "full"):
                continue
            says = f"parts must cover query {i}'s support {demand}, but key {j} "
            if not holders:
                return says + "is left out"
            a, b = holders[:2]
            if a != b:
                return says + f"lies in {a} and in {b}"
            if a.startswith("region") and positions[int(a.split()[1])].count(j) == 1:
                return says + f"lies in {a}, which regions[{i}] holds twice"
            return says + f"lies twice in {a}"
    return None


def check_cover(parts, is_causal: bool) -> set[str]:
    """Each demand is met or refused as brute force says; returns the refusals."""
    plan = plan_of(parts, is_causal)
    refusals = set()
    for cover, met in (("full", plan.is_full), ("partition", plan.is_partition)):
        expected = complaint(parts, is_causal, cover)
        assert met == (expected is None)
        arguments = {"is_causal": is_causal, "cover": cover}
        if expected is None:
            again = Plan.from_parts(parts.direct, parts.regions, parts.members, **arguments)
            for name, x in plan.arrays.items():
                np.testing.assert_array_equal(again.arrays[name], x)
            continue
        with pytest.raises(ValueError) as error:
            Plan.from_parts(parts.direct, parts.regions, parts.members, **arguments)
        assert str(error.value) == expected
        refusals.add(expected)
    return refusals


@settings(max_examples=300)
@given(small_parts())
def test_cover_of_small_parts(parts_and_direction):
    check_cover(*parts_and_direction)


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("name", [name for name in PATTERNS if "sparse" not in name])
def test_cover_of_a_pattern_with_one_list_changed(rng, name, is_causal):
    """A pattern's own parts, some nested, some overlapping; then with a row listed twice, left out or exchanged."""
    refusals = set()
    for L in (1, 20, 67):
        pattern = PATTERNS[name]()
        refusals |= check_cover(reference.parts(pattern, L, is_causal), is_causal)
        for change in ("twice", "left out", "exchanged") * 3:
            parts = reference.parts(pattern, L, is_causal)
            direct, regions, members = (
                [list(rows) for rows in lists] for lists in (parts.direct, parts.regions, parts.members)
            )
            lists = (direct, regions, members)[rng.integers(3)]
            filled = [n for n, rows in enumerate(lists) if rows]
            if not filled:
                continue
            rows = lists[rng.choice(filled)]
            at = int(rng.integers(len(rows)))
            if change == "twice":
                rows.append(rows[at])
            elif change == "left out":
                del rows[at]
            else:  # in place of it one that is seen as early
                rows[at] = min(rows)
            refusals |= check_cover(reference.Parts(direct, regions, members), is_causal)
    assert len(refusals) > 1


@pytest.mark.parametrize("seed", range(30))
def test_cover_of_random_parts(seed):
    rng = np.random.default_rng([seed, 2])
    is_causal = bool(seed % 2)
    L, R = int(rng.integers(1, 150)), int(rng.integers(0, 40))
    parts = random_parts(rng, L, R, is_causal)
    check_cover(parts, is_causal)
    for i, rows in enumerate(parts.direct):  # all of the support, and what the regions hold besides
        rows[:] = range(i + 1 if is_causal else L)
    whole = check_cover(parts, is_causal)
    assert all("exactly once" in refusal for refusal in whole)
    for rows in parts.direct[L // 2 :]:
        del rows[int(rng.integers(len(rows)))]
    check_cover(parts, is_causal)


@pytest.mark.parametrize(
    "cover, error, says",
    [
        ("whole", ValueError, "cover must be one of 'any', 'full', 'partition', got 'whole'"),
        ("", ValueError, "cover must be one of"),
        (True, TypeError, "cover must be a str, got bool"),
        (None, TypeError, "cover must be a str, got NoneType"),
    ],
)
def test_bad_cover(cover, error, says):
    with pytest.raises(error, match=says):
        Plan.from_parts([[0]], cover=cover)
    with pytest.raises(ValueError, match=r"direct\[0\] holds key 1"):  # what is listed is looked at first
        Plan.from_parts([[1]], cover="full")


# The tile before the region's: its query, width, runs [start, step, count, mask]; with an index array and masks.
BEFORE = {
    "first rows": ([3, 1, 1], 16, [[0, 1, 4, -1]]),
    "all rows": ([3, 1, 1], 16, [[0, 1, 8, -1]]),
    "a row kernel": ([3, 1, 1], 1, [[0, 1, 4, -1]]),
    "more queries": ([3, 1, 3], 16, [[0, 1, 3, -1], [3, 1, 3, 0]]),
    "masked first": ([3, 1, 3], 16, [[0, 1, 3, 0]]),
    "masked twice": ([3, 1, 3], 16, [[0, 1, 3, 0], [3, 1, 3, 0]]),
    "another query": ([4, 1, 1], 16, [[0, 1, 4, -1]]),
    "other rows": ([3, 1, 1], 16, [[1, 1, 4, -1]]),
    "every other row": ([3, 1, 1], 16, [[0, 2, 4, -1]]),
    "an index": ([3, 1, 1], 16, [[0, 0, 4, -1]]),
    "one of an index": ([3, 1, 1], 16, [[0, 0, 1, -1]]),
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("masked", [False, True])
def test_a_region_may_go_on_from_a_query(rng, before, masked):
    """The region asks as query 3 does, for all of the 8 rows, whatever the tile before it attends."""
    L = 8
    query, width, runs = BEFORE[before]
    n = len(runs)
    plan = Plan.from_arrays(
        wave=[0, 1], task=[[0, 0], [1, 2]], pool=[[L, 3, 1, 1]],
        tile=[[*query, 0, width], [L, 1, 1, n, 16], [0, 1, 0, n + 1, 0]],
        run=[*runs, [0, 1, L, -1]], index=[5, 2, 7, 1], mask=[1, 3, 7], length=L, regions=1, pooling="first",
    )  # fmt: skip
    q, k, v = rng.standard_normal((3, 2, L, 5))
    key_mask = np.arange(L) != 6 if masked else None
    weights = np.exp(q[:, 3:4] @ k.swapaxes(-1, -2) / 5**0.5) * (1 if key_mask is None else key_mask)
    expected = weights / weights.sum(-1, keepdims=True) @ v
    alone = combiner.summarize(q, k, v, plan, key_mask=key_mask).value
    close(alone, expected, 1e-13, "alone")
    _, saved = combiner.attention_forward(q, k, v, plan, key_mask=key_mask)
    assert np.array_equal(saved["summary_value"], alone)


BOOLS = {
    "mask": np.tril(np.ones((6, 6), bool)),
    "rows of a mask": list(np.tril(np.ones((6, 6), bool))),
    "lists": [[True], [False, True]],
    "one bool": [[0], [0, True]],
    "NumPy's": [[np.True_]],
    "objects": [np.array([True, False], object)],
    "two arrays": (np.array([0, 1]), np.array([True])),
    "a mask of two rows": tuple(np.ones((2, 2), bool)),
}


@pytest.mark.parametrize("given", BOOLS.values(), ids=BOOLS)
@pytest.mark.parametrize("name", ["direct", "regions", "members"])
def test_a_mask_is_no_list_of_positions(name, given):
    arguments = {"direct": [[0], [1]], "regions": [[], []], "members": []} | {name: given}
    says = rf"{name} must be .*: a bool is no position; Plan.from_mask makes .* np.flatnonzero lists"
    with pytest.raises(TypeError, match=says):
        Plan.from_parts(**arguments)


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 2, 2)])
def test_parts_that_cannot_be_read(shape):
    """A memoryview of several axes raised NotImplementedError."""
    with pytest.raises(TypeError, match="direct must be a sequence of integer sequences"):
        Plan.from_parts(memoryview(bytes(int(np.prod(shape)))).cast("B", shape))


@pytest.mark.parametrize("L", [0, 1, 2, 5, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_mask_is_what_queries_see(L, share, is_causal, rng):
    mask = rng.random((L, L)) < share
    if is_causal:
        mask &= np.tri(L, dtype=bool)
    laid = [mask, mask.tolist(), np.asfortranarray(mask), np.repeat(mask, 2, axis=1)[:, ::2]]
    plans = [Plan.from_mask(x) for x in (laid if L else laid[:1] + laid[2:])]
    for plan in plans:
        assert plan.is_causal == (not np.triu(mask, 1).any())
        np.testing.assert_array_equal(plan.to_mask(), mask)
    assert plans[0].pairs == mask.sum() and plans[0].region_count == 0
    if not L:
        return
    q, k, v, grad = rng.standard_normal((4, 2, L, 5))
    out, saved = combiner.attention_forward(q, k, v, plans[0])
    gradients = combiner.attention_backward(grad, saved)
    S = np.where(mask, q @ k.swapaxes(1, 2) / np.sqrt(5), -np.inf)
    P = np.exp(S - np.max(S, axis=-1, keepdims=True, initial=-1e9))
    P /= np.maximum(P.sum(axis=-1, keepdims=True), 1e-300)
    np.testing.assert_allclose(out, P @ v, atol=1e-12)
    dS = P * (grad @ v.swapaxes(1, 2) - (grad * out).sum(-1, keepdims=True)) / np.sqrt(5)
    np.testing.assert_allclose(gradients.value, P.swapaxes(1, 2) @ grad, atol=1e-11)
    np.testing.assert_allclose(gradients.query, dS @ k, atol=1e-11)
    np.testing.assert_allclose(gradients.key, dS.swapaxes(1, 2) @ q, atol=1e-11)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_to_mask_of_every_pattern(name, is_causal):
    """Against the reference's parts: positions listed, and those below the regions listed."""
    for L in (1, 5, 17, 33):
        pattern = PATTERNS[name]()
        parts = reference.parts(pattern, L, is_causal)
        positions = below(parts, L)
        expected = np.zeros((L, L), bool)
        for i in range(L):
            expected[i, sum((positions[r] for r in parts.regions[i]), parts.direct[i])] = True
        np.testing.assert_array_equal(pattern.plan(L, is_causal).to_mask(), expected)


def test_a_mask_given_as_causal_or_not():
    lower = np.tri(5, dtype=bool)
    assert Plan.from_mask(lower).is_causal and Plan.from_mask(lower, is_causal=True).is_causal
    plan = Plan.from_mask(lower, is_causal=False)
    assert not plan.is_causal and not plan.is_full and Plan.from_mask(lower).is_full
    with pytest.raises(ValueError, match=r"mask must be False after the query .*, got True at \[0, 3\]"):
        Plan.from_mask(np.array([[1, 0, 0, 1]] * 4, bool), is_causal=True)


@pytest.mark.parametrize(
    "mask, error, says",
    [
        (np.ones((3, 4), bool), ValueError, r"mask must have shape \(L, L\), got \(3, 4\)"),
        (np.ones((2, 3, 3), bool), ValueError, r"mask must have shape \(L, L\), got \(2, 3, 3\)"),
        (np.ones((3, 3)), TypeError, "mask must be a bool array, True where a query attends a key, got float64"),
        ([[0, 1], [1, 1]], TypeError, "mask must be a bool array.*, got int64"),
        ([[True], [True, True]], ValueError, "mask must be a bool array, got list"),
        (None, TypeError, "mask must be a bool array"),
    ],
)
def test_a_wrong_mask(mask, error, says):
    with pytest.raises(error, match=says):
        Plan.from_mask(mask)
    with pytest.raises(TypeError, match="is_causal must be a bool or None, got int"):
        Plan.from_mask(np.ones((2, 2), bool), is_causal=1)
