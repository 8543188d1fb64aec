# SPDX-License-Identifier: Apache-2.0
"""The functions of `combiner`, of tensors: `attention` is an operator of PyTorch, the stages are autograd functions.

Letters are those of `combiner.functional`. All functions here have in common, beside what is said there:

- Tensors are on the CPU and of one dtype: float32, float64, bfloat16 or float16. A tensor with any strides is read
  without a copy as long as its last axis is contiguous, and results are not copied. bfloat16 needs the package
  ml_dtypes.
- ``torch.autocast("cpu")`` casts tensors to its dtype, except float64 ones.
- Gradients are exact and computed by the library, in reverse mode. ``torch.func`` takes them too: grad, vjp, jacrev,
  and vmap of these. Second derivatives and forward mode raise NotImplementedError.
- The number of threads is ``combiner.set_num_threads``'s, not PyTorch's.
- Shape errors are raised by the library; compiled code raises them at run time.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Unpack, overload

import numpy.typing as npt
import torch
from torch import Tensor

from .. import functional
from ..arguments import check_merged
from ..composed import AnyPattern, Mixture
from ..foreign_names import explains_foreign_names
from ..signatures import AttendOptions, AttentionOptions, Layout
from . import stages
from .arguments import (
    as_bounds,
    check_is_real,
    check_scale,
    check_tensors,
    check_terms,
    laid_out,
    options_of_stages,
    seed_of,
    whole_key_mask,
    whole_terms,
)
from .ops import differentiable_attention
from .pattern_text import text_of
from .patterns import Routing, Selected, choices_of
from .stages import in_arrays
from .tensors import as_array, at_least_float32


class Summary(NamedTuple):
    """The summaries of a plan's regions, as in `combiner.Summary`. lse is not differentiable."""

    key: Tensor
    value: Tensor
    lse: Tensor
    bias: Tensor | None = None


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AnyPattern | Routing | Selected,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions[Tensor, int]],
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AnyPattern | Routing | Selected,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions[Tensor, int]],
) -> tuple[Tensor, Tensor]: ...
@explains_foreign_names
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AnyPattern | Routing | Selected,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: npt.ArrayLike | Tensor | None = None,
    region_query: Tensor | None = None,
    region_key: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    region_bias: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
    layout: Layout = "BHLD",
) -> Tensor | tuple[Tensor, Tensor]:
    """`combiner.attention` of tensors: each query's softmax over its direct keys and its regions (eq 7, 9).

    Parameters
    ----------
    query : `[..., Hq, L, D]` or `[L, D]`; 1 <= D <= 1024.
    key : `[..., Hk, L, D]` or `[L, D]`.
    value : `[..., Hk, L, Dv]` or `[L, Dv]`; 1 <= Dv <= 1024.
    pattern : as in `combiner.attention`, or a `Routing` or a `Selected` of a tensor. An exported function holds
        patterns such as ``Fixed(64)`` by their parameters and may be loaded elsewhere. It holds a Plan or another
        object by a number, which is valid in its own process.
    is_causal, scale : as in `combiner.attention`.
    key_mask : bool `[..., L]`, the leading axes without the heads, or a mask that broadcasts to it: `[L]`,
        `[B, 1, 1, L]`. True for keys that take part.
    cu_seqlens : integers `[N + 1]`, the boundaries of packed sequences.
    region_query, region_key : `[..., Hq, R, D]`, and `[..., Hk, R, D]` or `[..., Hq, R, D]`, in place of the pooled
        ones.
    dropout_p, seed : as in `combiner.attention`. None draws a seed from PyTorch's generator, which
        ``torch.manual_seed`` sets.
    softcap, key_bias, region_bias, sink : as in `combiner.attention`; tensors of the dtype of lse, with gradients.
    return_lse : whether to return lse too; it is differentiable.
    layout : "BHLD" for heads before positions, as above, or "BLHD" for heads after positions, `[..., L, H, D]`, in all
        tensors but lse and key_mask. Neither copies.

    Returns
    -------
    out : `[..., Hq, L, Dv]`, or as `layout` says.
    lse : `[..., Hq, L]` if `return_lse`; float32 for bfloat16 and float16.

    Raises
    ------
    TypeError : an argument that is no tensor, or has a wrong dtype.
    ValueError : a tensor on another device than the CPU, a wrong shape or value.
    NotImplementedError : where a second derivative or a forward-mode derivative is taken.

    Notes
    -----
    Time of `combiner.attention`. Autograd keeps the inputs, out and each query's softmax state; backward computes the
    regions' summaries again.
    """
    query, key, value, region_query, region_key = check_tensors(
        layout, query=query, key=key, value=value, region_query=region_query, region_key=region_key
    )
    check_scale(scale)
    check_terms(query, softcap, key_bias, region_bias, sink)
    key_bias, region_bias, sink = whole_terms(query, key, key_bias, region_bias, sink)
    if isinstance(pattern, Mixture) and return_lse:
        raise ValueError("return_lse must be False with a Mixture, whose components have a normaliser each")
    choices = choices_of(pattern)
    out, lse, *_ = differentiable_attention(
        query,
        key,
        value,
        text_of(pattern),
        choices.clusters,
        is_causal,
        scale,
        whole_key_mask(key_mask, query),
        as_bounds(cu_seqlens),
        region_query,
        region_key,
        dropout_p,
        seed_of(dropout_p, seed),
        softcap,
        key_bias,
        region_bias,
        sink,
        choices.regions,
    )
    out = laid_out(out, layout)
    return (out, lse) if return_lse else out


@explains_foreign_names
def attention_weights(
    query: Tensor,
    key: Tensor,
    pattern: AnyPattern | Routing | Selected,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: npt.ArrayLike | Tensor | None = None,
    region_query: Tensor | None = None,
    region_key: Tensor | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    region_bias: Tensor | None = None,
    sink: Tensor | None = None,
    layout: Layout = "BHLD",
) -> Tensor:
    """`combiner.attention_weights` of tensors: the effective attention `[..., Hq, L, L]` (eq 8), differentiable.

    Parameters and errors are those of `attention`.

    Notes
    -----
    `attention` with the identity for values, 512 columns at a time: L / 512 times the cost of attention with Dv = 512,
    and O(L^2) memory.
    """
    query, key, _, region_query, region_key = check_tensors(
        layout, query=query, key=key, value=key, region_query=region_query, region_key=region_key
    )
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
            softcap=softcap,
            key_bias=key_bias,
            region_bias=region_bias,
            sink=sink,
        )
        for part in columns
    ]
    return torch.cat(parts, dim=-1)[..., :L]


@torch.compiler.disable
@explains_foreign_names
def summarize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AnyPattern | Routing | Selected,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: npt.ArrayLike | Tensor | None = None,
    region_query: Tensor | None = None,
    region_key: Tensor | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    region_bias: Tensor | None = None,
    layout: Layout = "BHLD",
) -> Summary:
    """`combiner.summarize` of tensors: stage 1 alone (section 3.2, the inner sum of eq 7).

    Parameters and errors are those of `attention`. Not an operator: torch.compile breaks its graph here.
    """
    given = check_tensors(layout, query=query, key=key, value=value, region_query=region_query, region_key=region_key)
    options = options_of_stages(given[0], pattern, is_causal, scale, key_mask, cu_seqlens)
    check_terms(given[0], softcap, key_bias, region_bias, None)
    key, value, bias, lse = stages.summarize(pattern, options | {"softcap": softcap}, *given, key_bias, region_bias)
    return Summary(laid_out(key, layout), laid_out(value, layout), lse, bias)


@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_key: Tensor,
    region_value: Tensor,
    pattern: AnyPattern | Routing | Selected,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttendOptions[Tensor, int]],
) -> Tensor: ...
@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_key: Tensor,
    region_value: Tensor,
    pattern: AnyPattern | Routing | Selected,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttendOptions[Tensor, int]],
) -> tuple[Tensor, Tensor]: ...
@torch.compiler.disable
@explains_foreign_names
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_key: Tensor,
    region_value: Tensor,
    pattern: AnyPattern | Routing | Selected,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: npt.ArrayLike | Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    region_bias: Tensor | None = None,
    sink: Tensor | None = None,
    offset: int | None = None,
    return_lse: bool = False,
    layout: Layout = "BHLD",
) -> Tensor | tuple[Tensor, Tensor]:
    """`combiner.attend` of tensors: stage 2 alone, with given summaries (eq 7, 9).

    Parameters
    ----------
    region_key, region_value, region_bias : as in ``Summary.key``, ``Summary.value`` and ``Summary.bias``.
    offset : as in `combiner.attend`: the position of the first row of query, which may have fewer rows than key.
    query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, dropout_p, seed, softcap, key_bias, sink,
        return_lse, layout : as in `attention`.

    Returns
    -------
    out, lse : as `attention`; lse if ``return_lse``.

    Notes
    -----
    Errors are those of `attention`. Not an operator: torch.compile breaks its graph here.
    """
    given = check_tensors(
        layout,
        has_offset=offset is not None,
        query=query,
        key=key,
        value=value,
        region_key=region_key,
        region_value=region_value,
    )
    options = options_of_stages(given[1], pattern, is_causal, scale, key_mask, cu_seqlens) | {"offset": offset}
    drawn = seed_of(dropout_p, seed)
    options |= {"dropout_p": dropout_p, "seed": None if drawn is None else int(drawn) % 2**64, "softcap": softcap}
    check_terms(given[0], softcap, key_bias, region_bias, sink)
    out, lse = stages.attend(pattern, options, *given, key_bias, region_bias, sink)
    out = laid_out(out, layout)
    return (out, lse) if return_lse else out


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`combiner.merge` of tensors: (out, lse) of one softmax over two sets of parts, from the results over each.

    Plain PyTorch operations: compiled, mapped and differentiated like any others, any number of times.

    Parameters
    ----------
    out_a, out_b : `[..., Dv]`, the same shape and dtype.
    lse_a, lse_b : `[...]`, the same shape without the last axis, float64 for float64, else float32; -inf where nothing
        was attended.

    Raises
    ------
    TypeError, ValueError : an argument that is no tensor, or has a wrong dtype or shape.
    """
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in given.items():
        check_is_real(name, x)
    check_merged(at_least_float32(out_a.dtype), **given)
    # Where neither side attends to anything, -inf is replaced by 0: gradients through -inf - -inf would be NaN.
    is_empty = lse_a.isneginf() & lse_b.isneginf()
    a, b = lse_a.masked_fill(is_empty, 0), lse_b.masked_fill(is_empty, 0)
    lse = torch.logaddexp(a, b)
    weight_a, weight_b = ((x - lse).exp().masked_fill(is_empty, 0).unsqueeze(-1) for x in (a, b))
    out = weight_a * out_a + weight_b * out_b
    return out.to(out_a.dtype), lse.masked_fill(is_empty, -torch.inf)


@torch.compiler.disable
@explains_foreign_names
def workspace_bytes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AnyPattern | Routing | Selected,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: npt.ArrayLike | Tensor | None = None,
    region_query: Tensor | None = None,
    region_key: Tensor | None = None,
    region_value: Tensor | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    region_bias: Tensor | None = None,
    sink: Tensor | None = None,
    offset: int | None = None,
    backward: bool = False,
    layout: Layout = "BHLD",
) -> int:
    """`combiner.workspace_bytes` of tensors: the bytes that a call takes beside plan and results. Nothing is computed.

    Parameters
    ----------
    query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, region_query, region_key, dropout_p, softcap,
        key_bias, region_bias, sink, layout : as in `attention`.
    region_value, offset : as in `attend`, whose memory is asked for where region_value is given.
    backward : True reports the backward pass in place of the forward pass.
    """
    arrays: dict[str, Tensor | None] = {"query": query, "key": key, "value": value}
    arrays |= {"region_query": region_query, "region_key": region_key, "region_value": region_value}
    given = check_tensors(layout, has_offset=offset is not None, **arrays)
    own, options = in_arrays(pattern, options_of_stages(given[1], pattern, is_causal, scale, key_mask, cu_seqlens))
    q, k, v, options["region_query"], options["region_key"], options["region_value"] = map(as_array, given)
    check_terms(given[0], softcap, key_bias, region_bias, sink)
    terms = {"key_bias": key_bias, "region_bias": region_bias, "sink": sink}
    options |= {"softcap": softcap, "offset": offset} | {name: as_array(x) for name, x in terms.items()}
    return functional.workspace_bytes(q, k, v, own, dropout_p=dropout_p, backward=backward, **options)
