# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism with torch.distributed: ranks hold a part of the sequence each and send each other summaries.

A rank summarizes its positions, attends them, sends what others attend of them (`sharding` says which), attends what
others sent, and merges the two into one softmax. Backward gives both parts the out and lse of that softmax in place of
their own, as in ring attention: their weights and gradients are then those in the whole. The gradients that ranks find
for a summary are summed where it was made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .calls import Saved
from .functional import (
    attend_backward,
    attend_forward,
    attention_backward,
    attention_forward,
    merge,
    summarize_backward,
    summarize_forward,
)
from .patterns import Factorization
from .plan import Array, Plan
from .sharding import Layout, Traffic, lay_out, ring_traffic, traffic
from .torch_ops import as_array, as_tensor

__all__ = ["Traffic", "attention", "ring_traffic", "traffic"]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Factorization,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """`combiner.attention` of a sequence whose rank r of P holds positions ``[r * n, (r + 1) * n)``; differentiable.

    All ranks of the group must call it, and its backward, in one order and with equal shapes and arguments.

    Parameters
    ----------
    query : `[..., Hq, n, D]` on the CPU, a dtype that `combiner.attention` takes: this rank's positions.
    key : `[..., Hk, n, D]`, the same dtype.
    value : `[..., Hk, n, Dv]`, the same dtype.
    pattern : the whole sequence's: `Fixed` or row-major `Axial`, whose span or width divides n; `LogSparse`, where n is
        a power of two; `Tree`, where n is a power of its branching or a multiple of its largest nodes.
    is_causal, scale : as in `combiner.attention`.
    group : the ranks, in the order of their shards; the default group if None. Its backend takes CPU tensors: gloo.

    Returns
    -------
    out : `[..., Hq, n, Dv]`: the rows of `combiner.attention` of the whole sequence, up to rounding.

    Raises
    ------
    TypeError, ValueError : as `combiner.attention`; what is no CPU tensor; a pattern that cannot be sharded so.

    Notes
    -----
    Time is about that of `combiner.attention` of n positions, while summaries travel, and of n queries on those of
    other ranks. `traffic` counts the bytes.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
            got = f"one on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a CPU tensor, got {got}")
        if x.ndim < 3:
            raise ValueError(f"{name} must have shape (..., heads, n, features), got {tuple(x.shape)}")
    apply: Callable[..., torch.Tensor] = _Attention.apply
    return apply(query, key, value, pattern, is_causal, scale, group)


# ---- both passes of a rank


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, *options: Any) -> torch.Tensor:
        array, ctx.pass_back = _forward(as_array(query), as_array(key), as_array(value), *options)
        out = as_tensor(array)
        ctx.save_for_backward(query, key, value, out)  # pass_back has their memory, this knows whether it was written
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        assert ctx.saved_tensors  # an error where it was
        return *map(as_tensor, ctx.pass_back(as_array(grad_out))), None, None, None, None


PassBack: TypeAlias = Callable[..., list[Any]]  # gradients of what a function made to those of what it was given


def _forward(
    q: Array, k: Array, v: Array, pattern: Factorization, is_causal: bool, scale: float | None, group: Any
) -> tuple[Array, PassBack]:
    """out of this rank's positions; gradients of q, k and v."""
    ranks = _Ranks(group)
    layout = lay_out(pattern, q.shape[-2], ranks.count, ranks.rank, is_causal)
    own, of_own = summarize_forward(q, k, v, layout.own, scale=scale)
    sent = [own.key, own.value]
    if layout.has_blocks:
        own_query, of_own_query = _pool(q, layout.own)
        sent.append(own_query)
    arriving = ranks.gather(*(x[..., -layout.rows :, :] for x in sent))
    if layout.is_flat:
        out, of_near = attention_forward(q, k, v, layout.near, scale=scale)
    else:
        near_key, near_value = (x[..., : layout.near.region_count, :] for x in (own.key, own.value))
        out, of_near = attend_forward(q, k, v, near_key, near_value, layout.near, scale=scale)
    rows = arriving()
    key, value = rows[:2]
    if layout.has_blocks:
        key, value, to_rows = _blocks(q, k, v, rows, layout, ranks, scale)
    if layout.far:
        far, of_far = attend_forward(q, k, v, key, value, layout.far, scale=scale)
        lse = of_near["lse"]
        whole, lse = merge(out.astype(lse.dtype), lse, far.astype(lse.dtype), of_far["lse"])  # float16 as float32
        out = whole.astype(q.dtype)
        for saved in (of_near, of_far):
            saved.update(out=out, lse=lse)

    def pass_back(grad_out: Array) -> list[Array]:
        found: list[Any] = []  # gradients of q, k and v, part by part
        d_rows = [np.zeros_like(key), np.zeros_like(value)]
        if layout.far:
            dq, _, _, *d_rows = attend_backward(grad_out, of_far)
            found.append((dq, None, None))
        if layout.has_blocks:
            *d_rows, dk, dv = to_rows(*d_rows)
            found.append((None, dk, dv))
        arriving = ranks.give_back(*d_rows)
        dq, dk, dv, *d_near = (attention_backward if layout.is_flat else attend_backward)(grad_out, of_near)
        found.append((dq, dk, dv))
        d_own = [_last_rows(x, layout.own.region_count) for x in arriving()]
        if not layout.is_flat:
            for whole, part in zip(d_own, d_near, strict=False):  # of keys and values
                whole[..., : layout.near.region_count, :] += part
        found.append(summarize_backward(d_own[0], d_own[1], of_own)[:3])
        if layout.has_blocks:
            found.append((summarize_backward(d_own[2], None, of_own_query).key, None, None))
        return [functools.reduce(np.add, (x for x in each if x is not None)) for each in zip(*found, strict=True)]

    return out, pass_back


def _blocks(
    q: Array, k: Array, v: Array, rows: list[Array], layout: Layout, ranks: _Ranks, scale: Any
) -> tuple[Array, Array, PassBack]:
    """k_R and h_R of the P shards, whose k_R, h_R and q_R are given, and of the blocks of shards after them; gradients
    of what is given and, or None, of this rank's k and v."""
    key, value, query = rows
    P, group = layout.coarse.length, query.shape[-3] // key.shape[-3]
    shape = key.shape
    key = np.repeat(key, group, axis=-3)  # values, h_R, are of query heads
    blocks, of_blocks = summarize_forward(query, key, value, layout.coarse, scale=scale)
    block_value = blocks.value
    if layout.shard:
        block_query, of_query = _pool(query, layout.coarse)
        block_value, to_parts = _merged_parts(q, k, v, block_query, layout, ranks, scale)

    def pass_back(d_key: Array, d_value: Array) -> list[Any]:
        (d_shard_key, d_block_key), (d_shard_value, d_block_value) = (np.split(x, [P], -2) for x in (d_key, d_value))
        of_parts: list[Any] = [None, None]
        if layout.shard:
            dq, dk, dv, *_ = summarize_backward(d_block_key, None, of_blocks)
            d_block_query, *of_parts = to_parts(d_block_value)
            dq += summarize_backward(d_block_query, None, of_query).key
        else:
            dq, dk, dv, *_ = summarize_backward(d_block_key, d_block_value, of_blocks)
        dk += d_shard_key
        dk = _sum(dk.reshape(*shape[:-2], group, *shape[-2:]), -3)
        return [dk, dv + d_shard_value, dq, *of_parts]

    return np.concatenate([key, blocks.key], axis=-2), np.concatenate([value, block_value], axis=-2), pass_back


def _merged_parts(
    q: Array, k: Array, v: Array, query: Array, layout: Layout, ranks: _Ranks, scale: Any
) -> tuple[Array, PassBack]:
    """h_R of blocks of shards from their q_R, for which each shard summarizes its positions; gradients of this rank's
    part of q_R, and of its k and v."""
    assert layout.shard
    mine = layout.held[ranks.rank]
    part, of_part = summarize_forward(q, k, v, layout.shard, scale=scale, region_query=query[..., mine, :])
    values, lses = ranks.gather(part.value.astype(part.lse.dtype), part.lse[..., None])()
    merged = []
    for block in range(layout.coarse.region_count):
        parts = ((values[..., n, :], lses[..., n, 0]) for n in np.flatnonzero(layout.held == block))
        merged.append(functools.reduce(lambda a, b: merge(*a, *b), parts))
    value = np.stack([out for out, _ in merged], axis=-2).astype(q.dtype)
    lse = np.stack([lse for _, lse in merged], axis=-1)
    of_part.update(summary_value=value[..., mine, :], summary_lse=lse[..., mine])

    def pass_back(d_value: Array) -> list[Array]:
        (d_mine,) = ranks.give_back(d_value[..., layout.held.ravel(), :])()
        _, dk, dv, d_mine_query, _ = summarize_backward(None, d_mine, of_part)
        d_query = np.zeros_like(query)
        d_query[..., mine, :] = d_mine_query
        return [d_query, dk, dv]

    return value, pass_back


def _pool(query: Array, plan: Plan) -> tuple[Array, Saved]:
    """q_R of each region: k_R, where queries are the keys."""
    summary, saved = summarize_forward(query, query, query[..., :1], plan)
    return summary.key, saved


def _last_rows(x: Array, rows: int) -> Array:
    """x as the last of so many rows, after zeros."""
    whole = np.zeros((*x.shape[:-2], rows, x.shape[-1]), x.dtype)
    whole[..., rows - x.shape[-2] :, :] = x
    return whole


def _sum(x: Array, axis: int) -> Array:
    """The sum in x's dtype, added in float32 at least."""
    return x.sum(axis, np.result_type(x.dtype, np.float32)).astype(x.dtype)


# ---- what ranks send


class _Ranks:
    """The ranks of a group, which send each other rows. Arrays travel as bytes: gloo need not know their dtype."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group must hold the rank that calls, which is none of its ranks")

    def gather(self, *mine: Array) -> Callable[[], list[Array]]:
        """Sends `[..., rows, features]` to all; the call waits for `[..., P * rows, features]`, rank by rank."""
        given = [np.ascontiguousarray(x) for x in mine]
        gathered = [np.empty((self.count, *x.shape), x.dtype) for x in given]
        works: list[Any] = [
            dist.all_gather([*_bytes(y)], _bytes(x[None])[0], group=self._group, async_op=True)
            for y, x in zip(gathered, given, strict=True)
        ]

        def wait() -> list[Array]:
            for work in works:
                work.wait()
            return [np.concatenate(x, axis=-2) for x in gathered]

        return wait

    def give_back(self, *everyones: Array) -> Callable[[], list[Array]]:
        """The transpose of `gather`: sends each rank its rows; the call waits for `[..., rows, features]`, the sums of
        what ranks sent in their order."""
        given = [np.ascontiguousarray(np.stack(np.split(x, self.count, axis=-2))) for x in everyones]
        received = [np.empty(x.shape, x.dtype) for x in given]
        works: list[Any] = [
            dist.all_to_all_single(_bytes(y), _bytes(x), group=self._group, async_op=True)
            for y, x in zip(received, given, strict=True)
        ]

        def wait() -> list[Array]:
            for work in works:
                work.wait()
            return [_sum(x, 0) for x in received]

        return wait


def _bytes(x: Array) -> torch.Tensor:
    """`[P, bytes]` of `[P, ...]`, in its memory."""
    return torch.from_numpy(x.reshape(len(x), -1).view(np.uint8))
