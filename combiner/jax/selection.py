# SPDX-License-Identifier: Apache-2.0
"""The choice of regions: `combiner.select` of jax.Arrays."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy.typing as npt

from .. import selection
from ..arguments import as_integer, as_integers, choice_number
from ..composed import AnyPattern, block_bounds
from ..foreign_names import explains_foreign_names
from .arrays import Array, as_array
from .evaluate import refuse_traced, whole_key_mask
from .host import compute, integers


@explains_foreign_names
def select(
    query: Array,
    key: Array,
    pattern: AnyPattern,
    k: int,
    *,
    block: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    region_query: Array | None = None,
    region_key: Array | None = None,
    score: Literal["max", "mean"] = "max",
    causal_score: bool | None = None,
) -> jax.Array:
    """`combiner.select`: the k regions that score highest for each block of queries.

    ::

        regions = combiner.jax.select(query, key, pattern, 4, is_causal=True)
        out = combiner.jax.attention(query, key, value, combiner.jax.Selected(pattern, regions), is_causal=True)

    Parameters
    ----------
    query, key, key_mask, region_query, region_key : as in `combiner.select`; may be traced.
    pattern, k, block, is_causal, scale, cu_seqlens, score, causal_score : as there; static.

    Returns
    -------
    regions : `[..., Hk, T, k]` or `[T, k]`, int64, or int32 where JAX has no 64-bit types; as under
        jax.lax.stop_gradient.

    Raises
    ------
    TypeError, ValueError : as `combiner.select`; where arrays are traced, mostly XLA's error when the function runs.

    Notes
    -----
    Traced arrays go through jax.pure_callback, which gathers arrays that are divided over devices.
    """
    refuse_traced(is_causal=is_causal, scale=scale, cu_seqlens=cu_seqlens)
    count, size = as_integer("k", k, 0, bits=31), as_integer("block", block, 1)
    choice_number("score", score, selection.SCORES)
    optional = {"region_query": region_query, "region_key": region_key}
    given = {"query": as_array("query", query), "key": as_array("key", key)}
    given |= {name: as_array(name, x) for name, x in optional.items() if x is not None}
    if key_mask is not None:
        given["key_mask"] = whole_key_mask(as_array("key_mask", key_mask), given["query"], False)
    has_no_heads = given["query"].ndim == 2  # jax.vmap adds an axis, which would be read as that of heads
    if has_no_heads:
        given = {name: x if name == "key_mask" else x[None] for name, x in given.items()}

    def call(query: Any, key: Any, *others: Any) -> npt.NDArray[Any]:
        options = dict(zip(list(given)[2:], others, strict=True))
        return selection.select(
            query, key, pattern, count, block=size, is_causal=is_causal, scale=scale, cu_seqlens=cu_seqlens,
            score=score, causal_score=causal_score, **options,
        )  # fmt: skip

    def result(query: jax.Array, key: jax.Array, *_: jax.Array) -> jax.ShapeDtypeStruct:
        bounds = [0, key.shape[-2]] if cu_seqlens is None else as_integers("cu_seqlens", cu_seqlens).tolist()
        return integers((*key.shape[:-2], block_bounds(bounds, size)[-1], count))

    regions = compute(call, result, dict(given))
    return jnp.squeeze(regions, 0) if has_no_heads else regions
