# SPDX-License-Identifier: Apache-2.0
"""Plans: a factorization for one length, as the flat arrays that the C library runs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any, Literal, Self, TypeAlias, TypeGuard, cast

import numpy as np
import numpy.typing as npt

from . import _core

Array: TypeAlias = npt.NDArray[Any]
Pooling: TypeAlias = Literal["max", "mean", "sum"]
Lists: TypeAlias = Sequence[Sequence[int]] | Sequence[Array] | tuple[Array, Array]

REAL_ARRAY = "a float32, float64, bfloat16 or float16 NumPy array"

POOLINGS = ("max", "mean", "sum", "first")  # as numbered in combiner.h
COVERS = ("any", "full", "partition")  # the same


class Plan(_core.Plan):
    """A factorization of one length, checked once and immutable; any number of threads may share it.

    Made by ``pattern.plan(length, is_causal)``, `from_parts` or `from_arrays`; accepted wherever a pattern is, and
    carries its own causality. Attributes in C: ``length`` (L), ``region_count`` (R), ``is_causal``, ``size_bias``,
    ``weighted``, ``nbytes``, ``scratch_count`` (N) and ``arrays``.
    """

    __slots__ = ("__weakref__", "_facts", "_regions")

    _facts: tuple[int, int, int, bool, bool]
    _regions: tuple[Array, ...]

    @classmethod
    def from_parts(
        cls,
        direct: Lists,
        regions: Lists | None = None,
        members: Lists | None = None,
        *,
        length: int | None = None,
        is_causal: bool = False,
        pooling: Pooling = "max",
        size_bias: bool = False,
        cover: Literal["any", "full", "partition"] = "any",
    ) -> Self:
        """A user's own factorization, from index lists (spec: "A user's own pattern").

        Each argument is a sequence of integer sequences, or a pair of arrays (offsets, items) where list n is
        ``items[offsets[n]:offsets[n + 1]]``; a tuple of two arrays is always taken for such a pair. A list may repeat
        a row, which then counts twice, and positions may be left out, unless `cover` forbids it.

        Parameters
        ----------
        direct : L lists of the positions that each query attends itself.
        regions : L lists of the region numbers that each query attends; none by default.
        members : R lists: what lies in each region, positions or ``L + r`` for an earlier region r.
        length : L, by default the number of lists in `direct`.
        is_causal : whether query i may only see positions up to i.
        pooling : "max", "mean" or "sum" of the members' keys and queries.
        size_bias : whether the log of the unmasked positions below a region joins its logit.
        cover : what a query's parts must cover of its support: "any", what they like; "full", every position at least
            once; "partition", every position exactly once. What lies below a region counts as often as it lies there.

        Raises
        ------
        TypeError : an argument of the wrong kind, named.
        ValueError : a position outside the support, a region or member not listed before, a wrong number of lists; the
            first query whose parts do not cover what they must, with the first position left out or held twice.

        Notes
        -----
        Time and memory grow with the number of integers given; "full" takes L / 64 times as long where parts hold a
        position twice.
        """
        direct_lists = _lists("direct", direct)
        length = len(direct_lists[0]) - 1 if length is None else as_integer("length", length, 0)
        none = np.zeros(1, np.int64), np.zeros(0, np.int64)
        return cls._from_parts(
            length,
            direct_lists,
            (np.zeros(length + 1, np.int64), none[1]) if regions is None else _lists("regions", regions),
            none if members is None else _lists("members", members),
            choice_number("cover", cover, COVERS),
            is_causal,
            choice_number("pooling", pooling, POOLINGS[:3]),
            size_bias,
        )

    @classmethod
    def from_arrays(
        cls,
        wave: npt.ArrayLike,
        task: npt.ArrayLike,
        pool: npt.ArrayLike,
        tile: npt.ArrayLike,
        run: npt.ArrayLike,
        index: npt.ArrayLike,
        mask: npt.ArrayLike,
        *,
        length: int,
        regions: int = 0,
        scratch: int = 0,
        is_causal: bool = False,
        pooling: Pooling | Literal["first"] = "max",
        size_bias: bool = False,
        weighted: bool = False,
    ) -> Self:
        """A plan from its flat arrays, low level: what the engine can run, whether or not a pattern makes it.

        Parameters
        ----------
        wave, task, pool, tile, run, index, mask : as in ``Plan.arrays`` and, field by field, in csrc/combiner.h.
        length, regions, scratch : L, R and N, the rows of the table.
        pooling : also "first", the first child with an unmasked position below it.
        weighted : ``k_R = sum_j p(j | R) k_j`` in place of the pool.

        Raises
        ------
        TypeError : an array that does not hold integers.
        ValueError : a wrong shape, or what is broken in the plan: bounds, order, a row written twice.
        """
        return cls._from_arrays(
            wave,
            task,
            pool,
            tile,
            run,
            index,
            mask,
            as_integer("length", length, 0),
            as_integer("regions", regions, 0),
            as_integer("scratch", scratch, 0),
            is_causal,
            choice_number("pooling", pooling, POOLINGS),
            size_bias,
            weighted,
        )

    @property
    def pooling(self) -> str:
        """How a region's key and query come from its members': "max", "mean", "sum" or "first"."""
        return POOLINGS[self._pooling]

    @property
    def regions(self) -> tuple[Array, ...]:
        """The positions below each region, ascending, in region order: R read-only int64 arrays.

        Expanded from the pool steps, so that regions which no query attends are listed too. Computed once; O(their
        total size).
        """
        try:
            return self._regions
        except AttributeError:
            self._regions = tuple(_positions(self))
            return self._regions

    def _measured(self) -> tuple[int, int, int, bool, bool]:
        """Pairs attended, summarised and computed; whether the plan is a partition, and full. Computed once."""
        try:
            return self._facts
        except AttributeError:
            self._facts = self._measure()
            return self._facts

    @property
    def is_partition(self) -> bool:
        """Whether each query's parts cover its support exactly once, masks aside. O(pairs) at first."""
        return self._measured()[3]

    @property
    def is_full(self) -> bool:
        """Whether each query's parts cover all of its support, masks aside. O(pairs) at first."""
        return self._measured()[4]

    @property
    def pairs(self) -> int:
        """Direct keys and regions attended, summed over the queries; dense attention has ``L * L``."""
        return self._measured()[0]

    def flops(self, dim: int, value_dim: int | None = None, *, backward: bool = False) -> int:
        """Floating-point operations of the matrix products for one head, forward or (alone) backward.

        Forward counts ``2 (D + Dv)`` for each pair of both stages, backward ``2 (3 D + 2 Dv)``: the logits again and
        the gradients of query and key over D, those of the weights and of value over Dv.

        Parameters
        ----------
        dim, value_dim : D and Dv; Dv = D by default.
        backward : the backward pass in place of the forward pass.
        """
        D = as_integer("dim", dim, 1)
        Dv = D if value_dim is None else as_integer("value_dim", value_dim, 1)
        attended, summarized, *_ = self._measured()
        return 2 * (attended + summarized) * (3 * D + 2 * Dv if backward else D + Dv)

    def __repr__(self) -> str:
        return (
            f"Plan(length={self.length}, is_causal={self.is_causal}, regions={self.region_count}, "
            f"pooling={self.pooling!r}, size_bias={self.size_bias}, nbytes={self.nbytes})"
        )


def is_real(x: object) -> TypeGuard[Array]:
    """Whether `x` is a NumPy array of a dtype that the library computes with."""
    return isinstance(x, np.ndarray) and (x.dtype in (np.float32, np.float64, np.float16) or x.dtype.name == "bfloat16")


def widened(x: Array) -> Array:
    """The numbers of a 16-bit dtype as float32; others as they are."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


def as_integer(name: str, value: object, least: int, *, bits: int = 63) -> int:
    """`value` as an int of at most that many bits and at least `least`; bool is not an integer here."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    number = operator.index(value)
    if not least <= number < 1 << bits:
        raise ValueError(f"{name} must be at least {least} and fit 64 bits, got {number}")
    return number


def choice_number(name: str, value: object, choices: Sequence[str]) -> int:
    """The C library's number of a choice."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return choices.index(value)


def _lists(name: str, given: Lists) -> tuple[Array, Array]:
    """(offsets, items) of integer lists."""
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, np.ndarray) for part in given):
        return cast(tuple[Array, Array], given)
    try:
        lengths = [len(part) for part in given]
        items = np.fromiter(map(operator.index, chain.from_iterable(_plain(part) for part in given)), np.int64)
    except (TypeError, OverflowError) as error:
        raise type(error)(
            f"{name} must be a sequence of integer sequences or (offsets, items) arrays: {error}"
        ) from None
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]), items


def _plain(part: Iterable[int]) -> Iterable[int]:
    return part.tolist() if isinstance(part, np.ndarray) else part


def attended(plan: Plan) -> tuple[Array, Array]:
    """Who attends what, spelled out from the tiles: int64 arrays (query, row) `[pairs]`, by query, then row.

    Both are rows of the table: a position, or L + r for region r, which as a query attends its members (stage 1).
    Regions that no position needs do not. O(pairs log(pairs)) of both stages.
    """
    arrays = plan.arrays
    queries, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for (*query_list, run, _), (*_, last_run, _) in pairwise(arrays["tile"].tolist()):
        query = _rows(arrays["index"], *query_list)
        for *row_list, mask in arrays["run"][run:last_run].tolist():
            row = _rows(arrays["index"], *row_list)
            seen = np.ones((len(query), len(row)), bool)
            if mask >= 0:
                lane = np.arange(len(query), dtype=np.uint64)
                seen = (arrays["mask"][mask : mask + len(row)] >> lane[:, None] & np.uint64(1)).astype(bool)
            t, n = np.nonzero(seen)
            queries.append(query[t])
            rows.append(row[n])
    query, row = np.concatenate(queries), np.concatenate(rows)
    order = np.lexsort((row, query))
    return query[order], row[order]


def _rows(index: Array, start: int, step: int, count: int) -> Array:
    """The table rows of a list, spelled out (cmb_list)."""
    return np.arange(start, start + step * count, step) if step else index[start : start + count].astype(np.int64)


def _positions(plan: Plan) -> list[Array]:
    """The positions below each region, from the pool steps of the flat arrays."""
    L, arrays = plan.length, plan.arrays
    below: dict[int, Array] = {}  # by row; a scratch row is written before it is read in each task
    for row, *child_list in arrays["pool"].tolist():
        children = _rows(arrays["index"], *child_list)
        parts = [children[children < L], *(below[child] for child in children[children >= L].tolist())]
        below[row] = np.unique(np.concatenate(parts))
        below[row].flags.writeable = False
    nothing = np.zeros(0, np.int64)
    nothing.flags.writeable = False
    return [below.get(L + r, nothing) for r in range(plan.region_count)]
