# SPDX-License-Identifier: Apache-2.0
"""Causal attention one token after the other.

What a query of Dense, Fixed, LogSparse or Tree attends is a stack of rows in the order of positions: the nodes of a
tree that are complete, the largest first, then the keys of the node at hand. A position pushes its row; the rows of a
node that it completes give way to the node's summary, and so on up the tree. The sparse baselines leave a node's last
row in its place, or nothing; flat LogSparse summarizes the node's positions, which it keeps, rather than its children.

Heads are split into `[..., Hk, G, rows, features]`, G query heads to a key head, so that summaries, which are of query
heads, are keys and values like all others.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from .functional import AttendOptions, Summary, attend, summarize
from .patterns import AnyPattern, Dense, Factorization, Fixed, LogSparse, Mixture, Sparse, Tree
from .plan import Array, Plan

_LARGE = 1024  # rows: to attend more takes longer than to make a plan, which is not kept then


class _Nodes(NamedTuple):
    """How a pattern's positions become nodes."""

    branching: int  # children of a node
    levels: int | None  # of nodes; without an end if None
    left: Literal["children", "positions", "last", "nothing"]  # what is left of a node: the summary of what, or which row

    def can_grow(self, level: int) -> bool:
        """Whether nodes of this level, positions of level 0, become parts of others."""
        return self.levels is None or level < self.levels

    def size(self, level: int) -> int:
        """The positions of a node."""
        return self.branching**level

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


def _nodes(pattern: object) -> _Nodes:
    """The pattern's nodes.

    Raises
    ------
    ValueError : a pattern that depends on the length, or has no such nodes.
    TypeError : no pattern.
    """
    whole = pattern.pattern if isinstance(pattern, Sparse) else pattern
    is_sparse = isinstance(pattern, Sparse)
    if isinstance(whole, Dense):
        return _Nodes(2, 0, "nothing")
    if isinstance(whole, Fixed):
        if whole.span is None:
            raise ValueError(f"pattern must have a span that does not depend on the length, got {pattern!r}")
        return _Nodes(whole.span, 1, "last" if is_sparse else "children")
    if isinstance(whole, LogSparse):
        return _Nodes(2, None, "last" if is_sparse else "children" if whole.hierarchical else "positions")
    if isinstance(whole, Tree):
        return _Nodes(whole.branching, 1, "nothing") if is_sparse else _Nodes(whole.branching, whole.levels, "children")
    if isinstance(pattern, Plan | tuple):
        raise ValueError(f"pattern must be of any length, got a {type(pattern).__name__}")
    if isinstance(pattern, Factorization | Sparse | Mixture):
        raise ValueError(f"pattern must be Dense, Fixed, LogSparse or Tree, got {pattern!r}")
    kind = pattern.__name__ if isinstance(pattern, type) else type(pattern).__name__
    raise TypeError(f"pattern must be a pattern such as combiner.Fixed(64), got {kind}")


class _Rows:
    """Rows of `[..., rows, features]` that come and go at the end, in memory that grows by half and more."""

    __slots__ = ("_buffer", "count")

    def __init__(self, lead: tuple[int, ...], features: int, dtype: np.dtype[np.floating]) -> None:
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

    def pop(self, count: int) -> None:
        if self.query:
            self.query.pop(count)
        self.key.pop(count)
        self.value.pop(count)


class Decoder:
    """Causal attention of a sequence that grows: `prefill` what there is, then `step` by step.

    Row by row the result is that of ``attention(query, key, value, pattern, is_causal=True)`` of the whole sequence, up
    to rounding; `step` of n tokens has the bits of n steps of one. What is given is copied, never kept.

    Parameters
    ----------
    pattern : `Dense`, `Fixed` of a given span, `LogSparse`, `Tree`, or the sparse baseline of one.
    scale : factor of the logits, finite; 1 / sqrt(D) by default.

    Raises
    ------
    TypeError : what is no pattern, or a scale that is no number.
    ValueError : a pattern whose past depends on what follows, or of one length: a default span, a Plan, Routing; one
        without summaries that grow: Axial, AxialMixture, Mixture; a scale that is not finite.

    Notes
    -----
    Time of a token at length L, besides some 50 us of Python: what a query attends, O(Hq rows (D + Dv)), and what it
    completes; memory: what later queries attend.

    - `Dense`: L rows; memory O(L).
    - `Fixed`: up to span + L / span rows, and O(1) in the mean for summaries; memory O(span + L / span).
    - `LogSparse`: log2(L) rows and as many in the mean for summaries, L in the worst step; memory O(L).
    - `LogSparse(hierarchical=True)`, `Tree`: branching * log(L) rows, O(1) in the mean for summaries; memory the same.

    Memory grows by half of itself at a time. A decoder is for one thread at a time. After a MemoryError or a Ctrl-C in
    a call it is empty, as after `reset`.
    """

    def __init__(self, pattern: AnyPattern, *, scale: float | None = None) -> None:
        self._nodes = _nodes(pattern)
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
        self._layout: tuple[tuple[int, ...], ...] | None = None  # shapes without the number of tokens
        self._dtype: np.dtype[np.floating] | None = None
        self._stack: _Table | None = None
        self._past: _Table | None = None  # all positions, where nodes are summarized from them
        self._counts: list[int] = [0]  # rows of the stack by level

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return sum(table.nbytes for table in (self._stack, self._past) if table)

    @property
    def pattern(self) -> Factorization | Sparse:
        """What was given."""
        return self._pattern

    def prefill(self, query: Array, key: Array, value: Array) -> Array:
        """The first tokens, all at once: what `attention` gives for them, with its bits, at its cost.

        Parameters
        ----------
        query : `[..., Hq, n, D]` or `[n, D]`, float32 or float64; any n >= 0, here and in `step`.
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
        query, key, value = self._check(query, key, value)
        try:
            options: AttendOptions = {"is_causal": True, "scale": self._scale}
            summary = summarize(query, key, value, self._pattern, **options)
            out = attend(query, key, value, summary.key, summary.value, self._pattern, **options)
            if query.shape[-2]:
                self._fill(query, key, value, summary)
        except BaseException:
            self.reset()
            raise
        return out

    def step(self, query: Array, key: Array, value: Array) -> Array:
        """The next tokens: their keys and values join the sequence, their queries attend it up to themselves.

        Parameters, returns, raises
        ---------------------------
        As in `prefill`; dtype and all but n as in the calls before.
        """
        given = self._check(query, key, value)
        shape = (*given[0].shape[:-1], given[2].shape[-1])
        try:
            q, k, v = self._split(*given)
            n = q.shape[-2]
            out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
            first = 0
            while first < n:
                end = first + min(n - first, self._room())
                self._attend(q[..., first:end, :], k[..., first:end, :], v[..., first:end, :], out[..., first:end, :])
                self._push(q[..., first:end, :], k[..., first:end, :], v[..., first:end, :])
                first = end
        except BaseException:
            self.reset()
            raise
        return out.reshape(shape)

    def __repr__(self) -> str:
        scale = "" if self._scale is None else f", scale={self._scale}"
        return f"<Decoder({self._pattern!r}{scale}) of length {self._length}>"

    # ---- arguments

    def _check(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        """The arguments as arrays, checked; the first ones set what all others are like."""
        given = _array("query", query), _array("key", key), _array("value", value)
        if self._layout is None:
            n = given[0].shape[-2] if given[0].ndim > 1 else 0
            summarize(*given, _empty_plan(n), scale=self._scale)  # checks all that `attention` does
            self._begin(*given)
            return given
        n = given[0].shape[-2] if given[0].ndim > 1 else 0
        for name, x, layout in zip(("query", "key", "value"), given, self._layout, strict=True):
            if x.dtype != self._dtype:
                raise TypeError(f"{name} must be {self._dtype} like the tokens before, got {x.dtype}")
            if x.shape != (expected := (*layout[:-1], n, layout[-1])):
                raise ValueError(f"{name} must have shape {expected} like the tokens before, got {x.shape}")
        return given

    def _begin(self, query: Array, key: Array, value: Array) -> None:
        """Empty caches for tokens like these."""
        self._layout = tuple((*x.shape[:-2], x.shape[-1]) for x in (query, key, value))
        self._dtype = query.dtype
        query, key, value = self._split(query, key, value)
        *lead, group, _, D = query.shape

        def rows(heads: int, features: int) -> _Rows:
            return _Rows((*lead, heads), features, query.dtype)

        Dv, left = value.shape[-1], self._nodes.left
        value_heads = group if left in ("children", "positions") else 1  # summaries differ between query heads
        self._stack = _Table(rows(group, D) if left == "children" else None, rows(1, D), rows(value_heads, Dv))
        self._past = _Table(rows(group, D), rows(1, D), rows(1, Dv)) if left == "positions" else None

    @staticmethod
    def _split(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        """`[..., Hk, G, n, features]`, keys and values with G = 1."""
        if query.ndim == 2:
            return query[None, None], key[None, None], value[None, None]
        *lead, Hk, n, _ = key.shape
        group = query.shape[-3] // Hk if Hk else 1
        return query.reshape(*lead, Hk, group, n, query.shape[-1]), key[..., None, :, :], value[..., None, :, :]

    # ---- the stack

    def _room(self) -> int:
        """Positions that can be pushed before a node is complete."""
        return self._nodes.branching - self._counts[0] if self._nodes.can_grow(0) else 1 << 30

    def _attend(self, query: Array, key: Array, value: Array, out: Array) -> None:
        """Each query attends the stack and, of the keys given, those up to its own."""
        assert self._stack
        below = self._stack.count
        counts = tuple(self._counts) if self._pattern_size_bias() else (below,)
        is_kept = below <= _LARGE and self._nodes.can_grow(0)  # others do not come again
        make = _attend_plan if is_kept else _attend_plan.__wrapped__
        seen_value = self._stack.value.rows(0, below)
        if seen_value.shape[-3] != query.shape[-3]:
            seen_value = np.broadcast_to(seen_value, (*query.shape[:-2], *seen_value.shape[-2:]))
        attend(
            query,
            key,
            value,
            self._stack.key.rows(0, below),
            seen_value,
            make(query.shape[-2], counts, self._nodes.branching),
            scale=self._scale,
            out=out,
        )

    def _pattern_size_bias(self) -> bool:
        return isinstance(self._pattern, Factorization) and self._pattern.size_bias

    def _push(self, query: Array, key: Array, value: Array) -> None:
        """Positions up to the end of a node at most; nodes that are complete give way to what is left of them."""
        assert self._stack
        self._stack.push(query, key, value)
        if self._past:
            self._past.push(query, key, value)
        self._length += query.shape[-2]
        self._counts[0] += query.shape[-2]
        level = 0
        while self._nodes.can_grow(level) and self._counts[level] == self._nodes.branching:
            self._complete(level + 1)
            level += 1

    def _complete(self, level: int) -> None:
        """The rows of a node's children, which end the stack, become one of `level`, or none."""
        assert self._stack
        nodes, stack = self._nodes, self._stack
        if level == len(self._counts):
            self._counts.append(0)
        end = stack.count
        first = end - nodes.branching
        self._counts[level - 1] = 0
        if nodes.left == "nothing":
            stack.pop(nodes.branching)
            return
        self._counts[level] += 1
        if nodes.left == "last":
            key, value = stack.key.rows(end - 1, end).copy(), stack.value.rows(end - 1, end).copy()
            query = None
        elif self._past:
            of = self._length - nodes.size(level), self._length
            query, key, value = self._summarize(self._past, *of, False)
        else:
            query, key, value = self._summarize(stack, first, end, nodes.can_grow(level))
        stack.pop(nodes.branching)
        stack.push(query, key, value)

    def _summarize(self, table: _Table, first: int, end: int, needs_query: bool) -> tuple[Array | None, Array, Array]:
        """q_R if needed, k_R and h_R of one region whose members are these rows."""
        assert table.query
        query, key, value = (rows.rows(first, end) for rows in (table.query, table.key, table.value))
        if value.shape[-3] != 1:
            key = np.broadcast_to(key, (*value.shape[:-1], key.shape[-1]))
        plan = _region_plan(end - first, self._pattern.pooling)  # type: ignore[union-attr]
        summary = summarize(query, key, value, plan, scale=self._scale)
        # The key of a summary is pooled: of queries it is the region's query.
        pooled = summarize(query, query, query[..., :1], plan).key if needs_query else None
        return pooled, summary.key[..., :1, :, :], summary.value

    # ---- the first tokens

    def _fill(self, query: Array, key: Array, value: Array, summary: Summary) -> None:
        """What the last query attends is in the summaries of the whole; then its position comes as in a step."""
        assert self._stack
        nodes, last = self._nodes, query.shape[-2] - 1
        q, k, v = self._split(query, key, value)
        parts = nodes.seen(last)
        if nodes.left in ("children", "positions") and parts and parts[0][0]:
            # Keys have the heads of `key`, all else those of `query`.
            summary_key = self._heads(summary.key, k.shape[:-2])
            summary_value = self._heads(summary.value, q.shape[:-2])
            summary_query = None
            if nodes.can_grow(1) and nodes.left == "children":
                queries = summarize(query, query, query[..., :1], self._pattern, is_causal=True).key
                summary_query = self._heads(queries, q.shape[:-2])
        region, level_first = 0, [0]  # of each level's node 0: levels follow one another
        for level in range(1, parts[0][0] + 1 if parts else 1):
            level_first.append(region)
            region += -(-(last + 1) // nodes.size(level))
        self._counts = [0] * len(level_first)
        for level, first, end in parts:
            self._counts[level] = end - first
            if level == 0:
                rows = slice(first, end)
                self._stack.push(q[..., rows, :], k[..., rows, :], v[..., rows, :])
            elif nodes.left == "nothing":
                self._counts[level] = 0
            elif nodes.left == "last":
                size = nodes.size(level)
                rows = slice((first + 1) * size - 1, end * size, size)
                self._stack.push(None, k[..., rows, :], v[..., rows, :])
            else:
                rows = slice(level_first[level] + first, level_first[level] + end)
                pooled = None if summary_query is None else summary_query[..., rows, :]
                self._stack.push(pooled, summary_key[..., rows, :], summary_value[..., rows, :])
        self._length = last
        if self._past:
            self._past.push(q[..., :last, :], k[..., :last, :], v[..., :last, :])
        self._push(q[..., last:, :], k[..., last:, :], v[..., last:, :])

    @staticmethod
    def _heads(x: Array, lead: tuple[int, ...]) -> Array:
        return x.reshape(*lead, *x.shape[-2:])


def _array(name: str, x: Array) -> Array:
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ma.MaskedArray) or not hasattr(x, "__array__"):
        raise TypeError(f"{name} must be a float32 or float64 NumPy array, got {type(x).__name__}")
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
def _attend_plan(queries: int, counts: tuple[int, ...], branching: int) -> Plan:
    """Each query attends all regions and the positions up to its own.

    Parameters
    ----------
    counts : the regions of level 0, 1, ..; the highest come first. With several levels a region's size, branching^level
        positions, joins its logit.
    """
    sizes = [branching**level for level in range(len(counts))]
    L, R, N = queries, sum(counts), sizes[-1].bit_length()
    # Sizes are what pools count: scratch row p stands for 2^p positions, and a region pools those of its size's bits.
    scratch = np.array([[L + R + p, 2 * p - 2, 0, 2] for p in range(N)])
    scratch[0] = L + R, 0, 1, 1
    index = [L + R + p for p in range(N - 1) for _ in range(2)]
    child = []
    for size in reversed(sizes):
        bits = [L + R + p for p in range(N) if size >> p & 1]
        child.append([len(index), 0, len(bits)])
        index += bits
    regions = np.empty((R, 4), np.int64)
    regions[:, 0] = np.arange(L, L + R)
    regions[:, 1:] = np.repeat(child, counts[::-1], axis=0)
    # A region must have been a query before it is attended; its tile is not run.
    lanes = np.arange(0, R, 64)
    tile = np.zeros((len(lanes) + L + 1, 5), np.int64)
    tile[: len(lanes)] = np.stack([L + lanes, lanes * 0 + 1, np.minimum(64, R - lanes), lanes // 64, lanes * 0 + 64], 1)
    run = [[0, 1, 1, -1]] * len(lanes)
    for j in range(L):
        tile[len(lanes) + j] = j, 1, 1, len(run), 1
        if R:
            run.append([L, 1, R, -1])
        run.append([0, 1, j + 1, -1])
    tile[-1, 3] = len(run)
    return Plan.from_arrays(
        [0, 1],
        [[0, 0], [N + R, len(tile) - 1]],
        np.concatenate([scratch, regions]),
        tile,
        run,
        index,
        [],
        length=L,
        regions=R,
        scratch=N,
        size_bias=len(counts) > 1,
    )
