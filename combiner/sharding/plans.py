# SPDX-License-Identifier: Apache-2.0
"""The plans of a rank that no pattern makes, from their flat arrays (csrc/combiner.h defines the fields)."""

from __future__ import annotations

import numpy as np

from ..patterns import Axial, Factorization
from ..plan import Plan
from ..plan_cache import PlanCache
from ..plan_lists import attended


def node_plan(n: int, sizes: tuple[int, ...], pattern: Factorization) -> Plan:
    """Regions of these sizes, size by size and from left to right. Members of the first size are positions, members of
    a later size are regions of the size before it. All are summarized, and no query attends them."""
    wave, task = [0], [(0, 0)]
    pool: list[tuple[int, ...]] = []
    tile: list[tuple[int, ...]] = []
    run: list[tuple[int, ...]] = []
    mask: list[int] = []
    row, child, child_size = n, 0, 1  # first row of this size's regions, and of their members; positions of a member
    for size in sizes:
        members = size // child_size
        group, width, seen = 1, 1, -1
        if members <= 4:  # sixteen regions share a tile, masked so that each sees its own members
            group, width, seen = 16, 16, len(mask)
            mask += [1 << t for t in range(16) for _ in range(members)]
        for first in range(0, n // size, group):
            queries = min(group, n // size - first)
            pool += [(row + r, child + r * members, 1, members) for r in range(first, first + queries)]
            tile.append((row + first, 1, queries, len(run), width))
            run.append((child + first * members, 1, queries * members, seen))
            task.append((len(pool), len(tile)))
        wave.append(len(task) - 1)
        row, child, child_size = row + n // size, row, size
    return Plan.from_arrays(
        wave,
        task,
        pool,
        [*tile, (0, 0, 0, len(run), 0)],
        run,
        [],
        mask,
        length=n,
        regions=row - n,
        pooling=pattern.pooling,
        size_bias=pattern.size_bias,
    )


def shard_plan(n: int, regions: int) -> Plan:
    """Regions that each hold all n positions. All are summarized."""
    return Plan.from_parts(
        (np.zeros(n + 1, np.int64), np.zeros(0, np.int64)),
        (np.append(0, np.full(n, regions)), np.arange(regions)),  # a region that no query attends is not summarized
        (np.arange(regions + 1) * n, np.tile(np.arange(n), regions)),
    )


def row_plan(n: int, width: int, pattern: Axial) -> Plan:
    """The regions of row-major `Axial`; no query attends them. Region t is the row of t with query and key of t."""
    parts = [(row, first) for row in range(0, n, width) for first in range(0, width, 64)]
    tile = [(n + row + first, 1, min(64, width - first), t, _lanes(width)) for t, (row, first) in enumerate(parts)]
    return Plan.from_arrays(
        [0, 1],
        [(0, 0), (n, len(tile))],
        [(n + t, t, 1, 1) for t in range(n)],
        [*tile, (0, 0, 0, len(tile), 0)],
        [(row, 1, width, -1) for row, _ in parts],
        [],
        [],
        length=n,
        regions=n,
        pooling="first",
        weighted=pattern.row_key == "weighted",
    )


def far_plan(n: int, coarse: Plan, rank: int, rows: int, unit: int, stride: int, size_bias: bool) -> Plan | None:
    """n queries of a rank attend the summaries of other ranks; None if there are none to attend.

    Regions are the `rows` rows of every rank, rank by rank, then the regions of the coarse plan.

    Parameters
    ----------
    unit : positions that a row summarizes.
    stride : query i attends every stride-th row of a rank, from row i mod stride on.
    """
    P = coarse.length
    R = P * rows + coarse.region_count
    query, seen = attended(coarse)
    seen = seen[(query == rank) & (seen != rank)]
    if not seen.size:
        return None
    shards, blocks = seen[seen < P], seen[seen >= P]
    seen = np.concatenate(
        [(shards[:, None] * rows + np.arange(rows)).ravel(), blocks]
    )  # where there are blocks, a shard sends one row
    # size_bias counts the positions that a region pools. A scratch row pools `unit` positions, and a region pools the
    # scratch row as often as it holds a rank's row.
    scratch = n + R
    sizes = np.concatenate([np.ones(P * rows, np.int64), [len(below) for below in coarse.regions]]).astype(np.int64)
    pool = [(scratch, 0, 1, unit), *((n + r, 0, 0, size) for r, size in enumerate(sizes))]
    index = np.concatenate([np.full(sizes.max(), scratch), *(n + seen[first::stride] for first in range(stride))])
    # The checks ask that a region is a query of stage 1 before it is attended. `attend`, which is given the summaries,
    # does not run stage 1.
    tile = [(n + first, 1, min(64, R - first), t, 64) for t, first in enumerate(range(0, R, 64))]
    run = [(0, 1, 1, -1)] * len(tile)
    task = [(0, 0), (len(pool), len(tile))]
    count, each = n // stride, len(seen) // stride
    for first in range(stride):
        for m in range(0, count, 64):
            tile.append((first + m * stride, stride, min(64, count - m), len(run), _lanes(count)))
            run.append((sizes.max() + first * each, 0, each, -1))
            task.append((len(pool), len(tile)))
    return Plan.from_arrays(
        [0, 1, len(task) - 1],
        task,
        pool,
        [*tile, (0, 0, 0, len(run), 0)],
        run,
        index,
        [],
        length=n,
        regions=R,
        scratch=1,
        size_bias=size_bias,
    )


def _lanes(queries: int) -> int:
    """The width of a tile, in lanes, for this number of queries."""
    return min(64, -(-queries // 16) * 16)


@PlanCache
def few_plan(n: int, queries: int) -> Plan:
    """The first queries attend all n positions, the others attend nothing."""
    return Plan.from_arrays(
        [0, 1],
        [(0, 0), (0, 1)],
        [],
        [(0, 1, queries, 0, 16), (0, 0, 0, 1, 0)],
        [(0, 1, n, -1)],
        [],
        [],
        length=n,
    )
