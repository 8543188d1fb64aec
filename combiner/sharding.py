# SPDX-License-Identifier: Apache-2.0
"""Sequences sharded over ranks: which summaries ranks send each other, the plans for it, and the bytes.

Of P ranks each holds n = L / P consecutive positions, a shard. Where shards are whole spans, rows or nodes of a
pattern, a query attends its own shard as if that were all, and of the others summaries, the same for all queries of a
shard (in the row-major order: of a column of it). Which ones is the pattern once more, with ranks for positions: for
`LogSparse` and `Tree`, blocks of shards are regions of ranks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .patterns import Axial, AxialMixture, Dense, Factorization, Fixed, LogSparse, Mixture, Routing, Tree
from .plan import Array, Plan, as_integer, attended


class Layout(NamedTuple):
    """A pattern on P shards of n positions, as one rank has it."""

    near: Plan  # every query attends its shard
    own: Plan  # summarizes regions that are sent, its last; before them, where not flat, those of `near`
    rows: int  # that are sent
    is_flat: bool  # whether blocks of shards summarize positions, not shards
    far: Plan | None  # and what other ranks sent, and blocks of that; None where there is nothing
    coarse: Plan  # the pattern of P ranks: its positions are shards, its regions blocks of shards
    held: Array  # [P, U]: the blocks that each rank is in
    shard: Plan | None  # where flat, summarizes all positions for each of these; None where there are none

    @property
    def has_blocks(self) -> bool:
        """Whether there are blocks of shards."""
        return bool(self.coarse.region_count)


def lay_out(pattern: object, n: int, ranks: int, rank: int, is_causal: bool) -> Layout:
    """The layout of n positions on each of P ranks, for one of them.

    Raises
    ------
    TypeError, ValueError : no pattern, or one that cannot be sharded so.
    """
    if not isinstance(pattern, Factorization):
        raise _refusal(pattern, n)
    return _lay_out(pattern, n, ranks, rank, is_causal)


@lru_cache(maxsize=64, typed=True)
def _lay_out(pattern: Factorization, n: int, ranks: int, rank: int, is_causal: bool) -> Layout:
    of_ranks: Factorization = Dense()
    stride, is_flat = 1, False
    match pattern:
        case Fixed(span=int(span)) if n and n % span == 0:
            unit = span
            own = _node_plan(n, (span,), pattern)
        case Axial(width=int(width), order="rowmajor") if n and n % width == 0:
            unit = stride = width
            own = _row_plan(n, width, pattern)
        case LogSparse(hierarchical=is_nested) if n and n & (n - 1) == 0:
            unit, is_flat, of_ranks = n, not is_nested, pattern
            own = _node_plan(n, _powers(2, n) if is_nested else (n,), pattern)
        case Tree(branching=b, levels=levels) if n and (level := _level(b, levels, n)) is not None:
            unit = b**level
            own = _node_plan(n, _powers(b, unit), pattern)
            if level != levels:
                of_ranks = replace(pattern, levels=None if levels is None else levels - level)
        case _:
            raise _refusal(pattern, n)
    rows = n // unit * stride
    coarse = of_ranks.plan(ranks, is_causal)
    far = _far_plan(n, coarse, rank, rows, unit, stride, pattern.size_bias)
    held = np.array([[u for u, below in enumerate(coarse.regions) if r in below] for r in range(ranks)], np.int64)
    shard = _shard_plan(n, held.shape[1]) if is_flat and held.size else None
    return Layout(pattern.plan(n, is_causal), own, rows, is_flat, far, coarse, held, shard)


def _level(branching: int, levels: int | None, n: int) -> int | None:
    """The level of the nodes that a shard sends; None where shards are no whole nodes."""
    level, size = 0, 1
    while level != levels and size < n:
        level, size = level + 1, size * branching
    return level if n % size == 0 and (size == n or level == levels) else None


def _powers(base: int, last: int) -> tuple[int, ...]:
    """base, base^2, .. last; 1 alone where that is last."""
    powers = [base]
    while powers[-1] < last:
        powers.append(powers[-1] * base)
    return tuple(powers) if last > 1 else (1,)


def _refusal(pattern: object, n: int) -> Exception:
    """Why a pattern cannot be sharded into n positions."""
    match pattern:
        case Fixed(span=None) | Axial(width=None, order="rowmajor"):
            reason = "have its span or width given"
        case Fixed() | Axial(order="rowmajor"):
            reason = f"have a span or width that divides the positions of a rank, {n}"
        case LogSparse():
            reason = f"be on a power of two of positions for each rank, not {n}"
        case Tree():
            reason = f"be on a power of its branching, or a multiple of its largest nodes, for each rank, not {n}"
        case Dense():
            reason = "have summaries: every rank would need all keys and values, as ring attention sends them"
        case Axial() | AxialMixture():
            reason = "be row-major: parts of columns and of rows are as many summaries as there are positions"
        case Routing():
            reason = "be of consecutive positions: clusters hold positions of all ranks"
        case Mixture():
            reason = "have one softmax: take the mean of its components' attentions"
        case Plan() | tuple():
            reason = "be of any length"
        case _ if not isinstance(pattern, type) and callable(getattr(pattern, "plan", None)):
            reason = "be one of Fixed, LogSparse, Tree and Axial"
        case _:
            kind = pattern.__name__ if isinstance(pattern, type) else type(pattern).__name__
            return TypeError(f"pattern must be a pattern such as combiner.Fixed(64), got {kind}")
    return ValueError(f"pattern must {reason}, got {pattern!r}")


class Traffic(NamedTuple):
    """Bytes that each rank sends."""

    forward: int
    backward: int


def traffic(
    pattern: Factorization,
    length: int,
    ranks: int,
    *,
    heads: int,
    key_heads: int | None = None,
    dim: int,
    value_dim: int | None = None,
    batch: int = 1,
    itemsize: int = 4,
) -> Traffic:
    """What `combiner.distributed.attention` has each rank send, for B `batch` entries of L = `length` positions.

    Notes
    -----
    A rank sends each of the P - 1 others s rows of k_R (Hk D numbers) and h_R (Hq Dv), and in backward as many
    gradients. `Fixed` has s = n / span; row-major `Axial` s = n, with weighted keys of Hq heads; `Tree` s = n /
    branching^levels, or 1, as `LogSparse` has. Where blocks consist of shards, P > 2, the row's q_R (Hq D) comes too.
    Flat `LogSparse`'s ceil(log2(P)) - 1 blocks above the own shard are summarized where their positions are: each adds
    the shard's part of h_R (Hq Dv) with its lse (Hq), of float32 at least, and in backward a gradient of h_R.

    Parameters
    ----------
    heads, key_heads, dim, value_dim : Hq, Hk (Hq by default), D, Dv (D by default).
    itemsize : bytes of a number.

    Raises
    ------
    TypeError, ValueError : as `attention`.
    """
    P, B = as_integer("ranks", ranks, 1), as_integer("batch", batch, 1)
    Hq, Hk, D, Dv, itemsize = _sizes(heads, key_heads, dim, value_dim, itemsize)
    layout = lay_out(pattern, _shard(length, P), P, 0, False)
    key_heads = Hq if layout.own.weighted else Hk
    rows = layout.rows * (key_heads * D + Hq * Dv)
    if layout.has_blocks:
        rows += layout.rows * Hq * D
    blocks = layout.held.shape[1] if layout.shard else 0
    forward = rows * itemsize + blocks * Hq * (Dv + 1) * max(itemsize, 4)
    backward = rows * itemsize + blocks * Hq * Dv * itemsize
    return Traffic((P - 1) * B * forward, (P - 1) * B * backward)


def ring_traffic(
    length: int,
    ranks: int,
    *,
    heads: int,
    key_heads: int | None = None,
    dim: int,
    value_dim: int | None = None,
    batch: int = 1,
    itemsize: int = 4,
) -> Traffic:
    """What ring attention has each rank send for the same sequence; parameters as in `traffic`.

    Notes
    -----
    Forward, a shard's keys and values, n Hk (D + Dv) numbers, pass P - 1 times from rank to rank until all have seen
    them. Backward they do so again, and their gradients, as many numbers, follow: begun by the first rank that they
    visit, and home after P - 1 passes. (Liu et al., arXiv 2310.01889; implementations that begin at home pass P times.)
    """
    P, B = as_integer("ranks", ranks, 1), as_integer("batch", batch, 1)
    _, Hk, D, Dv, itemsize = _sizes(heads, key_heads, dim, value_dim, itemsize)
    once = (P - 1) * B * _shard(length, P) * Hk * (D + Dv) * itemsize
    return Traffic(once, 2 * once)


def _sizes(heads: int, key_heads: int | None, dim: int, value_dim: int | None, itemsize: int) -> tuple[int, ...]:
    """Hq, Hk, D, Dv and itemsize, checked."""
    Hq, D = as_integer("heads", heads, 1), as_integer("dim", dim, 1)
    Hk = Hq if key_heads is None else as_integer("key_heads", key_heads, 1)
    Dv = D if value_dim is None else as_integer("value_dim", value_dim, 1)
    if Hq % Hk:
        raise ValueError(f"heads must be a multiple of key_heads, {Hk}, got {Hq}")
    return Hq, Hk, D, Dv, as_integer("itemsize", itemsize, 1)


def _shard(length: int, ranks: int) -> int:
    n, left = divmod(as_integer("length", length, 0), ranks)
    if left:
        raise ValueError(f"length must be a multiple of ranks, {ranks}, got {length}")
    return n


# ---- plans


def _node_plan(n: int, sizes: tuple[int, ...], pattern: Factorization) -> Plan:
    """Regions of these sizes, each size's left to right, of positions, then of those before; all summarized."""
    wave, task = [0], [(0, 0)]
    pool: list[tuple[int, ...]] = []
    tile: list[tuple[int, ...]] = []
    run: list[tuple[int, ...]] = []
    mask: list[int] = []
    row, child, child_size = n, 0, 1  # first rows of these regions and of those before, their members
    for size in sizes:
        members = size // child_size
        group, width, seen = 1, 1, -1
        if members <= 4:  # sixteen regions share a tile, in which each sees its own members
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


def _shard_plan(n: int, regions: int) -> Plan:
    """Regions of all positions each, summarized."""
    return Plan.from_parts(
        (np.zeros(n + 1, np.int64), np.zeros(0, np.int64)),
        (np.append(0, np.full(n, regions)), np.arange(regions)),  # what no query attends is not summarized
        (np.arange(regions + 1) * n, np.tile(np.arange(n), regions)),
    )


def _row_plan(n: int, width: int, pattern: Axial) -> Plan:
    """Row-major Axial's regions: region t is the row of t, with the query and key of t; no query attends them."""
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


def _far_plan(n: int, coarse: Plan, rank: int, rows: int, unit: int, stride: int, size_bias: bool) -> Plan | None:
    """n queries attend, of every rank's `rows` rows and then the coarse regions, what `rank` attends but its own.

    Parameters
    ----------
    unit : positions that a row stands for.
    stride : a query attends every stride-th row, from its position modulo stride on.
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
    )  # blocks are of shards that send one row
    # Sizes are what pools count: a scratch row stands for `unit` positions, a region pools as many as it has of those.
    scratch = n + R
    sizes = np.concatenate([np.ones(P * rows, np.int64), [len(below) for below in coarse.regions]]).astype(np.int64)
    pool = [(scratch, 0, 1, unit), *((n + r, 0, 0, size) for r, size in enumerate(sizes))]
    index = np.concatenate([np.full(sizes.max(), scratch), *(n + seen[first::stride] for first in range(stride))])
    # A region must have been a query before it is attended; its tile is not run.
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
    """The width of tiles for so many queries in a row."""
    return min(64, -(-queries // 16) * 16)
