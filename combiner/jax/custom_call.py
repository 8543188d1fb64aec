# SPDX-License-Identifier: Apache-2.0
"""The library's custom calls of XLA: operands, results, attributes, and how calls are divided between devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _core
from .arrays import Arrays, Shape
from .call import NUMBERS, Call, by_heads, own_axes, results_of
from .partition import HEADS, KEY_HEADS, Label, Labels, Starts, partitioned, type_alike, type_results


class _Operation(NamedTuple):
    """A custom call without its operands."""

    target: str
    call: Call
    operands: tuple[str, ...]
    results: tuple[str, ...]
    batch_axes: int  # leading axes of the call itself; jax.vmap adds axes before them


@functools.cache  # once
def register() -> None:
    """Registers the custom calls with XLA.

    Raises
    ------
    RuntimeError : a JAX that takes no such calls.
    """
    jax.devices("cpu")  # starts XLA's CPU backend, which would fail to start after a registration that it refuses
    try:
        for name, capsule in _core.xla_targets().items():
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except RuntimeError as error:
        raise RuntimeError(f"JAX {jax.__version__} refuses combiner's custom calls: {error}") from error


def invoke(target: str, call: Call, arrays: Arrays, results: tuple[str, ...]) -> Arrays:
    """The named results of one custom call."""
    operation = _Operation(target, call, tuple(arrays), results, arrays["query"].ndim - 3)
    register()
    done = _custom_call(operation, *arrays.values())
    return dict(zip(results, done, strict=True))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _custom_call(operation: _Operation, *operands: jax.Array) -> Sequence[jax.Array]:
    """The results of a custom call, which XLA divides between devices. jax.vmap adds one leading axis."""

    @jax.custom_batching.custom_vmap
    def call(*operands: jax.Array) -> Sequence[jax.Array]:
        return _divided(operation, *operands)

    @call.def_vmap
    def call_of_entries(size: int, is_mapped: list[bool], *operands: jax.Array) -> Any:
        each = (
            x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, mapped in zip(operands, is_mapped, strict=True)
        )
        return _custom_call(operation, *each), [True] * len(operation.results)

    return call(*operands)


def _call_part(operation: _Operation, operands: Sequence[jax.Array], starts: Starts) -> Sequence[jax.Array]:
    """A custom call of all batch entries and heads, or of those that begin at `starts`."""
    call, arrays = operation.call, dict(zip(operation.operands, operands, strict=True))
    query = arrays["query"]
    mapped = query.ndim - 3 - operation.batch_axes
    if "seed" in arrays:  # followed by the numbers of the part's first batch entry and head
        batch = math.prod(query.shape[mapped + 1 : -3])  # batch entries below an index of the first batch axis
        first = starts.get(mapped, 0) * batch if operation.batch_axes else 0
        words = [jnp.asarray(x, jnp.uint32) for x in (first, starts.get(HEADS, 0))]
        seed = arrays["seed"]
        arrays["seed"] = jnp.concatenate([seed, jnp.broadcast_to(jnp.stack(words), seed.shape)], axis=-1)
    numbers = [NUMBERS[name] for name in (*operation.operands, *operation.results)]
    return jax.ffi.ffi_call(operation.target, _result_types(operation, operands))(
        *arrays.values(),
        arrays=np.array(numbers, np.int64),
        batch=np.int64(math.prod(query.shape[mapped:-3])),
        stages=np.int64(call.stages),
        heads_last=np.int64(call.heads_last),
        components=np.int64(call.components),
        offset=np.int64(call.offset),
        plans=np.array(call.plans, np.int64),
        segments=np.array(call.segments, np.int64),
        selection=np.array(call.selection, np.int64),
        scale=np.float64(call.scale),
        softcap=np.float64(call.softcap),
        dropout_p=np.float64(call.dropout_p),
    )


def _labels(operation: _Operation, shapes: Sequence[Shape]) -> list[Labels]:
    """The label of every axis, for `partition`. Leading axes without a label are not divided:

    - where each batch entry and head has its own plan, all but jax.vmap's, since the list of plans is not divided;
    - with dropout, those after the first batch axis, since a part numbers its batch entries from its first one.
    """
    call = operation.call
    *leading, Hq, _, _ = by_heads(call, shapes[operation.operands.index("query")])
    mapped = len(leading) - operation.batch_axes
    has_own_plans = len(call.plans) > call.components * max(1, len(call.segments) - 1)
    divided = mapped if has_own_plans else mapped + 1 if call.dropout_p else len(leading)
    axes = tuple(n if n < divided else None for n in range(len(leading)))
    labels: list[Labels] = []
    for name, shape in zip((*operation.operands, *operation.results), shapes, strict=True):
        own = own_axes(call, name)
        of_own: list[Label] = [None] * len(own)
        if "H" in own and not has_own_plans:
            heads = own.index("H") - len(own)
            of_own[heads] = HEADS if shape[heads] == Hq else KEY_HEADS
        labels.append((*axes[: len(shape) - len(own)], *of_own))
    return labels


_divided = partitioned(_call_part, _labels)


def _result_types(operation: _Operation, operands: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    """The types of an operation's results; a gradient has its operand's type."""
    arrays = dict(zip(operation.operands, operands, strict=True))
    if operation.target == "combiner_backward":
        return [type_alike(arrays[name.removeprefix("grad_")]) for name in operation.results]
    every = results_of(operation.call, True, arrays)
    results = [every[name] for name in operation.results]
    shapes = [x.shape for x in operands] + [x.shape for x in results]
    return type_results(results, operands, _labels(operation, shapes))
