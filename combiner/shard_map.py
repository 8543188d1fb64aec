# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism with JAX: attention within `jax.shard_map`, over a mesh axis that divides the sequence.

A device summarizes its positions, attends them, gathers what others attend of them (`sharding` says which), attends
that, and merges the two into one softmax. JAX differentiates it: what is gathered forward is summed and scattered
backward. One program serves all devices, so that it holds the plans of each, to choose among.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .jax import Array, attend, merge, summarize
from .jax import attention as attention_of_one
from .patterns import Factorization
from .plan import Plan
from .sharding import Layout, lay_out


def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: Factorization,
    axis_name: str,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> jax.Array:
    """`combiner.attention` of a sequence of which device r on the axis has positions ``[r * n, (r + 1) * n)``.

    Parameters
    ----------
    query : `[..., Hq, n, D]`: this device's positions, within `jax.shard_map`.
    key : `[..., Hk, n, D]`, the same dtype.
    value : `[..., Hk, n, Dv]`, the same dtype.
    pattern : the whole sequence's, as in `combiner.distributed.attention`.
    axis_name : the mesh axis.
    is_causal, scale : as in `combiner.attention`.

    Returns
    -------
    out : `[..., Hq, n, Dv]`: the rows of `combiner.attention` of the whole sequence, up to rounding.

    Raises
    ------
    TypeError, ValueError : as `combiner.jax.attention`; a pattern that cannot be sharded so.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if np.ndim(x) < 3:
            raise ValueError(f"{name} must have shape (..., heads, n, features), got {np.shape(x)}")
    P, rank = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    layouts = [lay_out(pattern, query.shape[-2], P, r, is_causal) for r in range(P)]
    layout = layouts[0]
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name, axis=-2, tiled=True)
    own = summarize(query, key, value, layout.own, scale=scale)
    if layout.is_flat:
        near, near_lse = attention_of_one(query, key, value, layout.near, scale=scale, return_lse=True)
    else:
        own_key, own_value = (x[..., : layout.near.region_count, :] for x in own[:2])
        near, near_lse = attend(query, key, value, own_key, own_value, layout.near, scale=scale, return_lse=True)
    rows = [gather(x[..., -layout.rows :, :]) for x in (own.key, own.value)]
    if layout.has_blocks:
        own_query = _pool(query, layout.own)[..., -layout.rows :, :]
        rows = _blocks(query, key, value, [gather(own_query), *rows], layout, rank, gather, scale)

    far, far_lse = jax.lax.switch(rank, [_far(each.far, scale) for each in layouts], near, query, key, value, *rows)
    return merge(near, near_lse, far, far_lse)[0]


def _far(plan: Plan | None, scale: float | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """out and lse of what other devices sent to the one of this plan."""

    def far(near: jax.Array, q: Array, k: Array, v: Array, *rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        if plan:
            region_key, region_value = rows
            return attend(q, k, v, region_key, region_value, plan, scale=scale, return_lse=True)
        return jnp.zeros_like(near), jnp.full_like(near[..., 0], -jnp.inf, jnp.promote_types(near.dtype, jnp.float32))

    return far


def _blocks(
    q: Array,
    k: Array,
    v: Array,
    rows: list[jax.Array],
    layout: Layout,
    rank: jax.Array,
    gather: Callable[[jax.Array], jax.Array],
    scale: float | None,
) -> list[jax.Array]:
    """k_R and h_R of the P shards, whose q_R, k_R and h_R are given, and of the blocks of shards after them."""
    query, key, value = rows
    key = jnp.repeat(key, query.shape[-3] // key.shape[-3], axis=-3)  # values, h_R, are of query heads
    blocks = summarize(query, key, value, layout.coarse, scale=scale)
    block_value = blocks.value
    if layout.shard:
        U = layout.held.shape[1]
        mine = jnp.take(_pool(query, layout.coarse), jnp.asarray(layout.held)[rank], axis=-2)
        # As queries of positions their lse has a gradient. There are as many queries as positions, most for nothing.
        if U > q.shape[-2]:
            raise ValueError(f"query must have at least {U} positions on each of so many devices, got {q.shape[-2]}")
        few = jnp.zeros_like(q).at[..., :U, :].set(mine)
        part, lse = attention_of_one(few, k, v, _few_plan(q.shape[-2], U), scale=scale, return_lse=True)
        values, lses = gather(part[..., :U, :]), gather(lse[..., :U, None])[..., 0]
        merged = []
        for block in range(layout.coarse.region_count):
            parts = [(values[..., n, :], lses[..., n]) for n in np.flatnonzero(layout.held == block)]
            merged.append(functools.reduce(lambda a, b: merge(*a, *b), parts)[0])
        block_value = jnp.stack(merged, axis=-2)
    return [jnp.concatenate([key, blocks.key], axis=-2), jnp.concatenate([value, block_value], axis=-2)]


def _pool(query: Array, plan: Plan) -> jax.Array:
    """q_R of each region: k_R, where queries are the keys."""
    return summarize(query, query, query[..., :1], plan).key


@functools.lru_cache(maxsize=64)
def _few_plan(n: int, queries: int) -> Plan:
    """The first queries attend all positions, the others none."""
    return Plan.from_arrays(
        [0, 1],
        [(0, 0), (0, 1)],
        [],
        [(0, 1, queries, 0, 16), (0, 0, 0, 1, 0)],
        [(0, 1, n, -1)],
        [],
        [],
        length=n,
    )
