# SPDX-License-Identifier: Apache-2.0
"""The factorizations: small values that make a plan for any length (spec: "Factorizations").

A pattern is compared, hashed and printed by its parameters. Queries see positions up to their own when the plan is
causal, else all.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from .plan import POOLINGS, Plan, Pooling, as_integer, choice_number


class Pattern(Protocol):
    """What attention takes for a pattern: anything that makes plans."""

    def plan(self, length: int, is_causal: bool = False, /) -> Plans:
        """A plan, or one for each batch entry and key head in that order."""
        ...


Plans: TypeAlias = Plan | tuple[Plan, ...]
AnyPattern: TypeAlias = "Pattern | Plans | Mixture"


@dataclass(frozen=True, slots=True, weakref_slot=True, repr=False)
class Factorization:
    """What all factorizations have in common.

    Parameters
    ----------
    pooling : "max", "mean" or "sum": how a region's key and query come from its members' (section 3.3).
    size_bias : whether the log of the unmasked positions below a region joins its logit (not in the paper).
    """

    pooling: Pooling = field(default="max", kw_only=True)
    size_bias: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        choice_number("pooling", self.pooling, POOLINGS[:3])
        _check_bool("size_bias", self.size_bias)

    def plan(self, length: int, is_causal: bool = False) -> Plan:
        """The plan for L = `length` positions. The last ones made are kept.

        Raises
        ------
        TypeError, ValueError, OverflowError : a length that is no integer, is negative, or exceeds 2^30.
        """
        _check_bool("is_causal", is_causal)
        return _plan(self, as_integer("length", length, 0), bool(is_causal))

    def sparse(self) -> Factorization | Sparse:
        """The sparse baseline: the direct keys alone, without regions; what they leave out is not attended."""
        return Sparse(self)

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        raise NotImplementedError

    def _options(self, is_causal: bool, sparse: bool) -> tuple[bool, bool, int, bool]:
        return is_causal, sparse, POOLINGS.index(self.pooling), self.size_bias

    def __repr__(self) -> str:
        changed = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed)})"


@dataclass(frozen=True, slots=True, repr=False)
class Dense(Factorization):
    """Every query attends its whole support: exact full attention, L^2 pairs."""

    def sparse(self) -> Dense:
        """Itself: there is nothing to leave out."""
        return self

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        return Plan._build("dense", length, 0, 0, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class Fixed(Factorization):
    """Combiner-Fixed (section 4.1): the own span directly, every earlier (or other) span as one region.

    L (span + L / span) pairs: L * sqrt(L) for the default span. Region t is span t. The sparse baseline attends the
    own span and the last position of each other span.

    Parameters
    ----------
    span : positions in a span; None for the power of two nearest sqrt(L).
    """

    span: int | None = None

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        if self.span is not None:
            object.__setattr__(self, "span", as_integer("span", self.span, 1))

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        span = _square_root(length) if self.span is None else self.span
        return Plan._build("fixed", length, span, 0, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class LogSparse(Factorization):
    """Combiner-Logsparse (section 4.2): one region of size 2^l for each l, the siblings from leaf to root.

    L * log(L) pairs. Regions: level 1, 2, .. while 2^l < L, in each the blocks from left to right. The sparse baseline
    attends the last position of each left sibling block and the first of each right one.

    Parameters
    ----------
    hierarchical : whether a block of level 2 or more summarises its two halves' summaries in place of its positions
        (the paper's remark on a partition tree): stage 1 then costs O(L), not O(L log L).
    """

    hierarchical: bool = False

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        _check_bool("hierarchical", self.hierarchical)

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        return Plan._build("logsparse", length, self.hierarchical, 0, *self._options(is_causal, sparse))


ORDERS = ("vertical", "horizontal", "rowmajor")  # as numbered in combiner.h
ROW_KEYS = ("pick", "weighted")


@dataclass(frozen=True, slots=True, repr=False)
class Axial(Factorization):
    """Combiner-Axial (section 4.3): positions lie row by row, `width` to a row; the own row and column directly.

    L * sqrt(L) pairs for the default width, up to a factor. Regions by order, with t a position and n rows:

    - "vertical": every other column's part above the own row (and, bidirectional, below it). Region t is t's column
      down to and including t; bidirectional also region L + t, that column from t on.
    - "horizontal": every other row without the own column. Region r * width + c is row r without column c.
    - "rowmajor": the own row alone directly, every other row whole, with the query and key it has in the own column
      (the nearest unmasked position at or before it, else after). Region t is the row of t, picked at t. No pooling.

    The sparse baseline attends the own row and column.

    Parameters
    ----------
    width : columns; None for the power of two nearest sqrt(L).
    order : which parts of the grid are regions.
    row_key : for rowmajor: "pick", or "weighted", the mean of the row's keys under the region's own softmax.
    """

    width: int | None = None
    order: Literal["vertical", "horizontal", "rowmajor"] = "vertical"
    row_key: Literal["pick", "weighted"] = "pick"

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        if self.width is not None:
            object.__setattr__(self, "width", as_integer("width", self.width, 1))
        choice_number("order", self.order, ORDERS)
        choice_number("row_key", self.row_key, ROW_KEYS)
        if self.row_key == "weighted" and self.order != "rowmajor":
            raise ValueError(f"row_key may be 'weighted' only where order is 'rowmajor', got order {self.order!r}")

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        width = _square_root(length) if self.width is None else self.width
        order = 3 if self.row_key == "weighted" else ORDERS.index(self.order)
        return Plan._build("axial", length, width, order, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class AxialMixture(Factorization):
    """Combiner-Mixture (section 4.3): the own row and column directly, the rest twice, as columns and as rows.

    Positions lie row by row, `width` to a row. All parts are in one softmax: every other column's part above (and,
    bidirectional, below) the own row, every earlier (or other) row's part left and part right of the own column.
    L * sqrt(L) pairs for the default width, up to a factor. Regions: `Axial`'s vertical ones, then with n rows
    n * width left parts, row by row, then n * width right parts. The sparse baseline attends the own row and column.

    Parameters
    ----------
    width : columns; None for the power of two nearest sqrt(L).
    """

    width: int | None = None

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        if self.width is not None:
            object.__setattr__(self, "width", as_integer("width", self.width, 1))

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        width = _square_root(length) if self.width is None else self.width
        return Plan._build("axial_mixture", length, width, 0, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class Tree(Factorization):
    """A tree of blocks (not in the paper, after its remark on partition trees): siblings on the path from leaf to root.

    A node of level t = 1 .. levels is an aligned block of branching^t positions; its members are its children. A query
    attends its level-1 node directly, and on each level the other children of its node one level up; on the highest
    level all other nodes. `Tree(2)` is `LogSparse(hierarchical=True)`, `Tree(b, 1)` is `Fixed(b)`. L * branching *
    log(L) pairs. Regions: level 1, 2, .. while branching^t < L, in each the nodes from left to right. The sparse
    baseline attends the own level-1 node.

    Parameters
    ----------
    branching : children of a node, at least 2.
    levels : None for as many as make one node cover L.
    """

    branching: int
    levels: int | None = None

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        object.__setattr__(self, "branching", as_integer("branching", self.branching, 2))
        if self.levels is not None:
            object.__setattr__(self, "levels", as_integer("levels", self.levels, 1))

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        return Plan._build("tree", length, self.branching, self.levels or 0, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Routing(Factorization):
    """Combiner-Routing (section 4.3): the own cluster directly, every other one as one region.

    Causal: regions are the other clusters' members so far. L (L / C + C) pairs for C clusters of one size. Regions:
    bidirectional, region c is cluster c, up to the largest id; causal, region t the members of t's cluster up to t.
    The sparse baseline attends the own cluster. Compared by identity.

    Parameters
    ----------
    clusters : integers in [0, L): `[L]`, or `[..., Hk, L]` with a set for each batch entry and key head. Copied.
    """

    clusters: npt.NDArray[Any]

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        clusters = np.asarray(self.clusters)
        if clusters.size == 0:
            clusters = clusters.astype(np.int64)
        if not np.issubdtype(clusters.dtype, np.integer):
            raise TypeError(f"clusters must hold integers, got {clusters.dtype}")
        if clusters.ndim == 0:
            raise ValueError("clusters must have shape [L] or [..., Hk, L], got ()")
        length = clusters.shape[-1]
        wrong = clusters[(clusters < 0) | (clusters >= length)]
        if wrong.size:
            raise ValueError(f"clusters must lie between 0 and {length - 1}, got {wrong[0]}")
        clusters = clusters.astype(np.int64)
        clusters.flags.writeable = False
        object.__setattr__(self, "clusters", clusters)

    def plan(self, length: int, is_causal: bool = False) -> Plans:  # type: ignore[override]
        """The plan, or a tuple of one for each batch entry and key head, of `length` = L positions."""
        return Factorization.plan(self, length, is_causal)

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plans:  # type: ignore[override]
        if length != self.clusters.shape[-1]:
            raise ValueError(f"clusters are of {self.clusters.shape[-1]} positions, got length {length}")
        return self._build_segment(0, length, is_causal, sparse)

    def _build_segment(self, start: int, end: int, is_causal: bool, sparse: bool) -> Plans:
        """The plans of positions [start, end), whose clusters keep their numbers."""
        options = self._options(is_causal, sparse)
        clusters = self.clusters[..., start:end]
        if clusters.ndim == 1:
            return Plan._routing(clusters, *options)
        sets = clusters.reshape(math.prod(clusters.shape[:-1]), end - start)
        return tuple(Plan._routing(each, *options) for each in sets)

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.clusters.shape))
        return f"Routing(<clusters [{shape}]>, pooling={self.pooling!r}, size_bias={self.size_bias})"


@dataclass(frozen=True, slots=True, weakref_slot=True, repr=False)
class Sparse:
    """The sparse baseline of a factorization, as its ``sparse()`` returns it."""

    pattern: Factorization

    def plan(self, length: int, is_causal: bool = False) -> Plan:
        """The plan for L = `length` positions, without regions."""
        _check_bool("is_causal", is_causal)
        return _plan(self, as_integer("length", length, 0), bool(is_causal))

    def sparse(self) -> Sparse:
        """Itself."""
        return self

    def __repr__(self) -> str:
        return f"{self.pattern!r}.sparse()"


@dataclass(frozen=True, slots=True, weakref_slot=True, repr=False, init=False)
class Mixture:
    """The mean of several factorizations' attentions, each with its own summaries (section 4.3).

    The output and the effective attention are the plain means of the components'; there is no single normaliser, so
    that `summarize`, `attend` and ``return_lse=True`` are errors. A component with nothing to attend to counts as 0.
    Pooling and size_bias are the components' own; the region axis is the concatenation of theirs. The cost is the sum
    of theirs.

    Parameters
    ----------
    *patterns : patterns or plans, at least one; no mixtures.
    """

    patterns: tuple[Pattern | Plan, ...]

    def __init__(self, *patterns: Pattern | Plan) -> None:
        if not patterns:
            raise ValueError("patterns must be at least one, got none")
        for pattern in patterns:
            if isinstance(pattern, Mixture | tuple | type) or not (
                isinstance(pattern, Plan) or callable(getattr(pattern, "plan", None))
            ):
                kind = pattern.__name__ if isinstance(pattern, type) else type(pattern).__name__
                raise TypeError(f"patterns must be patterns such as combiner.Fixed() or plans, got {kind}")
        object.__setattr__(self, "patterns", patterns)

    def plan(self, length: int, is_causal: bool = False) -> tuple[Plans, ...]:
        """The components' plans for L = `length` positions."""
        return tuple(
            pattern if isinstance(pattern, Plan) else pattern.plan(length, is_causal) for pattern in self.patterns
        )

    def sparse(self) -> Mixture:
        """The mixture of the components' sparse baselines.

        Raises
        ------
        TypeError : a component without one: a Plan.
        """
        for pattern in self.patterns:
            if not hasattr(pattern, "sparse"):
                raise TypeError(f"patterns must have a sparse baseline each, got {type(pattern).__name__}")
        return Mixture(*(pattern.sparse() for pattern in self.patterns))  # type: ignore[union-attr]

    def __repr__(self) -> str:
        return f"Mixture({', '.join(map(repr, self.patterns))})"


def segment_plans(pattern: Pattern | Plan, cu_seqlens: npt.NDArray[np.int64], is_causal: bool) -> tuple[Plan, ...]:
    """The plans of packed sequences, segment by segment: one each, or one for each batch entry and key head.

    Parameters
    ----------
    cu_seqlens : `[N + 1]`, from 0, not decreasing.

    Raises
    ------
    ValueError : a Plan, which is of one length; clusters of another length than all segments together.
    """
    if isinstance(pattern, Plan | tuple):
        raise ValueError(f"pattern must make a plan for each sequence of cu_seqlens, got a {type(pattern).__name__}")
    if isinstance(pattern, type) or not callable(getattr(pattern, "plan", None)):
        raise TypeError(f"pattern must be a pattern such as combiner.Fixed(), got {type(pattern).__name__}")
    plans: list[Plan] = []
    routing = pattern.pattern if isinstance(pattern, Sparse) else pattern
    if isinstance(routing, Routing) and routing.clusters.shape[-1] != cu_seqlens[-1]:
        raise ValueError(f"clusters are of {routing.clusters.shape[-1]} positions, got length {cu_seqlens[-1]}")
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        if isinstance(routing, Routing):
            made = routing._build_segment(start, end, is_causal, isinstance(pattern, Sparse))
        else:
            made = pattern.plan(end - start, is_causal)
        plans.extend(made if isinstance(made, tuple) else (made,))
    return tuple(plans)


@lru_cache(maxsize=64)
def _plan(pattern: Factorization | Sparse, length: int, is_causal: bool) -> Plan:
    if isinstance(pattern, Sparse):
        return pattern.pattern._build(length, is_causal, True)
    return pattern._build(length, is_causal, False)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def _square_root(length: int) -> int:
    """The power of two nearest sqrt(L)."""
    return 1 << (length.bit_length() // 2)
