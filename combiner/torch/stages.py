# SPDX-License-Identifier: Apache-2.0
"""The two stages as autograd functions. torch.compile calls them as Python: no symbolic shape expresses the number of
regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import functional
from .ops import refuse_forward_mode, refuse_second_derivative
from .patterns import Choices, with_choices
from .tensors import as_array, as_tensor


def in_arrays(pattern: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pattern and the options as functions of NumPy arrays take them."""
    arrays = {name: as_array(x) if isinstance(x, Tensor) else x for name, x in options.items()}
    choices = Choices(*(options[name] for name in Choices._fields))
    if any(x is not None for x in choices):
        pattern = with_choices(pattern, choices).as_numpy()
    return pattern, {name: x for name, x in arrays.items() if name not in Choices._fields}


def _stage(forward: Callable[..., Any], backward: Callable[..., Any], differentiable: int) -> Callable[..., Any]:
    """A stage of arrays as a stage of tensors with rules for autograd and torch.func.

    Parameters
    ----------
    forward : (pattern, options, *arrays) -> (results, saved); an absent array is None.
    backward : (saved, *gradients of the results) -> gradients of the arrays.
    differentiable : the number of results that are differentiable; they come first.
    """

    class Stage(torch.autograd.Function):
        @staticmethod
        def forward(pattern: Any, options: dict[str, Any], *given: Tensor | None) -> tuple[Any, ...]:
            made, saved = forward(*in_arrays(pattern, options), *map(as_array, given))
            return *(None if x is None else as_tensor(x) for x in made), saved

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            ctx.pattern, ctx.options, *given = inputs
            *made, ctx.saved = output
            ctx.save_for_backward(*given, *made)
            ctx.mark_non_differentiable(*(x for x in made[differentiable:] if x is not None))
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            count = len(grads) - 1  # the last result is `saved`
            given = ctx.saved_tensors[:-count]
            return None, None, *Gradient.apply(ctx.pattern, ctx.options, ctx.saved, count, *grads[:-1], *given)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(pattern: Any, options: dict[str, Any], saved: Any, count: int, *given: Any) -> tuple[Any, ...]:
            grads, arrays = given[:count], given[count:]
            if saved is None:  # vmap hands over tensors alone
                _, saved = forward(*in_arrays(pattern, options), *map(as_array, arrays))
            return tuple(None if x is None else as_tensor(x) for x in backward(saved, *map(as_array, grads)))

        setup_context = staticmethod(lambda ctx, inputs, output: None)
        backward = staticmethod(refuse_second_derivative)

    for function in (Stage, Gradient):
        for name, rule in {"jvp": refuse_forward_mode, "vmap": _entry_by_entry(function.apply)}.items():
            setattr(function, name, staticmethod(rule))
    return lambda *given: Stage.apply(*given)[:-1]


def _entry_by_entry(function: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """A vmap rule that calls the function once for each entry."""

    def entry(x: Any, dim: Any, n: int) -> Any:
        if isinstance(x, dict):
            return {name: entry(each, dim[name], n) for name, each in x.items()}
        return x.select(dim, n) if isinstance(x, Tensor) and dim is not None else x

    def rule(info: Any, in_dims: Sequence[Any], *given: Any) -> tuple[Any, Any]:
        each = [function(*map(entry, given, in_dims, [n] * len(given))) for n in range(info.batch_size)]
        made = tuple(torch.stack(x) if isinstance(x[0], Tensor) else None for x in zip(*each, strict=True))
        return made, tuple(None if x is None else 0 for x in made)

    return rule


def _summarize_forward(pattern: Any, options: dict[str, Any], *given: Any) -> tuple[Any, Any]:
    q, k, v, *rest = given
    names = ("region_query", "region_key", "key_bias", "region_bias")
    options = options | dict(zip(names, rest, strict=True))
    summary, saved = functional.summarize_forward(q, k, v, pattern, **options)
    return (summary.key, summary.value, summary.bias, summary.lse), saved


def _summarize_backward(saved: Any, grad_key: Any, grad_value: Any, grad_bias: Any, _: Any) -> Any:
    return functional.summarize_backward(grad_key, grad_value, saved, grad_summary_bias=grad_bias)[:-1]


def _attend_forward(pattern: Any, options: dict[str, Any], *given: Any) -> tuple[Any, Any]:
    q, k, v, region_key, region_value, *terms = given
    options = options | dict(zip(("key_bias", "region_bias", "sink"), terms, strict=True))
    _, saved = functional.attend_forward(q, k, v, region_key, region_value, pattern, **options)
    return (saved["out"], saved["lse"]), saved


def _attend_backward(saved: Any, grad_out: Any, grad_lse: Any) -> Any:
    grad_out = np.zeros_like(saved["out"]) if grad_out is None else grad_out
    return functional.attend_backward(grad_out, saved, grad_lse=grad_lse)


summarize = _stage(_summarize_forward, _summarize_backward, differentiable=3)
attend = _stage(_attend_forward, _attend_backward, differentiable=2)
