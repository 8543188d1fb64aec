# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism with JAX: attention within `jax.shard_map`, over a mesh axis that divides the sequence.

A device summarizes its positions, gathers the summaries of all devices, attends its own positions, attends the
summaries of the others, and merges the two results into one softmax. JAX differentiates it: the transpose of a gather
sums and scatters. All devices run one program, which holds the plans of every device and selects by the device's index.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from ..jax import attend, merge, summarize
from ..jax import attention as attention_of_one
from ..jax.arrays import Array, as_array
from ..patterns import Factorization
from ..plan import Plan
from .plans import few_plan
from .rank import RankPlans, plans_of_rank
from .regions import RegionNumbers, check_region_bias, has_own_biases


def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: Factorization,
    axis_name: str,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
) -> jax.Array:
    """`combiner.attention` of a sequence whose positions ``[r * n, (r + 1) * n)`` device r of the mesh axis holds.

    Parameters
    ----------
    query : `[..., Hq, n, D]`: this device's positions, within `jax.shard_map`.
    key : `[..., Hk, n, D]`, the same dtype.
    value : `[..., Hk, n, Dv]`, the same dtype.
    pattern : the pattern of the whole sequence, as in `combiner.distributed.attention`.
    axis_name : the mesh axis.
    is_causal, scale, softcap : as in `combiner.attention`.
    key_bias : `[..., Hk, n]` or `[..., Hq, n]`, as there: the biases of this device's positions.
    region_bias : `[..., Hk, R]` or `[..., Hq, R]`, as there: the biases of all regions of the whole sequence.
    sink : `[Hq]` or `[..., Hq]`, as there. region_bias and sink are equal on all devices.

    Returns
    -------
    out : `[..., Hq, n, Dv]`: the rows of `combiner.attention` of the whole sequence, up to rounding.

    Raises
    ------
    TypeError, ValueError : as `combiner.jax.attention`; a pattern that cannot be sharded into n positions.

    Notes
    -----
    Ours. The cost is that of `combiner.distributed.attention`.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if np.ndim(x) < 3:
            raise ValueError(f"{name} must have shape (..., heads, n, features), got {np.shape(x)}")
    P, rank = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    every = [plans_of_rank(pattern, query.shape[-2], P, r, is_causal) for r in range(P)]
    plans = every[0]  # they differ in `far` and in the numbers of their regions alone
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name, axis=-2, tiled=True)
    options = _Options(scale=scale, softcap=softcap)
    given = _given_biases(region_bias, [each.numbers for each in every], rank, key_bias is not None)
    own = summarize(query, key, value, plans.own, key_bias=key_bias, region_bias=given.own, **options)
    if plans.is_flat:
        near, near_lse = attention_of_one(
            query,
            key,
            value,
            plans.near,
            key_bias=key_bias,
            region_bias=given.near,
            sink=sink,
            return_lse=True,
            **options,
        )
    else:
        R = plans.near.region_count
        own_key, own_value = (x[..., :R, :] for x in own[:2])
        own_bias = None if own.bias is None else own.bias[..., :R]
        near, near_lse = attend(
            query, key, value, own_key, own_value, plans.near, key_bias=key_bias, region_bias=own_bias, sink=sink,
            return_lse=True, **options,
        )  # fmt: skip
    sent = [own.key, own.value, *([] if own.bias is None else [own.bias[..., None]])]
    rows = [gather(x[..., -plans.rows :, :]) for x in sent]
    if plans.has_blocks:
        own_query = _pool(query, plans.own)[..., -plans.rows :, :]
        rows = _blocks(query, key, value, key_bias, given.blocks, gather(own_query), rows, plans, rank, gather, options)

    far, far_lse = jax.lax.switch(rank, [_far(each.far, options) for each in every], near, query, key, value, *rows)
    return merge(near, near_lse, far, far_lse)[0]


class _Options(TypedDict):
    """The options of every stage."""

    scale: float | None
    softcap: float | None


class _Given(NamedTuple):
    """The biases of a device's regions out of `region_bias`; None without it."""

    near: jax.Array | None = None
    own: jax.Array | None = None
    blocks: jax.Array | None = None


def _given_biases(region_bias: Array | None, every: list[RegionNumbers], rank: jax.Array, has_key_bias: bool) -> _Given:
    """The biases of this device's regions; `every` has the numbers of all devices' regions."""
    if region_bias is None:
        return _Given()
    whole, first = jnp.atleast_2d(as_array("region_bias", region_bias)), every[0]
    check_region_bias(whole.shape, first.total)
    # A region that the whole sequence does not have, number -1, has the bias 0 at the end.
    padded = jnp.concatenate([whole, jnp.zeros((*whole.shape[:-1], 1), whole.dtype)], axis=-1)

    def of(numbers: list[Array]) -> jax.Array:
        here = jnp.asarray(np.stack(numbers) % (first.total + 1))[rank]
        return jnp.take(padded, here, axis=-1)

    own = of([each.own for each in every]) if has_own_biases(first, has_key_bias) else None
    return _Given(of([each.near for each in every]), own, of([each.blocks for each in every]))


def _far(plan: Plan | None, options: _Options) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A function that attends the summaries of other devices by this plan: out and lse."""

    def far(near: jax.Array, q: Array, k: Array, v: Array, *rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        if plan:
            region_key, region_value, *biases = rows
            bias = biases[0][..., 0] if biases else None
            return attend(q, k, v, region_key, region_value, plan, region_bias=bias, return_lse=True, **options)
        return jnp.zeros_like(near), jnp.full_like(near[..., 0], -jnp.inf, jnp.promote_types(near.dtype, jnp.float32))

    return far


def _blocks(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    block_bias: jax.Array | None,
    query: jax.Array,
    rows: list[jax.Array],
    plans: RankPlans,
    rank: jax.Array,
    gather: Callable[[jax.Array], jax.Array],
    options: _Options,
) -> list[jax.Array]:
    """k_R, h_R and b_R of the P shards and then of the blocks of shards, from the shards' q_R and rows k_R, h_R and
    b_R. Without biases there is no b_R."""
    key, value, *biases = rows
    heads = query.shape[-3]
    key, *biases = (jnp.repeat(x, heads // x.shape[-3], axis=-3) for x in (key, *biases))  # one for each query head
    if block_bias is not None:
        block_bias = jnp.broadcast_to(block_bias, (*query.shape[:-3], *block_bias.shape[-2:]))
        block_bias = jnp.repeat(block_bias, heads // block_bias.shape[-2], axis=-2)
    of_shards = biases[0][..., 0] if biases else None
    blocks = summarize(query, key, value, plans.coarse, key_bias=of_shards, region_bias=block_bias, **options)
    block_value = blocks.value
    if plans.shard:
        U = plans.held.shape[1]
        mine = jnp.take(_pool(query, plans.coarse), jnp.asarray(plans.held)[rank], axis=-2)
        # The blocks' q_R are given as queries, because an lse of `attention` has a gradient and that of `summarize` has
        # none. Queries after the first U attend nothing.
        if U > q.shape[-2]:
            raise ValueError(f"query must have at least {U} positions on each of so many devices, got {q.shape[-2]}")
        few = jnp.zeros_like(q).at[..., :U, :].set(mine)
        plan = few_plan.get(q.shape[-2], U)
        part, lse = attention_of_one(few, k, v, plan, key_bias=bias, return_lse=True, **options)
        values, lses = gather(part[..., :U, :]), gather(lse[..., :U, None])[..., 0]
        merged = []
        for block in range(plans.coarse.region_count):
            parts = [(values[..., n, :], lses[..., n]) for n in np.flatnonzero(plans.held == block)]
            merged.append(functools.reduce(lambda a, b: merge(*a, *b), parts)[0])
        block_value = jnp.stack(merged, axis=-2)
    of_blocks = [blocks.key, block_value, *([] if blocks.bias is None else [blocks.bias[..., None]])]
    return [jnp.concatenate(pair, axis=-2) for pair in zip((key, value, *biases), of_blocks, strict=True)]


def _pool(query: Array, plan: Plan) -> jax.Array:
    """q_R of each region: the k_R that results where queries are given as keys."""
    return summarize(query, query, query[..., :1], plan).key
