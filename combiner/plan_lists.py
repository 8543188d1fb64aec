# SPDX-License-Identifier: Apache-2.0
"""What the arrays of a plan list: pairs of a query and a row of the table, and the positions below a region.

A row of the table is a position, or L + r for region r. csrc/combiner.h describes the arrays field by field.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from ._core import Plan
from .arguments import Array


def attended(plan: Plan) -> tuple[Array, Array]:
    """The pairs that the tiles attend: int64 arrays (query, row) `[pairs]`, by query, then row.

    Both are rows of the table; region r as a query attends its members (stage 1). Regions that no position attends are
    omitted. O(pairs log(pairs)) of both stages.
    """
    queries, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for query, runs in _tiles(plan):
        lane = np.arange(len(query), dtype=np.uint64)[:, None]
        for row, mask in runs:
            seen = np.ones((len(query), len(row)), bool) if mask is None else (mask >> lane & np.uint64(1)).astype(bool)
            t, n = np.nonzero(seen)
            queries.append(query[t])
            rows.append(row[n])
    query, row = np.concatenate(queries), np.concatenate(rows)
    order = np.lexsort((row, query))
    return query[order], row[order]


def rows_of(plan: Plan, queries: Sequence[int]) -> list[Array]:
    """The rows that some queries attend, ascending: an int64 array for each query.

    Time O(T + P), with T the tiles of the plan and P the pairs of these queries: other queries' pairs are not spelled
    out.
    """
    number = np.full(plan.length + plan.region_count + plan.scratch_count, -1)
    number[list(queries)] = np.arange(len(queries))
    found: list[list[Array]] = [[np.zeros(0, np.int64)] for _ in queries]
    for query, runs in _tiles(plan):
        lanes = np.flatnonzero(number[query] >= 0)
        if not lanes.size:
            continue
        for row, mask in runs:
            for lane in lanes.tolist():
                seen = row if mask is None else row[(mask >> np.uint64(lane) & np.uint64(1)).astype(bool)]
                found[number[query[lane]]].append(seen)
    return [np.sort(np.concatenate(rows)) for rows in found]


def positions_below(plan: Plan, regions: Iterable[int] | None = None) -> dict[int, Array]:
    """The positions below regions, ascending: a read-only int64 array for each of them, by region number.

    They are read from the pool steps, so they are known of regions that no query attends too. Regions that grow by
    positions, as the causal ones of `Axial` and `Routing` do, share the memory of the largest.

    Parameters
    ----------
    regions : region numbers; None for all.

    Notes
    -----
    O(S + total size of these regions, and of the regions below them), with S the pool steps, where a region that grows
    from another counts the positions that it adds.
    """
    L, steps, index = plan.length, plan.arrays["pool"].tolist(), plan.arrays["index"]
    writers: dict[int, list[int]] = {}  # the steps that write a row: a scratch row is written anew in each task
    for number, (row, *_) in enumerate(steps):
        writers.setdefault(row, []).append(number)

    def writer(row: int, before: int) -> int:
        """The last step before this one that writes the row; -1 if none does."""
        of_row = writers.get(row, [])
        at = bisect_left(of_row, before)
        return of_row[at - 1] if at else -1

    wanted = {r: writer(L + r, len(steps)) for r in (range(plan.region_count) if regions is None else regions)}
    reads: dict[int, tuple[list[int], list[int]]] = {}  # of a step: positions, and the steps that wrote other rows
    waiting = list(wanted.values())
    while waiting:
        step = waiting.pop()
        if step >= 0 and step not in reads:
            rows = _rows(index, *steps[step][1:]).tolist()
            others = [writer(row, step) for row in rows if row >= L]
            reads[step] = [row for row in rows if row < L] if others else rows, others
            waiting += others
    # Below a step: the first `count` of a list. A step that reads one other may lengthen the other's list.
    below: dict[int, tuple[list[int], int]] = {-1: ([], 0)}
    for step in sorted(reads):  # what a step reads was written before it
        own, others = reads[step]
        found, count = below[others[0]] if len(others) == 1 else (own, len(own))
        if len(others) == 1 and others[0] >= 0 and len(found) == count:
            found += own
        elif others:
            found = list({*own, *(x for other in others for x in below[other][0][: below[other][1]])})
        below[step] = found, len(found)
    arrays: dict[int, Array] = {}  # of a list: its numbers
    for found, _ in below.values():
        if id(found) not in arrays:
            arrays[id(found)] = np.array(found, np.int64)
            arrays[id(found)].flags.writeable = False
    order = {key: np.sign(np.diff(array)) for key, array in arrays.items()}
    ascend, descend = ({key for key, signs in order.items() if (signs == way).all()} for way in (1, -1))

    def ascending(step: int) -> Array:
        found, count = below[step]
        array = arrays[id(found)][:count]
        if id(found) in ascend:
            return array
        if id(found) in descend:
            return array[::-1]
        array = np.unique(array)
        array.flags.writeable = False
        return array

    return {r: ascending(step) for r, step in wanted.items()}


def count_pairs(plan: Plan) -> tuple[int, int]:
    """The pairs of stage 2 (queries and what they attend) and of stage 1 (regions and their members).

    O(arrays of the plan): runs without a mask are counted and not spelled out.
    """
    tile, run, mask = (plan.arrays[name] for name in ("tile", "run", "mask"))
    ones = np.unpackbits(np.ascontiguousarray(mask).view(np.uint8)).reshape(len(mask), 64).sum(axis=1, dtype=np.int64)
    ones_before = np.concatenate([[0], np.cumsum(ones)])
    count, first = run[:, 2].astype(np.int64), run[:, 3].astype(np.int64)
    is_masked = first >= 0
    masked = np.where(is_masked, ones_before[np.where(is_masked, first + count, 0)] - ones_before[first * is_masked], 0)
    shared = np.where(is_masked, 0, count)
    masked_before, shared_before = (np.concatenate([[0], np.cumsum(x)]) for x in (masked, shared))
    begin, end = tile[:-1, 3], tile[1:, 3]
    pairs = masked_before[end] - masked_before[begin]
    pairs += (shared_before[end] - shared_before[begin]) * tile[:-1, 2]
    start, step = tile[:-1, 0], tile[:-1, 1]
    first_query = np.where(
        step != 0, start, plan.arrays["index"][start * (step == 0)] if len(plan.arrays["index"]) else 0
    )
    attends = first_query < plan.length
    return int(pairs[attends].sum()), int(pairs[~attends].sum())


def _tiles(plan: Plan) -> Iterator[tuple[Array, Iterator[tuple[Array, Array | None]]]]:
    """The queries of each tile, and its runs: their rows, and a word for each row, with a bit for each query, or None
    where all queries attend all rows."""
    tile, run, index, mask = (plan.arrays[name] for name in ("tile", "run", "index", "mask"))

    def runs(begin: int, end: int) -> Iterator[tuple[Array, Array | None]]:
        for *row_list, first in run[begin:end].tolist():
            row = _rows(index, *row_list)
            yield row, mask[first : first + len(row)] if first >= 0 else None

    for (*query_list, begin, _), (*_, end, _) in pairwise(tile.tolist()):
        yield _rows(index, *query_list), runs(begin, end)


def _rows(index: Array, start: int, step: int, count: int) -> Array:
    """The table rows of a list, spelled out (cmb_list)."""
    return np.arange(start, start + step * count, step) if step else index[start : start + count].astype(np.int64)
