# SPDX-License-Identifier: Apache-2.0
"""Patterns that are made of other patterns, and what a pattern makes for packed sequences.

docs/mathematics.md, section 3, defines them. `Selected` is a pattern with the regions that queries open; `Mixture` the
mean of several patterns' attentions.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .arguments import as_integer, as_integers, check_bool
from .display import Shown
from .patterns import (
    Factorization,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Pattern,
    Plans,
    Routing,
    Sparse,
    Tree,
    made_plan,
    makes_plans,
    no_pattern,
)
from .plan import Plan

AnyPattern: TypeAlias = "Pattern | Plans | Mixture"


@dataclass(frozen=True, slots=True, weakref_slot=True, repr=False, eq=False)
class Selected(Shown):
    """A pattern whose queries open some of the regions that they attend (not in the paper).

    An opened region is replaced by the positions below it, as direct keys, less those that the query attends directly
    anyway. With `open` and `rest` the parts of a query are a partition where those of `pattern` are: opening nothing is
    `pattern`, and opening everything is `Dense`. ``open=True, rest=False`` attends the opened regions and the direct
    keys alone, as MoBA does; ``open=False, rest=False`` the summaries of the listed regions, and the direct keys. No
    gradient flows through the choice of regions; given the choice, gradients are exact. Two `Selected` are equal only
    if they are the same object.

    Cost: that of `pattern`, and for each query the positions below the regions that its block opens. Blocks smaller
    than 16 queries leave most lanes idle; blocks of one query fill them with query heads, if four or more share a key
    head. The top regions of `LogSparse` are half of the sequence each: opening them costs what `Dense` does
    (docs/selection.md).

    Parameters
    ----------
    pattern : `Fixed`, `HeavilyCompressed`, `LogSparse`, `Tree` or, bidirectional, `Routing`: a pattern whose regions
        many queries attend.
    regions : integers, region numbers as `pattern` documents them, -1 for none: `[k]`, the same for every query;
        `[T, k]`, for each block of queries; or `[..., Hk, T, k]` with one set for each batch entry and key head. T =
        ceil(L / block). A region that is no part of a query means nothing to it, and repeats count once. Copied. With
        cu_seqlens, blocks and region numbers begin anew in each sequence, and T is the sum of the sequences' blocks:
        the lists of a sequence are those that it has alone.
    block : queries that share a list: block t is the queries ``t * block .. (t + 1) * block - 1``.
    open : whether a listed region is replaced by the positions below it.
    rest : whether a query attends its other regions too.

    Raises
    ------
    TypeError, ValueError : an argument of another kind; a pattern without shared regions; `rest` without `open`;
        `regions` without an axis. `plan` raises ValueError for a length that has another number of blocks, for a
        region that the pattern does not have, and for a causal `Routing`.
    """

    pattern: Factorization
    regions: npt.NDArray[Any]
    block: int = field(default=64, kw_only=True)
    open: bool = field(default=True, kw_only=True)
    rest: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, _SHARED_REGIONS):
            if not makes_plans(self.pattern):
                raise no_pattern(self.pattern)
            names = ", ".join(each.__name__ for each in _SHARED_REGIONS)
            raise ValueError(f"pattern must have regions that queries share ({names}), got {self.pattern!r}")
        regions = as_integers("regions", self.regions)
        if regions.ndim == 0:
            raise ValueError("regions must have shape [k], [T, k] or [..., Hk, T, k], got ()")
        regions = regions.astype(np.int64)
        regions.flags.writeable = False
        object.__setattr__(self, "regions", regions)
        object.__setattr__(self, "block", as_integer("block", self.block, 1))
        check_bool("open", self.open)
        check_bool("rest", self.rest)
        if self.rest and not self.open:
            raise ValueError("open must be True where rest is True: else the pattern is the same without a selection")

    def plan(self, length: int, is_causal: bool = False) -> Plans:
        """The plan for L = `length` positions, or a tuple of one for each batch entry and key head."""
        check_bool("is_causal", is_causal)
        key = weakref.ref(self, made_plan.forget)
        return made_plan.get(key, as_integer("length", length, 0), bool(is_causal), False)

    def sparse(self) -> Selected:
        """The same without the regions that are not listed."""
        return Selected(self.pattern, self.regions, block=self.block, open=self.open, rest=False)

    def _only_length(self) -> int | None:
        """The longest that has as many blocks as `regions` has lists, where they are listed block by block."""
        only = self.pattern._only_length()
        return only if only is not None or self.regions.ndim == 1 else self.regions.shape[-2] * self.block

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plans:
        bases = [self.pattern.plan(length, is_causal)]
        return self._build_segments(bases, [0, length], is_causal)[0]

    def _build_segments(self, bases: Iterable[Plans], cu_seqlens: list[int], is_causal: bool) -> list[Plans]:
        """For each packed sequence its plans, from those of `pattern`."""
        if is_causal and isinstance(self.pattern, Routing):
            raise ValueError("pattern must not be a Routing where is_causal is True: few queries share its regions")
        bounds = block_bounds(cu_seqlens, self.block)
        if self.regions.ndim > 1 and self.regions.shape[-2] != bounds[-1]:
            of = f"length {cu_seqlens[-1]}" if len(cu_seqlens) == 2 else f"the sequences of cu_seqlens, {cu_seqlens}"
            raise ValueError(
                f"regions must have {bounds[-1]} blocks of {self.block} queries for {of}, got {self.regions.shape[-2]}"
            )
        plans = []
        for base, start, (first, end) in zip(bases, cu_seqlens[:-1], itertools.pairwise(bounds), strict=True):
            own = self.regions[..., first:end, :] if self.regions.ndim > 1 else self.regions
            open_regions = self._opened if len(cu_seqlens) == 2 else partial(self._opened_at, start)
            plans.append(open_regions(base, own, end - first))
        return plans

    def _opened_at(self, start: int, base: Plans, regions: npt.NDArray[Any], blocks: int) -> Plans:
        """`_opened`, whose error names the sequence."""
        try:
            return self._opened(base, regions, blocks)
        except ValueError as error:
            raise ValueError(f"{error} of the sequence from position {start} on") from None

    def _opened(self, base: Plans, regions: npt.NDArray[Any], blocks: int) -> Plans:
        """Plans of `pattern` with regions opened: those listed for each of so many blocks, or for all."""
        k = regions.shape[-1]
        if regions.ndim == 1:
            regions = regions[None].repeat(blocks, axis=0)
        sets = list(regions.reshape(math.prod(regions.shape[:-2]), blocks, k))
        bases = list(base) if isinstance(base, tuple) else [base]
        if len(sets) > 1 and len(bases) > 1 and len(sets) != len(bases):
            raise ValueError(f"regions must have a set for each of {len(bases)} plans of the pattern, got {len(sets)}")
        count = max(len(sets), len(bases)) if sets and bases else 0
        plans = [
            Plan._selected(bases[n % len(bases)], sets[n % len(sets)].ravel(), k, self.block, self.open, self.rest)
            for n in range(count)
        ]
        return plans[0] if regions.ndim < 3 and isinstance(base, Plan) else tuple(plans)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are read-only too."""
        make = partial(Selected, block=self.block, open=self.open, rest=self.rest)
        return make, (self.pattern, self.regions)

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.regions.shape))
        changed = "".join(f", {name}=False" for name in ("open", "rest") if not getattr(self, name))
        return f"Selected({self.pattern!r}, <regions [{shape}]>, block={self.block}{changed})"


_SHARED_REGIONS = (Fixed, HeavilyCompressed, LogSparse, Tree, Routing)


@dataclass(frozen=True, slots=True, weakref_slot=True, repr=False, init=False)
class Mixture(Shown):
    """The mean of the attentions of several factorizations, each with its own summaries (section 3.3).

    The output and the effective attention are the means of the components'. A component with nothing to attend counts
    as 0. The mean has no single normaliser, so `summarize`, `attend` and ``return_lse=True`` are errors. Each component
    has its own pooling and size_bias; the region axis is the concatenation of theirs; the cost is the sum of theirs. In
    16-bit dtypes each component's output is rounded before the mean is taken in float32: where outputs cancel, the
    error of the mean is up to one rounding of the largest of them.

    Parameters
    ----------
    *patterns : at least one pattern, plan, or tuple of one plan for each batch entry and key head; no `Mixture`.
    """

    patterns: tuple[Pattern | Plans, ...]

    def __init__(self, *patterns: Pattern | Plans) -> None:
        if not patterns:
            raise ValueError("patterns must be at least one, got none")
        for pattern in patterns:
            is_plans = isinstance(pattern, Plan) or _are_plans(pattern)
            if not is_plans and (isinstance(pattern, Mixture) or not makes_plans(pattern)):
                raise no_pattern(pattern, "patterns such as combiner.Fixed() or plans", name="patterns")
        object.__setattr__(self, "patterns", patterns)

    def plan(self, length: int, is_causal: bool = False) -> Mixture:
        """A mixture of plans: those of the components for L = `length` positions, each a Plan or a tuple of them."""
        plans = (x if isinstance(x, Plan | tuple) else x.plan(length, is_causal) for x in self.patterns)
        return Mixture(*plans)

    def sparse(self) -> Mixture:
        """The mixture of the components' sparse baselines.

        Raises
        ------
        TypeError : a component has no sparse baseline: it is a Plan.
        """
        for pattern in self.patterns:
            if not hasattr(pattern, "sparse"):
                raise TypeError(f"patterns must have a sparse baseline each, got {type(pattern).__name__}")
        return Mixture(*(pattern.sparse() for pattern in self.patterns))  # type: ignore[union-attr]

    def _only_length(self) -> int | None:
        components = (each[0] if isinstance(each, tuple) else each for each in self.patterns)
        lengths = (each._only_length() for each in components if isinstance(each, Shown))
        return next((length for length in lengths if length is not None), None)

    def __repr__(self) -> str:
        return f"Mixture({', '.join(map(repr, self.patterns))})"


def segment_plans(pattern: Pattern | Plan, cu_seqlens: npt.NDArray[np.int64], is_causal: bool) -> tuple[Plan, ...]:
    """The plans of packed sequences, segment by segment: one for each, or one for each batch entry and key head.

    Parameters
    ----------
    cu_seqlens : `[N + 1]`, from 0, not decreasing.

    Raises
    ------
    ValueError : the pattern is a Plan, which fits one length only; the clusters are not of the segments' total length;
        the lists of a `Selected` are not of all their blocks.
    """
    if isinstance(pattern, Plan | tuple):
        raise ValueError(f"pattern must make a plan for each sequence of cu_seqlens, got a {type(pattern).__name__}")
    if not makes_plans(pattern):
        raise no_pattern(pattern)
    each = _of_segments(pattern, cu_seqlens.tolist(), is_causal)
    return tuple(plan for made in each for plan in (made if isinstance(made, tuple) else (made,)))


def _of_segments(pattern: Pattern, cu_seqlens: list[int], is_causal: bool) -> Iterable[Plans]:
    """For each packed sequence its plan or plans; those of a part of the clusters or of the lists are not kept."""
    segments = itertools.pairwise(cu_seqlens)
    routing = pattern.pattern if isinstance(pattern, Sparse) else pattern
    if isinstance(routing, Routing):
        sparse = isinstance(pattern, Sparse)
        if routing.clusters.shape[-1] != cu_seqlens[-1]:
            raise ValueError(f"clusters are of {routing.clusters.shape[-1]} positions, got length {cu_seqlens[-1]}")
        return [routing._build_segment(start, end, is_causal, sparse) for start, end in segments]
    if isinstance(pattern, Selected) and (pattern.regions.ndim > 1 or isinstance(pattern.pattern, Routing)):
        bases = _of_segments(pattern.pattern, cu_seqlens, is_causal)
        return pattern._build_segments(bases, cu_seqlens, is_causal)
    return [pattern.plan(end - start, is_causal) for start, end in segments]


def block_bounds(cu_seqlens: Iterable[int], block: int) -> list[int]:
    """The first block of each packed sequence, counted over all of them, and the number of all: `[N + 1]`."""
    lengths = (end - start for start, end in itertools.pairwise(cu_seqlens))
    return [0, *itertools.accumulate(-(-length // block) for length in lengths)]


def _are_plans(pattern: object) -> bool:
    return isinstance(pattern, tuple) and all(isinstance(plan, Plan) for plan in pattern)
