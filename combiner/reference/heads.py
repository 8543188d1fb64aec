# SPDX-License-Identifier: Apache-2.0
"""All heads of a call: leading axes flattened, and one `Table` for the heads that have the same parts and mask."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..arguments import Array
from .dropout import dropout_factors
from .parts import Pattern, parts_of_heads
from .passes import Table


class Heads:
    """The tables of all query heads, `[B, Hq]` once leading axes are flattened, and arrays read from and written to
    them.

    Query head h reads key head h // (Hq / Hk). Iteration gives ((b, h), table): the n batch entries and query heads
    that a table holds. Arguments are those of `functional.attention_forward`.
    """

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
        softcap: float | None = None,
        key_bias: Array | None = None,
        sink: Array | None = None,
    ) -> None:
        q, k, v = flat(query), flat(key), flat(value)
        self.leading = np.shape(query)[:-2]
        self.B, self.Hq, self.L, self.D = q.shape
        self.Hk, self.Dv = k.shape[1], v.shape[3]
        scale = 1 / np.sqrt(self.D) if scale is None else scale
        live = np.ones((self.B, self.L), bool) if key_mask is None else np.reshape(key_mask, (self.B, self.L))
        self.parts = parts_of_heads(pattern, self.B, self.Hk, self.L, is_causal)
        self.R = max((len(each.members) for each in self.parts.values()), default=0)
        self.weighted = any(each.weighted for each in self.parts.values())
        alike: dict[Any, list[tuple[int, int]]] = {}
        for b, h in itertools.product(range(self.B), range(self.Hq)):
            alike.setdefault((id(self.parts[b, h * self.Hk // self.Hq]), live[b].tobytes()), []).append((b, h))
        self.tables: list[tuple[tuple[Array, Array], Table]] = []
        for heads in alike.values():
            b, h = np.array(heads).T
            own = self.parts[heads[0][0], heads[0][1] * self.Hk // self.Hq]
            keep = dropout_factors(dropout_p, seed, b, h, self.L, dropout_row + self.L + len(own.members))
            inputs = self.read(q, b, h), self.read(k, b, h), self.read(v, b, h)
            bias = None if key_bias is None else self.read_biases(key_bias, b, h)
            sinks = np.full(len(b), -np.inf) if sink is None else self.read_sinks(sink)[b, h]
            terms = softcap, bias, sinks
            table = Table(own, *inputs, live[b[0]], scale, keep[:, :, dropout_row:], *terms)
            self.tables.append(((b, h), table))

    def __iter__(self) -> Iterator[tuple[tuple[Array, Array], Table]]:
        return iter(self.tables)

    def read(self, x: Array, b: Array, h: Array) -> Array:
        """The heads `[n, rows, features]` that query heads h of batch entries b read, of an array of Hq or Hk heads."""
        heads = flat(x)
        own: Array = heads[b, h * heads.shape[1] // self.Hq]
        return own

    def read_if_given(self, x: Array | None, b: Array, h: Array) -> Array | None:
        """The same; None for None."""
        return None if x is None else self.read(x, b, h)

    def read_biases(self, x: Array, b: Array, h: Array) -> Array:
        """The biases `[n, rows, 1]` of query heads h, of an array that broadcasts to `[..., Hq or Hk, rows]`."""
        heads = np.shape(x)[-2] if np.ndim(x) > 1 else 1
        whole = np.broadcast_to(np.asarray(x, np.float64), (*self.leading[:-1], heads, np.shape(x)[-1]))
        own: Array = whole.reshape(self.B, heads, -1)[b, h * heads // self.Hq, :, None]
        return own

    def read_sinks(self, x: Array) -> Array:
        """The sinks `[B, Hq]` of an array that broadcasts to `[..., Hq]`."""
        whole: Array = np.broadcast_to(np.asarray(x, np.float64), (*self.leading[:-1], self.Hq))
        return whole.reshape(self.B, self.Hq)

    def biases_backward(self, given: Array | None, of_regions: bool = False) -> Array | None:
        """The gradient of given biases, of positions or of regions, summed over what they were broadcast to; None for
        None."""
        if given is None:
            return None
        heads = np.shape(given)[-2] if np.ndim(given) > 1 else 1
        if of_regions:
            whole = self.write_regions(heads, lambda table: table.dB)[..., 0]
        else:
            whole = self.write(heads, (self.L,), lambda table: table.dB[:, : self.L, 0])
        return _summed(whole, np.shape(given))

    def sink_backward(self, given: Array | None) -> Array | None:
        """The gradient of given sinks; None for None."""
        if given is None:
            return None
        whole = self.write(self.Hq, (), lambda table: table.dsink)
        return _summed(whole if self.leading else whole.reshape(()), np.shape(given))

    def write(self, heads: int, tail: tuple[int, ...], get: Callable[[Table], Array], add: bool = True) -> Array:
        """An array `[..., heads, *tail]` of get(table). Query heads of one of its heads are summed where `add`."""
        x = np.zeros((self.B, heads, *tail))
        for (b, h), table in self:
            at = b, h * heads // self.Hq
            if add:
                np.add.at(x, at, get(table))
            else:
                x[at] = get(table)
        return x.reshape((*self.leading[:-1], heads, *tail) if self.leading else tail)

    def backward(self) -> tuple[Array, Array, Array]:
        """The gradients of query, key and value, once every table has run its passes backward."""
        return (
            self.write(self.Hq, (self.L, self.D), lambda table: table.dQ[:, : self.L]),
            self.write(self.Hk, (self.L, self.D), lambda table: table.dK[:, : self.L]),
            self.write(self.Hk, (self.L, self.Dv), lambda table: table.dV[:, : self.L]),
        )

    def region_backward(self, given: Array | None, name: str) -> Array | None:
        """The gradient of a given array of regions, from the attribute `name` of the tables; None for None."""
        if given is None:
            return None
        return self.write_regions(flat(given).shape[1], lambda table: getattr(table, name))

    def write_regions(self, heads: int, get: Callable[[Table], Array], add: bool = True, empty: float = 0.0) -> Array:
        """As `write`, of the tables' regions, rows L .. L + R - 1. `empty` fills heads that have fewer regions."""

        def rows(table: Table) -> Array:
            own = get(table)[:, self.L :]
            fill = np.full((table.n, self.R - table.R, *own.shape[2:]), empty)
            return np.concatenate([own, fill], axis=1)

        tail = get(self.tables[0][1]).shape[2:] if self.tables else ()
        return self.write(heads, (self.R, *tail), rows, add)


def flat(x: Array) -> Array:
    """`[..., H, L, D]` or `[L, D]` as float64 `[B, H, L, D]`."""
    x = np.asarray(x, np.float64)
    return x.reshape(math.prod(x.shape[:-3]), *(x.shape[-3:] if x.ndim > 2 else (1, *x.shape)))


def _summed(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum of x over the axes along which an array of this shape broadcasts to that of x."""
    whole = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(a for a, own in enumerate(whole[: x.ndim]) if own == 1)
    total: Array = x.sum(axis=axes).reshape(shape)
    return total
