# SPDX-License-Identifier: Apache-2.0
"""From a function's arguments to its results: checks, and the call of the library."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ..arguments import as_integer
from ..plan import Plan
from ..problem import ATTEND, make_problem, plan_of, turned_shapes
from ..signatures import Terms
from .arrays import Array, Arrays, as_array, stand_in
from .call import AXES, Call
from .derivative import differentiable
from .partition import varying
from .patterns import Selected, whole_regions
from .plans import number_of

IntegerOrKey: TypeAlias = int | Array
Seed: TypeAlias = IntegerOrKey | None


class Static(NamedTuple):
    """The arguments that are no arrays: static when a function is traced."""

    stages: int
    wanted: tuple[str, ...]  # results that are returned, and differentiated
    pattern: Any
    is_causal: bool
    scale: float | None
    cu_seqlens: Any
    dropout_p: float = 0.0
    heads_last: bool = False
    softcap: float | None = None
    offset: int | None = None


def evaluate(static: Static, arrays: dict[str, Any], seed: Seed = None) -> Arrays:
    """The wanted results. Absent arrays are None."""
    given = {name: as_array(name, x) for name, x in arrays.items() if x is not None}
    if given["query"].ndim < 3:
        static = static._replace(heads_last=False)
    if static.heads_last:
        given = turn_regions(given)
    if "key_mask" in given:
        positions = given["query" if static.offset is None else "key"]
        given["key_mask"] = whole_key_mask(given["key_mask"], positions, static.heads_last)
    call = _call_of(static, given)
    if isinstance(static.pattern, Selected):
        given["selected"] = whole_regions(static.pattern, given["key"], static.heads_last, call.segments)
    if call.dropout_p:
        if seed is None:
            raise ValueError("seed must be given where dropout_p > 0, got None: jax.jit would keep one that is drawn")
        given["seed"] = seed_words(seed)
    given |= whole_terms(given, static.heads_last)
    without_heads = given["query"].ndim == 2
    if without_heads:
        given = {name: x if name in ("key_mask", "seed") else x[None] for name, x in given.items()}
    done = differentiable(call, vary_alike(given))
    if without_heads:
        return {name: x[0] for name, x in done.items()}
    return turn_regions(done) if static.heads_last else done


def turn_regions(arrays: Arrays) -> Arrays:
    """Arrays of regions with heads and regions exchanged: calls take them with heads first in both layouts."""
    names = [name for name, x in arrays.items() if AXES.get(name) == "HRD" and x.ndim > 2]
    return arrays | {name: arrays[name].swapaxes(-2, -3) for name in names}


def whole_key_mask(mask: jax.Array, positions: jax.Array, heads_last: bool) -> jax.Array:
    """The mask broadcast to a row of L for each batch entry. The core refuses a mask that does not broadcast.

    positions : a query or key, of all L positions."""
    if mask.dtype != bool:
        raise TypeError(
            f"key_mask must be bool, a jax.Array or a NumPy array, True for keys that take part, got {mask.dtype}"
        )
    if positions.ndim < 2:
        return mask
    L = positions.shape[-3 if heads_last else -2]
    whole = (*positions.shape[:-3], L)
    if mask.ndim == len(whole) + 2 and mask.shape[-3:-1] == (1, 1):  # axes of heads and queries
        mask = mask[..., 0, 0, :]
    own = (1,) * (len(whole) - mask.ndim) + mask.shape
    fits = len(own) == len(whole) and own[-1] == L and all(n in (1, m) for n, m in zip(own, whole, strict=True))
    return jnp.broadcast_to(mask, whole) if fits else mask


def whole_terms(given: Arrays, heads_last: bool) -> Arrays:
    """The terms of the logit with all leading axes of query and all heads, and a sink with a last axis of 1.

    JAX sums the gradients of what is broadcast here."""
    query, sink = given["query"], given.get("sink")
    if query.ndim < 3:
        return {} if sink is None else {"sink": sink.reshape(1)}
    lead, heads = query.shape[:-3], -2 if heads_last else -3
    Hq, Hk = query.shape[heads], given["key"].shape[heads]
    found = {} if sink is None else {"sink": jnp.broadcast_to(sink, (*lead, Hq))[..., None]}
    for name in ("key_bias", "region_bias", "summary_bias"):
        if (x := given.get(name)) is not None:
            own = Hq if x.shape[-2:-1] == (Hq,) else Hk
            found[name] = jnp.broadcast_to(x, (*lead, own, x.shape[-1]))
    return found


def _call_of(static: Static, given: Arrays) -> Call:
    """The call; the arrays are operands of the custom call. The core checks all arguments, on stand-ins for arrays."""
    refuse_traced(**static._asdict())
    pattern = static.pattern
    if isinstance(pattern, Selected):
        if static.offset is not None:
            raise ValueError(f"offset must be None with combiner.jax.Selected, got {static.offset}")
        pattern = pattern.of_none()
    at = {name: stand_in(x, static.heads_last and name in ("query", "key", "value")) for name, x in given.items()}
    region_key = at.get("summary_key" if static.stages == ATTEND else "region_key")
    region_bias = at.get("summary_bias" if static.stages == ATTEND else "region_bias")
    with turned_shapes() if static.heads_last else contextlib.nullcontext():
        problem = make_problem(
            static.stages, at["query"], at["key"], at["value"], pattern, static.is_causal, static.scale,
            at.get("key_mask"), static.cu_seqlens, "BHLD", at.get("region_query"), region_key, static.dropout_p, 0,
            at.get("summary_value"), Terms(static.softcap, at.get("key_bias"), region_bias, at.get("sink")),
            static.offset,
        )  # fmt: skip
    if problem.is_mixture and len(static.wanted) > 1:
        raise ValueError("return_lse must be False with a Mixture, whose components have a normaliser each")
    components = problem.plan if problem.is_mixture else (problem.plan,)
    selection: tuple[int, ...] = ()
    if isinstance(static.pattern, Selected):
        components = (plan_of(static.pattern.pattern, at["query"], problem.cu_seqlens, static.is_causal),)
        selection = static.pattern.block, static.pattern.open, static.pattern.rest
    plans = _flat([plan if isinstance(plan, tuple) else (plan,) for plan in components])
    dropout_p, _ = problem.dropout or (0.0, 0)
    return Call(
        stages=static.stages,
        wanted=static.wanted,
        plans=tuple(map(number_of, plans)),
        components=len(components),
        weighted=any(plan.weighted for plan in plans),
        regions=problem.region_count,
        scale=problem.scale,
        softcap=float(problem.softcap or 0),
        segments=() if problem.cu_seqlens is None else tuple(problem.cu_seqlens.tolist()),
        dropout_p=dropout_p,
        heads_last=static.heads_last,
        offset=-1 if problem.offset is None else problem.offset,
        selection=tuple(map(int, selection)),
    )


def _flat(components: list[tuple[Plan, ...]]) -> list[Plan]:
    """The plans of all components, as many of each: where one has plans for each head, those of others are repeated."""
    most = max(map(len, components))
    return [plan for own in components for plan in own for _ in range(most // len(own))]


def refuse_traced(**given: Any) -> None:
    """Refuses traced values of the arguments on whose value the call depends."""
    ways = {
        "is_causal": "make it a static argument of jit",
        "scale": "multiply query by it, and give scale=1.0",
        "softcap": "make it a static argument of jit",
        "offset": "make it a static argument of jit",
        "cu_seqlens": "the sequences' plans follow from it; make a tuple of it a static argument of jit",
        "dropout_p": "make it a static argument of jit",
    }
    for name, way in ways.items():
        if isinstance(given.get(name), jax.core.Tracer):
            raise TypeError(f"{name} must be known when the function is traced, got a traced array: {way}")


def seed_words(seed: Seed) -> jax.Array:
    """The seed as two words of 32 bits, the lower one first; a key of jax.random gives 64 bits drawn from it."""
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


def vary_alike(given: Arrays) -> Arrays:
    """All arrays as varying over the mesh axes that any of them varies over: JAX wants a call's operands alike."""
    every = frozenset[Any]().union(*map(varying, given.values()))
    missing = {name: tuple(every - varying(x)) for name, x in given.items()}
    return {name: jax.lax.pcast(x, missing[name], to="varying") if missing[name] else x for name, x in given.items()}
