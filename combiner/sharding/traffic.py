# SPDX-License-Identifier: Apache-2.0
"""The bytes that ranks send each other, and those of ring attention for comparison."""

from __future__ import annotations

from typing import NamedTuple

from ..arguments import as_integer
from ..patterns import Factorization
from .rank import plans_of_rank


class Traffic(NamedTuple):
    """Bytes that each rank sends."""

    forward: int
    backward: int


def traffic(
    pattern: Factorization,
    length: int,
    ranks: int,
    *,
    heads: int,
    key_heads: int | None = None,
    dim: int,
    value_dim: int | None = None,
    batch: int = 1,
    itemsize: int = 4,
    bias_heads: int = 0,
) -> Traffic:
    """The bytes that each rank sends in `combiner.distributed.attention`, of B `batch` entries and L = `length`
    positions.

    Parameters
    ----------
    heads, key_heads, dim, value_dim : Hq, Hk (Hq by default), D, Dv (D by default).
    itemsize : bytes of a number.
    bias_heads : heads of region_bias or, where there is none, of key_bias: Hk or Hq; 0 without either. softcap and sink
        send nothing.

    Raises
    ------
    TypeError, ValueError : as `combiner.distributed.attention`; a length that ranks does not divide; heads
        that key_heads does not divide.

    Notes
    -----
    A rank sends to each of the other P - 1 ranks s rows of k_R (Hk D numbers) and of h_R (Hq Dv numbers), and in
    backward as many gradients. s is n / span for `Fixed`, n for row-major `Axial` (weighted keys have Hq heads),
    n / branching^levels or 1 for `Tree`, and 1 for `LogSparse`. Where there are biases, a row has b_R: a number for
    each of their heads (Hq where weighted keys pool them), in float32 at least. Where blocks of shards are attended
    (P > 2), a row includes q_R (Hq D numbers). Flat `LogSparse` has ceil(log2(P)) - 1 blocks that contain the rank's
    shard. Each adds the shard's part of h_R (Hq Dv numbers) and its softmax state (2 Hq numbers), in float32 at least,
    and in backward a gradient of h_R.
    """
    P, B = as_integer("ranks", ranks, 1), as_integer("batch", batch, 1)
    Hq, Hk, D, Dv, itemsize = _sizes(heads, key_heads, dim, value_dim, itemsize)
    plans = plans_of_rank(pattern, _shard(length, P), P, 0, False)
    key_heads = Hq if plans.own.weighted else Hk
    rows = plans.rows * (key_heads * D + Hq * Dv)
    if plans.has_blocks:
        rows += plans.rows * Hq * D
    blocks = plans.held.shape[1] if plans.shard else 0
    biases = plans.rows * as_integer("bias_heads", bias_heads, 0) * max(itemsize, 4)
    forward = rows * itemsize + biases + blocks * Hq * (Dv + 2) * max(itemsize, 4)
    backward = rows * itemsize + biases + blocks * Hq * Dv * itemsize
    return Traffic((P - 1) * B * forward, (P - 1) * B * backward)


def ring_traffic(
    length: int,
    ranks: int,
    *,
    heads: int,
    key_heads: int | None = None,
    dim: int,
    value_dim: int | None = None,
    batch: int = 1,
    itemsize: int = 4,
) -> Traffic:
    """The bytes that each rank sends in ring attention of the same sequence. Parameters and errors as in `traffic`.

    Notes
    -----
    Liu et al., arXiv 2310.01889. Forward, a shard's keys and values, n Hk (D + Dv) numbers, pass P - 1 times from rank
    to rank, until all ranks have seen them. Backward, they pass P - 1 times again with their gradients, as many
    numbers, which begin on the first rank that they visit. (Implementations whose gradients begin on the shard's own
    rank pass them P times.)
    """
    P, B = as_integer("ranks", ranks, 1), as_integer("batch", batch, 1)
    _, Hk, D, Dv, itemsize = _sizes(heads, key_heads, dim, value_dim, itemsize)
    once = (P - 1) * B * _shard(length, P) * Hk * (D + Dv) * itemsize
    return Traffic(once, 2 * once)


def _sizes(heads: int, key_heads: int | None, dim: int, value_dim: int | None, itemsize: int) -> tuple[int, ...]:
    """Hq, Hk, D, Dv and itemsize, checked."""
    Hq, D = as_integer("heads", heads, 1), as_integer("dim", dim, 1)
    Hk = Hq if key_heads is None else as_integer("key_heads", key_heads, 1)
    Dv = D if value_dim is None else as_integer("value_dim", value_dim, 1)
    if Hq % Hk:
        raise ValueError(f"heads must be a multiple of key_heads, {Hk}, got {Hq}")
    return Hq, Hk, D, Dv, as_integer("itemsize", itemsize, 1)


def _shard(length: int, ranks: int) -> int:
    n, left = divmod(as_integer("length", length, 0), ranks)
    if left:
        raise ValueError(f"length must be a multiple of ranks, {ranks}, got {length}")
    return n
