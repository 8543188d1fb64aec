# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism with torch.distributed: each rank holds a shard of the sequence and sends summaries of it.

Forward, a rank summarizes its positions, sends the summaries that other ranks attend, attends its own positions,
attends the summaries that arrived, and merges the two results into one softmax. Backward runs on both parts with the
out and the softmax state of the whole, as in ring attention, so that their weights and gradients are those of the
whole. The gradients of a summary, from all ranks that attended it, are summed on the rank that made it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ..arguments import Array
from ..foreign_names import explains_foreign_names
from ..functional import (
    attend_backward,
    attend_forward,
    attention_backward,
    attention_forward,
    summarize_backward,
    summarize_forward,
)
from ..patterns import Factorization
from ..plan import Plan
from ..problem import Saved
from ..signatures import AttendGradients
from ..torch.arguments import check_scale, check_terms, whole_terms
from ..torch.tensors import as_array, as_tensor
from .rank import RankPlans, plans_of_rank
from .regions import GivenBiases


@explains_foreign_names
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Factorization,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: torch.Tensor | None = None,
    region_bias: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """`combiner.attention` of a sequence whose rank r of P holds positions ``[r * n, (r + 1) * n)``; differentiable.

    All ranks of the group must call it, and its backward, in one order and with equal shapes and arguments.

    Parameters
    ----------
    query : `[..., Hq, n, D]` on the CPU, a dtype that `combiner.attention` takes: this rank's positions.
    key : `[..., Hk, n, D]`, the same dtype.
    value : `[..., Hk, n, Dv]`, the same dtype.
    pattern : the pattern of the whole sequence: `Fixed` or row-major `Axial`, where the span or width divides n;
        `LogSparse`, where n is a power of two; `Tree`, where n is a power of its branching or a multiple of its largest
        nodes.
    is_causal, scale, softcap : as in `combiner.attention`.
    key_bias : `[..., Hk, n]` or `[..., Hq, n]`, as there: the biases of this rank's positions.
    region_bias : `[..., Hk, R]` or `[..., Hq, R]`, as there: the biases of all regions of the whole sequence.
    sink : `[Hq]` or `[..., Hq]`, as there. region_bias and sink are equal on all ranks; a rank has a part of their
        gradients, and the sum over the ranks is the whole.
    group : the ranks, in the order of their shards; the default group if None. Its backend takes CPU tensors: gloo.

    Returns
    -------
    out : `[..., Hq, n, Dv]`: the rows of `combiner.attention` of the whole sequence, up to rounding.

    Raises
    ------
    TypeError : as `combiner.attention`; an argument that is no CPU tensor.
    ValueError : as `combiner.attention`; a pattern that cannot be sharded into n positions; a group without this rank.

    Notes
    -----
    Ours. Time is about that of `combiner.attention` of n positions, during which summaries travel, and of n queries on
    the summaries of other ranks. `traffic` counts the bytes.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
            got = f"one on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a CPU tensor, got {got}")
        if x.ndim < 3:
            raise ValueError(f"{name} must have shape (..., heads, n, features), got {tuple(x.shape)}")
    check_scale(scale)
    check_terms(query, softcap, key_bias, region_bias, sink)
    terms = whole_terms(query, key, key_bias, region_bias, sink)
    apply: Callable[..., torch.Tensor] = _Attention.apply
    return apply(query, key, value, *terms, pattern, is_causal, {"scale": scale, "softcap": softcap}, group)


# ---- both passes of a rank


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, key_bias: Any, region_bias: Any, sink: Any, *options: Any
    ) -> torch.Tensor:
        given = query, key, value, key_bias, region_bias, sink
        array, ctx.pass_back = _forward(*map(as_array, given), *options)
        out = as_tensor(array)
        ctx.save_for_backward(*given, out)  # pass_back reads their memory; PyTorch notices a write
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        assert ctx.saved_tensors  # raises where the memory was written
        made = ctx.pass_back(as_array(grad_out))
        return *(None if x is None else as_tensor(x) for x in made), None, None, None, None


PassBack: TypeAlias = Callable[..., list[Any]]  # from gradients of a function's results to gradients of its arguments


def _forward(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    region_bias: Array | None,
    sink: Array | None,
    pattern: Factorization,
    is_causal: bool,
    options: dict[str, Any],
    group: Any,
) -> tuple[Array, PassBack]:
    """out of this rank's positions, and the function from its gradients to those of q, k, v, both biases and the sink.

    The options are scale and softcap. Of all parts of a query's softmax the near one has the sink."""
    ranks = _Ranks(group)
    plans = plans_of_rank(pattern, q.shape[-2], ranks.count, ranks.rank, is_causal)
    given = GivenBiases(region_bias, plans.numbers, bias is not None)
    own, of_own = summarize_forward(q, k, v, plans.own, key_bias=bias, region_bias=given.own, **options)
    sent = [own.key, own.value, *_rows_of(own.bias)]
    if plans.has_blocks:
        own_query, of_own_query = _pool(q, plans.own)
        sent.append(own_query)
    arriving = ranks.gather(*(x[..., -plans.rows :, :] for x in sent))
    if plans.is_flat:
        terms: dict[str, Any] = {"key_bias": bias, "region_bias": given.near, "sink": sink}
        out, of_near = attention_forward(q, k, v, plans.near, **terms, **options)
    else:
        R = plans.near.region_count
        near = q, k, v, own.key[..., :R, :], own.value[..., :R, :], plans.near
        near_bias = None if own.bias is None else own.bias[..., :R]
        out, of_near = attend_forward(*near, key_bias=bias, region_bias=near_bias, sink=sink, **options)
    rows = arriving()
    if plans.has_blocks:
        rows, to_rows = _blocks(q, k, v, bias, given.blocks, rows, plans, ranks, options)
    if plans.far:
        far_bias = None if own.bias is None else rows[2][..., 0]
        far, of_far = attend_forward(q, k, v, rows[0], rows[1], plans.far, region_bias=far_bias, **options)
        whole, softmax = _merged(((out, of_near["softmax"]), (far, of_far["softmax"])))
        out = whole.astype(q.dtype)
        of_near, of_far = (saved.with_results(out=out, softmax=softmax) for saved in (of_near, of_far))

    def pass_back(grad_out: Array) -> list[Any]:
        found: list[Any] = []  # gradients of q, k, v and the biases of keys, part by part
        d_given = given.zeros()
        d_rows = [np.zeros_like(x) for x in rows]
        if plans.far:
            d_far = attend_backward(grad_out, of_far)
            found.append((d_far.query, None, None, None))
            d_rows = [d_far.region_key, d_far.region_value, *_rows_of(d_far.region_bias)]
        if plans.has_blocks:
            d_rows, d_blocks, *of_positions = to_rows(*d_rows)
            given.add(d_given, plans.numbers.blocks, d_blocks)
            found.append((None, *of_positions))
        arriving = ranks.give_back(*d_rows)
        near = (attention_backward if plans.is_flat else attend_backward)(grad_out, of_near)
        found.append((*near[:3], near.key_bias))
        if plans.is_flat:
            given.add(d_given, plans.numbers.near, near.region_bias)
        d_own = [_last_rows(x, plans.own.region_count) for x in arriving()]
        if isinstance(near, AttendGradients):
            d_near = near.region_key, near.region_value, *_rows_of(near.region_bias)
            for whole, part in zip(d_own, d_near, strict=False):
                whole[..., : plans.near.region_count, :] += part
        of_bias = None if own.bias is None else d_own[2][..., 0]
        d_summarize = summarize_backward(d_own[0], d_own[1], of_own, grad_summary_bias=of_bias)
        found.append((*d_summarize[:3], d_summarize.key_bias))
        given.add(d_given, plans.numbers.own, d_summarize.region_bias)
        if plans.has_blocks:
            found.append((summarize_backward(d_own[-1], None, of_own_query).key, None, None, None))
        parts = ([x for x in each if x is not None] for each in zip(*found, strict=True))
        of_inputs = [functools.reduce(np.add, each) if each else None for each in parts]
        return [*of_inputs, None if d_given is None else d_given[..., :-1], near.sink]

    return out, pass_back


def _rows_of(bias: Array | None) -> tuple[Array, ...]:
    """Biases of regions as rows of one feature, as ranks send them; nothing for None."""
    return () if bias is None else (bias[..., None],)


def _blocks(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    block_bias: Array | None,
    rows: list[Array],
    plans: RankPlans,
    ranks: _Ranks,
    options: dict[str, Any],
) -> tuple[list[Array], PassBack]:
    """k_R, h_R and b_R of the P shards and then of the blocks of shards, from the shards' rows k_R, h_R, b_R and q_R;
    and the function from their gradients to the gradients of the rows, of the blocks' given biases, and of this rank's
    k, v and biases (None where blocks do not need these). Without biases there is no b_R."""
    key, value, *biases, query = rows
    P, heads = plans.coarse.length, query.shape[-3]
    given = [key, *biases]
    key, *biases = (np.repeat(x, heads // x.shape[-3], axis=-3) for x in given)  # for each query head, as h_R has
    of_shards = biases[0][..., 0] if biases else None
    of_blocks_given = None if block_bias is None else np.repeat(block_bias, heads // block_bias.shape[-2], axis=-2)
    terms: dict[str, Any] = {"key_bias": of_shards, "region_bias": of_blocks_given}
    blocks, of_blocks = summarize_forward(query, key, value, plans.coarse, **terms, **options)
    block_value = blocks.value
    if plans.shard:
        block_query, of_query = _pool(query, plans.coarse)
        block_value, to_parts = _merged_parts(q, k, v, bias, block_query, plans, ranks, options)

    def pass_back(d_key: Array, d_value: Array, *d_biases: Array) -> list[Any]:
        pairs = (np.split(x, [P], -2) for x in (d_key, d_value, *d_biases))
        (d_shard_key, d_block_key), (d_shard_value, d_block_value), *of_biases = pairs
        d_block_bias = of_biases[0][1][..., 0] if of_biases else None
        of_parts: list[Any] = [None, None, None]
        of_value = None if plans.shard else d_block_value
        made = summarize_backward(d_block_key, of_value, of_blocks, grad_summary_bias=d_block_bias)
        dq, dk, dv = made[:3]
        if plans.shard:
            d_block_query, *of_parts = to_parts(d_block_value)
            dq += summarize_backward(d_block_query, None, of_query).key
        of_heads = [dk + d_shard_key]
        if made.key_bias is not None:
            of_heads.append(made.key_bias[..., None] + of_biases[0][0])
        grouped = [x.reshape(*own.shape[:-2], -1, *x.shape[-2:]) for x, own in zip(of_heads, given, strict=True)]
        dk, *d_bias = (_sum(x, -3) for x in grouped)
        d_given = None
        if block_bias is not None and made.region_bias is not None:
            d_given = made.region_bias.reshape(*block_bias.shape[:-1], -1, block_bias.shape[-1]).sum(-2)
        return [[dk, dv + d_shard_value, *d_bias, dq], d_given, *of_parts]

    of_regions = [key, blocks.key], [value, block_value], *([x, *_rows_of(blocks.bias)] for x in biases)
    return [np.concatenate(x, axis=-2) for x in of_regions], pass_back


def _merged_parts(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    query: Array,
    plans: RankPlans,
    ranks: _Ranks,
    options: dict[str, Any],
) -> tuple[Array, PassBack]:
    """h_R of the blocks of shards from their q_R; and the function of gradients: to those of q_R, and to those of k, v
    and biases of this rank.

    Each rank summarizes its own positions with the q_R of the blocks that contain it; the parts are merged."""
    assert plans.shard
    mine = plans.held[ranks.rank]
    asked = query[..., mine, :]
    part, of_part = summarize_forward(q, k, v, plans.shard, region_query=asked, key_bias=bias, **options)
    states = of_part["summary_softmax"]
    values, states = ranks.gather(part.value.astype(states.dtype), states)()
    merged = []
    for block in range(plans.coarse.region_count):
        merged.append(_merged((values[..., n, :], states[..., n, :]) for n in np.flatnonzero(plans.held == block)))
    value = np.stack([out for out, _ in merged], axis=-2).astype(q.dtype)
    softmax = np.stack([state for _, state in merged], axis=-2)
    of_part = of_part.with_results(summary_value=value[..., mine, :], summary_softmax=softmax[..., mine, :])

    def pass_back(d_value: Array) -> list[Any]:
        (d_mine,) = ranks.give_back(d_value[..., plans.held.ravel(), :])()
        made = summarize_backward(None, d_mine, of_part)
        d_query = np.zeros_like(query)
        d_query[..., mine, :] = made.region_query
        return [d_query, made.key, made.value, made.key_bias]

    return value, pass_back


def _merged(parts: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    """out and state of the softmax over several sets of parts, from out `[..., Dv]` and state `[..., 2]` of each.

    Results have the dtype of the states, which is float32 for 16-bit dtypes."""
    outs, states = zip(*parts, strict=True)
    m = functools.reduce(np.maximum, (state[..., 0] for state in states))
    shares = []
    for state in states:
        with np.errstate(invalid="ignore"):  # -inf - -inf, where nothing is attended
            share = np.exp(state[..., 0] - m) * state[..., 1]
        shares.append(np.where(state[..., 1] == 0, state[..., 1], share))
    total = functools.reduce(np.add, shares)
    sums = [share[..., None] * out.astype(total.dtype) for share, out in zip(shares, outs, strict=True)]
    return functools.reduce(np.add, sums) / np.where(total == 0, 1, total)[..., None], np.stack([m, total], axis=-1)


def _pool(query: Array, plan: Plan) -> tuple[Array, Saved]:
    """q_R of each region, and what its backward needs: the k_R that results where queries are given as keys."""
    summary, saved = summarize_forward(query, query, query[..., :1], plan)
    return summary.key, saved


def _last_rows(x: Array, rows: int) -> Array:
    """x as the last of this number of rows; the rows before it are zeros."""
    whole = np.zeros((*x.shape[:-2], rows, x.shape[-1]), x.dtype)
    whole[..., rows - x.shape[-2] :, :] = x
    return whole


def _sum(x: Array, axis: int) -> Array:
    """The sum, added in float32 at least and returned in x's dtype."""
    return x.sum(axis, np.result_type(x.dtype, np.float32)).astype(x.dtype)


# ---- what ranks send


class _Ranks:
    """The ranks of a group, which send each other rows. Arrays travel as bytes, since gloo does not know all dtypes."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group must hold the rank that calls, which is none of its ranks")

    def gather(self, *mine: Array) -> Callable[[], list[Array]]:
        """Sends `[..., rows, features]` to all ranks. The returned function waits for `[..., P * rows, features]`, in
        the order of the ranks.
        """
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
        """The transpose of `gather`: sends each rank its rows. The returned function waits for `[..., rows, features]`,
        the sums over the ranks in their order.
        """
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
    """A view `[P, bytes]` of an array `[P, ...]`."""
    return torch.from_numpy(x.reshape(len(x), -1).view(np.uint8))
