# SPDX-License-Identifier: Apache-2.0
"""Which plans a rank runs and which summaries it sends."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..arguments import Array, check_bool
from ..composed import Mixture
from ..patterns import (
    Axial,
    AxialMixture,
    Dense,
    Factorization,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Routing,
    Tree,
    Window,
    makes_plans,
    no_pattern,
)
from ..plan import Plan
from ..plan_cache import PlanCache
from .plans import far_plan, node_plan, row_plan, shard_plan
from .regions import RegionNumbers, region_numbers


class RankPlans(NamedTuple):
    """A pattern on P shards of n positions, as one rank has it."""

    near: Plan  # every query attends its shard
    own: Plan  # summarizes regions that are sent, its last; before them, where not flat, those of `near`
    rows: int  # that are sent
    is_flat: bool  # whether blocks of shards summarize positions, not shards
    far: Plan | None  # and what other ranks sent, and blocks of that; None where there is nothing
    coarse: Plan  # the pattern of P ranks: its positions are shards, its regions blocks of shards
    held: Array  # [P, U]: the blocks that each rank is in
    shard: Plan | None  # where flat, summarizes all positions for each of these; None where there are none
    numbers: RegionNumbers  # of the regions of near, own and coarse in the plan of the whole sequence

    @property
    def has_blocks(self) -> bool:
        """Whether there are blocks of shards."""
        return bool(self.coarse.region_count)


def plans_of_rank(pattern: object, n: int, ranks: int, rank: int, is_causal: bool) -> RankPlans:
    """The plans of one of P ranks with n positions each. The latest are kept, as plans of patterns are.

    Raises
    ------
    TypeError : an object that is no pattern.
    ValueError : a pattern that cannot be sharded into n positions, with the reason.
    """
    if not isinstance(pattern, Factorization):
        raise _refusal(pattern, n)
    check_bool("is_causal", is_causal)
    return _made_plans.get(pattern, n, ranks, rank, bool(is_causal))


@PlanCache
def _made_plans(pattern: Factorization, n: int, ranks: int, rank: int, is_causal: bool) -> RankPlans:
    of_ranks: Factorization = Dense()
    stride, is_flat = 1, False
    sizes: tuple[int, ...]  # positions from one of the rank's own regions to the next, level by level
    match pattern:
        case Fixed(span=int(span), window=1) if n and n % span == 0:
            unit, sizes = span, (span,)
            own = node_plan(n, sizes, pattern)
        case Axial(width=int(width), order="rowmajor") if n and n % width == 0:
            unit, sizes, stride = width, (1,), width  # a region for each position: a row, seen from its column
            own = row_plan(n, width, pattern)
        case LogSparse(hierarchical=is_nested) if n and n & (n - 1) == 0:
            unit, is_flat, of_ranks = n, not is_nested, pattern
            sizes = _powers(2, n) if is_nested else (n,)
            own = node_plan(n, sizes, pattern)
        case Tree(branching=b, levels=levels) if n and (level := _level(b, levels, n)) is not None:
            unit = b**level
            sizes = _powers(b, unit)
            own = node_plan(n, sizes, pattern)
            if level != levels:
                of_ranks = replace(pattern, levels=None if levels is None else levels - level)
        case _:
            raise _refusal(pattern, n)
    rows = n // unit * stride
    coarse = of_ranks.plan(ranks, is_causal)
    far = far_plan(n, coarse, rank, rows, unit, stride, pattern.size_bias)
    held = np.array([[u for u, below in enumerate(coarse.regions) if r in below] for r in range(ranks)], np.int64)
    shard = shard_plan(n, held.shape[1]) if is_flat and held.size else None
    numbers = region_numbers(pattern, n, ranks, rank, sizes, coarse.region_count)
    return RankPlans(pattern.plan(n, is_causal), own, rows, is_flat, far, coarse, held, shard, numbers)


def _level(branching: int, levels: int | None, n: int) -> int | None:
    """The level of a `Tree`'s nodes that a shard sends; None where a shard is no number of whole nodes."""
    level, size = 0, 1
    while level != levels and size < n:
        level, size = level + 1, size * branching
    return level if n % size == 0 and (size == n or level == levels) else None


def _powers(base: int, last: int) -> tuple[int, ...]:
    """base, base^2, .. last; (1,) where last is 1."""
    powers = [base]
    while powers[-1] < last:
        powers.append(powers[-1] * base)
    return tuple(powers) if last > 1 else (1,)


def _refusal(pattern: object, n: int) -> Exception:
    """The error for a pattern that cannot be sharded into n positions."""
    match pattern:
        case Fixed(span=None) | Axial(width=None, order="rowmajor"):
            reason = "have its span or width given"
        case Fixed(window=window) if window > 1:
            reason = "have a window of 1: a rank would need the last keys and values of other ranks"
        case Fixed() | Axial(order="rowmajor"):
            reason = f"have a span or width that divides the positions of a rank, {n}"
        case LogSparse():
            reason = f"be on a power of two of positions for each rank, not {n}"
        case Tree():
            reason = f"be on a power of its branching, or a multiple of its largest nodes, for each rank, not {n}"
        case Dense():
            reason = "have summaries: every rank would need all keys and values, as ring attention sends them"
        case Window():
            reason = "have summaries: a rank would need the last keys and values of other ranks"
        case HeavilyCompressed():
            reason = "have no window: a rank would need the last keys and values of other ranks"
        case Axial() | AxialMixture():
            reason = "be row-major: parts of columns and of rows are as many summaries as there are positions"
        case Routing():
            reason = "be of consecutive positions: clusters hold positions of all ranks"
        case Mixture():
            reason = "have one softmax: take the mean of its components' attentions"
        case Plan() | tuple():
            reason = "be of any length"
        case _ if makes_plans(pattern):
            reason = "be one of Fixed, LogSparse, Tree and Axial"
        case _:
            return no_pattern(pattern)
    return ValueError(f"pattern must {reason}, got {pattern!r}")
