# SPDX-License-Identifier: Apache-2.0
"""The three passes of Combiner attention and their derivatives: what one reads beside the paper.

Letters: L positions, R regions, D features of query and key, Dv of value, n heads that have the same parts and the same
mask, computed side by side. Equation numbers are the paper's (Ren et al., NeurIPS 2021).

Everything is written over one table of L + R rows: row j < L is position j, row L + r is region r.

    Q = [q ; q_R]    K = [k ; k_R]    V = [v ; h_R]

    pass 1, abstract:   q_R, k_R are the pools over the unmasked positions below R
    pass 2, summarize:  h_R   = sum_m p(m | R) V[m],   p(m | R) = softmax over members m   of scale * q_R . K[m]
    pass 3, attend:     out_i = sum_t p_it V[t],       p_it     = softmax over the parts t of scale * q_i . K[t]

The logits of passes 2 and 3 have further terms where these are asked for (docs/mathematics.md, section 2): a softcap,
the size of a region, a bias B = [b ; b_R] of each row, and in pass 3 a sink. b_R is abstracted as k_R is.

A member or a part is a row of the table: a position or, where a partition is a tree, a region. Each pass has its
derivative beside it, in the same words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arguments import Array
from .parts import Lists, Parts


class Table:
    """The tables of n heads and the three passes over them.

    Parameters
    ----------
    parts : the factorization of all n heads.
    q, k, v : float64 `[n, L, D]`, `[n, L, D]`, `[n, L, Dv]`: what each query head reads.
    live : bool `[L]`, True for unmasked positions.
    scale : factor of the logits.
    keep : `[n, L, L + R]`, dropout's factor of each query's weight of each row.
    softcap : the bound of the scaled products; None: none.
    b : `[n, L, 1]`, the biases of keys; None: none.
    sink : `[n]`, the logits of the sinks, -inf for none.
    """

    def __init__(
        self,
        parts: Parts,
        q: Array,
        k: Array,
        v: Array,
        live: Array,
        scale: float,
        keep: Array,
        softcap: float | None,
        b: Array | None,
        sink: Array,
    ) -> None:
        n, L, R = len(q), q.shape[1], len(parts.members)
        self.parts, self.n, self.L, self.R, self.scale, self.keep = parts, n, L, R, scale, keep
        self.softcap, self.sink = softcap, sink
        b = np.zeros((n, L, 1)) if b is None else b
        self.Q, self.K, self.V, self.B = (
            np.concatenate([x, np.zeros((n, R, x.shape[2]))], axis=1) for x in (q, k, v, b)
        )

        # The unmasked positions below each row, ascending. A row without any takes part in no softmax.
        self.below: Lists = [[j] if live[j] else [] for j in range(L)]
        for rows in parts.members:
            self.below.append(sorted(j for m in rows for j in self.below[m]))
        self.count = np.array([len(positions) for positions in self.below], dtype=np.int64)
        self.size = np.log(np.maximum(self.count, 1)) * parts.size_bias

        # Regions that some query attends, directly or through a parent region. No others are summarized.
        is_attended = np.zeros(L + R, dtype=bool)
        is_attended[[L + r for regions in parts.regions for r in regions]] = True
        for r in reversed(range(R)):
            if is_attended[L + r]:
                is_attended[parts.members[r]] = True
        self.summarized = [L + r for r in range(R) if is_attended[L + r] and self.count[L + r]]

        self.rows: Lists = [[] for _ in range(L + R)]  # the rows that each row's softmax runs over
        self.p: list[Array] = [np.zeros((n, 0)) for _ in range(L + R)]  # and their probabilities
        self.slope: list[Array] = [np.ones((n, 1)) for _ in range(L + R)]  # the softcap's derivatives
        self.out = np.zeros_like(v)
        self.lse = np.full((n, L + R), -np.inf)
        self.lse[:, :L] = sink[:, None]

    # pass 1: the abstractions q_R and k_R (section 3.2: the maximum; mean and sum are ours)

    def abstract(self, region_query: Array | None, region_key: Array | None, region_bias: Array | None) -> None:
        for r in self.summarized:
            self.B[:, r] = self.pool(self.B, r) if region_bias is None else region_bias[:, r - self.L]
            self.Q[:, r] = self.pool(self.Q, r) if region_query is None else region_query[:, r - self.L]
            self.K[:, r] = self.pool(self.K, r) if region_key is None else region_key[:, r - self.L]

    def pool(self, X: Array, r: int) -> Array:
        if self.parts.pick is not None:
            return X[:, self.picked(self.parts.pick[r - self.L])]
        pooled: Array = getattr(X[:, self.below[r]], self.parts.pooling)(axis=1)
        return pooled

    def picked(self, positions: list[int]) -> int:
        """The first position that is unmasked."""
        return next(j for j in positions if self.count[j])

    def abstract_backward(self, has_region_query: bool, has_region_key: bool, has_region_bias: bool) -> None:
        for r in self.summarized:
            if not has_region_query:
                self.pool_backward(self.Q, self.dQ, r)
            if not (has_region_key or self.parts.weighted):
                self.pool_backward(self.K, self.dK, r)
            if not (has_region_bias or self.parts.weighted):
                self.pool_backward(self.B, self.dB, r)

    def pool_backward(self, X: Array, dX: Array, r: int) -> None:
        positions = np.array(self.below[r])
        if self.parts.pick is not None:
            dX[:, self.picked(self.parts.pick[r - self.L])] += dX[:, r]
        elif self.parts.pooling == "max":  # argmax is the first of equals: the lowest position
            heads, features = np.ogrid[: self.n, : X.shape[2]]
            dX[heads, positions[X[:, positions].argmax(axis=1)], features] += dX[:, r]
        else:
            share = len(positions) if self.parts.pooling == "mean" else 1
            _add_rows(dX, positions, dX[:, r, None] / share)

    # pass 2: the local expectations h_R (the inner sum of eq 7)

    def summarize(self, has_region_key: bool, has_region_bias: bool) -> None:
        for r in self.summarized:
            self.softmax(r, self.parts.members[r - self.L])
            self.V[:, r] = _average(self.p[r], self.V[:, self.rows[r]])
            if self.parts.weighted and not has_region_key:
                self.K[:, r] = _average(self.p[r], self.K[:, self.rows[r]])
            if self.parts.weighted and not has_region_bias:
                self.B[:, r] = _average(self.p[r], self.B[:, self.rows[r]])

    def summarize_backward(self, has_region_key: bool, has_region_bias: bool) -> None:
        for r in reversed(self.summarized):
            dp = _dots(self.V[:, self.rows[r]], self.dV[:, r])
            _add_rows(self.dV, self.rows[r], _outer(self.p[r], self.dV[:, r]))
            if self.parts.weighted and not has_region_key:
                dp += _dots(self.K[:, self.rows[r]], self.dK[:, r])
                _add_rows(self.dK, self.rows[r], _outer(self.p[r], self.dK[:, r]))
            if self.parts.weighted and not has_region_bias:
                dp += _dots(self.B[:, self.rows[r]], self.dB[:, r])
                _add_rows(self.dB, self.rows[r], _outer(self.p[r], self.dB[:, r]))
            self.softmax_backward(r, dp, np.zeros(self.n))

    # pass 3: one softmax over direct positions and regions (eq 9), and the expectation under it (eq 7)

    def attend(self) -> None:
        for i in range(self.L):
            if self.softmax(i, self.parts.direct[i] + [self.L + r for r in self.parts.regions[i]]):
                self.out[:, i] = _average(self.p[i] * self.keep[:, i, self.rows[i]], self.V[:, self.rows[i]])

    def attend_backward(self, grad_out: Array, grad_lse: Array) -> None:
        for i in range(self.L):
            if not self.rows[i]:  # lse is the sink
                self.dsink += grad_lse[:, i] * np.isfinite(self.sink)
            else:
                keep = self.keep[:, i, self.rows[i]]
                dp = keep * _dots(self.V[:, self.rows[i]], grad_out[:, i])
                _add_rows(self.dV, self.rows[i], _outer(self.p[i] * keep, grad_out[:, i]))
                self.softmax_backward(i, dp, grad_lse[:, i])

    # the softmax of one row x over rows t: s_t = cap(scale * Q[x] . K[t]) + size_t + B[t], lse = log(sum of e^s_t),
    # p = e^(s - lse). Of a query the sink is one more s, whose value is 0.

    def softmax(self, x: int, rows: Sequence[int]) -> bool:
        """Sets rows, p and lse of row x, and returns whether its softmax has any row."""
        self.rows[x] = rows = [t for t in rows if self.count[t]]
        if rows:
            s = self.scale * _dots(self.K[:, rows], self.Q[:, x])
            if self.softcap is not None:
                t = np.tanh(s / self.softcap)
                s, self.slope[x] = self.softcap * t, 1 - t**2
            s = s + self.size[rows] + self.B[:, rows, 0]
            sink = self.sink[:, None] if x < self.L else np.full((self.n, 1), -np.inf)
            top = np.maximum(s.max(axis=1, keepdims=True), sink)
            e = np.exp(s - top)
            total = e.sum(axis=1, keepdims=True) + np.exp(sink - top)
            self.p[x] = e / total
            self.lse[:, x] = (top + np.log(total))[:, 0]
        return bool(rows)

    def softmax_backward(self, x: int, dp: Array, dlse: Array) -> None:
        shift = dlse - (self.p[x] * dp).sum(axis=1)
        ds = self.p[x] * (dp + shift[:, None])
        _add_rows(self.dB, self.rows[x], ds[:, :, None])
        if x < self.L:
            self.dsink += np.exp(self.sink - self.lse[:, x]) * shift
        ds = ds * self.slope[x]
        self.dQ[:, x] += self.scale * _average(ds, self.K[:, self.rows[x]])
        _add_rows(self.dK, self.rows[x], self.scale * _outer(ds, self.Q[:, x]))

    def zero_gradients(self) -> None:
        self.dQ, self.dK, self.dV, self.dB = (np.zeros_like(x) for x in (self.Q, self.K, self.V, self.B))
        self.dsink = np.zeros(self.n)

    def weights(self) -> Array:
        """The effective attention `[n, L, L]` (eq 8): the product of the probabilities along a path from query i to
        position j, summed over all paths."""
        W = np.tile(np.eye(self.L + self.R, self.L), (self.n, 1, 1))
        for r in self.summarized:
            W[:, r] = _average(self.p[r], W[:, self.rows[r]])
        whole = np.zeros((self.n, self.L, self.L))
        for i in range(self.L):
            whole[:, i] = _average(self.p[i], W[:, self.rows[i]])
        return whole


# Each works head by head, on n heads side by side.


def _dots(rows: Array, x: Array) -> Array:
    """The product of each row with x: `[n, t]` of `[n, t, D]` and `[n, D]`."""
    return (rows @ x[:, :, None])[:, :, 0]


def _average(weights: Array, rows: Array) -> Array:
    """The sum of the weighted rows: `[n, D]` of `[n, t]` and `[n, t, D]`."""
    return (weights[:, None] @ rows)[:, 0]


def _outer(weights: Array, x: Array) -> Array:
    """x times each weight: `[n, t, D]` of `[n, t]` and `[n, D]`."""
    return weights[:, :, None] * x[:, None]


def _add_rows(X: Array, rows: Sequence[int] | Array, values: Array) -> None:
    """Adds values `[n, t, D]` to rows of `[n, L + R, D]`, to each as often as it is listed."""
    np.add.at(X.swapaxes(0, 1), np.asarray(rows, np.int64), values.swapaxes(0, 1))
