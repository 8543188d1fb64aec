# SPDX-License-Identifier: Apache-2.0
"""Combiner attention in JAX, on CPUs: the functions of `combiner` under the same names, for jit, grad and vmap.

Ren et al., NeurIPS 2021 (arXiv 2107.05768). Letters: Hq query heads, Hk key / value heads, L positions, D features of
query and key, Dv of value, R regions of the plan. What every function here has in common:

- Arrays are jax.Arrays or NumPy arrays, shaped and typed as in `combiner`: `[..., heads, L, features]` or
  `[L, features]`. What is no array is static, fixed when a function is traced. Patterns hash by value (`Routing` by
  identity), so that they may be static arguments of jax.jit, or be closed over, without tracing anew.
- First derivatives, in reverse mode: jax.grad, jax.vjp, jax.checkpoint. Forward mode raises TypeError, a second
  derivative NotImplementedError.
- XLA calls the C library on its own buffers, without a copy, and lends it the threads of its pool, at most
  ``combiner.get_num_threads()``. Where jaxlib takes no such custom call, or the environment has COMBINER_JAX=callback,
  jax.pure_callback does the same, slower.
- Under jax.vmap each entry is computed as if alone, dropout included, in one call where its batch can hold them all.
  jax.shard_map divides a call between devices, over batch and heads (before JAX 0.10 with check_vma=False); without
  it every device computes all of it.
- TypeError, ValueError: as in `combiner`, when a function is traced. Memory that runs out later is an error of XLA's,
  a JaxRuntimeError or ValueError that begins with RESOURCE_EXHAUSTED.
- A plan that was traced is kept for the rest of the process, as a compiled function may always run again: one for each
  pattern, length and direction. It is known by its contents: what jax.export or a cache on disk has brought from
  another process runs once the same attention has been traced in this one, and is an error before.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from . import _core, calls
from .calls import ATTEND, BOTH, SUMMARIZE, Inputs
from .patterns import AnyPattern, Mixture
from .plan import Plan, as_integer

Array: TypeAlias = jax.Array | npt.NDArray[Any]
Arrays: TypeAlias = dict[str, jax.Array]
Seed: TypeAlias = int | Array | None


class AttendOptions(TypedDict, total=False):
    """What `attend` takes by name, with the defaults that it says."""

    is_causal: bool
    scale: float | None
    key_mask: Array | None
    cu_seqlens: npt.ArrayLike | None
    dropout_p: float
    seed: Seed


class AttentionOptions(AttendOptions, total=False):
    """What `attention` takes by name, with the defaults that it says."""

    region_query: Array | None
    region_key: Array | None


class Summary(NamedTuple):
    """What stage 1 makes of the regions, as `combiner.Summary`. lse has no gradient, as under jax.lax.stop_gradient."""

    key: jax.Array
    value: jax.Array
    lse: jax.Array


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> jax.Array: ...
@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[jax.Array, jax.Array]: ...
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    region_query: Array | None = None,
    region_key: Array | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`combiner.attention`: each query's softmax over its direct keys and, as one key each, its regions (eq 7, 9).

    Parameters
    ----------
    query, key, value : `[..., Hq, L, D]`, `[..., Hk, L, D]`, `[..., Hk, L, Dv]`, or `[L, D]`, `[L, D]`, `[L, Dv]`.
    pattern, is_causal, scale, key_mask, region_query, region_key, return_lse : as in `combiner.attention`.
    cu_seqlens : as there, and not traced: the sequences' plans follow from it.
    dropout_p : the share of weights that become 0, as there.
    seed : needed where dropout_p > 0; may be traced. An integer, with which the same weights fall as in `combiner`, or
        a key of jax.random, from which 64 bits are drawn. Backward has the same weights.

    Returns
    -------
    out : `[..., Hq, L, Dv]`; zeros for a query with nothing to attend to.
    lse : `[..., Hq, L]` if `return_lse`.
    """
    arrays = {"query": query, "key": key, "value": value, "key_mask": key_mask}
    arrays |= {"region_query": region_query, "region_key": region_key}
    wanted = ("out", "lse") if return_lse else ("out",)
    fixed = _Fixed(BOTH, wanted, pattern, is_causal, scale, cu_seqlens, dropout_p)
    done = _evaluate(fixed, arrays, seed)
    return (done["out"], done["lse"]) if return_lse else done["out"]


def summarize(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    region_query: Array | None = None,
    region_key: Array | None = None,
) -> Summary:
    """`combiner.summarize`: stage 1 alone, each region's abstraction and local expectation (section 3.3, eq 6).

    Parameters as in `attention`; shapes of the summary as in `combiner.Summary`.
    """
    arrays = {"query": query, "key": key, "value": value, "key_mask": key_mask}
    arrays |= {"region_query": region_query, "region_key": region_key}
    wanted = "summary_key", "summary_value", "summary_lse"
    done = _evaluate(_Fixed(SUMMARIZE, wanted, pattern, is_causal, scale, cu_seqlens), arrays)
    return Summary(done["summary_key"], done["summary_value"], jax.lax.stop_gradient(done["summary_lse"]))


@overload
def attend(
    query: Array,
    key: Array,
    value: Array,
    region_key: Array,
    region_value: Array,
    pattern: AnyPattern,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttendOptions],
) -> jax.Array: ...
@overload
def attend(
    query: Array,
    key: Array,
    value: Array,
    region_key: Array,
    region_value: Array,
    pattern: AnyPattern,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttendOptions],
) -> tuple[jax.Array, jax.Array]: ...
def attend(
    query: Array,
    key: Array,
    value: Array,
    region_key: Array,
    region_value: Array,
    pattern: AnyPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`combiner.attend`: stage 2 alone, each query's one softmax over its direct keys and the regions given (eq 7, 9).

    Parameters
    ----------
    region_key : `[..., Hk, R, D]` or `[..., Hq, R, D]`: k_R, as in ``Summary.key``.
    region_value : `[..., Hq, R, Dv]`: h_R, as in ``Summary.value``.
    query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, dropout_p, seed, return_lse : as in `attention`.

    Returns
    -------
    out, or (out, lse), as `attention`.
    """
    arrays = {"query": query, "key": key, "value": value, "key_mask": key_mask}
    arrays["summary_key"] = _as_array("region_key", region_key)
    arrays["summary_value"] = _as_array("region_value", region_value)
    wanted = ("out", "lse") if return_lse else ("out",)
    done = _evaluate(_Fixed(ATTEND, wanted, pattern, is_causal, scale, cu_seqlens, dropout_p), arrays, seed)
    return (done["out"], done["lse"]) if return_lse else done["out"]


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[jax.Array, jax.Array]:
    """`combiner.merge`: one softmax over two sets of parts, from the results over each: (out, lse).

    Parameters
    ----------
    out_a, out_b : `[..., Dv]`, the same shape and dtype.
    lse_a, lse_b : `[...]`, the same shape without the last axis, float64 for float64, else float32; -inf where nothing
        was attended.
    """
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    given = {name: _as_array(name, x) for name, x in given.items()}
    out_a, lse_a, out_b, lse_b = given.values()
    wide = jnp.promote_types(out_a.dtype, jnp.float32)
    for name, x in given.items():
        dtype = out_a.dtype if name.startswith("out") else wide
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be of floating point, got {x.dtype}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} like out_a, got {x.dtype}")
        shape = out_a.shape if name.startswith("out") else out_a.shape[:-1]
        if x.shape != shape or not out_a.ndim:
            raise ValueError(f"{name} must have shape {shape if out_a.ndim else '(..., Dv)'}, got {x.shape}")
    highest = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    highest = jnp.where(highest == -jnp.inf, 0, highest)  # where neither side attends to anything
    share_a, share_b = jnp.exp(lse_a - highest), jnp.exp(lse_b - highest)
    total = share_a + share_b
    some = jnp.where(total == 0, 1, total)
    out = (share_a / some)[..., None] * out_a.astype(wide) + (share_b / some)[..., None] * out_b.astype(wide)
    return out.astype(out_a.dtype), jnp.where(total == 0, -jnp.inf, highest + jnp.log(some))


def attention_fn(pattern: AnyPattern, *, is_causal: bool = False) -> Callable[..., jax.Array]:
    """`attention` for Flax: the `attention_fn` of linen.MultiHeadDotProductAttention and nnx.MultiHeadAttention.

    Arrays are Flax's `[batch..., L, heads, features]`, and are not transposed. What cannot be had of a factorization
    raises.

    Parameters
    ----------
    pattern, is_causal : as in `attention`. nnx's own `is_causal` counts too.

    Returns
    -------
    A function of (query, key, value) that takes by name, as Flax hands them over:

    mask : None, or bool `[batch..., 1, 1, L]`, True for keys that take part. Causality is `is_causal`, not a mask.
    dropout_rate, dropout_rng, deterministic : dropout of the attention weights; the key is needed where there is any.
    broadcast_dropout : must be False where there is dropout: each batch entry and head has its own.
    dtype : what the arrays are cast to.
    precision : any: products are computed as by Precision.HIGHEST.
    bias, module, qk_attn_weights_einsum, attn_weights_value_einsum : must be None.
    """
    always_causal = is_causal

    def attend_heads_last(
        query: Array,
        key: Array,
        value: Array,
        bias: None = None,
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
            "bias": (bias, "weights are those of a factorization"),
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
        if dropout_p and broadcast_dropout:
            raise ValueError("broadcast_dropout must be False where there is dropout, got True")
        arrays = {name: _as_array(name, x) for name, x in (("query", query), ("key", key), ("value", value))}
        if query.ndim < 3:
            raise ValueError(f"query must have shape (batch..., L, heads, D), got {query.shape}")
        if dtype is not None:
            arrays = {name: x.astype(dtype) for name, x in arrays.items()}
        if mask is not None:
            arrays["key_mask"] = _key_mask(mask, query.shape)
        causal = always_causal or is_causal
        fixed = _Fixed(BOTH, ("out",), pattern, causal, None, None, dropout_p, heads_last=True)
        return _evaluate(fixed, arrays, dropout_rng)["out"]

    return attend_heads_last


def _key_mask(mask: Array, shape: tuple[int, ...]) -> jax.Array:
    """Flax's mask as `[batch..., L]`, for a query `[batch..., L, heads, D]`."""
    mask = _as_array("mask", mask)
    if mask.dtype != bool:
        raise TypeError(f"mask must be bool, True for keys that take part, got {mask.dtype}")
    *batch, L = shape[:-2]
    if mask.ndim != len(shape) or mask.shape[-3:] != (1, 1, L):
        raise ValueError(
            f"mask must be of keys alone, {(*batch, 1, 1, L)}, got {mask.shape}: a factorization has no L x L mask"
        )
    return jnp.broadcast_to(mask[..., 0, 0, :], (*batch, L))


# ---- arguments ---------------------------------------------------------------------------------------


class _Fixed(NamedTuple):
    """The arguments that are not arrays."""

    stages: int
    wanted: tuple[str, ...]  # the results asked for, and differentiated
    pattern: Any
    is_causal: bool
    scale: float | None
    cu_seqlens: Any
    dropout_p: float = 0.0
    heads_last: bool = False


@dataclass(frozen=True)
class _Call:
    """One call of the library, but for its arrays."""

    stages: int
    wanted: tuple[str, ...]
    plans: tuple[int, ...]  # by `_digest`
    weighted: bool
    regions: int  # R
    scale: float
    segments: tuple[int, ...]  # empty for one sequence
    dropout_p: float
    dropout_rows: tuple[int, ...]
    heads_last: bool  # positions are [..., L, heads, features]


def _evaluate(fixed: _Fixed, arrays: dict[str, Any], seed: Seed = None) -> Arrays:
    """The wanted results: of the one call, or the mean of a mixture's. Arrays may be None."""
    given = {name: _as_array(name, x) for name, x in arrays.items() if x is not None}
    parts = _components(fixed, given)
    if parts[0][0].dropout_p:
        if seed is None:
            raise ValueError("seed must be given where dropout_p > 0, got None: jax.jit would keep one that is drawn")
        given["seed"] = _seed_words(seed)
    without_heads = given["query"].ndim == 2
    if without_heads:
        given = {name: x if name in ("key_mask", "seed") else x[None] for name, x in given.items()}
    given = _vary_alike(given)
    done = [_run(call, _take_regions(given, regions)) for call, regions in parts]
    mean = {name: _mean([each[name] for each in done]) for name in done[0]}
    return {name: x[0] for name, x in mean.items()} if without_heads else mean


def _mean(each: list[jax.Array]) -> jax.Array:
    """Of 16-bit numbers summed in float32."""
    if len(each) == 1:
        return each[0]
    wide = jnp.promote_types(each[0].dtype, jnp.float32)
    total = functools.reduce(jnp.add, (x.astype(wide) for x in each))
    return (total / len(each)).astype(each[0].dtype)


def _take_regions(given: Arrays, regions: calls.Regions) -> Arrays:
    return {name: x[..., regions, :] if name.startswith("region") else x for name, x in given.items()}


def _components(fixed: _Fixed, given: Arrays) -> list[tuple[_Call, calls.Regions]]:
    """The calls, each with its part of the region axis. The core checks all arguments, as in NumPy, on stand-ins."""
    if isinstance(fixed.cu_seqlens, jax.core.Tracer):
        raise TypeError("cu_seqlens must be known when the function is traced, got a traced array")
    at = {name: _stand_in(x, fixed.heads_last and name in ("query", "key", "value")) for name, x in given.items()}
    region_key = at.get("summary_key" if fixed.stages == ATTEND else "region_key")
    inputs = Inputs(
        at["query"], at["key"], at["value"], fixed.pattern, fixed.is_causal, fixed.scale, at.get("key_mask"),
        fixed.cu_seqlens, at.get("region_query"), region_key, calls.dropout(fixed.dropout_p, 0),
    )  # fmt: skip
    parts: list[tuple[Inputs, calls.Regions]]
    if isinstance(fixed.pattern, Mixture) and fixed.stages == BOTH:
        if len(fixed.wanted) > 1:
            raise ValueError("return_lse must be False with a Mixture, whose components have a normaliser each")
        parts, _ = calls.components(inputs)
    else:
        parts = [(calls.single(inputs), slice(None))]
    made = []
    for part, regions in parts:
        plan, scale, R = _core.check(fixed.stages, *part, at.get("summary_value"))
        plans = plan if isinstance(plan, tuple) else (plan,)
        rows = part.dropout and part.dropout[2]
        call = _Call(
            stages=fixed.stages,
            wanted=fixed.wanted,
            plans=tuple(map(_digest, plans)),
            weighted=bool(plans) and plans[0].weighted,
            regions=R,
            scale=scale,
            segments=() if part.cu_seqlens is None else tuple(part.cu_seqlens.tolist()),
            dropout_p=part.dropout[0] if part.dropout else 0.0,
            dropout_rows=() if rows is None else tuple(rows.tolist()),
            heads_last=fixed.heads_last,
        )
        made.append((call, regions))
    return made


def _as_array(name: str, x: object) -> jax.Array:
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be a jax.Array or a NumPy array, got {type(x).__name__}")
    return jnp.asarray(x)


def _stand_in(x: jax.Array, swapped: bool) -> npt.NDArray[Any]:
    """An array of the same shape and dtype that takes no memory."""
    like = np.broadcast_to(np.zeros((), x.dtype), x.shape)
    return like.swapaxes(-2, -3) if swapped and x.ndim > 2 else like


def _seed_words(seed: Seed) -> jax.Array:
    """Two words of 32 bits, the lower first."""
    if not isinstance(seed, jax.Array | np.ndarray):
        number = as_integer("seed", seed, 0, bits=64)
        return jnp.array([number & 0xFFFFFFFF, number >> 32], jnp.uint32)
    is_key = jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    if (is_key and not seed.ndim) or (seed.dtype == np.uint32 and seed.shape == (2,)):  # new-style and old-style keys
        return jax.random.bits(seed, (2,), jnp.uint32)
    if is_key or seed.ndim or not jnp.issubdtype(seed.dtype, jnp.integer):
        raise TypeError(f"seed must be an integer or one key of jax.random, got {seed.dtype} of shape {seed.shape}")
    high = seed >> 32 if seed.dtype.itemsize == 8 else jnp.zeros((), jnp.uint32)
    return jnp.stack([seed.astype(jnp.uint32), high.astype(jnp.uint32)])


def _varying(x: jax.Array) -> frozenset[Any]:
    """Within jax.shard_map: the mesh axes over which x varies, where JAX tells them (check_vma)."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)  # from JAX 0.10 on
    return frozenset() if kind is None else kind.varying


def _vary_alike(given: Arrays) -> Arrays:
    """All arrays as varying over the mesh axes over which any of them does, as JAX wants a call's operands."""
    every = frozenset[Any]().union(*map(_varying, given.values()))
    missing = {name: tuple(every - _varying(x)) for name, x in given.items()}
    return {name: jax.lax.pcast(x, missing[name], to="varying") if missing[name] else x for name, x in given.items()}


_plans: dict[int, Plan] = {}  # all that were traced, by digest


@functools.lru_cache(maxsize=256)
def _digest(plan: Plan) -> int:
    """A number that follows from the plan's contents, under which it is kept from now on."""
    arrays = plan.arrays
    names = "length", "region_count", "scratch_count", "is_causal", "size_bias", "weighted", "pooling"
    flags = [getattr(plan, name) for name in names]
    digest = hashlib.blake2b(repr((flags, [x.shape for x in arrays.values()])).encode(), digest_size=8)
    for x in arrays.values():
        digest.update(x.tobytes())
    number = int.from_bytes(digest.digest(), "little", signed=True)
    if number not in _plans:
        _core.xla_keep_plan(number, plan)
        _plans[number] = plan
    return number


# ---- differentiation ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(call: _Call, arrays: Arrays) -> Arrays:
    done = _forward(call, False, arrays)
    return {name: done[name] for name in call.wanted}


def _run_forward(call: _Call, arrays: Arrays) -> tuple[Arrays, Arrays]:
    done = _forward(call, True, arrays)
    return {name: done[name] for name in call.wanted}, {**arrays, **done}


def _run_backward(call: _Call, saved: Arrays, gradients: Arrays) -> tuple[dict[str, jax.Array | None]]:
    inputs = [name for name in saved if name not in _results(call, True, saved)]
    gradients = {f"grad_{name}": x for name, x in gradients.items() if name != "summary_lse"}
    done = _backward(call, {**saved, **gradients})
    return ({name: done.get(f"grad_{name}") for name in inputs},)


_run.defvjp(_run_forward, _run_backward)


def _results(call: _Call, for_backward: bool, arrays: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    """What a forward call writes."""
    query, value = arrays["query"], arrays["value"]
    (*lead, Hq, L), Dv, R = _by_heads(call, query)[:-1], value.shape[-1], call.regions
    key_heads = _by_heads(call, arrays["key"])[-3]
    if "region_key" in arrays:
        key_heads = arrays["region_key"].shape[-3]
    elif call.weighted:
        key_heads = Hq
    shapes: dict[str, tuple[int, ...]] = {}
    if call.stages & ATTEND:
        shapes |= {"out": (*query.shape[:-1], Dv), "lse": (*lead, Hq, L)}
    if call.stages == SUMMARIZE or (call.stages == BOTH and for_backward and call.weighted):
        shapes["summary_key"] = (*lead, key_heads, R, query.shape[-1])
    if call.stages == SUMMARIZE or (call.stages == BOTH and for_backward):
        shapes |= {"summary_value": (*lead, Hq, R, Dv), "summary_lse": (*lead, Hq, R)}
    return {name: _like(query, shape, name.endswith("lse")) for name, shape in shapes.items()}


def _by_heads(call: _Call, x: jax.Array) -> tuple[int, ...]:
    """The shape as [..., heads, L, features]."""
    *lead, a, b, features = x.shape
    return (*lead, b, a, features) if call.heads_last else x.shape


def _like(x: jax.Array, shape: tuple[int, ...], is_lse: bool) -> jax.ShapeDtypeStruct:
    dtype = jnp.promote_types(x.dtype, jnp.float32) if is_lse else x.dtype
    if not _varying(x):
        return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]
    kind = jax.typeof(x)
    sharding = NamedSharding(kind.sharding.mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=kind.manual_axis_type)  # type: ignore[no-untyped-call]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(call: _Call, for_backward: bool, arrays: Arrays) -> Arrays:
    return _invoke("combiner_forward", call, arrays, _results(call, for_backward, arrays))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(call: _Call, arrays: Arrays) -> Arrays:
    names = ["query", "key", "value"]
    names += ["summary_key", "summary_value"] if call.stages == ATTEND else ["region_query", "region_key"]
    results = {f"grad_{name}": _like(arrays[name], arrays[name].shape, False) for name in names if name in arrays}
    return _invoke("combiner_backward", call, arrays, results)


@_forward.defjvp
@_backward.defjvp
def _refuse(*_: Any) -> Any:
    raise NotImplementedError("combiner.jax has first derivatives only, in reverse mode")


# ---- calls -------------------------------------------------------------------------------------------

# The arrays of a custom call, as numbered in _xla.c.
_ARRAYS = (
    "query", "key", "value", "key_mask", "seed", "region_query", "region_key", "summary_key", "summary_value",
    "summary_lse", "out", "lse", "grad_out", "grad_lse", "grad_summary_key", "grad_summary_value", "grad_query",
    "grad_key", "grad_value", "grad_region_query", "grad_region_key",
)  # fmt: skip
_OF_POSITIONS = "query", "key", "value", "out"
_GRADIENTS = "query", "key", "value", "region_query", "region_key", "summary_key", "summary_value"


@functools.cache
def _takes_custom_calls() -> bool:
    """Whether XLA takes the library's custom calls. Asked once its CPU backend is there: it refuses at once then, and
    would fail to start otherwise."""
    wanted = os.environ.get("COMBINER_JAX", "")
    if wanted not in ("", "callback"):
        raise ValueError(f"COMBINER_JAX must be 'callback' or not set, got {wanted!r}")
    if wanted:
        return False
    try:
        jax.devices("cpu")
        for name, capsule in _core.xla_targets().items():
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except RuntimeError as error:
        warnings.warn(
            f"JAX {jax.__version__} takes no custom calls of combiner; jax.pure_callback stands in, slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _invoke(target: str, call: _Call, arrays: Arrays, results: dict[str, jax.ShapeDtypeStruct]) -> Arrays:
    """One call of the library as XLA will make it."""
    shapes = list(results.values())
    if not _takes_custom_calls():
        done = jax.pure_callback(
            _host_call(target, call, tuple(arrays), tuple(results)), shapes, *arrays.values(), vmap_method="sequential"
        )
    else:
        done = jax.ffi.ffi_call(target, shapes, vmap_method="broadcast_all")(
            *arrays.values(),
            arrays=np.array([_ARRAYS.index(name) for name in (*arrays, *results)], np.int64),
            batch=np.int64(math.prod(arrays["query"].shape[:-3])),
            stages=np.int64(call.stages),
            heads_last=np.int64(call.heads_last),
            plans=np.array(call.plans, np.int64),
            segments=np.array(call.segments, np.int64),
            scale=np.float64(call.scale),
            dropout_p=np.float64(call.dropout_p),
            dropout_rows=np.array(call.dropout_rows, np.int64),
        )
    return dict(zip(results, done, strict=True))


@functools.lru_cache(maxsize=256)
def _host_call(target: str, call: _Call, names: tuple[str, ...], wanted: tuple[str, ...]) -> Callable[..., Any]:
    """The same function for the same call, for which JAX compiles it once."""
    return functools.partial(_on_host, target, call, names, wanted)


def _on_host(
    target: str, call: _Call, names: tuple[str, ...], wanted: tuple[str, ...], *given: Any
) -> list[npt.NDArray[Any]]:
    """A call through the binding: the arrays given by `names` in, those `wanted` out."""

    def by_heads(name: str, x: Any) -> Any:
        return x.swapaxes(-2, -3) if call.heads_last and name.removeprefix("grad_") in _OF_POSITIONS else x

    at = {name: by_heads(name, np.asarray(x)) for name, x in zip(names, given, strict=True)}
    plans = tuple(_plans[number] for number in call.plans)
    dropout = None
    if "seed" in at:
        low, high = at["seed"].tolist()
        rows = np.array(call.dropout_rows, np.int64) if call.dropout_rows else None
        dropout = call.dropout_p, high << 32 | low, rows
    problem = (
        call.stages, at["query"], at["key"], at["value"], plans[0] if len(plans) == 1 and not call.segments else plans,
    )  # fmt: skip
    masks = at.get("key_mask"), np.array(call.segments, np.int64) if call.segments else None
    regions = at.get("region_query"), at.get("region_key")
    if target == "combiner_forward":
        if call.stages == ATTEND:
            regions = None, at["summary_key"]
        kept = call.stages == BOTH and "summary_value" in wanted
        *results, _, _ = _core.forward(
            *problem, False, call.scale, *masks, *regions, dropout, at.get("summary_value"), None, False, kept
        )
        done = dict(zip(("out", "lse", "summary_key", "summary_value", "summary_lse"), results, strict=True))
    else:
        rest = (at.get(name) for name in _ARRAYS[_ARRAYS.index("summary_key") : _ARRAYS.index("grad_query")])
        gradients = _core.backward(*problem, call.scale, *masks, *regions, dropout, *(*rest, None))  # type: ignore[arg-type]
        done = dict(zip((f"grad_{name}" for name in _GRADIENTS), gradients, strict=True))
    return [by_heads(name, done[name]) for name in wanted]
