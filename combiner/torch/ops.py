# SPDX-License-Identifier: Apache-2.0
"""The operators `combiner::attention` and `combiner::attention_backward`.

With them, their rules for autograd, torch.func, vmap and torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import Problem, Results
from ..patterns import Plans, Sparse
from ..problem import BOTH, KEEP_ALL, KEEP_SOFTMAX, make_problem, summed_terms
from ..signatures import Terms
from .library import library
from .pattern_text import pattern_of
from .tensors import as_array, as_tensor, at_least_float32


class _Given(NamedTuple):
    """The arguments that both operators take."""

    query: Tensor
    key: Tensor
    value: Tensor
    pattern: str
    clusters: Tensor | None
    is_causal: bool
    scale: float | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    region_query: Tensor | None
    region_key: Tensor | None
    dropout_p: float
    seed: Tensor | None
    softcap: float | None
    key_bias: Tensor | None
    region_bias: Tensor | None
    sink: Tensor | None
    regions: Tensor | None

    @property
    def has_choices(self) -> bool:
        """Whether the pattern is made of tensors, and its plans of this call alone."""
        return self.clusters is not None or self.regions is not None

    def problem(self) -> Problem:
        """The problem of these arguments, for the core."""
        pattern = pattern_of(self.pattern, as_array(self.clusters), as_array(self.regions))
        if self.has_choices and self.cu_seqlens is None:
            pattern = _Unkept(pattern)
        return make_problem(
            BOTH, as_array(self.query), as_array(self.key), as_array(self.value), pattern, self.is_causal, self.scale,
            as_array(self.key_mask), as_array(self.cu_seqlens), "BHLD", as_array(self.region_query),
            as_array(self.region_key), self.dropout_p, None if self.seed is None else int(self.seed) % 2**64,
            terms=Terms(self.softcap, as_array(self.key_bias), as_array(self.region_bias), as_array(self.sink)),
        )  # fmt: skip


@dataclass(frozen=True)
class _Unkept:
    """A pattern of tensors. The next call has other tensors, so that the cache of plans keeps none of its plans."""

    pattern: Any

    def plan(self, length: int, is_causal: bool) -> Plans:
        is_sparse = isinstance(self.pattern, Sparse)
        made: Plans = (self.pattern.pattern if is_sparse else self.pattern)._build(length, is_causal, is_sparse)
        return made


_DIFFERENTIABLE = ("query", "key", "value", "region_query", "region_key", "key_bias", "region_bias", "sink")
_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, str pattern, Tensor? clusters, bool is_causal, float? scale, "
    "Tensor? key_mask, Tensor? cu_seqlens, Tensor? region_query, Tensor? region_key, float dropout_p, Tensor? seed, "
    "float? softcap, Tensor? key_bias, Tensor? region_bias, Tensor? sink, Tensor? regions"
)


def _forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and each query's softmax state, which backward reads.

    A `Mixture` has no single softmax: its lse and state are zeros.
    """
    problem = _Given(*given).problem()
    if problem.is_mixture:
        mean = as_tensor(problem.forward().out)
        lse = mean.new_zeros(mean.shape[:-1], dtype=at_least_float32(mean.dtype))
        return mean, lse, lse.new_zeros(*lse.shape, 2)
    out, lse, softmax, *_ = problem.forward(None, True, KEEP_SOFTMAX)
    return as_tensor(out), as_tensor(lse), as_tensor(softmax)


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, softmax: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    """The gradients of the differentiable arguments, in the order of `_DIFFERENTIABLE`; tensors without elements for
    None.

    The regions' summaries are computed again, which takes 4 % (`Fixed`) to 18 % (`LogSparse`) of forward and backward
    together. They cannot be results of the forward operator: it is compiled for any length, and no symbolic shape
    expresses the number of regions. Kept, they would take the memory of out or several times that.
    """
    problem = _Given(*given).problem()
    if problem.is_mixture:
        gradients = problem.backward(problem.forward(None, False, KEEP_ALL), as_array(grad_out))
    else:
        results = Results((as_array(out), None, as_array(softmax), *problem.summarize()[3:]))
        gradients = problem.backward(results, as_array(grad_out), as_array(grad_lse))
    made = *gradients[:5], *summed_terms(problem, *gradients[6:])
    return tuple(grad_out.new_empty(0) if x is None else as_tensor(x) for x in made)


library.define(f"attention({_SCHEMA}) -> (Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
library.define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor softmax, {_SCHEMA}) "
    f"-> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})",
    tags=torch.Tag.pt2_compliant_tag,
)
library.impl("attention", _forward, "CPU")
library.impl("attention_backward", _backward, "CPU")
_attention = torch.ops.combiner.attention.default
_attention_backward = torch.ops.combiner.attention_backward.default


@torch.library.register_fake("combiner::attention", lib=library)
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = _Given(*given)
    lead = problem.query.shape[:-1]
    out = problem.query.new_empty(*lead, problem.value.shape[-1])
    lse = out.new_empty(lead, dtype=at_least_float32(out.dtype))
    return out, lse, lse.new_empty(*lead, 2)


@torch.library.register_fake("combiner::attention_backward", lib=library)
def _(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, softmax: Tensor, *given: Any) -> tuple[Tensor, ...]:
    problem = _Given(*given)._asdict()
    inputs = [problem[name] for name in _DIFFERENTIABLE]
    return tuple(grad_out.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, _, softmax = output
    ctx.mark_non_differentiable(softmax)
    ctx.save_for_backward(out, softmax, *(x if isinstance(x, Tensor) else None for x in inputs))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)
    problem = _Given(*inputs)
    if not problem.has_choices and not torch.compiler.is_compiling():  # guards of compiled code keep the pattern alive
        ctx.alive = pattern_of(problem.pattern)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    out, softmax, *tensors = ctx.saved_tensors
    given = [x if tensor is None else tensor for tensor, x in zip(tensors, ctx.others, strict=True)]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    made = _differentiable_attention_backward(grad_out, grad_lse, out, softmax, *given)
    of = dict(zip(_DIFFERENTIABLE, made, strict=True))
    problem = _Given(*given)._asdict()
    return tuple(None if x is None else of.get(name) for name, x in problem.items())


def refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "combiner's gradients can be taken once: there is no second derivative; take differences of gradients, "
        "(g(x + h * t) - g(x - h * t)) / (2 * h) in float64, for a Hessian's product with t"
    )


def refuse_forward_mode(ctx: Any, *tangents: Any) -> None:
    raise NotImplementedError(f"attention must have no tangents: {NO_FORWARD_MODE}")


NO_FORWARD_MODE = (
    "there is no forward-mode differentiation; take gradients in reverse mode (torch.func.vjp, jacrev), or "
    "differences, (f(x + h * t) - f(x - h * t)) / (2 * h) in float64"
)


torch.library.register_autograd("combiner::attention", _differentiate, setup_context=_save, lib=library)
torch.library.register_autograd("combiner::attention_backward", refuse_second_derivative, lib=library)


def _are_alike(problem: _Given, dims: dict[str, int | None]) -> bool:
    """Whether the regions of an entry, if there are any, have the leading axes and heads of its query."""
    axes = [
        x.ndim - (dims[name] is not None)
        for name, x in (("query", problem.query), ("regions", problem.regions))
        if x is not None
    ]
    return axes.count(axes[0]) == len(axes)


def _mapped(op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of vmap: the mapped axis becomes the first leading axis of one call, or each entry has its own call.

    Entries have their own calls where an entry's place in the batch matters: with dropout, with plans of each batch
    entry, and with mapped boundaries of sequences.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *given: Any) -> tuple[Any, Any]:
        others = len(given) - len(_Given._fields)  # the backward operator's arguments before these
        problem, dims = _Given(*given[others:]), dict(zip(_Given._fields, in_dims[others:], strict=True))
        is_value = problem.clusters is None and problem.pattern[0].isalpha() and _are_alike(problem, dims)
        made: Any
        if is_value and problem.seed is None and dims["cu_seqlens"] is None:
            has_no_heads = problem.query.ndim - (dims["query"] is not None) == 2
            names = (*[""] * others, *_Given._fields)
            whole = []
            for name, x, dim in zip(names, given, in_dims, strict=True):
                if isinstance(x, Tensor) and name != "cu_seqlens":
                    x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                    x = x.unsqueeze(1) if has_no_heads and name != "key_mask" else x
                whole.append(x)
            made = [x.squeeze(1) if has_no_heads and x.ndim > 1 else x for x in op(*whole)]
        else:
            each = []
            for n in range(info.batch_size):
                pairs = zip(given, in_dims, strict=True)
                each.append(op(*(x if dim is None else x.select(dim, n) for x, dim in pairs)))
            made = [torch.stack(x) for x in zip(*each, strict=True)]
        # A gradient without elements is not mapped.
        return tuple(made), tuple(0 if x.ndim > 1 or len(x) == info.batch_size else None for x in made)

    return rule


torch.library.register_vmap("combiner::attention", _mapped(_attention), lib=library)
torch.library.register_vmap("combiner::attention_backward", _mapped(_attention_backward), lib=library)


def _transformable(op: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """A function that calls the operator, under torch.func's transforms through an autograd Function: they ignore
    `register_autograd`."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*given: Any) -> Any:
            return op(*given)

    def call(*given: Any) -> Any:
        is_transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        return Function.apply(*given) if is_transformed else op(*given)

    rules = {"setup_context": save, "backward": backward, "jvp": refuse_forward_mode, "vmap": _mapped(call)}
    for name, rule in rules.items():
        setattr(Function, name, staticmethod(rule))
    return call


differentiable_attention = _transformable(_attention, _save, _differentiate)
_differentiable_attention_backward = _transformable(
    _attention_backward, lambda ctx, inputs, output: None, refuse_second_derivative
)
