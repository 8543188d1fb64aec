# SPDX-License-Identifier: Apache-2.0
"""`attention` as Flax's attention modules call it, and Flax's masks read as causality and a mask of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ..alibi import alibi_slopes
from ..arguments import check_bool
from ..composed import AnyPattern
from ..problem import BOTH
from .arrays import Array, Shape, as_array
from .evaluate import Static, evaluate


def attention_fn(
    pattern: AnyPattern,
    *,
    is_causal: bool = False,
    softcap: float | None = None,
    key_bias: Array | None = None,
    sink: Array | None = None,
    alibi: bool = False,
) -> Callable[..., jax.Array]:
    """`attention` for Flax: the `attention_fn` of linen.MultiHeadDotProductAttention and nnx.MultiHeadAttention.

    Arrays are Flax's `[batch..., L, heads, features]`, and are not transposed.

    Parameters
    ----------
    pattern, is_causal, softcap : as in `attention`. A call is causal too where nnx gives `is_causal`.
    key_bias : `[batch..., heads, L]`, as in `attention`, or what broadcasts to it: one bias of each key for all calls.
    sink : `[heads]`, as in `attention`. It may be a parameter of the module that makes the function, such as
        ``self.param("sink", nn.initializers.zeros, (heads,))``, and then has a gradient.
    alibi : True adds the biases of ALiBi (`combiner.alibi_bias`), which are of causal calls without a sink.

    Returns
    -------
    attention : a function of (query, key, value) and Flax's keyword arguments, which are:

    mask : None, or a mask of keys `[batch..., 1, 1, L]`, or a mask of pairs `[batch..., 1, L, L]`, as
        nn.make_causal_mask, nn.make_attention_mask and nn.combine_masks make them: bool, or numbers that are not 0 for
        pairs that take part. A mask of pairs must be causal, of padding, or both, the same for all heads, and known
        when the function is traced: under jit give ``is_causal=True`` and a mask of keys. The output of queries that
        are padding is unspecified.
    dropout_rate, dropout_rng, deterministic : dropout of the attention weights, which needs the key.
    broadcast_dropout : ignored. Each batch entry and head drops its own weights; Flax's True shares them to save random
        numbers.
    dtype : cast of the arrays: float32, float64, bfloat16 or float16.
    precision : ignored. Products are as exact as with Precision.HIGHEST.
    bias : None, or a bias of keys `[batch..., heads, 1, L]`, or what broadcasts to it, in place of key_bias.
    module, qk_attn_weights_einsum, attn_weights_value_einsum : must be None.

    Raises
    ------
    TypeError, ValueError : as `attention`; a mask that is not causal, of padding, or both; a bias of pairs, two biases,
        ALiBi beside a sink or in a call that is not causal; cross-attention; ``decode=True``, in place of which there
        is `combiner.Decoder`.

    Notes
    -----
    Biases and the sink are cast to the dtype of lse: float32 at least.
    """
    check_bool("alibi", alibi)
    if alibi and key_bias is not None:
        raise ValueError("key_bias must be None where alibi is True: add combiner.alibi_bias to it")
    if alibi and sink is not None:
        raise ValueError(
            "sink must be None where alibi is True: the sink has no distance, so that the query's part of the biases "
            "would not cancel"
        )
    always_causal = is_causal

    def attend_heads_last(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: None = None,
        is_causal: bool = False,
        qk_attn_weights_einsum: None = None,
        attn_weights_value_einsum: None = None,
    ) -> jax.Array:
        refused = {
            "module": (module, "there are no weights to sow; combiner.attention_weights computes them"),
            "qk_attn_weights_einsum": (qk_attn_weights_einsum, "there is no such product"),
            "attn_weights_value_einsum": (attn_weights_value_einsum, "there is no such product"),
        }
        for name, (argument, reason) in refused.items():
            if argument is not None:
                raise ValueError(f"{name} must be None: {reason}")
        dropout_p = 0.0 if deterministic else dropout_rate
        if dropout_p and dropout_rng is None:
            raise ValueError("dropout_rng must be given where there is dropout, got None")
        arrays = {name: as_array(name, x) for name, x in (("query", query), ("key", key), ("value", value))}
        for name, x in arrays.items():
            if x.ndim < 3:
                raise ValueError(f"{name} must have shape (batch..., L, heads, features), got {x.shape}")
        _check_one_sequence(arrays["query"].shape[-3], arrays["key"].shape[-3])
        if dtype is not None:
            arrays = {name: x.astype(_real_dtype(dtype)) for name, x in arrays.items()}
        causal = always_causal or is_causal
        if mask is not None:
            mask_is_causal, arrays["key_mask"] = _split_flax_mask(mask, arrays["query"].shape)
            causal = causal or mask_is_causal
        if alibi and not causal:
            raise ValueError("is_causal must be True where alibi is: other queries would prefer later keys")
        *_, L, heads, _ = arrays["query"].shape
        own = alibi_slopes(heads)[:, None] * np.arange(L) if alibi else key_bias
        if bias is not None:
            if own is not None:
                raise ValueError("bias must be None where attention_fn was given key_bias or alibi, got one more")
            own = _keys_of_flax_bias(bias, arrays["query"].shape)
        wide = jnp.promote_types(arrays["query"].dtype, jnp.float32)
        terms = {"key_bias": own, "sink": sink}
        arrays |= {name: as_array(name, x).astype(wide) for name, x in terms.items() if x is not None}
        static = Static(BOTH, ("out",), pattern, causal, None, None, dropout_p, heads_last=True, softcap=softcap)
        return evaluate(static, arrays, dropout_rng)["out"]

    return attend_heads_last


def _check_one_sequence(queries: int, keys: int) -> None:
    if queries == 1 < keys:
        raise ValueError(
            f"query must be of all {keys} positions, got 1: there is no decoding with a cache (decode=True) here; call "
            "the module with decode=False on the whole text, or generate with combiner.Decoder"
        )
    if queries != keys:
        raise ValueError(f"query and key must be of one sequence, got lengths {queries} and {keys}: no cross-attention")


def _real_dtype(dtype: Any) -> np.dtype[Any]:
    kind = jnp.dtype(dtype)
    if kind not in map(jnp.dtype, (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)):
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {kind}")
    return kind


def _keys_of_flax_bias(bias: Array, shape: Shape) -> jax.Array:
    """The biases of keys `[batch..., heads, L]` of Flax's bias, which all queries must share."""
    *batch, L, heads, _ = shape
    whole = as_array("bias", bias)
    if whole.ndim < 2 or whole.shape[-2] != 1:
        raise ValueError(
            f"bias must be None or of keys alone, {(*batch, heads, 1, L)}, got {whole.shape}: a region has one key for "
            "all queries, so that a bias of pairs has no place"
        )
    return whole[..., 0, :]


def _split_flax_mask(mask: Array, shape: Shape) -> tuple[bool, jax.Array]:
    """Whether Flax's mask is causal, and its mask of keys `[batch..., L]`, for a query `[batch..., L, heads, D]`."""
    *batch, L, heads, _ = shape
    mask = _as_flax_mask(mask, (*batch, heads, L, L))
    is_of_heads, is_of_queries = mask.shape[-3] > 1, mask.shape[-2] > 1
    if isinstance(mask, jax.core.Tracer) and (is_of_heads or is_of_queries):
        raise ValueError(
            f"mask must be of keys alone, {(*batch, 1, 1, L)}, where it is traced, as under jit, got {mask.shape}: in "
            "place of a causal mask give is_causal=True to combiner.jax.attention_fn, and of a mask of padding the row "
            "of a query that is no padding, of the last one mask[:, :, -1:]"
        )
    if is_of_heads and (mask != mask[..., :1, :, :]).any():
        raise ValueError("mask must be the same for all heads: give plans, one for each batch entry and key head")
    mask = mask[..., 0, :, :]
    split = split_mask(np.asarray(mask)) if is_of_queries else (False, mask[..., 0, :])
    if split is None:
        raise ValueError(
            f"mask must be causal, of padding, or both, got another, of shape {mask.shape}: make a pattern of it, by "
            "combiner.Plan.from_mask, for combiner.jax.attention_fn"
        )
    is_causal, keys = split
    return is_causal, jnp.broadcast_to(keys, (*batch, L))


def _as_flax_mask(mask: Array, whole: Shape) -> Array:
    """The mask as bool, with all axes of `whole`, `[batch..., heads, L, L]`, each of its size or 1."""
    if not isinstance(mask, jax.Array | np.ndarray):
        raise TypeError(f"mask must be a jax.Array or a NumPy array, got {type(mask).__name__}")
    if not isinstance(mask, jax.core.Tracer):
        mask = np.asarray(mask)  # under jit too, where what JAX computes would be traced
    is_real = jnp.issubdtype(mask.dtype, jnp.integer) or jnp.issubdtype(mask.dtype, jnp.floating)
    if not (is_real or mask.dtype == bool):
        raise TypeError(f"mask must be bool, or of numbers that are not 0 for what takes part, got {mask.dtype}")
    shape = (1,) * (len(whole) - mask.ndim) + mask.shape
    fits = len(shape) == len(whole) and shape[-1] == whole[-1]
    if not fits or any(n not in (1, m) for n, m in zip(shape, whole, strict=True)):
        *batch, _, _, L = whole
        raise ValueError(f"mask must have shape {(*batch, 1, 1, L)} or {(*batch, 1, L, L)}, got {mask.shape}")
    return (mask if mask.dtype == bool else mask != 0).reshape(shape)


def split_mask(mask: npt.NDArray[Any]) -> tuple[bool, npt.NDArray[Any]] | None:
    """Reads a mask of pairs as causality and a mask of keys; None if the mask is not the product of these two.

    A query without any True, such as padding, fits both.

    Parameters
    ----------
    mask : bool `[..., L, L]`, of query and key; True for pairs that take part.

    Returns
    -------
    is_causal : True where query i sees the keys up to i, False where it sees all keys, and where both hold.
    keys : bool `[..., L]`, the keys that take part.

    Notes
    -----
    Time and memory O(size of the mask).
    """
    keys: npt.NDArray[Any] = np.any(mask, axis=-2)
    seen: npt.NDArray[Any] = np.any(mask, axis=-1, keepdims=True) & keys[..., None, :]
    if np.array_equal(mask, seen):
        return False, keys
    seen &= np.tri(mask.shape[-1], dtype=bool)
    return (True, keys) if np.array_equal(mask, seen) else None
