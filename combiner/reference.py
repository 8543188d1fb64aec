# SPDX-License-Identifier: Apache-2.0
"""Combiner in plain float64 NumPy, from the equations of Ren et al., NeurIPS 2021 (arXiv 2107.05768).

This is the definition of what the library computes, and its tests' judge: the same function names as `combiner`,
one query at a time, no speed. Letters: L positions, D features of query and key, Dv of value, R regions,
Hq query heads, Hk key / value heads. Equation numbers are the paper's.

Everything is written over one table of L + R rows: row j < L is the position j, row L + r is the region r.

    Q = [q ; q_R]    K = [k ; k_R]    V = [v ; h_R]

    pass 1, abstract:   q_R, k_R are the pools over the unmasked positions below R
    pass 2, summarize:  h_R   = sum_m p(m | R) V[m],   p(m | R) = softmax over members m   of scale * q_R . K[m]
    pass 3, attend:     out_i = sum_t p_it V[t],       p_it     = softmax over the parts t of scale * q_i . K[t]

A member or a part is a row of the table: a position or, where a partition is a tree, a region. Each pass has its
backward beside it, in the same words.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .patterns import Axial, AxialMixture, Dense, Factorization, Fixed, LogSparse, Mixture, Routing, Sparse, Tree

Array: TypeAlias = np.ndarray
Lists: TypeAlias = list[list[int]]
Saved: TypeAlias = dict[str, Any]


class Gradients(NamedTuple):
    """Gradients of one scalar, shaped as the inputs; the last two None unless given."""

    query: Array
    key: Array
    value: Array
    region_query: Array | None
    region_key: Array | None


class AttendGradients(NamedTuple):
    """Gradients of one scalar through stage 2 alone, shaped as the inputs."""

    query: Array
    key: Array
    value: Array
    region_key: Array
    region_value: Array


class Summary(NamedTuple):
    """Stage 1: k_R `[..., Hk or Hq, R, D]`, h_R `[..., Hq, R, Dv]`, and the log normaliser of p(m | R) `[..., Hq, R]`.

    The key has Hq heads where the parts are weighted, or as many as a given region_key.
    """

    key: Array
    value: Array
    lse: Array


# Factorizations: the parts of every query's support


@dataclass(frozen=True)
class Parts:
    """A factorization of L positions, spelled out (section 3.1).

    direct[i] are the positions in O_i^0, regions[i] the regions of query i; members[r] are the rows below region r:
    positions, or L + r' for an earlier region r'. A row listed twice counts twice. `pick[r]`, where given, are the
    positions whose q and k the region takes for its own, most wanted first: the first unmasked one is taken, and
    nothing is pooled. `weighted` replaces k_R by sum_m p(m | R) K[m].
    """

    direct: Lists
    regions: Lists
    members: Lists
    pooling: str = "max"
    size_bias: bool = False
    pick: Lists | None = None
    weighted: bool = False


Pattern: TypeAlias = Factorization | Sparse | Parts | Mixture


def parts(pattern: Pattern, length: int, is_causal: bool = False) -> Parts:
    """The parts of `pattern` for L = `length` positions, by brute force. O(L^2)."""
    if isinstance(pattern, Parts):
        return pattern
    if isinstance(pattern, Sparse):
        return _sparse_parts(pattern.pattern, length, is_causal)
    L = length

    def support(i: int) -> range:
        return range(i + 1 if is_causal else L)

    def earlier_or_other(t: int, own: int) -> bool:
        return t < own or (not is_causal and t > own)

    match pattern:
        case Dense():
            direct, regions, members = [list(support(i)) for i in range(L)], [[] for i in range(L)], []
        case Fixed():
            s = square_root(L) if pattern.span is None else pattern.span
            spans = range(-(-L // s))
            direct = [[j for j in support(i) if j // s == i // s] for i in range(L)]
            regions = [[t for t in spans if earlier_or_other(t, i // s)] for i in range(L)]
            members = [[j for j in range(L) if j // s == t] for t in spans]
        case LogSparse():
            # Block n of a level holds the positions j with j >> level == n. Regions: level by level, left to right.
            levels = [level for level in range(1, L.bit_length() + 1) if 1 << level < L]
            blocks = [(level, n) for level in levels for n in range(((L - 1) >> level) + 1)]
            number = {block: r for r, block in enumerate(blocks)}
            direct = [[j for j in support(i) if j in (i, i ^ 1)] for i in range(L)]
            regions = [
                [
                    number[level, sibling]
                    for level in levels
                    if (level, sibling := (i >> level) ^ 1) in number and earlier_or_other(sibling, i >> level)
                ]
                for i in range(L)
            ]
            members = [
                [L + number[level - 1, half] for half in (2 * n, 2 * n + 1) if (level - 1, half) in number]
                if pattern.hierarchical and level >= 2
                else [j for j in range(L) if j >> level == n]
                for level, n in blocks
            ]
        case Axial() | AxialMixture():
            return _axial_parts(pattern, L, is_causal)
        case Tree():
            b = pattern.branching
            levels = [t for t in range(1, 1 + min(pattern.levels or L, L.bit_length())) if b**t < L]
            nodes = [(t, n) for t in levels for n in range(-(-L // b**t))]
            number = {node: r for r, node in enumerate(nodes)}
            direct = [[j for j in support(i) if j // b == i // b] for i in range(L)]
            regions = [
                [
                    r
                    for r, (t, n) in enumerate(nodes)
                    if (t == levels[-1] or n // b == i // b ** (t + 1)) and earlier_or_other(n, i // b**t)
                ]
                for i in range(L)
            ]
            members = [
                [j for j in range(L) if j // b == n]
                if t == 1
                else [L + number[t - 1, c] for c in range(n * b, n * b + b) if (t - 1, c) in number]
                for t, n in nodes
            ]
        case Routing():
            of = pattern.clusters.tolist()
            direct = [[j for j in support(i) if of[j] == of[i]] for i in range(L)]
            if is_causal:
                members = [[j for j in range(t + 1) if of[j] == of[t]] for t in range(L)]
                latest = [{of[j]: j for j in range(i + 1)} for i in range(L)]
                regions = [sorted(t for c, t in latest[i].items() if c != of[i]) for i in range(L)]
            else:
                ids = range(max(of, default=-1) + 1)
                members = [[j for j in range(L) if of[j] == c] for c in ids]
                regions = [[c for c in ids if c != of[i] and members[c]] for i in range(L)]
        case _:
            raise TypeError(f"pattern must be a factorization or Parts, got {type(pattern).__name__}")
    return Parts(direct, regions, members, pattern.pooling, pattern.size_bias)


def _axial_parts(pattern: Axial | AxialMixture, length: int, is_causal: bool) -> Parts:
    L, m = length, square_root(length) if pattern.width is None else pattern.width
    order = pattern.order if isinstance(pattern, Axial) else "mixture"
    row, col, n = [i // m for i in range(L)], [i % m for i in range(L)], -(-L // m)
    cells = [(r, c) for r in range(n) for c in range(m)]
    pick = None

    def seen(r: int, i: int) -> bool:
        """Whether query i reads row r as a region."""
        return r < row[i] or (not is_causal and r > row[i])

    members: Lists = []
    sees: list[Callable[[int], bool]] = []  # whether query i attends the region
    if order in ("vertical", "mixture"):
        for t in range(L):
            members.append([j for j in range(t + 1) if col[j] == col[t]])
            sees.append(lambda i, t=t: col[i] != col[t] and row[t] == row[i] - 1)
        for t in range(0 if is_causal else L):
            members.append([j for j in range(t, L) if col[j] == col[t]])
            sees.append(lambda i, t=t: col[i] != col[t] and row[t] == row[i] + 1)
    sides: list[Callable[[int, int], bool]] = []  # whether column j lies in the part of its row for column c
    if order == "horizontal":
        sides = [lambda j, c: j != c]
    elif order == "mixture":
        sides = [lambda j, c: j < c, lambda j, c: j > c]
    for side in sides:
        for r, c in cells:
            members.append([j for j in range(L) if row[j] == r and side(col[j], c)])
            sees.append(lambda i, r=r, c=c: col[i] == c and seen(r, i))
    if order == "rowmajor":
        members = [[j for j in range(L) if row[j] == row[t]] for t in range(L)]
        # At the query's column, or the last of a row that ends before it; and there the nearest one before, else after.
        sees = [
            lambda i, t=t: seen(row[t], i) and (col[t] == col[i] or (t == L - 1 and col[t] < col[i])) for t in range(L)
        ]
        pick = [
            [j for j in range(t, -1, -1) if row[j] == row[t]] + [j for j in range(t + 1, L) if row[j] == row[t]]
            for t in range(L)
        ]
    direct = [
        [j for j in range(i + 1 if is_causal else L) if row[j] == row[i] or (order != "rowmajor" and col[j] == col[i])]
        for i in range(L)
    ]
    regions = [[r for r, is_seen in enumerate(sees) if members[r] and is_seen(i)] for i in range(L)]
    weighted = isinstance(pattern, Axial) and pattern.row_key == "weighted"
    return Parts(direct, regions, members, pattern.pooling, pattern.size_bias, pick, weighted)


def _sparse_parts(pattern: Factorization, length: int, is_causal: bool = False) -> Parts:
    """The parts of the sparse baseline of `pattern`: direct positions only, and what they leave out is left out."""
    L = length
    match pattern:
        case Dense():

            def sees(i: int, j: int) -> bool:
                return True
        case Fixed():
            s = square_root(L) if pattern.span is None else pattern.span

            def sees(i: int, j: int) -> bool:
                return i // s == j // s or j % s == s - 1
        case LogSparse():

            def sees(i: int, j: int) -> bool:
                level = (i ^ j).bit_length() - 1  # j lies in the sibling block of i at this level, or is i
                return i == j or j == (j | (1 << level) - 1 if j < i else j >> level << level)
        case Axial() | AxialMixture():
            m = square_root(L) if pattern.width is None else pattern.width

            def sees(i: int, j: int) -> bool:
                return i // m == j // m or i % m == j % m
        case Tree():

            def sees(i: int, j: int) -> bool:
                return i // pattern.branching == j // pattern.branching
        case Routing():

            def sees(i: int, j: int) -> bool:
                return pattern.clusters[i] == pattern.clusters[j]
        case _:
            raise TypeError(f"pattern must be a factorization, got {type(pattern).__name__}")
    direct = [[j for j in range(i + 1 if is_causal else L) if sees(i, j)] for i in range(L)]
    return Parts(direct, [[] for _ in range(L)], [], pattern.pooling, pattern.size_bias)


def square_root(length: int) -> int:
    """The span of `Fixed(None)`: the power of two nearest sqrt(L)."""
    return 1 << (length.bit_length() // 2)


# One query head


class _Head:
    """The table of one query head, and the three passes over it."""

    def __init__(
        self, parts: Parts, q: Array, k: Array, v: Array, live: Array, scale: float, keep: Callable[[int, Array], Array]
    ):
        self.keep = keep  # dropout's factors of query i's weights of some rows of the table
        L, R = len(q), len(parts.members)
        self.parts, self.L, self.R, self.scale = parts, L, R, scale
        self.Q = np.concatenate([q, np.zeros((R, q.shape[1]))])
        self.K = np.concatenate([k, np.zeros((R, k.shape[1]))])
        self.V = np.concatenate([v, np.zeros((R, v.shape[1]))])

        # The unmasked positions below each row, ascending; a row without any has left every softmax.
        self.below: Lists = [[j] if live[j] else [] for j in range(L)]
        for rows in parts.members:
            self.below.append(sorted(j for m in rows for j in self.below[m]))
        self.count = np.array([len(positions) for positions in self.below], dtype=np.int64)
        self.bias = np.log(np.maximum(self.count, 1)) * parts.size_bias

        # Regions that some query attends, itself or through a parent; no other is summarised.
        self.attended = np.zeros(L + R, dtype=bool)
        self.attended[[L + r for regions in parts.regions for r in regions]] = True
        for r in reversed(range(R)):
            if self.attended[L + r]:
                self.attended[parts.members[r]] = True
        self.summarised = [L + r for r in range(R) if self.attended[L + r] and self.count[L + r]]

        self.rows: Lists = [[] for _ in range(L + R)]  # what each row's softmax runs over
        self.p = [np.zeros(0) for _ in range(L + R)]  # and its probabilities
        self.out = np.zeros((L, v.shape[1]))
        self.lse = np.full(L + R, -np.inf)

    # pass 1: abstractions q_R, k_R (section 3.2, max pooling; mean and sum are ours)

    def abstract(self, region_query: Array | None, region_key: Array | None) -> None:
        for r in self.summarised:
            self.Q[r] = self.pool(self.Q, r) if region_query is None else region_query[r - self.L]
            self.K[r] = self.pool(self.K, r) if region_key is None else region_key[r - self.L]

    def pool(self, X: Array, r: int) -> Array:
        if self.parts.pick is not None:
            return X[self.picked(r)]
        return getattr(X[self.below[r]], self.parts.pooling)(axis=0)

    def picked(self, r: int) -> int:
        return next(j for j in self.parts.pick[r - self.L] if self.count[j])

    def abstract_backward(self, region_query: bool, region_key: bool) -> None:
        for r in self.summarised:
            if not region_query:
                self.pool_backward(self.Q, self.dQ, r)
            if not (region_key or self.parts.weighted):
                self.pool_backward(self.K, self.dK, r)

    def pool_backward(self, X: Array, dX: Array, r: int) -> None:
        positions, features = np.array(self.below[r]), np.arange(X.shape[1])
        if self.parts.pick is not None:
            dX[self.picked(r)] += dX[r]
        elif self.parts.pooling == "max":  # argmax is the first of equals: the lowest position
            dX[positions[X[positions].argmax(axis=0)], features] += dX[r]
        elif self.parts.pooling == "mean":
            np.add.at(dX, positions, dX[r] / len(positions))
        else:
            np.add.at(dX, positions, dX[r])

    # pass 2: local expectations h_R (eq 7)

    def summarize(self, region_key: bool) -> None:
        for r in self.summarised:
            self.softmax(r, self.parts.members[r - self.L])
            self.V[r] = self.p[r] @ self.V[self.rows[r]]
            if self.parts.weighted and not region_key:
                self.K[r] = self.p[r] @ self.K[self.rows[r]]

    def summarize_backward(self, region_key: bool) -> None:
        for r in reversed(self.summarised):
            dp = self.V[self.rows[r]] @ self.dV[r]
            np.add.at(self.dV, self.rows[r], np.outer(self.p[r], self.dV[r]))
            if self.parts.weighted and not region_key:
                dp += self.K[self.rows[r]] @ self.dK[r]
                np.add.at(self.dK, self.rows[r], np.outer(self.p[r], self.dK[r]))
            self.softmax_backward(r, dp, 0.0)

    # pass 3: one softmax over direct positions and regions (eq 9), and the expectation under it (eq 7)

    def attend(self) -> None:
        for i in range(self.L):
            if self.softmax(i, self.parts.direct[i] + [self.L + r for r in self.parts.regions[i]]):
                self.out[i] = (self.p[i] * self.keep(i, self.rows[i])) @ self.V[self.rows[i]]

    def attend_backward(self, grad_out: Array, grad_lse: Array) -> None:
        for i in range(self.L):
            if self.rows[i]:
                keep = self.keep(i, self.rows[i])
                dp = keep * (self.V[self.rows[i]] @ grad_out[i])
                np.add.at(self.dV, self.rows[i], np.outer(self.p[i] * keep, grad_out[i]))
                self.softmax_backward(i, dp, grad_lse[i])

    # the softmax of one row x over others: s_t = scale * Q[x] . K[t] + bias_t, p = exp(s - lse)

    def softmax(self, x: int, rows: Sequence[int]) -> bool:
        self.rows[x] = rows = [t for t in rows if self.count[t]]
        if rows:
            s = self.scale * (self.K[rows] @ self.Q[x]) + self.bias[rows]
            e = np.exp(s - s.max())
            self.p[x] = e / e.sum()
            self.lse[x] = s.max() + np.log(e.sum())
        return bool(rows)

    def softmax_backward(self, x: int, dp: Array, dlse: float) -> None:
        ds = self.p[x] * (dp - self.p[x] @ dp + dlse)
        self.dQ[x] += self.scale * (ds @ self.K[self.rows[x]])
        np.add.at(self.dK, self.rows[x], self.scale * np.outer(ds, self.Q[x]))

    def zero_gradients(self) -> None:
        self.dQ, self.dK, self.dV = np.zeros_like(self.Q), np.zeros_like(self.K), np.zeros_like(self.V)

    def weights(self) -> Array:
        """The effective attention p(j | i) (eq 8): the products of probabilities down each path from i to j, summed."""
        W = np.eye(self.L + self.R, self.L)
        for r in self.summarised:
            W[r] = self.p[r] @ W[self.rows[r]]
        return np.array([self.p[i] @ W[self.rows[i]] for i in range(self.L)]).reshape(self.L, self.L)


# All heads


def _parts_of_heads(pattern: Pattern, B: int, Hk: int, length: int, is_causal: bool) -> dict[tuple[int, int], Parts]:
    """The parts of each batch entry and key head: the same but where they have their own clusters."""
    heads = list(itertools.product(range(B), range(Hk)))
    routing = pattern.pattern if isinstance(pattern, Sparse) else pattern
    if isinstance(routing, Routing) and routing.clusters.ndim > 1:
        own = [_with_clusters(routing, each) for each in routing.clusters.reshape(B * Hk, length)]
        alone = [Sparse(each) if isinstance(pattern, Sparse) else each for each in own]
        return {at: parts(each, length, is_causal) for at, each in zip(heads, alone, strict=True)}
    return dict.fromkeys(heads, parts(pattern, length, is_causal))


def _with_clusters(routing: Routing, clusters: Array) -> Routing:
    """The same with other clusters, whose ids may exceed the length of what is cut out of a longer sequence."""
    own = copy.copy(routing)
    object.__setattr__(own, "clusters", clusters)
    return own


def dropout_factors(dropout_p: float, seed: int, b: int, h: int, i: int, rows: Array) -> Array:
    """1 / (1 - dropout_p), or 0 with the probability dropout_p, for query i's weight of each of the rows.

    The random number of a row is 24 bits of word ``row mod 4`` of Philox4x32-10 (Salmon et al., SC 2011).
    """
    if dropout_p in (0, 1):
        return np.full(len(rows), 1.0 - dropout_p)
    words = philox((rows // 4, i, h, b), (seed % 2**32, seed // 2**32))
    u = (words[rows % 4, np.arange(len(rows))] >> 8) / 2**24
    return np.where(u >= dropout_p, 1 / (1 - dropout_p), 0.0)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> Array:
    """The four 32-bit words of Philox4x32-10, `[4, ...]`, for counters of four broadcast words each."""
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    mask = np.uint64(2**32 - 1)
    for n in range(10):
        k0, k1 = (np.uint64((k + n * weyl) % 2**32) for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        ac, cc = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (cc >> np.uint64(32)) ^ b ^ k0, cc & mask, (ac >> np.uint64(32)) ^ d ^ k1, ac & mask
    return np.stack([a, b, c, d])


class _Heads:
    """The leading axes flattened to [B, H], and a `_Head` for each query head; it reads key head h // (Hq / Hk)."""

    def __init__(
        self,
        query: Array,
        key: Array,
        value: Array,
        pattern: Pattern,
        is_causal: bool,
        scale: float | None,
        key_mask: Array | None,
        dropout_p: float = 0.0,
        seed: int = 0,
        dropout_row: int = 0,
    ):
        q, k, v = _flat(query), _flat(key), _flat(value)
        self.leading = np.shape(query)[:-2]
        self.B, self.Hq, self.L, self.D = q.shape
        self.Hk, self.Dv = k.shape[1], v.shape[3]
        scale = 1 / np.sqrt(self.D) if scale is None else scale
        live = np.ones((self.B, self.L), bool) if key_mask is None else np.reshape(key_mask, (self.B, self.L))
        self.parts = _parts_of_heads(pattern, self.B, self.Hk, self.L, is_causal)
        self.R = max((len(each.members) for each in self.parts.values()), default=0)
        self.weighted = any(each.weighted for each in self.parts.values())
        self.heads = {}
        for b, h in itertools.product(range(self.B), range(self.Hq)):
            own = self.parts[b, h * self.Hk // self.Hq]

            def keep(i: int, rows: Sequence[int], b: int = b, h: int = h) -> Array:
                return dropout_factors(dropout_p, seed, b, h, i, np.array(rows) + dropout_row)

            self.heads[b, h] = _Head(own, q[b, h], self.read(k, b, h), self.read(v, b, h), live[b], scale, keep)

    def __iter__(self) -> Iterator[tuple[tuple[int, int], _Head]]:
        return iter(self.heads.items())

    def read(self, x: Array | None, b: int, h: int) -> Array | None:
        """What query head h of batch entry b reads of an array with Hq or Hk heads; None where it is absent."""
        return None if x is None else _flat(x)[b, h * _flat(x).shape[1] // self.Hq]

    def write(self, heads: int, tail: tuple[int, ...], get: Callable[[_Head], Array], add=True) -> Array:
        """An array [..., heads, *tail] of get(head), added up over the query heads that share one of its heads."""
        x = np.zeros((self.B, heads, *tail))
        for (b, h), head in self:
            x[b, h * heads // self.Hq] = get(head) + (x[b, h * heads // self.Hq] if add else 0.0)
        return x.reshape((*self.leading[:-1], heads, *tail) if self.leading else tail)

    def backward(self) -> tuple[Array, Array, Array]:
        """The gradients of query, key and value, once every head has run its passes backward."""
        return (
            self.write(self.Hq, (self.L, self.D), lambda head: head.dQ[: self.L]),
            self.write(self.Hk, (self.L, self.D), lambda head: head.dK[: self.L]),
            self.write(self.Hk, (self.L, self.Dv), lambda head: head.dV[: self.L]),
        )

    def region_backward(self, given: Array | None, table: str) -> Array | None:
        """The gradient of rows L .. L+R-1 of a table that were given, None where they were not."""
        if given is None:
            return None
        return self.write_regions(_flat(given).shape[1], lambda head: getattr(head, table))

    def write_regions(self, heads: int, get: Callable[[_Head], Array], add=True, empty: float = 0.0) -> Array:
        """The same of rows L .. L+R-1 of a table; `empty` where a head has fewer regions than another."""

        def rows(head: _Head) -> Array:
            own = get(head)[self.L :]
            return np.concatenate([own, np.full((self.R - len(own), *own.shape[1:]), empty)])

        tail = get(next(iter(self.heads.values()))).shape[1:] if self.heads else ()
        return self.write(heads, (self.R, *tail), rows, add)


def _flat(x: Array) -> Array:
    """[..., H, L, D] or [L, D] as float64 [B, H, L, D]."""
    x = np.asarray(x, np.float64)
    return x.reshape(math.prod(x.shape[:-3]), *(x.shape[-3:] if x.ndim > 2 else (1, *x.shape)))


def attention(
    query: Array, key: Array, value: Array, pattern: Pattern, *, return_lse: bool = False, **options: Any
) -> Array | tuple[Array, Array]:
    """Both stages: out `[..., Hq, L, Dv]`, or (out, lse) with lse `[..., Hq, L]`. Options as in `attention_forward`."""
    out, saved = attention_forward(query, key, value, pattern, **options)
    return (out, saved["lse"]) if return_lse else out


def attention_forward(
    query: Array,
    key: Array,
    value: Array,
    pattern: Pattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: Sequence[int] | None = None,
    region_query: Array | None = None,
    region_key: Array | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    dropout_row: int = 0,
) -> tuple[Array, Saved]:
    """out and what `attention_backward` needs. Dropout numbers the pattern's rows from `dropout_row` on."""
    options = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p, "seed": seed}
    if cu_seqlens is not None:
        return _packed_forward(
            attention_forward, (query, key, value), pattern, cu_seqlens, key_mask, (region_query, region_key), options
        )
    if isinstance(pattern, Mixture):
        return _mixture_forward((query, key, value), pattern, key_mask, (region_query, region_key), options)
    heads = _Heads(query, key, value, pattern, is_causal, scale, key_mask, dropout_p, seed, dropout_row)
    for at, head in heads:
        head.abstract(heads.read(region_query, *at), heads.read(region_key, *at))
        head.summarize(region_key is not None)
        head.attend()
    out = heads.write(heads.Hq, (heads.L, heads.Dv), lambda head: head.out)
    lse = heads.write(heads.Hq, (heads.L,), lambda head: head.lse[: heads.L])
    return out, {"heads": heads, "out": out, "lse": lse, "region_query": region_query, "region_key": region_key}


def attention_backward(grad_out: Array, saved: Saved, *, grad_lse: Array | None = None) -> Gradients:
    """The exact derivatives of sum(out * grad_out) + sum(lse * grad_lse)."""
    if "sequences" in saved:
        return _packed_backward(attention_backward, grad_out, saved, grad_lse)
    if "components" in saved:
        each = [attention_backward(grad_out, component) for component in saved["components"]]
        query, key, value = (sum(x) / len(each) for x in zip(*(own[:3] for own in each), strict=True))
        return Gradients(
            query, key, value, *(_join(x, 1 / len(each)) for x in zip(*(g[3:] for g in each), strict=True))
        )
    heads, region_query, region_key = saved["heads"], saved["region_query"], saved["region_key"]
    for at, head in heads:
        head.zero_gradients()
        head.attend_backward(heads.read(grad_out, *at), _lse_rows(heads, grad_lse, *at))
        head.summarize_backward(region_key is not None)
        head.abstract_backward(region_query is not None, region_key is not None)
    return Gradients(
        *heads.backward(), heads.region_backward(region_query, "dQ"), heads.region_backward(region_key, "dK")
    )


def _lse_rows(heads: _Heads, grad_lse: Array | None, b: int, h: int) -> Array:
    return np.zeros(heads.L) if grad_lse is None else heads.read(np.asarray(grad_lse)[..., None], b, h)[:, 0]


def summarize(query: Array, key: Array, value: Array, pattern: Pattern, **options: Any) -> Summary:
    """Stage 1. Rows of regions that no query attends, or with every member masked, are zero (lse -inf)."""
    return summarize_forward(query, key, value, pattern, **options)[0]


def summarize_forward(
    query: Array,
    key: Array,
    value: Array,
    pattern: Pattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: Sequence[int] | None = None,
    region_query: Array | None = None,
    region_key: Array | None = None,
) -> tuple[Summary, Saved]:
    """The summary and what `summarize_backward` needs."""
    if cu_seqlens is not None:
        options = {"is_causal": is_causal, "scale": scale}
        return _packed_forward(
            summarize_forward, (query, key, value), pattern, cu_seqlens, key_mask, (region_query, region_key), options
        )
    heads = _Heads(query, key, value, pattern, is_causal, scale, key_mask)
    for at, head in heads:
        head.abstract(heads.read(region_query, *at), heads.read(region_key, *at))
        head.summarize(region_key is not None)
    if region_key is not None:
        key_heads = _flat(region_key).shape[1]
    else:
        key_heads = heads.Hq if heads.weighted else heads.Hk
    summary = Summary(
        heads.write_regions(key_heads, lambda head: head.K, add=False),
        heads.write_regions(heads.Hq, lambda head: head.V),
        heads.write_regions(heads.Hq, lambda head: head.lse, empty=-np.inf),
    )
    return summary, {"heads": heads, "region_query": region_query, "region_key": region_key}


def summarize_backward(grad_summary_key: Array | None, grad_summary_value: Array | None, saved: Saved) -> Gradients:
    """The exact derivatives of sum(key * grad_summary_key) + sum(value * grad_summary_value); either may be None."""
    if "sequences" in saved:
        each = [
            summarize_backward(_cut(grad_summary_key, regions), _cut(grad_summary_value, regions), own)
            for own, regions in zip(saved["sequences"], saved["regions"], strict=True)
        ]
        return Gradients(*map(_join, zip(*each, strict=True)))
    heads, region_query, region_key = saved["heads"], saved["region_query"], saved["region_key"]
    share = 1 if grad_summary_key is None else heads.Hq // _flat(grad_summary_key).shape[1]
    for at, head in heads:
        head.zero_gradients()
        used = head.summarised
        if grad_summary_key is not None and at[1] % share == 0:  # one k_R of a group: its gradient enters once
            head.dK[used] = heads.read(grad_summary_key, *at)[np.array(used, int) - heads.L]
        if grad_summary_value is not None:
            head.dV[used] = heads.read(grad_summary_value, *at)[np.array(used, int) - heads.L]
        head.summarize_backward(region_key is not None)
        head.abstract_backward(region_query is not None, region_key is not None)
    return Gradients(
        *heads.backward(), heads.region_backward(region_query, "dQ"), heads.region_backward(region_key, "dK")
    )


def attend(
    query: Array,
    key: Array,
    value: Array,
    region_key: Array,
    region_value: Array,
    pattern: Pattern,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """Stage 2, from the k_R and h_R given: out, or (out, lse). Options as in `attend_forward`."""
    out, saved = attend_forward(query, key, value, region_key, region_value, pattern, **options)
    return (out, saved["lse"]) if return_lse else out


def attend_forward(
    query: Array,
    key: Array,
    value: Array,
    region_key: Array,
    region_value: Array,
    pattern: Pattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Array, Saved]:
    """out and what `attend_backward` needs."""
    if cu_seqlens is not None:
        options = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p, "seed": seed}
        return _packed_forward(
            attend_forward, (query, key, value), pattern, cu_seqlens, key_mask, (region_key, region_value), options
        )
    heads = _Heads(query, key, value, pattern, is_causal, scale, key_mask, dropout_p, seed)
    for at, head in heads:
        head.K[heads.L :] = heads.read(region_key, *at)[: head.R]
        head.V[heads.L :] = heads.read(region_value, *at)[: head.R]
        head.attend()
    out = heads.write(heads.Hq, (heads.L, heads.Dv), lambda head: head.out)
    lse = heads.write(heads.Hq, (heads.L,), lambda head: head.lse[: heads.L])
    return out, {"heads": heads, "out": out, "lse": lse, "region_key": region_key, "region_value": region_value}


def attend_backward(grad_out: Array, saved: Saved, *, grad_lse: Array | None = None) -> AttendGradients:
    """The exact derivatives of sum(out * grad_out) + sum(lse * grad_lse) through stage 2."""
    if "sequences" in saved:
        return _packed_backward(attend_backward, grad_out, saved, grad_lse)
    heads = saved["heads"]
    for at, head in heads:
        head.zero_gradients()
        head.attend_backward(heads.read(grad_out, *at), _lse_rows(heads, grad_lse, *at))
    return AttendGradients(
        *heads.backward(),
        heads.region_backward(saved["region_key"], "dK"),
        heads.region_backward(saved["region_value"], "dV"),
    )


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """(out, lse) of one softmax over the parts of a and the parts of b."""
    out_a, lse_a, out_b, lse_b = (np.asarray(x, np.float64) for x in (out_a, lse_a, out_b, lse_b))
    lse = np.logaddexp(lse_a, lse_b)
    with np.errstate(invalid="ignore"):  # -inf - -inf: neither side attends to anything
        a, b = (np.where(x == -np.inf, 0.0, np.exp(x - lse)) for x in (lse_a, lse_b))
    return a[..., None] * out_a + b[..., None] * out_b, lse


def attention_weights(query: Array, key: Array, pattern: Pattern, **options: Any) -> Array:
    """The effective attention W `[..., Hq, L, L]` (eq 8): rows sum to 1, or to 0 with nothing to attend to."""
    nothing = np.zeros((*np.shape(key)[:-1], 0))
    return _weights(attention_forward(query, key, nothing, pattern, **options)[1])


def _weights(saved: Saved) -> Array:
    if "components" in saved:
        return sum(map(_weights, saved["components"])) / len(saved["components"])
    if "sequences" in saved:
        whole = np.zeros((*saved["out"].shape[:-1], saved["out"].shape[-2]))
        for own, positions in zip(saved["sequences"], saved["positions"], strict=True):
            whole[..., positions, positions] = _weights(own)
        return whole
    heads = saved["heads"]
    return heads.write(heads.Hq, (heads.L, heads.L), lambda head: head.weights())


# Several calls in one: packed sequences, each as if alone, and the components of a mixture


def _region_count(pattern: Pattern, B: int, Hk: int, length: int, is_causal: bool) -> int:
    """R: of a mixture the sum of its components', of heads with parts of their own the largest."""
    if isinstance(pattern, Mixture):
        return sum(_region_count(each, B, Hk, length, is_causal) for each in pattern.patterns)
    own = _parts_of_heads(pattern, B, Hk, length, is_causal)
    return max((len(each.members) for each in own.values()), default=0)


def _of_sequence(pattern: Pattern, positions: slice) -> Pattern:
    """The pattern of some positions of packed sequences: only clusters are cut."""
    if isinstance(pattern, Mixture):
        return Mixture(*(_of_sequence(each, positions) for each in pattern.patterns))
    if isinstance(pattern, Sparse):
        return Sparse(_of_sequence(pattern.pattern, positions))
    if isinstance(pattern, Routing):
        return _with_clusters(pattern, pattern.clusters[..., positions])
    return pattern


def _packed_forward(
    forward: Callable[..., Any],
    arrays: tuple[Array, ...],
    pattern: Pattern,
    cu_seqlens: Sequence[int],
    key_mask: Array | None,
    regions: tuple[Array | None, Array | None],
    options: dict[str, Any],
) -> tuple[Any, Saved]:
    """`forward` of each sequence alone; the region axes follow one another."""
    B, Hk = _flat(arrays[1]).shape[:2]
    results, saved = [], {"sequences": [], "positions": [], "regions": []}
    first = 0
    for start, end in itertools.pairwise(cu_seqlens):
        here, own = slice(start, end), _of_sequence(pattern, slice(start, end))
        there = slice(first, first + _region_count(own, B, Hk, end - start, options["is_causal"]))
        first = there.stop
        mask = None if key_mask is None else np.asarray(key_mask)[..., here]
        names = ("region_key", "region_value") if forward is attend_forward else ("region_query", "region_key")
        given = {name: _cut(x, there) for name, x in zip(names, regions, strict=True)}
        result, kept = forward(*(_cut(x, here) for x in arrays), pattern=own, key_mask=mask, **given, **options)
        results.append(result)
        for name, x in zip(saved, (kept, here, there), strict=True):
            saved[name].append(x)
    if forward is summarize_forward:
        key, value, lse = zip(*results, strict=True)
        return Summary(_join(key), _join(value), np.concatenate(lse, axis=-1)), saved
    lse = [kept.get("lse") for kept in saved["sequences"]]
    joined = {"out": _join(results), "lse": None if lse[0] is None else np.concatenate(lse, axis=-1)}
    return joined["out"], saved | joined


def _packed_backward(backward: Callable[..., Any], grad_out: Array, saved: Saved, grad_lse: Array | None) -> Any:
    each = [
        backward(_cut(grad_out, here), own, grad_lse=None if grad_lse is None else np.asarray(grad_lse)[..., here])
        for own, here in zip(saved["sequences"], saved["positions"], strict=True)
    ]
    return type(each[0])(*map(_join, zip(*each, strict=True)))


def _mixture_forward(
    arrays: tuple[Array, ...],
    mixture: Mixture,
    key_mask: Array | None,
    regions: tuple[Array | None, Array | None],
    options: dict[str, Any],
) -> tuple[Array, Saved]:
    """The mean of the components' outs; the region axes, and dropout's rows, follow one another."""
    (B, Hk, L, _), is_causal = _flat(arrays[1]).shape, options["is_causal"]
    outs, components = [], []
    first = row = 0
    for pattern in mixture.patterns:
        there = slice(first, first + _region_count(pattern, B, Hk, L, is_causal))
        given = {name: _cut(x, there) for name, x in zip(("region_query", "region_key"), regions, strict=True)}
        out, saved = attention_forward(*arrays, pattern=pattern, key_mask=key_mask, dropout_row=row, **given, **options)
        outs.append(out)
        components.append(saved)
        first, row = there.stop, row + L + there.stop - there.start
    return sum(outs) / len(outs), {"components": components, "out": sum(outs) / len(outs)}


def _cut(x: Array | None, rows: slice) -> Array | None:
    """Some of the rows of `[..., rows, features]`; None where it is absent."""
    return None if x is None else np.asarray(x)[..., rows, :]


def _join(parts: Sequence[Array | None], factor: float = 1.0) -> Array | None:
    """Rows that follow one another, times a factor; None where they are absent."""
    return None if any(x is None for x in parts) else factor * np.concatenate(parts, axis=-2)


# Clusters for Routing: spherical k-means (Roy et al., TACL 2021, section 4.1), one `[L, D]` at a time


def cluster(x: Array, n: int, *, iterations: int = 10, balanced: bool = False, seed: int = 0) -> Array:
    """Clusters `[..., L]` of the rows of x `[..., L, D]`."""
    return assign_clusters(x, fit_centroids(x, n, iterations=iterations, seed=seed), balanced=balanced)


def fit_centroids(x: Array, n: int, *, iterations: int = 10, seed: int = 0) -> Array:
    """Centroids `[..., n, D]`: k-means++, then rounds of assigning rows and moving centroids to them."""
    centroids = _for_each(lambda u: _plus_plus(u, n, seed), 2, (n, np.shape(x)[-1]), (directions(x), 2))
    for _ in range(iterations):
        centroids = update_centroids(centroids, x, assign_clusters(x, centroids), decay=0)
    return centroids


def assign_clusters(x: Array, centroids: Array, *, balanced: bool = False) -> Array:
    """The most similar centroid of each row; balanced, the most similar one that has room when it is the row's turn."""
    similarity = directions(x) @ directions(centroids).swapaxes(-1, -2)
    if balanced:
        return _for_each(_balance, 1, similarity.shape[-2:-1], (similarity, 2)).astype(np.int64)
    return similarity.argmax(-1)


def update_centroids(centroids: Array, x: Array, clusters: Array, *, decay: float = 0.999) -> Array:
    """The direction of decay * centroid + (1 - decay) * the mean direction of the cluster's rows."""

    def move(centroids: Array, u: Array, clusters: Array) -> Array:
        moved = centroids.copy()
        for c in range(len(centroids)):
            rows = u[(clusters == c) & u.any(-1)]
            if len(rows):
                direction = directions(decay * centroids[c] + (1 - decay) * rows.mean(0))
                moved[c] = direction if direction.any() else centroids[c]
        return moved

    centroids = np.asarray(centroids, np.float64)
    return _for_each(move, 2, centroids.shape[-2:], (centroids, 2), (directions(x), 2), (np.asarray(clusters), 1))


def directions(x: Array) -> Array:
    """Rows at unit length; zeros for a row of zeros or with a NaN or Inf."""
    x = np.asarray(x, np.float64)
    top = np.abs(x).max(-1, keepdims=True)  # of a NaN, NaN
    has_direction = np.isfinite(top) & (top > 0)
    x = np.where(has_direction, x, 0) / np.where(has_direction, top, 1)  # so that squares stay in range
    return x / np.where(has_direction, np.linalg.norm(x, axis=-1, keepdims=True), 1)


def _for_each(function: Callable[..., Array], axes: int, tail: tuple[int, ...], *arrays: tuple[Array, int]) -> Array:
    """function of the last axes, as many as are given beside each array, for all that lies before them."""
    lead = arrays[0][0].shape[: -arrays[0][1]]
    flat = [x.reshape(math.prod(lead), *x.shape[x.ndim - own :]) for x, own in arrays]
    results = [function(*parts) for parts in zip(*flat, strict=True)]
    return np.array(results, np.float64).reshape(*lead, *tail)


def _plus_plus(u: Array, n: int, seed: int) -> Array:
    """k-means++ (Arthur and Vassilvitskii, SODA 2007) among a sample of at most 16 n rows that have a direction."""
    L, live = len(u), np.flatnonzero(u.any(-1))
    size, sample = min(len(live), 16 * n), []
    for left, i in zip(range(len(live), 0, -1), live.tolist(), strict=True):  # Knuth, TAOCP 2, 3.4.2, algorithm S
        if (_draw(seed, i) >> 32) * left >> 32 < size - len(sample):
            sample.append(i)
    u, centroids = u[sample], np.zeros((n, u.shape[1]))
    weight = np.full(size, 2.0)
    for c in range(n if size else 0):
        total = weight.cumsum()
        ahead = np.flatnonzero(total > (_draw(seed, L + c) >> 11) * 2.0**-53 * total[-1])
        chosen = ahead[0] if len(ahead) else 0
        centroids[c] = u[chosen]
        weight = np.minimum(weight, np.maximum(1 - u @ u[chosen], 0))
        weight[chosen] = 0
    return centroids


def _draw(seed: int, counter: int) -> int:
    """64 random bits: splitmix64 (Steele, Lea and Flood, OOPSLA 2014) by counter."""

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    step = 0x9E3779B97F4A7C15
    return mix((mix((seed + step) % 2**64) + (counter + 1) * step) % 2**64)


def _balance(similarity: Array) -> Array:
    """Rows that are surest of their cluster choose first; L // n go to each, one more to the first L % n to fill up."""
    L, n = similarity.shape
    best = np.sort(similarity, axis=-1)
    margin = best[:, -1] - best[:, -2] if n > 1 else np.zeros(L)
    size, extra = np.zeros(n, int), L % n
    clusters = np.zeros(L, int)
    for i in np.argsort(-margin, kind="stable").tolist():
        open_ = size < L // n + (extra > 0)
        c = clusters[i] = np.where(open_, similarity[i], -np.inf).argmax()
        extra -= int(size[c] == L // n)
        size[c] += 1
    return clusters
