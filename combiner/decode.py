# SPDX-License-Identifier: Apache-2.0
"""Causal attention one token after the other.

What a query of Dense, Fixed, LogSparse or Tree attends is a stack of rows in the order of positions: the nodes of a
tree that are complete, the largest first, then the keys of the node at hand. A position pushes its row; the rows of a
node that it completes give way to the node's summary, and so on up the tree. The sparse baselines leave a node's last
row in its place, or nothing; flat LogSparse summarizes the node's positions, which it keeps, rather than its children.

Axial's positions lie in a grid, row by row. What a query attends beside its own row lies column by column: its
column's keys and the summaries that earlier rows left there, or the summaries of all the columns.

Heads are split into `[..., Hk, G, rows, features]`, G query heads to a key head, so that summaries, which are of query
heads, are keys and values like all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from .functional import Summary, attend, summarize
from .interchange import any_library
from .patterns import AnyPattern, Axial, AxialMixture, Dense, Factorization, Fixed, LogSparse, Sparse, Tree
from .plan import REAL_ARRAY, Array, Plan

_LONGEST = 1 << 30  # positions of a sequence
_LARGE = 1024  # rows: to attend more takes longer than to make a plan, which is not kept then


class _Nodes(NamedTuple):
    """How a pattern's positions become nodes."""

    branching: int  # children of a node
    levels: int | None  # of nodes; without an end if None
    # What a complete node leaves: the summary of its children, or of its positions, or its last row.
    left: Literal["children", "positions", "last", "nothing"]

    def can_grow(self, level: int) -> bool:
        """Whether nodes of this level, positions of level 0, become parts of others."""
        return self.levels is None or level < self.levels

    def size(self, level: int) -> int:
        """The positions of a node."""
        return int(self.branching**level)

    def seen(self, length: int) -> list[tuple[int, int, int]]:
        """The stack of the position after the first `length`: (level, first node, end), the highest level first."""
        found = []
        level, end = 0, length
        while end and self.can_grow(level):
            above = end // self.branching
            found.append((level, above * self.branching, end))
            level, end = level + 1, above
        found.append((level, 0, end))
        return [part for part in reversed(found) if part[1] < part[2]]


class _Columns(NamedTuple):
    """How a pattern's positions lie in a grid."""

    width: int
    # What a complete row leaves in the columns: its keys alone, or what the order of this name attends.
    left: Literal["keys", "vertical", "horizontal", "rowmajor"]


def _layout(pattern: object) -> _Nodes | _Columns:
    """How the pattern sees the past.

    Raises
    ------
    ValueError : a pattern that depends on the length, or has no such layout.
    TypeError : no pattern.
    """
    is_sparse = isinstance(pattern, Sparse)
    match pattern.pattern if isinstance(pattern, Sparse) else pattern:
        case Dense():
            return _Nodes(2, 0, "nothing")
        case Fixed(span=None):
            raise ValueError(f"pattern must have a span, the default depends on the length, got {pattern!r}")
        case Axial(width=None):
            raise ValueError(f"pattern must have a width, the default depends on the length, got {pattern!r}")
        case Fixed(span=int(span)):
            return _Nodes(span, 1, "last" if is_sparse else "children")
        case LogSparse(hierarchical=hierarchical):
            return _Nodes(2, None, "last" if is_sparse else "children" if hierarchical else "positions")
        case Tree(branching=branching, levels=levels):
            return _Nodes(branching, 1, "nothing") if is_sparse else _Nodes(branching, levels, "children")
        case Axial(width=int(width), order=order):
            return _Columns(min(width, _LONGEST), "keys" if is_sparse else order)
        case AxialMixture(width=int(width)) if is_sparse:
            return _Columns(min(width, _LONGEST), "keys")
        case Plan() | tuple():
            raise ValueError(f"pattern must be of any length, got a {type(pattern).__name__}")
    if not isinstance(pattern, type) and callable(getattr(pattern, "plan", None)):
        raise ValueError(f"pattern must be Dense, Fixed, LogSparse, Tree or Axial, got {pattern!r}")
    kind = pattern.__name__ if isinstance(pattern, type) else type(pattern).__name__
    raise TypeError(f"pattern must be a pattern such as combiner.Fixed(64), got {kind}")


class _Rows:
    """Rows of `[..., rows, features]` that come and go at the end, in memory that grows by half and more."""

    __slots__ = ("_buffer", "count")

    def __init__(self, lead: tuple[int, ...], features: int, dtype: np.dtype[Any]) -> None:
        self._buffer: Array = np.empty((*lead, 0, features), dtype)
        self.count = 0

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def rows(self, first: int, end: int) -> Array:
        return self._buffer[..., first:end, :]

    def push(self, rows: Array) -> None:
        first, self.count = self.count, self.count + rows.shape[-2]
        *lead, capacity, features = self._buffer.shape
        if self.count > capacity:
            grown = np.empty((*lead, max(self.count, capacity + capacity // 2, 16), features), self._buffer.dtype)
            grown[..., :first, :] = self._buffer[..., :first, :]
            self._buffer = grown
        self._buffer[..., first : self.count, :] = rows

    def pop(self, count: int) -> None:
        self.count -= count


class _Table:
    """Queries, keys and values by row; no queries where nothing is summarized."""

    def __init__(self, query: _Rows | None, key: _Rows, value: _Rows) -> None:
        self.query, self.key, self.value = query, key, value

    @property
    def count(self) -> int:
        return self.key.count

    @property
    def nbytes(self) -> int:
        return (self.query.nbytes if self.query else 0) + self.key.nbytes + self.value.nbytes

    def push(self, query: Array | None, key: Array, value: Array) -> None:
        if self.query:
            self.query.push(key if query is None else query)  # None: nothing will read it
        self.key.push(key)
        self.value.push(value)

    def rows(self, first: int, end: int) -> tuple[Array, Array, Array]:
        """Rows [first, end) of each; without queries the keys stand in for them."""
        return (self.query or self.key).rows(first, end), self.key.rows(first, end), self.value.rows(first, end)

    def all(self) -> tuple[Array, Array, Array]:
        """Every row."""
        return self.rows(0, self.count)

    @property
    def heads(self) -> tuple[int, int]:
        """G of keys and of values."""
        return self.key.rows(0, 0).shape[-3], self.value.rows(0, 0).shape[-3]

    def pop(self, count: int) -> None:
        if self.query:
            self.query.pop(count)
        self.key.pop(count)
        self.value.pop(count)


class _Sizes(NamedTuple):
    """Of the arrays, split."""

    lead: tuple[int, ...]  # Hk the last
    group: int
    D: int
    Dv: int
    dtype: np.dtype[Any]

    def rows(self, heads: int, features: int, *columns: int) -> _Rows:
        return _Rows((*self.lead, *columns, heads), features, self.dtype)

    def table(self, value_heads: int, *columns: int, has_query: bool = False, key_heads: int = 1) -> _Table:
        query = self.rows(self.group, self.D, *columns) if has_query else None
        return _Table(query, self.rows(key_heads, self.D, *columns), self.rows(value_heads, self.Dv, *columns))


class _Past(Protocol):
    """What later queries attend, and what they will."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""

    def room(self) -> int:
        """Tokens that `attend` takes at once, now."""

    def attend(self, query: Array, key: Array, value: Array, out: Array) -> None:
        """Each query attends the past and, of the keys given, those up to its own; then all join the past."""

    def fill(self, query: Array, key: Array, value: Array, summary: Summary) -> None:
        """The first tokens, one at least, with the pattern's summary of them."""


class _Stack:
    """Rows in the order of positions: nodes, the largest first, then the keys of the node at hand."""

    def __init__(self, nodes: _Nodes, pattern: Any, scale: float | None, sizes: _Sizes) -> None:
        self._nodes, self._pattern, self._scale = nodes, pattern, scale
        self._size_bias = nodes.left in ("children", "positions") and pattern.size_bias
        value_heads = sizes.group if nodes.left in ("children", "positions") else 1  # summaries differ in a group
        self._rows = sizes.table(value_heads, has_query=nodes.left == "children")
        self._positions = sizes.table(1, has_query=True) if nodes.left == "positions" else None
        self._length = 0
        self._counts: list[int] = [0]  # rows by level

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes + (self._positions.nbytes if self._positions else 0)

    def room(self) -> int:
        return self._nodes.branching - self._counts[0] if self._nodes.can_grow(0) else _LONGEST

    def attend(self, query: Array, key: Array, value: Array, out: Array) -> None:
        _, region_key, region_value = self._rows.all()
        below = self._rows.count
        counts = tuple(self._counts) if self._size_bias else (below,)
        is_kept = below <= _LARGE and self._nodes.can_grow(0)  # others do not come again
        make = _stack_plan if is_kept else _stack_plan.__wrapped__
        plan = make(query.shape[-2], counts, self._nodes.branching)
        region_value = _spread(region_value, query.shape[-3])
        attend(query, key, value, region_key, region_value, plan, scale=self._scale, out=out)
        self._push(query, key, value)

    def _push(self, query: Array, key: Array, value: Array) -> None:
        """Up to the end of a node at most; nodes that are complete give way to what is left of them."""
        self._rows.push(query, key, value)
        if self._positions:
            self._positions.push(query, key, value)
        self._length += query.shape[-2]
        self._counts[0] += query.shape[-2]
        level = 0
        while self._nodes.can_grow(level) and self._counts[level] == self._nodes.branching:
            self._complete(level + 1)
            level += 1

    def _complete(self, level: int) -> None:
        """The rows of a node's children, which end the stack, become one of `level`, or none."""
        nodes, rows = self._nodes, self._rows
        if level == len(self._counts):
            self._counts.append(0)
        end = rows.count
        first = end - nodes.branching
        self._counts[level - 1] = 0
        if nodes.left == "nothing":
            rows.pop(nodes.branching)
            return
        self._counts[level] += 1
        query = None
        if nodes.left == "last":
            _, key, value = rows.rows(end - 1, end)
        elif self._positions:
            positions = self._length - nodes.size(level), self._length
            key, value, query = self._summarize(self._positions, *positions, False)
        else:
            key, value, query = self._summarize(rows, first, end, nodes.can_grow(level))
        rows.pop(nodes.branching)
        rows.push(query, key, value)

    def _summarize(self, table: _Table, first: int, end: int, needs_query: bool) -> tuple[Array, Array, Array | None]:
        """k_R, h_R and, if needed, q_R of one region whose members are these rows."""
        query, key, value = table.rows(first, end)
        plan = _region_plan(end - first, self._pattern.pooling)
        summary = summarize(query, _spread(key, value.shape[-3]), value, plan, scale=self._scale)
        # The key of a summary is pooled: of queries it is the region's query.
        pooled = summarize(query, query, query[..., :1], plan).key if needs_query else None
        return summary.key[..., :1, :, :], summary.value, pooled

    def fill(self, query: Array, key: Array, value: Array, summary: Summary) -> None:
        nodes, last = self._nodes, query.shape[-2] - 1
        # What the last query attends is in the summary; then its position comes as in a step.
        parts = nodes.seen(last)
        queries = None
        if nodes.left == "children" and nodes.can_grow(1):
            queries = summarize(query, query, query[..., :1], self._pattern, is_causal=True).key
        region, level_first = 0, [0]  # of each level's node 0: levels follow one another
        for level in range(1, parts[0][0] + 1 if parts else 1):
            level_first.append(region)
            region += -(-(last + 1) // nodes.size(level))
        self._counts = [0] * len(level_first)
        for level, first, end in parts:
            if level and nodes.left == "nothing":
                continue
            self._counts[level] = end - first
            size = nodes.size(level)
            if level == 0 or nodes.left == "last":
                rows = slice((first + 1) * size - 1, end * size, size)
                self._rows.push(query[..., rows, :], key[..., rows, :], value[..., rows, :])
            else:
                rows = slice(level_first[level] + first, level_first[level] + end)
                pooled = None if queries is None else queries[..., rows, :]
                self._rows.push(pooled, summary.key[..., rows, :], summary.value[..., rows, :])
        self._length = last
        if self._positions:
            self._positions.push(query[..., :last, :], key[..., :last, :], value[..., :last, :])
        self._push(query[..., last:, :], key[..., last:, :], value[..., last:, :])


class _Grid:
    """The row at hand, and what earlier rows left in the columns.

    A column keeps, of each row that is complete, its key, a summary, or both in turn. In the vertical order it keeps
    the query and the key, and all columns are summarized whenever a row is complete, for the queries of the next one.
    """

    def __init__(self, columns: _Columns, pattern: Any, scale: float | None, sizes: _Sizes) -> None:
        self._m, self._left = columns
        self._pattern, self._scale = pattern, scale
        self._size_bias = self._left != "keys" and pattern.size_bias
        is_vertical = self._left == "vertical"
        self._has_summaries = self._left in ("horizontal", "rowmajor")
        is_weighted = self._has_summaries and pattern.row_key == "weighted"
        self._row = sizes.table(1, has_query=True)
        self._columns = sizes.table(
            sizes.group if self._has_summaries else 1,
            self._m,
            has_query=is_vertical,
            key_heads=sizes.group if is_weighted else 1,
        )
        # Vertical: the columns' summaries, but of the first row, and the row at hand.
        self._across = sizes.table(sizes.group) if is_vertical else None
        self._length = 0

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in (self._row, self._columns, self._across) if table)

    def room(self) -> int:
        return 1

    def attend(self, query: Array, key: Array, value: Array, out: Array) -> None:
        r, c = divmod(self._length, self._m)
        column_key, column_value = (x[..., c, :, :, :] for x in self._columns.all()[1:])
        count = column_key.shape[-2]
        self._row.push(query, key, value)
        if self._across:  # the column is positions, what lies across it regions, but for its own summary
            positions = np.concatenate([column_key, key], axis=-2), np.concatenate([column_value, value], axis=-2)
            regions = self._across.all()[1:]
            sizes = np.repeat((r, 1), (self._across.count - c, c))
            lists = [(0, c), (c + 1, len(sizes))] if r else [(0, c)]
        else:  # the row is positions, the column regions
            positions = self._row.all()[1:]
            regions = column_key, _spread(column_value, query.shape[-3])
            of_row = {"keys": (1,), "rowmajor": (self._m,), "horizontal": (1, self._m - 1)}[self._left]
            sizes = np.tile(of_row[: count // max(r, 1)], r)
            lists = [(0, count)]
        # The query is that of the last position; the others have none.
        length = positions[0].shape[-2]
        queries = np.broadcast_to(query, (*query.shape[:-2], length, query.shape[-1]))
        plan = _plan(length, 1, lists, len(sizes), sizes if self._size_bias else None)
        out[...] = attend(queries, *positions, *regions, plan, scale=self._scale)[..., -1:, :]
        if self._across:
            self._across.push(None, key, value)
        self._length += 1
        if c + 1 == self._m:
            self._end_row()

    def _end_row(self) -> None:
        """The row leaves what later rows attend, and another begins."""
        query, key, value = self._row.all()
        summary = None
        if self._has_summaries:
            # The first of two rows is summarized as the second one sees it.
            query, key, value = (np.concatenate([x, x], axis=-2) for x in (query, key, value))
            summary = summarize(query, key, value, self._pattern, is_causal=True, scale=self._scale)
        self._leave(query, key, value, summary, 1)
        self._row.pop(self._m)

    def _leave(self, query: Array, key: Array, value: Array, summary: Summary | None, rows: int) -> None:
        """What the first rows, whole ones, leave in the columns."""
        if not rows:
            return
        first = slice(0, rows * self._m)
        left = [] if self._left == "rowmajor" else [(key, value)]
        if summary and (self._left == "rowmajor" or self._m > 1):  # a row without its only column is nothing
            left.append((summary.key, summary.value))
        keys, values = (
            [_by_column(_spread(x[..., first, :], heads), rows) for x in xs]
            for xs, heads in zip(zip(*left, strict=True), self._columns.heads, strict=True)
        )
        in_turn = (np.stack(xs, axis=-2).reshape(*xs[0].shape[:-2], -1, xs[0].shape[-1]) for xs in (keys, values))
        self._columns.push(_by_column(query[..., first, :], rows), *in_turn)
        if self._across:
            self._across.pop(self._across.count)
            query, key, value = self._columns.all()
            plan = _region_plan(key.shape[-2], self._pattern.pooling)
            summary = summarize(query, key, value, plan, scale=self._scale)
            self._across.push(None, *(np.moveaxis(x[..., 0, :], -3, -2) for x in (summary.key, summary.value)))

    def fill(self, query: Array, key: Array, value: Array, summary: Summary) -> None:
        n, m = query.shape[-2], self._m
        whole = n // m
        # Later rows of these attend whole rows but the last, which is left as in a step.
        early = max(whole - 1, 0)
        self._leave(query, key, value, summary if self._has_summaries else None, early)
        for first, end in ((early * m, whole * m), (whole * m, n)):
            self._row.push(query[..., first:end, :], key[..., first:end, :], value[..., first:end, :])
            if first < end == whole * m:
                self._end_row()
        if self._across:
            self._across.push(None, *self._row.all()[1:])
        self._length = n


def _by_column(x: Array, rows: int) -> Array:
    """`[..., H, rows * m, features]` as `[..., m, H, rows, features]`."""
    return np.moveaxis(x.reshape(*x.shape[:-2], rows, -1, x.shape[-1]), -2, -4)


def _spread(x: Array, heads: int) -> Array:
    """`[..., 1, rows, features]` as that of so many heads."""
    return x if x.shape[-3] == heads else np.broadcast_to(x, (*x.shape[:-3], heads, *x.shape[-2:]))


class Decoder:
    """Causal attention of a sequence that grows: `prefill` what there is, then `step` by step.

    Row by row the result is that of ``attention(query, key, value, pattern, is_causal=True)`` of the whole sequence, up
    to rounding; `step` of n tokens has the bits of n steps of one. What is given is copied, never kept.

    Parameters
    ----------
    pattern : `Dense`, `Fixed`, `LogSparse`, `Tree` or `Axial`, or the sparse baseline of one or of `AxialMixture`, with
        its span or width given.
    scale : factor of the logits, finite; 1 / sqrt(D) by default.

    Raises
    ------
    TypeError : what is no pattern, or a scale that is no number.
    ValueError : a default span or width, which depends on the length; a Plan or Routing, which are of one length;
        AxialMixture and Mixture; a scale that is not finite.

    Notes
    -----
    The time of a token at length L is that of the rows that it attends, O(Hq rows (D + Dv)), besides some 50 us of
    Python, and in the mean that of the rows that it is summarized with; memory is what later queries attend:

    - `Dense`: L rows; memory O(L).
    - `Fixed`: up to span + L / span rows, summarized once; memory O(span + L / span).
    - `LogSparse`: log2(L) rows, summarized log2(L) times, and L rows at worst in one step; memory O(L).
    - `LogSparse(hierarchical=True)`, `Tree`: branching * log(L) rows, summarized once, and with their summaries; memory
      the same, but for the nodes of the highest of a number of levels given.
    - `Axial`: width + L / width rows. Its own row summarizes a token width times in the horizontal and the row-major
      order, its column as often as there are rows in the vertical one. Memory O(L).
    - Sparse baselines: the rows that they attend; memory the same, but O(L) for `Axial`.

    Caches grow by half of themselves. A decoder is for one thread at a time. After a MemoryError or a Ctrl-C in a call
    it is empty, as after `reset`.
    """

    def __init__(self, pattern: AnyPattern, *, scale: float | None = None) -> None:
        self._way = _layout(pattern)
        self._pattern: Factorization | Sparse = pattern  # type: ignore[assignment]
        if scale is not None:
            try:
                scale = float(scale)
            except (TypeError, ValueError):
                raise TypeError(f"scale must be a number or None, got {type(scale).__name__}") from None
            if not math.isfinite(scale):
                raise ValueError(f"scale must be finite, got {scale}")
        self._scale = scale
        self.reset()

    def reset(self) -> None:
        """Forgets the sequence, its dtype and its shapes."""
        self._length = 0
        self._shapes: tuple[tuple[int, ...], ...] = ()  # without the number of tokens
        self._dtype: np.dtype[Any] | None = None
        self._past: _Past | None = None

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return self._past.nbytes if self._past else 0

    @property
    def pattern(self) -> Factorization | Sparse:
        """What was given."""
        return self._pattern

    @any_library
    def prefill(self, query: Array, key: Array, value: Array) -> Array:
        """The first tokens, all at once: what `attention` gives for them, with its bits, at its cost.

        Parameters
        ----------
        query : `[..., Hq, n, D]` or `[n, D]`, of a dtype that `attention` takes; any n >= 0, here and in `step`.
        key : `[..., Hk, n, D]` or `[n, D]`, the same dtype.
        value : `[..., Hk, n, Dv]` or `[n, Dv]`, the same dtype.

        Returns
        -------
        out : `[..., Hq, n, Dv]` or `[n, Dv]`

        Raises
        ------
        TypeError, ValueError : as `attention`; ValueError after other tokens.
        """
        if self._length:
            raise ValueError(f"prefill must come before all other tokens, got it at length {self._length}")
        given = self._check(query, key, value)
        try:
            q, k, v = self._split(*given)
            summary = summarize(q, k, v, self._pattern, is_causal=True, scale=self._scale)
            region = summary.key, summary.value
            out = attend(q, k, v, *region, self._pattern, is_causal=True, scale=self._scale)
            if q.shape[-2]:
                self._past.fill(q, k, v, summary)  # type: ignore[union-attr]
        except BaseException:
            self.reset()
            raise
        self._length = q.shape[-2]
        return out.reshape(*given[0].shape[:-1], v.shape[-1])

    @any_library
    def step(self, query: Array, key: Array, value: Array) -> Array:
        """The next tokens: their keys and values join the sequence, their queries attend it up to themselves.

        Parameters, returns, raises
        ---------------------------
        As in `prefill`; dtype and all but n as in the calls before.
        """
        given = self._check(query, key, value)
        assert self._past
        try:
            q, k, v = self._split(*given)
            n = q.shape[-2]
            out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
            first = 0
            while first < n:
                end = first + min(n - first, self._past.room())
                self._past.attend(*(x[..., first:end, :] for x in (q, k, v, out)))
                first = end
        except BaseException:
            self.reset()
            raise
        self._length += n
        return out.reshape(*given[0].shape[:-1], v.shape[-1])

    def __repr__(self) -> str:
        scale = "" if self._scale is None else f", scale={self._scale}"
        return f"<Decoder({self._pattern!r}{scale}) of length {self._length}>"

    # ---- arguments

    def _check(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        """The arguments as arrays, checked; the first ones set what all others are like."""
        given = _array("query", query), _array("key", key), _array("value", value)
        n = given[0].shape[-2] if given[0].ndim > 1 else 0
        if not self._past:
            summarize(*given, _empty_plan(n), scale=self._scale)  # checks all that `attention` does
            self._begin(*given)
            return given
        for name, x, shape in zip(("query", "key", "value"), given, self._shapes, strict=True):
            if x.dtype != self._dtype:
                raise TypeError(f"{name} must be {self._dtype} like the tokens before, got {x.dtype}")
            if x.shape != (expected := (*shape[:-1], n, shape[-1])):
                raise ValueError(f"{name} must have shape {expected} like the tokens before, got {x.shape}")
        return given

    def _begin(self, query: Array, key: Array, value: Array) -> None:
        """A past for tokens like these."""
        self._shapes = tuple((*x.shape[:-2], x.shape[-1]) for x in (query, key, value))
        self._dtype = query.dtype
        q, _, v = self._split(query, key, value)
        *lead, group, _, D = q.shape
        sizes = _Sizes(tuple(lead), group, D, v.shape[-1], q.dtype)
        if isinstance(self._way, _Nodes):
            self._past = _Stack(self._way, self._pattern, self._scale, sizes)
        else:
            self._past = _Grid(self._way, self._pattern, self._scale, sizes)

    @staticmethod
    def _split(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        """`[..., Hk, G, n, features]`, keys and values with G = 1."""
        if query.ndim == 2:
            return query[None, None], key[None, None], value[None, None]
        *lead, Hk, n, _ = key.shape
        group = query.shape[-3] // Hk if Hk else 1
        return query.reshape(*lead, Hk, group, n, query.shape[-1]), key[..., None, :, :], value[..., None, :, :]


def _array(name: str, x: Array) -> Array:
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ma.MaskedArray) or not hasattr(x, "__array__"):
        raise TypeError(f"{name} must be {REAL_ARRAY}, got {type(x).__name__}")
    return np.asarray(x)


# ---- plans of a few queries over rows that are given


@lru_cache(maxsize=64)
def _empty_plan(length: int) -> Plan:
    return Plan.from_arrays([0], [[0, 0]], [], [[0] * 5], [], [], [], length=length)


@lru_cache(maxsize=64)
def _region_plan(members: int, pooling: str) -> Plan:
    """One region of all positions, summarized as a row."""
    everything = [0, 1, members]
    return Plan.from_arrays(
        [0, 1],
        [[0, 0], [1, 1]],
        [[members, *everything]],
        [[members, 1, 1, 0, 1], [0, 0, 0, 1, 0]],
        [[*everything, -1]],
        [],
        [],
        length=members,
        regions=1,
        pooling=pooling,  # type: ignore[arg-type]
    )


@lru_cache(maxsize=1024)
def _stack_plan(queries: int, counts: tuple[int, ...], branching: int) -> Plan:
    """Each query attends the whole stack and the positions up to its own.

    Parameters
    ----------
    counts : rows of level 0, 1, ..; the highest come first. With several levels a row's size, branching^level
        positions, joins its logit.
    """
    R, sizes = sum(counts), None
    if len(counts) > 1:
        sizes = np.repeat([branching**level for level in reversed(range(len(counts)))], counts[::-1])
    return _plan(queries, queries, [(0, R)], R, sizes)


def _plan(length: int, queries: int, lists: Sequence[tuple[int, int]], regions: int, sizes: Array | None) -> Plan:
    """The last `queries` positions attend the lists [first, end) of regions and the positions up to their own.

    Parameters
    ----------
    sizes : `[R]`, the positions that each region stands for, if these join the logits.
    """
    L, R = length, regions
    N, pool = 0, np.empty((0, 4), np.int64)
    index: list[int] = []
    tile: list[tuple[int, ...]] = []
    if sizes is not None and R:
        N, pool, index = _count(L, sizes)
        # A pooled region must have been a query before it is attended; its tile is not run.
        tile = [(L + first, 1, min(64, R - first), n, 64) for n, first in enumerate(range(0, R, 64))]
    run = [(0, 1, 1, -1)] * len(tile)
    for i in range(L - queries, L):
        tile.append((i, 1, 1, len(run), 1))
        run += [(L + first, 1, end - first, -1) for first, end in lists if first < end]
        run.append((0, 1, i + 1, -1))
    return Plan.from_arrays(
        [0, 1],
        [(0, 0), (len(pool), len(tile))],
        pool,
        [*tile, (0, 0, 0, len(run), 0)],
        run,
        index,
        [],
        length=L,
        regions=R,
        scratch=N,
        size_bias=sizes is not None,
    )


def _count(length: int, sizes: Array) -> tuple[int, Array, list[int]]:
    """Scratch rows, pools and their index array, by which each region counts as many positions as it stands for."""
    L, R = length, len(sizes)
    each, which = np.unique(sizes, return_inverse=True)
    N = int(each[-1]).bit_length()
    # Scratch row p stands for 2^p positions, and a region pools those of its size's bits.
    pool = np.empty((N + R, 4), np.int64)
    pool[:N] = [(L + R + p, 2 * p - 2, 0, 2) if p else (L + R, 0, 1, 1) for p in range(N)]
    index = [L + R + p for p in range(N - 1) for _ in range(2)]
    child = []
    for size in map(int, each):
        bits = [L + R + p for p in range(N) if size >> p & 1]
        child.append((len(index), 0, len(bits)))
        index += bits
    pool[N:, 0] = np.arange(L, L + R)
    pool[N:, 1:] = np.array(child)[which]
    return N, pool, index
