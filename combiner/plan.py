# SPDX-License-Identifier: Apache-2.0
"""Plans: a factorization of one length, as the flat arrays that the C library runs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any, Literal, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from . import _core
from .arguments import Array, as_array, as_integer, choice_number
from .display import Shown
from .plan_lists import attended, positions_below

Pooling: TypeAlias = Literal["max", "mean", "sum"]
Lists: TypeAlias = Sequence[Sequence[int]] | Sequence[Array] | tuple[Array, Array]

POOLINGS = ("max", "mean", "sum", "first")  # as numbered in combiner.h
COVERS = ("any", "full", "partition")  # the same


class Plan(_core.Plan, Shown):
    """A factorization of one length. A plan is checked when it is made and never changes; threads may share it.

    ``pattern.plan(length, is_causal)``, `from_mask`, `from_parts` and `from_arrays` make plans. A plan is accepted
    wherever a pattern is, and carries its own causality. A copy of a plan is the plan itself. A pickle holds the plan's
    arrays, which are checked again when they are read. Attributes defined in C: ``length`` (L), ``region_count`` (R),
    ``is_causal``, ``size_bias``, ``weighted``, ``nbytes``, ``scratch_count`` (N) and ``arrays``.
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
        """A plan of a user's own factorization, from index lists (docs/mathematics.md, section 1).

        Each list argument is a sequence of integer sequences, or a pair of arrays (offsets, items), where list n is
        ``items[offsets[n]:offsets[n + 1]]``. A tuple of two arrays is always read as such a pair. A list may repeat a
        row, which then counts twice, and may leave positions out, unless `cover` forbids it.

        Parameters
        ----------
        direct : L lists: the positions that each query attends directly.
        regions : L lists: the numbers of the regions that each query attends; none by default.
        members : R lists: the members of each region, positions or ``L + r`` for an earlier region r.
        length : L, by default the number of lists in `direct`.
        is_causal : whether query i may attend positions up to i only.
        pooling : "max", "mean" or "sum": how a region's key and query are pooled from its members'.
        size_bias : whether the log of the number of unmasked positions below a region is added to its logit.
        cover : how the parts of each query must cover its support: "any", without a condition; "full", every position
            at least once; "partition", every position exactly once. A position that is several times below a region
            counts that often.

        Raises
        ------
        TypeError : an argument is of the wrong kind; the message names it.
        ValueError : a position is outside the support, a region or member is not listed before, or the number of lists
            is wrong; or the parts do not cover a support as they must: the message has the first such query, and the
            first position that is left out or covered twice.

        Notes
        -----
        Time and memory are proportional to the number of integers given; with "full", where parts hold a position
        twice, the time is L / 64 times that.
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
    def from_mask(cls, mask: npt.ArrayLike, *, is_causal: bool | None = None) -> Self:
        """A plan without regions: query i attends the keys j where ``mask[i, j]`` is True.

        Parameters
        ----------
        mask : bool `[L, L]`. A query whose row has no True attends nothing.
        is_causal : whether the plan is causal; by default it is when no query attends a later key.

        Raises
        ------
        TypeError : `mask` is not bool, or `is_causal` is neither bool nor None.
        ValueError : `mask` has another shape, or a query attends a later key although `is_causal` is True.

        Notes
        -----
        Finding the pairs takes O(L^2) time; making the plan, as `from_parts` does, takes O(pairs log(pairs)) time and
        about 30 bytes of memory a pair. The engine skips rows that 64 consecutive queries all leave out.
        """
        seen = as_array("mask", mask, "a bool array")
        if seen.dtype != bool:
            raise TypeError(f"mask must be a bool array, True where a query attends a key, got {seen.dtype}")
        if seen.ndim != 2 or seen.shape[0] != seen.shape[1]:
            raise ValueError(f"mask must have shape (L, L), got {seen.shape}")
        if not (is_causal is None or isinstance(is_causal, bool | np.bool_)):
            raise TypeError(f"is_causal must be a bool or None, got {type(is_causal).__name__}")
        L = len(seen)
        offsets = np.zeros(L + 1, np.int64)
        np.cumsum(np.count_nonzero(seen, axis=1), out=offsets[1:])
        keys = np.flatnonzero(seen)
        keys %= max(L, 1)
        queries = np.flatnonzero(np.diff(offsets))
        last = keys[offsets[queries + 1] - 1]
        later = np.flatnonzero(last > queries)
        if is_causal and later.size:
            i, j = queries[later[0]], last[later[0]]
            raise ValueError(f"mask must be False after the query where is_causal is True, got True at [{i}, {j}]")
        return cls.from_parts((offsets, keys), is_causal=not later.size if is_causal is None else bool(is_causal))

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
        """A plan from its flat arrays: the low-level way to any plan that the engine can run.

        Parameters
        ----------
        wave, task, pool, tile, run, index, mask : as in ``Plan.arrays`` and, field by field, in csrc/combiner.h.
        length, regions, scratch : L, R and N, the rows of the table.
        pooling : as in `from_parts`, or "first": the first child with an unmasked position below it.
        weighted : whether k_R is ``sum_j p(j | R) k_j`` instead of a pooled key.

        Raises
        ------
        TypeError : an array does not hold integers.
        ValueError : a shape is wrong, or the arrays break a rule of plans: bounds, order, a row written twice.
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

    def to_mask(self) -> Array:
        """The positions that each query's parts cover, directly or in a region: bool `[L, L]`.

        The inverse of `from_mask` for plans without regions. A plan knows no key mask. O(L^2) memory; time is
        proportional to the number of True cells.
        """
        L = self.length
        mask = np.zeros((L, L), bool)
        query, row = attended(self)
        is_query = query < L  # others are the regions', of stage 1
        query, row = query[is_query], row[is_query]
        is_direct = row < L
        mask[query[is_direct], row[is_direct]] = True
        query, row = query[~is_direct], row[~is_direct]
        query = query[np.argsort(row, kind="stable")]
        regions, counts = np.unique(row, return_counts=True)
        for region, (first, end) in zip(regions - L, pairwise([0, *np.cumsum(counts)]), strict=True):
            mask[np.ix_(query[first:end], self.regions[region])] = True
        return mask

    def __copy__(self) -> Self:
        """Itself: a plan never changes."""
        return self

    def __deepcopy__(self, memo: object) -> Self:
        """Itself: a plan never changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the flat arrays; reading it checks them as `from_arrays` does."""
        make = partial(
            type(self).from_arrays,
            length=self.length,
            regions=self.region_count,
            scratch=self.scratch_count,
            is_causal=self.is_causal,
            pooling=self.pooling,  # type: ignore[arg-type]
            size_bias=self.size_bias,
            weighted=self.weighted,
        )
        return make, tuple(self.arrays.values())

    @property
    def pooling(self) -> str:
        """How a region's key and query are pooled from its members', "max", "mean", "sum" or "first"."""
        return POOLINGS[self._pooling]

    @property
    def regions(self) -> tuple[Array, ...]:
        """The positions below each region, ascending, in region order, R read-only int64 arrays.

        They are read from the pool steps, so regions that no query attends are listed too. Computed at the first use;
        O(total size of the regions).
        """
        try:
            return self._regions
        except AttributeError:
            self._regions = tuple(positions_below(self).values())
            return self._regions

    def _measured(self) -> tuple[int, int, int, bool, bool]:
        """Pairs attended, summarized and computed; is_partition; is_full. Computed at the first use."""
        try:
            return self._facts
        except AttributeError:
            self._facts = self._measure()
            return self._facts

    @property
    def is_partition(self) -> bool:
        """Whether each query's parts cover its support exactly once, masks aside. The first use takes O(pairs)."""
        return self._measured()[3]

    @property
    def is_full(self) -> bool:
        """Whether each query's parts cover its support at least once, masks aside. The first use takes O(pairs)."""
        return self._measured()[4]

    @property
    def pairs(self) -> int:
        """Direct keys and regions attended, summed over the queries. Dense attention has ``L * L``, or causal
        ``L (L + 1) / 2``."""
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

    def _only_length(self) -> int:
        return self.length

    def _causalities(self) -> tuple[bool, ...]:
        return (self.is_causal,)

    def _plans(self, length: int, is_causal: bool) -> Self:
        if length != self.length:
            raise ValueError(f"length must be {self.length}, the plan's, got {length}")
        if is_causal and not self.is_causal:
            raise ValueError("is_causal must be False with a bidirectional plan, got True")
        return self

    def __repr__(self) -> str:
        return (
            f"Plan(length={self.length}, is_causal={self.is_causal}, regions={self.region_count}, "
            f"pooling={self.pooling!r}, size_bias={self.size_bias}, nbytes={self.nbytes})"
        )


def _lists(name: str, given: Lists) -> tuple[Array, Array]:
    """(offsets, items) of integer lists."""
    try:
        return _read_lists(given)
    except (NotImplementedError, OverflowError, TypeError, ValueError) as error:
        kind = OverflowError if isinstance(error, OverflowError) else TypeError
        raise kind(f"{name} must be a sequence of integer sequences or (offsets, items) arrays: {error}") from None


def _read_lists(given: Lists) -> tuple[Array, Array]:
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, np.ndarray) for part in given):
        offsets, items = cast(tuple[Array, Array], given)
        _refuse_bools((offsets.dtype.type, items.dtype.type))
        return offsets, items
    kinds: set[type] = set()
    for part in given:
        kinds.update(_kinds(part))
    _refuse_bools(kinds)
    lengths = [len(part) for part in given]
    items = np.fromiter(map(operator.index, chain.from_iterable(_plain(part) for part in given)), np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]), items


def _kinds(part: Iterable[int]) -> Iterable[type]:
    """The types of a list's items."""
    return (part.dtype.type,) if isinstance(part, np.ndarray) and part.dtype != object else set(map(type, part))


def _plain(part: Iterable[int]) -> Iterable[int]:
    return part.tolist() if isinstance(part, np.ndarray) else part


def _refuse_bools(kinds: Iterable[type]) -> None:
    if any(issubclass(kind, bool | np.bool_) for kind in kinds):
        raise TypeError(
            "a bool is no position; Plan.from_mask makes a plan of a mask, np.flatnonzero lists where its row is True"
        )
