# SPDX-License-Identifier: Apache-2.0
"""A call with its derivative, exact and in reverse mode. Second derivatives and forward mode are errors."""

from __future__ import annotations

import functools
from typing import Any

import jax

from ..problem import ATTEND
from .arrays import Arrays
from .call import Call, results_of
from .custom_call import invoke


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(call: Call, arrays: Arrays) -> Arrays:
    done = _forward(call, False, arrays)
    return {name: done[name] for name in call.wanted}


def _run_forward(call: Call, arrays: Arrays) -> tuple[Arrays, Arrays]:
    done = _forward(call, True, arrays)
    unread = ("lse", "summary_lse", "out" if call.components > 1 else "")
    saved = {name: x for name, x in done.items() if name not in unread}
    return {name: done[name] for name in call.wanted}, {**arrays, **saved}


def _run_backward(call: Call, saved: Arrays, gradients: Arrays) -> tuple[dict[str, jax.Array | None]]:
    inputs = [name for name in saved if name not in results_of(call, True, saved)]
    gradients = {f"grad_{name}": x for name, x in gradients.items() if name != "summary_lse"}
    done = _backward(call, {**saved, **gradients})
    return ({name: done.get(f"grad_{name}") for name in inputs},)


_run.defvjp(_run_forward, _run_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(call: Call, for_backward: bool, arrays: Arrays) -> Arrays:
    return invoke("combiner_forward", call, arrays, tuple(results_of(call, for_backward, arrays)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(call: Call, arrays: Arrays) -> Arrays:
    names = ["query", "key", "value", "key_bias", "sink"]
    of_regions = ["region_query", "region_key", "region_bias"]
    names += ["summary_key", "summary_value", "summary_bias"] if call.stages == ATTEND else of_regions
    return invoke("combiner_backward", call, arrays, tuple(f"grad_{name}" for name in names if name in arrays))


@_forward.defjvp
@_backward.defjvp
def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "combiner.jax has first derivatives only, in reverse mode, neither grad of grad nor jax.hessian: "
        "jax.nn.dot_product_attention has second ones, of dense attention"
    )


def differentiable(call: Call, arrays: Arrays) -> Arrays:
    """The wanted results of a call.

    Raises
    ------
    TypeError : where a forward-mode derivative is taken.
    NotImplementedError : where a second derivative is taken.
    """
    try:
        return _run(call, arrays)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "combiner.jax has no forward-mode derivatives (jax.jvp, jax.jacfwd, jax.linearize): take them in reverse "
            "mode, by jax.grad, jax.vjp or jax.jacrev"
        ) from None
