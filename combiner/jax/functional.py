# SPDX-License-Identifier: Apache-2.0
"""The functions of `combiner`, of jax.Arrays."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
import numpy.typing as npt

from .. import functional
from ..arguments import check_merged
from ..composed import AnyPattern
from ..foreign_names import explains_foreign_names
from ..problem import ATTEND, BOTH, SUMMARIZE, is_turned
from ..signatures import AttendOptions, AttentionOptions, Layout
from .arrays import Array, as_array, stand_in
from .evaluate import IntegerOrKey, Seed, Static, evaluate, whole_key_mask
from .patterns import Selected


class Summary(NamedTuple):
    """The summaries of a plan's regions, as in `combiner.Summary`. lse is under jax.lax.stop_gradient."""

    key: jax.Array
    value: jax.Array
    lse: jax.Array
    bias: jax.Array | None = None


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern | Selected,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions[Array, IntegerOrKey]],
) -> jax.Array: ...
@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern | Selected,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions[Array, IntegerOrKey]],
) -> tuple[jax.Array, jax.Array]: ...
@explains_foreign_names
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern | Selected,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    layout: Layout = "BHLD",
    region_query: Array | None = None,
    region_key: Array | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`combiner.attention`: each query's softmax over its direct keys and, as one key each, its regions (eq 7, 9).

    Parameters
    ----------
    query, key, value : `[..., Hq, L, D]`, `[..., Hk, L, D]`, `[..., Hk, L, Dv]`, or `[L, D]`, `[L, D]`, `[L, Dv]`.
    pattern : as in `combiner.attention`, or a `Selected` of an array.
    is_causal, region_query, region_key, return_lse : as in `combiner.attention`.
    scale, cu_seqlens : as there, and not traced: the sequences' plans follow from cu_seqlens.
    key_mask : as there: bool `[..., L]`, or a mask that broadcasts to it: `[L]`, `[..., 1, 1, L]`.
    layout : "BHLD", or "BLHD" where query, key, value, region_query, region_key and out have heads after positions or
        regions. lse is `[..., Hq, L]` in both.
    dropout_p : the probability of zeroing a weight, as there.
    softcap : as there, and not traced.
    key_bias, region_bias, sink : as there, of the dtype of lse.
    seed : needed where dropout_p > 0; may be traced. An integer, which drops the weights that it drops in `combiner`,
        or a key of jax.random, from which 64 bits are drawn. Backward drops the same weights.

    Returns
    -------
    out : `[..., Hq, L, Dv]`; zeros for a query with nothing to attend to.
    lse : `[..., Hq, L]` if `return_lse`.

    Raises
    ------
    TypeError, ValueError : an argument, named, of a wrong kind, dtype, shape or value, when the function is traced.
    """
    arrays = {"query": query, "key": key, "value": value, "key_mask": key_mask}
    arrays |= {"region_query": region_query, "region_key": region_key}
    arrays |= {"key_bias": key_bias, "region_bias": region_bias, "sink": sink}
    wanted = ("out", "lse") if return_lse else ("out",)
    static = Static(BOTH, wanted, pattern, is_causal, scale, cu_seqlens, dropout_p, is_turned(layout), softcap)
    done = evaluate(static, arrays, seed)
    return (done["out"], done["lse"]) if return_lse else done["out"]


@explains_foreign_names
def summarize(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern | Selected,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    layout: Layout = "BHLD",
    region_query: Array | None = None,
    region_key: Array | None = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
) -> Summary:
    """`combiner.summarize`: stage 1 alone, each region's abstraction (section 3.2) and local expectation (eq 7).

    Parameters and errors are those of `attention`. Shapes are those of `combiner.Summary`; with ``layout="BLHD"``
    `[..., R, heads, features]`.
    """
    arrays = {"query": query, "key": key, "value": value, "key_mask": key_mask}
    arrays |= {"region_query": region_query, "region_key": region_key}
    arrays |= {"key_bias": key_bias, "region_bias": region_bias}
    wanted: tuple[str, ...] = ("summary_key", "summary_value", "summary_lse")
    wanted += () if key_bias is None and region_bias is None else ("summary_bias",)
    static = Static(SUMMARIZE, wanted, pattern, is_causal, scale, cu_seqlens, 0.0, is_turned(layout), softcap)
    done = evaluate(static, arrays)
    lse = jax.lax.stop_gradient(done["summary_lse"])
    return Summary(done["summary_key"], done["summary_value"], lse, done.get("summary_bias"))


@overload
def attend(
    query: Array,
    key: Array,
    value: Array,
    region_key: Array,
    region_value: Array,
    pattern: AnyPattern | Selected,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttendOptions[Array, IntegerOrKey]],
) -> jax.Array: ...
@overload
def attend(
    query: Array,
    key: Array,
    value: Array,
    region_key: Array,
    region_value: Array,
    pattern: AnyPattern | Selected,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttendOptions[Array, IntegerOrKey]],
) -> tuple[jax.Array, jax.Array]: ...
@explains_foreign_names
def attend(
    query: Array,
    key: Array,
    value: Array,
    region_key: Array,
    region_value: Array,
    pattern: AnyPattern | Selected,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    layout: Layout = "BHLD",
    dropout_p: float = 0.0,
    seed: Seed = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
    offset: int | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`combiner.attend`: stage 2 alone, one softmax of each query over its direct keys and given regions (eq 7, 9).

    Parameters
    ----------
    region_key : `[..., Hk, R, D]` or `[..., Hq, R, D]`: k_R, as in ``Summary.key``.
    region_value : `[..., Hq, R, Dv]`: h_R, as in ``Summary.value``.
    region_bias : `[..., Hk, R]` or `[..., Hq, R]`: b_R, as in ``Summary.bias``.
    offset : as in `combiner.attend`: the position of the first row of query, which may have fewer rows than key.
        Static.
    query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, layout, dropout_p, seed, softcap, key_bias,
        sink, return_lse : as in `attention`.

    Returns
    -------
    out, lse : as `attention`; lse if ``return_lse``.
    """
    arrays = {"query": query, "key": key, "value": value, "key_mask": key_mask}
    arrays["summary_key"] = as_array("region_key", region_key)
    arrays["summary_value"] = as_array("region_value", region_value)
    arrays |= {"key_bias": key_bias, "summary_bias": region_bias, "sink": sink}
    wanted = ("out", "lse") if return_lse else ("out",)
    heads_last = is_turned(layout)
    static = Static(ATTEND, wanted, pattern, is_causal, scale, cu_seqlens, dropout_p, heads_last, softcap, offset)
    done = evaluate(static, arrays, seed)
    return (done["out"], done["lse"]) if return_lse else done["out"]


@explains_foreign_names
def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[jax.Array, jax.Array]:
    """`combiner.merge`: (out, lse) of one softmax over two sets of parts, from the results over each.

    Parameters
    ----------
    out_a, out_b : `[..., Dv]`, the same shape and dtype.
    lse_a, lse_b : `[...]`, the same shape without the last axis, float64 for float64, else float32; -inf where nothing
        was attended.
    """
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    given = {name: as_array(name, x) for name, x in given.items()}
    out_a, lse_a, out_b, lse_b = given.values()
    wide = jnp.promote_types(out_a.dtype, jnp.float32)
    for name, x in given.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be of floating point, got {x.dtype}")
    check_merged(wide, **given)
    highest = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    highest = jnp.where(highest == -jnp.inf, 0, highest)  # where neither side attends to anything
    share_a, share_b = jnp.exp(lse_a - highest), jnp.exp(lse_b - highest)
    total = share_a + share_b
    some = jnp.where(total == 0, 1, total)
    out = (share_a / some)[..., None] * out_a.astype(wide) + (share_b / some)[..., None] * out_b.astype(wide)
    return out.astype(out_a.dtype), jnp.where(total == 0, -jnp.inf, highest + jnp.log(some))


@explains_foreign_names
def attention_weights(
    query: Array,
    key: Array,
    pattern: AnyPattern | Selected,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    layout: Layout = "BHLD",
    region_query: Array | None = None,
    region_key: Array | None = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
) -> jax.Array:
    """`combiner.attention_weights`: how much of each position's value is in each query's output (eq 8).

    Parameters and errors are those of `attention`, which is called with the identity for values, 512 columns at a time.

    Returns
    -------
    W : `[..., Hq, L, L]` in either layout (`[L, L]` for `[L, D]` inputs)
    """
    query, key = as_array("query", query), as_array("key", key)
    has_heads_last = is_turned(layout) and query.ndim > 2
    L = query.shape[-3 if has_heads_last else -2] if query.ndim > 1 else 0
    columns = []
    for first in range(0, max(L, 1), 512):
        identity = jnp.eye(L, min(512, max(L - first, 1)), -first, key.dtype)
        value = jnp.broadcast_to(
            identity[:, None] if has_heads_last else identity, (*key.shape[:-1], identity.shape[1])
        )
        options: AttentionOptions[Array, IntegerOrKey] = {
            "is_causal": is_causal,
            "scale": scale,
            "key_mask": key_mask,
        }
        options |= {"cu_seqlens": cu_seqlens, "layout": layout, "region_query": region_query, "region_key": region_key}
        options |= {"softcap": softcap, "key_bias": key_bias, "region_bias": region_bias, "sink": sink}
        columns.append(attention(query, key, value, pattern, **options))
    weights = jnp.concatenate(columns, axis=-1)[..., :L]
    return weights.swapaxes(-2, -3) if has_heads_last else weights


@explains_foreign_names
def workspace_bytes(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern | Selected,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    layout: Layout = "BHLD",
    region_query: Array | None = None,
    region_key: Array | None = None,
    region_value: Array | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
    offset: int | None = None,
    backward: bool = False,
) -> int:
    """`combiner.workspace_bytes`: the bytes that a call takes beside plan and results. Nothing is computed.

    Parameters and errors are those of `combiner.workspace_bytes`. Arrays may be traced: only shapes and dtypes count.
    """
    arrays = {"query": query, "key": key, "value": value}
    arrays |= {"region_query": region_query, "region_key": region_key, "region_value": region_value}
    given = {name: as_array(name, x) for name, x in arrays.items() if x is not None}
    has_heads_last = is_turned(layout) and given["query"].ndim > 2
    at: dict[str, Any] = {name: stand_in(x, has_heads_last) for name, x in given.items()}
    terms = {"key_bias": key_bias, "region_bias": region_bias, "sink": sink}
    at |= {name: stand_in(as_array(name, x), False) for name, x in terms.items() if x is not None}
    if key_mask is not None:
        whole = whole_key_mask(as_array("key_mask", key_mask), given["key"], has_heads_last)
        at["key_mask"] = stand_in(whole, False)
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "cu_seqlens": cu_seqlens, "dropout_p": dropout_p}
    options |= {"softcap": softcap, "offset": offset, "backward": backward}
    return functional.workspace_bytes(pattern=pattern, **at, **options)
