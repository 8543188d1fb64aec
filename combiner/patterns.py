# SPDX-License-Identifier: Apache-2.0
"""The factorizations: small values that make a plan for any length.

docs/mathematics.md, section 3, defines each of them; other sections and equations are those of the paper (Ren et al.,
NeurIPS 2021). A pattern is compared, hashed and printed by its parameters, and can be copied and pickled. When a plan
is causal, a query attends positions up to its own; otherwise it attends all positions.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from .arguments import as_integer, as_integers, check_bool, choice_number
from .display import Shown
from .plan import POOLINGS, Plan, Pooling
from .plan_cache import PlanCache


class Pattern(Protocol):
    """What attention accepts as a pattern: any object that makes plans."""

    def plan(self, length: int, is_causal: bool = False, /) -> Plans:
        """One plan, or a tuple of one for each batch entry and key head, in that order."""
        ...


Plans: TypeAlias = Plan | tuple[Plan, ...]


@dataclass(frozen=True, slots=True, weakref_slot=True, repr=False)
class Factorization(Shown):
    """The base of all factorizations.

    Parameters
    ----------
    pooling : "max" (the paper's), "mean" or "sum": how a region's key and query are pooled from its members' (section
        3.2). `Dense`, `Window`, sparse baselines and row-major `Axial` pool nothing and ignore it.
    size_bias : whether the log of the number of unmasked positions below a region is added to its logit (not in the
        paper).
    """

    pooling: Pooling = field(default="max", kw_only=True)
    size_bias: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        choice_number("pooling", self.pooling, POOLINGS[:3])
        check_bool("size_bias", self.size_bias)

    def plan(self, length: int, is_causal: bool = False) -> Plan:
        """The plan for L = `length` positions. Plans made recently are kept and returned again.

        Raises
        ------
        TypeError, ValueError, OverflowError : `length` is not an integer, is negative, or exceeds 2^30.
        """
        check_bool("is_causal", is_causal)
        return made_plan.get(self, as_integer("length", length, 0), bool(is_causal), False)

    def sparse(self) -> Factorization | Sparse:
        """The sparse baseline: queries attend direct keys alone, and no regions."""
        return Sparse(self)

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        raise NotImplementedError

    def _key(self) -> Factorization | weakref.ref[Factorization]:
        """The key under which the cache keeps this pattern's plans."""
        return self

    def _options(self, is_causal: bool, sparse: bool) -> tuple[bool, bool, int, bool]:
        return is_causal, sparse, POOLINGS.index(self.pooling), self.size_bias

    def __repr__(self) -> str:
        own_first = sorted(fields(self), key=lambda f: bool(f.kw_only))
        changed = ((f.name, getattr(self, f.name)) for f in own_first if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed)})"


@dataclass(frozen=True, slots=True, repr=False)
class Dense(Factorization):
    """Every query attends its whole support directly: exact full attention, L^2 pairs."""

    def sparse(self) -> Dense:
        """The pattern itself: it has no regions to leave out."""
        return self

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        return Plan._dense(length, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class Fixed(Factorization):
    """Combiner-Fixed (section 4.1): a query attends its span directly and every earlier (or other) span as a region.

    L (span + L / span) pairs: L * sqrt(L) for the default span. Region t is span t. The sparse baseline attends the
    direct keys and the last position of each other span.

    Parameters
    ----------
    span : positions in a span; None for the power of two nearest sqrt(L).
    window : query i attends directly every span that holds a position nearer to i than `window` (not in the paper), so
        that the first queries of a span have neighbours. 1: the own span alone. It adds about L * window pairs.
    """

    span: int | None = None
    window: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        if self.span is not None:
            object.__setattr__(self, "span", as_integer("span", self.span, 1))
        object.__setattr__(self, "window", as_integer("window", self.window, 1))

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        span = _square_root(length) if self.span is None else self.span
        return Plan._fixed(length, span, self.window, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class LogSparse(Factorization):
    """Combiner-Logsparse (section 4.2): a query attends one block of 2^l positions for each level l, as a region.

    The blocks are the siblings on the path from the query's leaf to the root of a binary tree. L * log(L) pairs.
    Regions: level 1, 2, .. while 2^l < L, and within a level the blocks from left to right. The sparse baseline attends
    the last position of each left sibling block and the first of each right one.

    Parameters
    ----------
    hierarchical : whether a block of level 2 or more summarizes the summaries of its two halves instead of its
        positions (the remark on a partition tree in section 3.1): stage 1 then costs O(L), not O(L log L).
    """

    hierarchical: bool = False

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        check_bool("hierarchical", self.hierarchical)

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        return Plan._logsparse(length, self.hierarchical, *self._options(is_causal, sparse))


ORDERS = ("vertical", "horizontal", "rowmajor")  # numbered as in combiner.h
ROW_KEYS = ("pick", "weighted")


@dataclass(frozen=True, slots=True, repr=False)
class Axial(Factorization):
    """Combiner-Axial (section 4.3): positions lie in rows of `width`; a query attends its row and column directly.

    O(L * sqrt(L)) pairs for the default width. The regions depend on the order; t is a position:

    - "vertical": every other column's part above the own row (bidirectional also the part below it). Region t is the
      column of t from the top down to t; bidirectional also region L + t, the same column from t on.
    - "horizontal": every other row without the own column. Region r * width + c is row r without column c.
    - "rowmajor": every other row, whole; only the own row is direct. The row's abstraction is not pooled: it is the
      query and key of the row's position in the own column. If the row has no unmasked position there, the nearest
      unmasked one before it is taken, else the nearest after it. Region t is the row of t, picked at t.

    The sparse baseline attends the own row and column.

    Parameters
    ----------
    width : columns; None for the power of two nearest sqrt(L).
    order : which parts of the grid are regions.
    row_key : for rowmajor: "pick", or "weighted" for the mean of the row's keys under the region's own softmax.
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
        order, weighted = ORDERS.index(self.order), self.row_key == "weighted"
        return Plan._axial(length, width, order, weighted, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class AxialMixture(Factorization):
    """Combiner-Mixture (table 1 of the paper, and its authors' code): vertical and horizontal `Axial` in one softmax.

    Positions lie in rows of `width`. A query attends its row and column directly. Its regions are every other column's
    part above the own row (bidirectional also the part below), and of every earlier (or other) row the part left and
    the part right of the own column. So most positions are covered twice. O(L * sqrt(L)) pairs for the default width.
    Regions: those of vertical `Axial`, then with n rows n * width left parts, row by row, then n * width right parts.
    The sparse baseline attends the own row and column.

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
        return Plan._axial_mixture(length, width, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class Tree(Factorization):
    """A tree of blocks (not in the paper): a query attends the siblings on the path from its leaf to the root.

    It extends the remark on a partition tree in section 3.1. A node of level t = 1 .. levels is an aligned block of
    branching^t positions, and its members are its children. A query attends its node of level 1 directly. As regions it
    attends, on each level, the siblings of its own node; on the highest level all nodes are siblings. `Tree(2)` is
    `LogSparse(hierarchical=True)`, and `Tree(b, 1)` is `Fixed(b)`. L * branching * log(L) pairs. Regions: level 1, 2,
    .. while branching^t < L, and within a level the nodes from left to right. The sparse baseline attends the own node
    of level 1.

    Parameters
    ----------
    branching : children of a node, at least 2.
    levels : the highest level; None for the lowest one on which a single node covers the sequence.
    """

    branching: int
    levels: int | None = None

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        object.__setattr__(self, "branching", as_integer("branching", self.branching, 2))
        if self.levels is not None:
            object.__setattr__(self, "levels", as_integer("levels", self.levels, 1))

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        return Plan._tree(length, self.branching, self.levels or 0, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class Window(Factorization):
    """Sliding-window attention (not in the paper): a query attends the positions nearer than `size`, and no regions.

    Query i attends position j where i - size < j <= i (causal) or where abs(i - j) < size (bidirectional). It is the
    ``sliding_window`` of Mistral, Gemma and Qwen. About L * size pairs causal, twice as many bidirectional.

    Parameters
    ----------
    size : positions that a causal query attends, its own among them; at least 1.
    """

    size: int

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        object.__setattr__(self, "size", as_integer("size", self.size, 1))

    def sparse(self) -> Window:
        """The pattern itself: it has no regions to leave out."""
        return self

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        return Plan._window(length, self.size, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class HeavilyCompressed(Factorization):
    """A window, and every complete span as a region (not in the paper): DeepSeek-V4's heavily compressed attention.

    A query attends the positions of ``Window(window)`` directly. As regions it attends spans of `rate` positions: when
    causal those that end at its position or before it, otherwise all. So recent spans are covered twice, and a support
    is covered whole if `window` is at least `rate` - 1. About L (window + L / (2 rate)) pairs causal, twice as many
    bidirectional. Region t is span t. The sparse baseline is ``Window(window)``.

    With pooled abstractions it is ours; with the model's compressed entries as `region_key` and `region_value` of
    `attend` it is DeepSeek's.

    Parameters
    ----------
    rate : positions of a span; at least 1.
    window : positions that a causal query attends directly, its own among them; at least 1.
    """

    rate: int = 128
    window: int = 128

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        object.__setattr__(self, "rate", as_integer("rate", self.rate, 1))
        object.__setattr__(self, "window", as_integer("window", self.window, 1))

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        return Plan._heavily_compressed(length, self.rate, self.window, *self._options(is_causal, sparse))


_CLUSTERS = 1 << 30  # cluster numbers are below this limit of the C library


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Routing(Factorization):
    """Combiner-Routing (section 4.4): a query attends its own cluster directly and every other cluster as a region.

    When causal, a region is the other cluster's members up to the query. L (L / C + C) pairs for C clusters of equal
    size. Regions: bidirectional, region c is cluster c, up to the largest number; causal, region t is the members of
    t's cluster up to t. The sparse baseline attends the own cluster. Two `Routing` are equal only if they are the same
    object.

    Parameters
    ----------
    clusters : integers from 0 to 2^30 - 1: `[L]`, or `[..., Hk, L]` with one set for each batch entry and key head.
        Copied. A number that no position has costs nothing when causal; bidirectionally it is an empty region.
    """

    clusters: npt.NDArray[Any]

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        clusters = as_integers("clusters", self.clusters)
        if clusters.ndim == 0:
            raise ValueError("clusters must have shape [L] or [..., Hk, L], as combiner.cluster makes them, got ()")
        wrong = clusters[(clusters < 0) | (clusters >= _CLUSTERS)]
        if wrong.size:
            raise ValueError(f"clusters must lie between 0 and 2^30 - 1, got {wrong[0]}")
        clusters = clusters.astype(np.int64)
        clusters.flags.writeable = False
        object.__setattr__(self, "clusters", clusters)

    def plan(self, length: int, is_causal: bool = False) -> Plans:  # type: ignore[override]
        """The plan for `length` = L positions, or a tuple of one for each batch entry and key head."""
        check_bool("is_causal", is_causal)
        return made_plan.get(self._key(), as_integer("length", length, 0), bool(is_causal), False)

    def _key(self) -> weakref.ref[Factorization]:
        return weakref.ref(self, made_plan.forget)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are read-only too."""
        return partial(Routing, pooling=self.pooling, size_bias=self.size_bias), (self.clusters,)

    def _only_length(self) -> int:
        return int(self.clusters.shape[-1])

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plans:  # type: ignore[override]
        if length != self.clusters.shape[-1]:
            raise ValueError(f"clusters are of {self.clusters.shape[-1]} positions, got length {length}")
        return self._build_segment(0, length, is_causal, sparse)

    def _build_segment(self, start: int, end: int, is_causal: bool, sparse: bool) -> Plans:
        """The plans of positions [start, end). Clusters keep their numbers where regions are numbered by cluster."""
        options = self._options(is_causal, sparse)
        clusters = self.clusters[..., start:end]
        if (is_causal or sparse) and clusters[clusters >= clusters.size].size:  # numbers do not matter: make them small
            clusters = np.unique(clusters, return_inverse=True)[1].reshape(clusters.shape)
        if clusters.ndim == 1:
            return Plan._routing(clusters, *options)
        sets = clusters.reshape(math.prod(clusters.shape[:-1]), end - start)
        return tuple(Plan._routing(each, *options) for each in sets)

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.clusters.shape))
        return f"Routing(<clusters [{shape}]>, pooling={self.pooling!r}, size_bias={self.size_bias})"


@dataclass(frozen=True, slots=True, weakref_slot=True, repr=False)
class Sparse(Shown):
    """The sparse baseline of a factorization, as its ``sparse()`` returns it."""

    pattern: Factorization

    def plan(self, length: int, is_causal: bool = False) -> Plan:
        """The plan for L = `length` positions, without regions."""
        check_bool("is_causal", is_causal)
        return made_plan.get(self.pattern._key(), as_integer("length", length, 0), bool(is_causal), True)

    def sparse(self) -> Sparse:
        """Itself."""
        return self

    def _only_length(self) -> int | None:
        return self.pattern._only_length()

    def __repr__(self) -> str:
        return f"{self.pattern!r}.sparse()"


@PlanCache
def made_plan(key: Factorization | weakref.ref[Any], length: int, is_causal: bool, sparse: bool) -> Plan:
    """The plan, or plans, of a factorization or of its sparse baseline. The cache keeps those made last."""
    pattern = key() if isinstance(key, weakref.ref) else key
    assert pattern is not None  # the caller holds a reference
    return pattern._build(length, is_causal, sparse)


def makes_plans(pattern: object) -> bool:
    """Whether the object has a method `plan`. A class, such as Fixed without parentheses, is not a pattern."""
    return not isinstance(pattern, type) and callable(getattr(pattern, "plan", None))


def no_pattern(
    pattern: object, expected: str = "a pattern such as combiner.Fixed()", name: str = "pattern"
) -> TypeError:
    """The error for an object that is no pattern; a class is told to be called."""
    got = f"{pattern.__name__}, a class: call it" if isinstance(pattern, type) else type(pattern).__name__
    return TypeError(f"{name} must be {expected}, got {got}")


def _square_root(length: int) -> int:
    """The power of two nearest sqrt(L)."""
    return 1 << (length.bit_length() // 2)
