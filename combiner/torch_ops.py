# SPDX-License-Identifier: Apache-2.0
"""What `combiner.torch` has of functions: operators on tensors, and the two stages.

`attention` is `combiner.attention` of tensors, as an operator that PyTorch's transformations know. Letters as in
`combiner.functional`. What every function here has in common, beyond what is said there:

- Tensors are on the CPU, float32, float64, bfloat16 or float16, never mixed. They are read where they are, whatever
  their strides, as long as the last axis is contiguous, and results are handed over as the library made them. bfloat16
  needs the package ml_dtypes.
- Under ``torch.autocast("cpu")`` they are cast to its dtype first, but for float64.
- Gradients are the library's: exact, in reverse mode, once. Second derivatives, forward mode and ``torch.func.grad``
  are errors.
- Threads are combiner's, not PyTorch's: ``combiner.set_num_threads``.
- What is wrong with shapes the library says, compiled code when it runs.
"""

from __future__ import annotations

import ast
import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

import combiner

from . import calls
from .patterns import AnyPattern, Axial, AxialMixture, Dense, Fixed, LogSparse, Mixture, Sparse, Tree
from .plan import Array, Pooling, as_integer

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ---- tensors and arrays, of one memory


def as_array(x: Tensor | None) -> Any:
    """The array that a tensor is; NumPy has no bfloat16 of its own."""
    if x is None:
        return None
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.detach().view(torch.int16).numpy(force=True).view(ml_dtypes.bfloat16)
    return x.numpy(force=True)


def as_tensor(x: Array) -> Tensor:
    """The tensor that an array is."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


# ---- patterns as text: operators take tensors, numbers and strings


@dataclass(frozen=True, eq=False)
class Routing:
    """`combiner.Routing` of a tensor, whose clusters may change from call to call of what torch.compile compiled.

    Parameters
    ----------
    clusters : int64 `[L]`, or `[..., Hk, L]` with a set for each batch entry and key head; not copied.
    pooling, size_bias : as in `combiner.Routing`.
    """

    clusters: Tensor
    pooling: Pooling = "max"
    size_bias: bool = False


# The patterns that are their parameters, and the names of these.
_VALUES: dict[type, list[str]] = {
    cls: [each.name for each in fields(cls)] for cls in (Axial, AxialMixture, Dense, Fixed, LogSparse, Tree)
}
_others: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # patterns that are no values, by number
_numbers: dict[int, int] = {}  # theirs, by id
_next_number = itertools.count().__next__


def _text(pattern: object) -> str:
    """What `_pattern` reads: patterns that are values spelled out, good in any process; the numbers of others."""
    match pattern:
        case Routing():
            return f"Routing(pooling={pattern.pooling!r}, size_bias={pattern.size_bias!r})"
        case Sparse() if _is_value(pattern):
            return f"{_text(pattern.pattern)}.sparse()"
        case Mixture() if _is_value(pattern):
            return f"Mixture({', '.join([_text(each) for each in pattern.patterns])})"
        case tuple():
            return f"({' '.join([_number(each) for each in pattern])})"
    if not _is_value(pattern):
        return _number(pattern)
    values = [f"{name}={_constant(getattr(pattern, name))!r}" for name in _VALUES[type(pattern)]]
    return f"{type(pattern).__name__}({', '.join(values)})"


def _is_value(pattern: object) -> bool:
    if isinstance(pattern, Mixture):
        return all([_is_value(each) for each in pattern.patterns])
    return _is_value(pattern.pattern) if isinstance(pattern, Sparse) else type(pattern) in _VALUES


def _constant(x: object) -> object:
    """x, of which torch.compile may have made a symbol."""
    return operator.index(x) if isinstance(x, int) and not isinstance(x, bool) else x


@torch.compiler.assume_constant_result  # compiled code is of one object: with another it is compiled anew
def _number(pattern: object) -> str:
    """The number of an object, by which it is found as long as it lives."""
    if id(pattern) not in _numbers:
        number = _next_number()
        try:
            _others[number] = pattern
        except TypeError:
            kind = type(pattern).__name__
            raise TypeError(f"pattern must be a pattern such as combiner.Fixed() or a Plan, got {kind}") from None
        _numbers[id(pattern)] = number
        weakref.finalize(pattern, _numbers.pop, id(pattern), None).atexit = False
    return str(_numbers[id(pattern)])


def _pattern(text: str, clusters: Tensor | None = None) -> Any:
    """The pattern of a text; clusters are a `Routing`'s."""
    if clusters is not None:
        return _read(text, Routing=partial(combiner.Routing, as_array(clusters)))
    if text[:1].isalpha():
        return _value(text)
    found = [_others.get(int(number)) for number in text.strip("()").split()]
    if any(each is None for each in found):
        raise RuntimeError(f"pattern must be alive and of this process, got a text of another: {text}")
    return tuple(found) if text.startswith("(") else found[0]


@lru_cache(maxsize=64)
def _value(text: str) -> Any:
    return _read(text, Mixture=Mixture, **{cls.__name__: cls for cls in _VALUES})


def _read(text: str, **names: Callable[..., Any]) -> Any:
    def read(node: ast.expr) -> Any:
        match node:
            case ast.Call(ast.Name(name), args, keywords) if name in names:
                return names[name](*map(read, args), **{str(each.arg): read(each.value) for each in keywords})
            case ast.Call(ast.Attribute(of, "sparse"), [], []):
                return read(of).sparse()
        return ast.literal_eval(node)

    return read(ast.parse(text, mode="eval").body)


# ---- the operators of attention


class _Problem(NamedTuple):
    """What both operators are given."""

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

    def inputs(self) -> tuple[Array, Array, Array, Any]:
        """query, key, value and pattern as `combiner.attention` takes them."""
        pattern = _pattern(self.pattern, self.clusters)
        if self.clusters is not None and self.cu_seqlens is None:  # pattern.plan would keep the plan
            pattern = pattern._build(self.clusters.shape[-1], self.is_causal, False)
        return as_array(self.query), as_array(self.key), as_array(self.value), pattern

    def options(self) -> dict[str, Any]:
        """What both stages take by name."""
        return {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "key_mask": as_array(self.key_mask),
            "cu_seqlens": as_array(self.cu_seqlens),
            "region_query": as_array(self.region_query),
            "region_key": as_array(self.region_key),
        }

    def dropout(self) -> dict[str, Any]:
        """What stage 2 takes too."""
        return {"dropout_p": self.dropout_p, "seed": None if self.seed is None else int(self.seed) % 2**64}


_DIFFERENTIABLE = ("query", "key", "value", "region_query", "region_key")
_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, str pattern, Tensor? clusters, bool is_causal, float? scale, "
    "Tensor? key_mask, Tensor? cu_seqlens, Tensor? region_query, Tensor? region_key, float dropout_p, Tensor? seed"
)


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    """out and lse; with a `Mixture`, which has none, zeros."""
    problem = _Problem(*given)
    inputs, options = problem.inputs(), problem.options() | problem.dropout()
    if isinstance(inputs[3], Mixture):
        mean = as_tensor(combiner.attention(*inputs, **options))
        return mean, mean.new_zeros(mean.shape[:-1], dtype=_at_least_float32(mean.dtype))
    out, lse = combiner.attention(*inputs, return_lse=True, **options)
    return as_tensor(out), as_tensor(lse)


def _backward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *given: Any) -> list[Tensor]:
    """The gradients of query, key, value and, where these are given, region_query and region_key.

    The summaries of the regions are made again. They cannot be results of the forward operator: how many there are
    depends on pattern and length in ways that no symbolic shape says, and it is to be compiled for any length. Kept,
    they would take as much memory as out, or several times as much; made again, they cost 4 % (`Fixed`) to 18 %
    (`LogSparse`) of forward and backward together.
    """
    problem = _Problem(*given)
    inputs, options, dropout = problem.inputs(), problem.options(), problem.dropout()
    if isinstance(inputs[3], Mixture):
        grad_lse = None
        _, saved = combiner.attention_forward(*inputs, **(options | dropout))
    else:
        _, saved = combiner.summarize_forward(*inputs, **options)
        saved |= {"function": "attention_forward", "dropout": calls.dropout(**dropout)}
        saved |= {"out": as_array(out), "lse": as_array(lse)}
    gradients = combiner.attention_backward(as_array(grad_out), saved, grad_lse=as_array(grad_lse))
    return [as_tensor(x) for x in gradients if x is not None]


# As `torch.library.custom_op` does it, less its wrappers, which cost every call some microseconds.
_library = torch.library.Library("combiner", "FRAGMENT")
_library.define(f"attention({_SCHEMA}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_SCHEMA}) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("attention", _forward, "CPU")
_library.impl("attention_backward", _backward, "CPU")
_attention = torch.ops.combiner.attention.default
_attention_backward = torch.ops.combiner.attention_backward.default


@torch.library.register_fake("combiner::attention", lib=_library)
def _(*given: Any) -> tuple[Tensor, Tensor]:
    problem = _Problem(*given)
    lead = problem.query.shape[:-1]
    out = problem.query.new_empty(*lead, problem.value.shape[-1])
    return out, out.new_empty(lead, dtype=_at_least_float32(out.dtype))


@torch.library.register_fake("combiner::attention_backward", lib=_library)
def _(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *given: Any) -> list[Tensor]:
    problem = _Problem(*given)._asdict()
    return [problem[name].new_empty(problem[name].shape) for name in _DIFFERENTIABLE if problem[name] is not None]


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *(x if isinstance(x, Tensor) else None for x in inputs))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)
    problem = _Problem(*inputs)
    if problem.clusters is None and not torch.compiler.is_compiling():  # or guards of what is compiled know
        ctx.alive = _pattern(problem.pattern)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    given = [x if tensor is None else tensor for tensor, x in zip(tensors, ctx.others, strict=True)]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    made = iter(_attention_backward(grad_out, grad_lse, out, lse, *given))
    problem = _Problem(*given)._asdict()
    return tuple(next(made) if name in _DIFFERENTIABLE and x is not None else None for name, x in problem.items())


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("combiner's gradients can be taken once: there is no second derivative")


torch.library.register_autograd("combiner::attention", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("combiner::attention_backward", _refuse, lib=_library)


def _mapped(op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of vmap: its axis becomes the first leading one, or its entries have calls of their own.

    They need those where an entry's place in the batch matters: with dropout, and with plans of each batch entry.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *given: Any) -> tuple[Any, Any]:
        others = len(given) - len(_Problem._fields)
        problem, dims = _Problem(*given[others:]), dict(zip(_Problem._fields, in_dims[others:], strict=True))
        is_value = problem.clusters is None and problem.pattern[0].isalpha()
        made: Any
        if is_value and problem.seed is None and dims["cu_seqlens"] is None:
            has_no_heads = problem.query.ndim - (dims["query"] is not None) == 2
            names = (*("grad_out", "grad_lse", "out", "lse")[:others], *_Problem._fields)
            whole = []
            for name, x, dim in zip(names, given, in_dims, strict=True):
                if isinstance(x, Tensor) and name != "cu_seqlens":
                    x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                    x = x.unsqueeze(1) if has_no_heads and name != "key_mask" else x
                whole.append(x)
            made = [x.squeeze(1) if has_no_heads else x for x in op(*whole)]
        else:
            each = []
            for n in range(info.batch_size):
                pairs = zip(given, in_dims, strict=True)
                each.append(op(*(x if dim is None else x.select(dim, n) for x, dim in pairs)))
            made = [torch.stack(x) for x in zip(*each, strict=True)]
        return (made, [0] * len(made)) if others else (tuple(made), (0, 0))

    return rule


torch.library.register_vmap("combiner::attention", _mapped(_attention), lib=_library)
torch.library.register_vmap("combiner::attention_backward", _mapped(_attention_backward), lib=_library)


# ---- attention


class AttendOptions(TypedDict, total=False):
    """What `attend` takes by name, with the defaults that it says."""

    is_causal: bool
    scale: float | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | Sequence[int] | None
    dropout_p: float
    seed: int | None


class AttentionOptions(AttendOptions, total=False):
    """What `attention` takes by name, with the defaults that it says."""

    region_query: Tensor | None
    region_key: Tensor | None


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AnyPattern | Routing,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AnyPattern | Routing,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AnyPattern | Routing,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    region_query: Tensor | None = None,
    region_key: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`combiner.attention` of tensors: each query's softmax over its direct keys and its regions (eq 7, 9).

    Parameters
    ----------
    query : `[..., Hq, L, D]` or `[L, D]`; 1 <= D <= 1024.
    key : `[..., Hk, L, D]` or `[L, D]`.
    value : `[..., Hk, L, Dv]` or `[L, Dv]`; 1 <= Dv <= 1024.
    pattern : as in `combiner.attention`, or a `Routing` of a tensor. Patterns that are values, such as ``Fixed(64)``,
        may be exported and loaded elsewhere; Plans and others live as long as their process.
    is_causal, scale : as in `combiner.attention`.
    key_mask : bool `[..., L]`, without the heads; True for keys that take part.
    cu_seqlens : integers `[N + 1]`, the bounds of packed sequences.
    region_query, region_key : `[..., Hq, R, D]`, and `[..., Hk, R, D]` or `[..., Hq, R, D]`, in place of the pooled
        ones.
    dropout_p, seed : as in `combiner.attention`; without a seed one is drawn from PyTorch's generator, which
        ``torch.manual_seed`` sets.
    return_lse : whether to return lse too, which is differentiable.

    Returns
    -------
    out : `[..., Hq, L, Dv]`
    lse : `[..., Hq, L]` if `return_lse`; float32 for bfloat16 and float16.

    Raises
    ------
    TypeError : an argument that is no tensor, or of another dtype than it must be.
    ValueError : a tensor elsewhere than on the CPU, a wrong shape or value.
    NotImplementedError : a second derivative, or forward-mode differentiation, as it is taken.

    Notes
    -----
    Backward makes the summaries of the regions again rather than keep them.
    """
    query, key, value, region_query, region_key = _tensors(
        query=query, key=key, value=value, region_query=region_query, region_key=region_key
    )
    _check_mask(key_mask, query)
    if isinstance(pattern, Mixture) and return_lse:
        raise ValueError("return_lse must be False with a Mixture, whose components have a normaliser each")
    out, lse = _attention(
        query,
        key,
        value,
        _text(pattern),
        _clusters(pattern),
        is_causal,
        scale,
        key_mask,
        _bounds(cu_seqlens),
        region_query,
        region_key,
        dropout_p,
        _seed(dropout_p, seed),
    )
    return (out, lse) if return_lse else out


def _tensors(**given: Tensor | None) -> list[Any]:
    """The tensors once checked, as autocast wants them; None stays None."""
    is_autocast = torch.is_autocast_enabled("cpu")
    found: list[Any] = []
    for name, x in given.items():
        if x is None and name.startswith("region"):
            found.append(x)
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.device.type not in ("cpu", "meta"):
            raise ValueError(f"{name} must be on the CPU, got {x.device}: {name}.cpu() is")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if is_autocast and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype("cpu"))
        if found and x.dtype != found[0].dtype:
            raise TypeError(f"{name} must be {found[0].dtype} like query, got {x.dtype}")
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name} must have no tangent: there is no forward-mode differentiation")
        found.append(x)
    return found


def _clusters(pattern: object) -> Tensor | None:
    if not isinstance(pattern, Routing):
        return None
    clusters = pattern.clusters
    if not isinstance(clusters, Tensor) or clusters.dtype != torch.int64:
        got = clusters.dtype if isinstance(clusters, Tensor) else type(clusters).__name__
        raise TypeError(f"clusters must be a torch.Tensor of int64, got {got}")
    return clusters


def _bounds(cu_seqlens: Tensor | Sequence[int] | None) -> Tensor | None:
    return None if cu_seqlens is None else torch.as_tensor(cu_seqlens)


def _options(
    query: Tensor, is_causal: bool, scale: float | None, key_mask: Tensor | None, cu_seqlens: Any
) -> dict[str, Any]:
    """The options of both stages as combiner's functions take them."""
    _check_mask(key_mask, query)
    bounds = as_array(_bounds(cu_seqlens))
    return {"is_causal": is_causal, "scale": scale, "key_mask": as_array(key_mask), "cu_seqlens": bounds}


def _check_mask(key_mask: Tensor | None, query: Tensor) -> None:
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a torch.Tensor, got {type(key_mask).__name__}")
    if key_mask.dtype != torch.bool:
        hint = ": of a mask to be added, key_mask == 0" if key_mask.is_floating_point() else ""
        raise TypeError(f"key_mask must be bool, True for keys that take part, got {key_mask.dtype}{hint}")
    expected = query.shape[:-3] + query.shape[-2:-1]
    if key_mask.shape != expected:
        hint = ""
        if key_mask.shape[-2:] == 2 * query.shape[-2:-1]:
            hint = ": what each query sees is the pattern's matter, and is_causal's; Plan.from_parts makes any"
        raise ValueError(f"key_mask must have shape {tuple(expected)}, got {tuple(key_mask.shape)}{hint}")


def _seed(dropout_p: float, seed: int | None) -> Tensor | None:
    """The seed as an int64 of the same bits; from PyTorch's generator if there is none, None where nothing falls."""
    if seed is not None and not torch.compiler.is_compiling():  # where it may be symbolic
        seed = as_integer("seed", seed, 0, bits=64)
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, ())
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def attention_weights(
    query: Tensor,
    key: Tensor,
    pattern: AnyPattern | Routing,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    region_query: Tensor | None = None,
    region_key: Tensor | None = None,
) -> Tensor:
    """`combiner.attention_weights` of tensors: the effective attention `[..., Hq, L, L]`, differentiable.

    Notes
    -----
    `attention` with the identity for values, 512 columns at a time: to look at, not to compute with.
    """
    L = query.shape[-2]
    columns = torch.eye(L, dtype=query.dtype).split(512, dim=-1) if L else (query.new_empty(0, 1),)
    parts = [
        attention(
            query,
            key,
            part.expand(*key.shape[:-2], *part.shape),
            pattern,
            is_causal=is_causal,
            scale=scale,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            region_query=region_query,
            region_key=region_key,
        )
        for part in columns
    ]
    return torch.cat(parts, dim=-1)[..., :L]


# ---- the two stages, which torch.compile leaves to Python: the number of regions is not a number that it knows


class Summary(NamedTuple):
    """What stage 1 makes of the regions, as `combiner.Summary`; lse is not differentiable."""

    key: Tensor
    value: Tensor
    lse: Tensor


class _Summarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pattern: Any, options: dict[str, Any], *given: Tensor | None) -> tuple[Tensor, ...]:
        q, k, v, region_query, region_key = map(as_array, given)
        regions = {"region_query": region_query, "region_key": region_key}
        summary, ctx.saved = combiner.summarize_forward(q, k, v, pattern, **(options | regions))
        made = tuple(map(as_tensor, summary))
        ctx.save_for_backward(*given, *made)
        ctx.mark_non_differentiable(made[2])
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_key: Tensor | None, grad_value: Tensor | None, _: None) -> tuple[Any, ...]:
        assert ctx.saved_tensors  # which is an error where one was written in between
        gradients = combiner.summarize_backward(as_array(grad_key), as_array(grad_value), ctx.saved)
        return None, None, *(None if x is None else as_tensor(x) for x in gradients)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pattern: Any, options: dict[str, Any], *given: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, region_key, region_value = map(as_array, given)
        _, ctx.saved = combiner.attend_forward(q, k, v, region_key, region_value, pattern, **options)
        out, lse = as_tensor(ctx.saved["out"]), as_tensor(ctx.saved["lse"])
        ctx.save_for_backward(*given, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        assert ctx.saved_tensors  # which is an error where one was written in between
        grad_out = torch.zeros_like(ctx.saved_tensors[-2]) if grad_out is None else grad_out
        gradients = combiner.attend_backward(as_array(grad_out), ctx.saved, grad_lse=as_array(grad_lse))
        return None, None, *map(as_tensor, gradients)


@torch.compiler.disable
def summarize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AnyPattern | Routing,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    region_query: Tensor | None = None,
    region_key: Tensor | None = None,
) -> Summary:
    """`combiner.summarize` of tensors: stage 1 alone (section 3.3, eq 6). Parameters as in `attention`.

    Not an operator: torch.compile breaks its graph here.
    """
    given = _tensors(query=query, key=key, value=value, region_query=region_query, region_key=region_key)
    options = _options(query, is_causal, scale, key_mask, cu_seqlens)
    return Summary(*_Summarize.apply(_pattern_of(pattern), options, *given))


@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_key: Tensor,
    region_value: Tensor,
    pattern: AnyPattern | Routing,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttendOptions],
) -> Tensor: ...
@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_key: Tensor,
    region_value: Tensor,
    pattern: AnyPattern | Routing,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttendOptions],
) -> tuple[Tensor, Tensor]: ...
@torch.compiler.disable
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_key: Tensor,
    region_value: Tensor,
    pattern: AnyPattern | Routing,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`combiner.attend` of tensors: stage 2 alone, over the summaries given (eq 7, 9).

    Parameters
    ----------
    region_key, region_value : as in ``Summary.key`` and ``Summary.value``.
    query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, dropout_p, seed, return_lse : as in `attention`.

    Returns
    -------
    out, or (out, lse), as `attention`. Not an operator: torch.compile breaks its graph here.
    """
    given = _tensors(query=query, key=key, value=value, region_key=region_key, region_value=region_value)
    options = _options(query, is_causal, scale, key_mask, cu_seqlens)
    drawn = _seed(dropout_p, seed)
    options |= {"dropout_p": dropout_p, "seed": None if drawn is None else int(drawn) % 2**64}
    out, lse = _Attend.apply(_pattern_of(pattern), options, *given)
    return (out, lse) if return_lse else out


def _pattern_of(pattern: Any) -> Any:
    """The pattern as combiner's functions take it."""
    clusters = _clusters(pattern)
    if clusters is None:
        return pattern
    return combiner.Routing(as_array(clusters), pooling=pattern.pooling, size_bias=pattern.size_bias)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`combiner.merge` of tensors: one softmax over two sets of parts, from the results over each; (out, lse).

    Plain PyTorch, so that all that PyTorch does with tensors it does with this.

    Parameters
    ----------
    out_a, out_b : `[..., Dv]`, the same shape and dtype.
    lse_a, lse_b : `[...]`, the same shape without the last axis; -inf where nothing was attended.
    """
    for name, x in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        dtype = out_a.dtype if name.startswith("out") else _at_least_float32(out_a.dtype)
        if x.dtype not in _DTYPES or x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} as out_a's is {out_a.dtype}, got {x.dtype}")
        shape = out_a.shape if name.startswith("out") else out_a.shape[:-1]
        if x.shape != shape or not out_a.ndim:
            raise ValueError(
                f"{name} must have shape {tuple(shape) if out_a.ndim else '(..., Dv)'}, got {tuple(x.shape)}"
            )
    # Where neither side attends to anything, logs of 0 are kept out of sums whose gradients would be NaN.
    is_empty = lse_a.isneginf() & lse_b.isneginf()
    a, b = lse_a.masked_fill(is_empty, 0), lse_b.masked_fill(is_empty, 0)
    lse = torch.logaddexp(a, b)
    weight_a, weight_b = ((x - lse).exp().masked_fill(is_empty, 0).unsqueeze(-1) for x in (a, b))
    out = weight_a * out_a + weight_b * out_b
    return out.to(out_a.dtype), lse.masked_fill(is_empty, -torch.inf)


# ---- clusters


_library.define(
    "assign_clusters(Tensor x, Tensor centroids, bool balanced) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_library.define(
    "update_centroids(Tensor centroids, Tensor x, Tensor clusters, float decay) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _assign_clusters(x: Tensor, centroids: Tensor, balanced: bool) -> Tensor:
    return as_tensor(combiner.assign_clusters(as_array(x), as_array(centroids), balanced=balanced))


def _update_centroids(centroids: Tensor, x: Tensor, clusters: Tensor, decay: float) -> Tensor:
    return as_tensor(combiner.update_centroids(as_array(centroids), as_array(x), as_array(clusters), decay=decay))


_library.impl("assign_clusters", _assign_clusters, "CPU")
_library.impl("update_centroids", _update_centroids, "CPU")


@torch.library.register_fake("combiner::assign_clusters", lib=_library)
def _(x: Tensor, centroids: Tensor, balanced: bool) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@torch.library.register_fake("combiner::update_centroids", lib=_library)
def _(centroids: Tensor, x: Tensor, clusters: Tensor, decay: float) -> Tensor:
    return centroids.new_empty(centroids.shape)


def assign_clusters(x: Tensor, centroids: Tensor, *, balanced: bool = False) -> Tensor:
    """`combiner.assign_clusters` of tensors: `[..., L]` int64, what `Routing` takes; no gradients."""
    clusters: Tensor = torch.ops.combiner.assign_clusters(x.detach(), centroids.detach(), balanced)
    return clusters


def update_centroids(centroids: Tensor, x: Tensor, clusters: Tensor, *, decay: float = 0.999) -> Tensor:
    """`combiner.update_centroids` of tensors: `[..., n, D]`, a new tensor; no gradients."""
    moved: Tensor = torch.ops.combiner.update_centroids(centroids.detach(), x.detach(), clusters, decay)
    return moved
