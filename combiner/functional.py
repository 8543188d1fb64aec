# SPDX-License-Identifier: Apache-2.0
"""Combiner attention as functions of arrays: both stages at once, each alone, and their gradients.

Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", NeurIPS 2021 (arXiv 2107.05768);
equation numbers are the paper's. Letters: Hq query heads, Hk key / value heads, L positions, D features of query and
key, Dv of value, R regions of the plan. These hold for every function here:

- Arrays are `[..., heads, L, features]` with equal leading axes, or `[L, features]` each; Hq is a multiple of Hk, and
  query head h uses key head ``h // (Hq // Hk)``. With ``layout="BLHD"`` every array that has features, given or
  returned, has its heads after its positions or regions, `[..., L, heads, features]`; an lse is `[..., Hq, L]` in both
  layouts. Neither layout costs a copy: results of "BLHD" are views. Shapes below are those of "BHLD". A view with any
  strides is taken without a copy as long as its last axis is contiguous. Inputs are never written.
- Their dtypes are float32, float64, float16 or bfloat16 (of the package ml_dtypes), never mixed; results have the
  inputs' dtype. With a 16-bit dtype sums, softmaxes and every lse are float32.
- Arrays are NumPy's, or all are of one other library with DLPack, on the CPU (PyTorch, JAX): these are not copied
  either, and results are arrays of that library. Gradients and tracing need the adapters combiner.torch, combiner.jax.
- Any number of threads may call functions at once; the GIL is released. Ctrl-C ends a call within 0.1 s. Results have
  the same bits for any number of threads, any batch or heads beside them and any memory layout. The sign and payload of
  a NaN may differ between instruction sets.
- TypeError: an argument of a wrong kind or dtype. ValueError: a wrong shape or value. OverflowError, MemoryError: a
  size beyond the machine. A message names the argument, its value and what was expected. After an error nothing has
  been written to `out`.
"""

from __future__ import annotations

from typing import Literal, Unpack, overload

import numpy as np
import numpy.typing as npt

from .arguments import REAL_ARRAY, Array, check_merged, is_real, widened
from .composed import AnyPattern
from .foreign_names import explains_foreign_names
from .interchange import any_library
from .problem import (
    ATTEND,
    BOTH,
    SUMMARIZE,
    Saved,
    make_problem,
    run_attention,
    run_backward,
    run_forward,
)
from .signatures import AttendGradients, AttendOptions, AttentionOptions, Gradients, Layout, Summary, Terms


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern,
    *,
    return_lse: Literal[False] = False,
    out: Array | None = None,
    **options: Unpack[AttentionOptions[Array, int]],
) -> Array: ...
@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern,
    *,
    return_lse: Literal[True],
    out: Array | None = None,
    **options: Unpack[AttentionOptions[Array, int]],
) -> tuple[Array, Array]: ...
@any_library
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
    layout: Layout = "BHLD",
    region_query: Array | None = None,
    region_key: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Combiner attention: each query's softmax over its direct keys and, as one key each, its regions (eq 7, 9).

    The axes of query, key and value are batch entries (any number of axes, or none), heads, positions, features; with
    ``layout="BLHD"`` they are batch entries, positions, heads, features, as in flash-attn and JAX. Only `layout` tells
    the two apart: positions given where heads are expected are no error.

    Parameters
    ----------
    query : `[..., Hq, L, D]` or `[L, D]`, of one of the four dtypes; 1 <= D <= 1024.
    key : `[..., Hk, L, D]` or `[L, D]`, the same dtype.
    value : `[..., Hk, L, Dv]` or `[L, Dv]`, the same dtype; 1 <= Dv <= 1024.
    pattern : the factorization of each query's support: a pattern such as `Fixed`, a `Plan` for length L, or a tuple of
        plans, one for each batch entry and key head in that order.
    is_causal : whether query i sees positions up to i only. A Plan carries its own causality; True with a bidirectional
        Plan is an error.
    scale : factor of the logits, finite; 1 / sqrt(D) by default.
    key_mask : bool, key's leading axes without the heads, then L; True for positions that take part. A mask that
        broadcasts to this shape is accepted, such as `[L]` for a whole batch, and so is one with axes of length 1 for
        heads and queries, `[..., 1, 1, L]`. Masked keys, values and pooled queries are never read; a masked position's
        own query still attends.
    cu_seqlens : integers `[N + 1]` from 0 to L, not decreasing: the boundaries of packed sequences, each attended on
        its own, in every batch entry; R is the total over the sequences. None: a single sequence. A default span or
        width follows from each sequence's length; a Plan, which is of one length, is an error.
    layout : "BHLD" or "BLHD": whether heads come before or after positions in every array with features.
    region_query : `[..., Hq, R, D]` in place of the pooled q_R, in the plan's region order.
    region_key : `[..., Hk, R, D]` or `[..., Hq, R, D]` in place of the pooled k_R.
    dropout_p : probability of zeroing a weight; a region is dropped as a whole. The other weights are divided by
        ``1 - dropout_p``. lse is computed without dropout.
    seed : 64-bit seed of a counter-based generator (Philox4x32-10): the same weights are dropped in backward and for
        any number of threads. None draws a seed from the operating system.
    softcap : a bound of the scaled product: it becomes ``softcap * tanh(product / softcap)`` before anything is added,
        as in Gemma 2; positive. None: no bound.
    key_bias : `[..., Hk, L]` or `[..., Hq, L]`, of the dtype of lse: added to the logits of each key, in both stages.
        Axes before the last may be missing or have length 1. A region's bias is pooled by the rule of its key.
        `alibi_bias` makes that of ALiBi.
    region_bias : `[..., Hk, R]` or `[..., Hq, R]` in place of the pooled bias of each region, in the plan's region
        order; broadcast as key_bias is.
    sink : `[..., Hq]`, of the dtype of lse, such as `[Hq]`: the logit of one more part of every query, whose value is 0
        (GPT-OSS). lse includes it; a query with nothing else to attend to has out 0 and lse = sink.
    return_lse : whether to return lse too; an error with a `Mixture`, which has no single normaliser.
    out : array to write the result to: writeable, of the result's shape and dtype, overlapping no input.

    Returns
    -------
    out : `[..., Hq, L, Dv]`; zeros for a query with nothing to attend to.
    lse : `[..., Hq, L]` if `return_lse`: the natural log of each query's normaliser; -inf with nothing to attend to.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError : as said at the top of this module.

    Notes
    -----
    Time O(B Hq P (D + Dv)) for B batch entries, P the pairs of query and key or region in both stages (``Plan.pairs``
    are those of stage 2); memory beside the arrays O(Hq L (D + Dv)).
    """
    given = query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, layout, region_query, region_key
    problem = make_problem(BOTH, *given, dropout_p, seed, terms=Terms(softcap, key_bias, region_bias, sink))
    return run_attention(problem, layout, out, return_lse)


@any_library
def attention_forward(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    layout: Layout = "BHLD",
    region_query: Array | None = None,
    region_key: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """`attention`, and an object that `attention_backward` needs.

    Parameters, errors and time are those of `attention`.

    Returns
    -------
    out : `[..., Hq, L, Dv]`
    saved : the arguments, not copied (do not change them before the backward call), and results, O(Hq (L + R) Dv) of
        memory. ``saved["lse"]`` `[..., Hq, L]` is one of them; `combiner.problem.Saved` names all. It can be copied and
        pickled.
    """
    given = query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, layout, region_query, region_key
    problem = make_problem(BOTH, *given, dropout_p, seed, terms=Terms(softcap, key_bias, region_bias, sink))
    results, saved = run_forward(problem, "attention_forward", layout, out)
    return results[0], saved


@any_library
def attention_backward(grad_out: Array, saved: Saved, *, grad_lse: Array | None = None) -> Gradients:
    """Gradients of sum(out * grad_out) + sum(lse * grad_lse), the exact derivatives of `attention`.

    Where several positions of a pool have the maximum, the lowest gets the gradient. Gradients of key, value and
    region_key are sums over the query heads that share them. The formulas are in docs/mathematics.md.

    Parameters
    ----------
    grad_out : `[..., Hq, L, Dv]`, the dtype of the inputs, in the layout of the forward call, as are the gradients.
    saved : returned by `attention_forward`.
    grad_lse : `[..., Hq, L]`, the dtype of lse; None for zeros, and with a `Mixture`.

    Returns
    -------
    Gradients : each of its input's shape and dtype, a sum over what a term was broadcast to; those after the first
        three None unless these inputs were given.

    Raises
    ------
    TypeError, ValueError : a `saved` of another function; a gradient of a wrong kind, dtype or shape.

    Notes
    -----
    About 2.5 times the time of the forward pass; memory beside the arrays O(Hq L (D + Dv)).
    """
    gradients = run_backward("attention_forward", saved, grad_out, grad_lse)
    return Gradients(*gradients[:5], *gradients[6:])


@any_library
def workspace_bytes(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern,
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
    """The memory that `attention` or `attend`, or its backward pass, takes beside plan and results, in bytes.

    Nothing is computed. `attention_forward` takes the same as `attention`. The number of threads in force
    (`set_num_threads`) counts.

    Parameters
    ----------
    query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, layout, region_query, region_key, dropout_p,
        softcap, key_bias, region_bias, sink : as in `attention`; of the arrays only shapes, strides and dtypes count.
    region_value, offset : as in `attend`. With a region_value the memory is that of `attend`, and region_key and
        region_bias are its arguments. With None it is that of `attention`, and offset must be None.
    backward : True: report the backward pass instead of the forward pass.

    Raises
    ------
    TypeError, ValueError, OverflowError : as `attention`.
    """
    given = query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, layout, region_query, region_key
    terms = Terms(softcap, key_bias, region_bias, sink)
    if region_value is None and offset is not None:
        raise ValueError(f"offset must be None without region_value, as of attention, got {offset}")
    stages = BOTH if region_value is None else ATTEND
    return make_problem(stages, *given, dropout_p, 0, region_value, terms, offset).workspace_bytes(backward)


@explains_foreign_names
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
    layout: Layout = "BHLD",
    region_query: Array | None = None,
    region_key: Array | None = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
) -> Summary:
    """Stage 1 alone: each region's abstraction and local expectation (section 3.2, eq 7).

    ``k_R = pool(k_j)``, ``q_R = pool(q_j)`` and ``h_R = sum_j softmax_j(scale * q_R . k_j) v_j`` over its members j.
    `summarize` followed by `attend` is `attention`, divided for incremental or distributed use. Parameters and errors
    are those of `attention`.

    Returns
    -------
    Summary : key `[..., Hk or Hq, R, D]`, value `[..., Hq, R, Dv]`, lse `[..., Hq, R]`, and with key_bias or
        region_bias bias `[..., Hk or Hq, R]`. Key and value have the inputs' dtype: a float16 key that is pooled by
        "sum" may overflow, which `attention` keeps in float32.

    Notes
    -----
    Time O(B Hq P (D + Dv)), P the pairs of regions and their members.
    """
    return summarize_forward(
        query,
        key,
        value,
        pattern,
        is_causal=is_causal,
        scale=scale,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        layout=layout,
        region_query=region_query,
        region_key=region_key,
        softcap=softcap,
        key_bias=key_bias,
        region_bias=region_bias,
    )[0]


@any_library
def summarize_forward(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern,
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
) -> tuple[Summary, Saved]:
    """`summarize`, and an object that `summarize_backward` needs, as `attention_forward` returns one."""
    given = query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, layout, region_query, region_key
    problem = make_problem(SUMMARIZE, *given, terms=Terms(softcap, key_bias, region_bias))
    results, saved = run_forward(problem, "summarize_forward", layout)
    return Summary._make([*results[3:6], results[7]]), saved


@any_library
def summarize_backward(
    grad_summary_key: Array | None,
    grad_summary_value: Array | None,
    saved: Saved,
    *,
    grad_summary_bias: Array | None = None,
) -> Gradients:
    """Gradients of sum(summary.key * grad_summary_key) + sum(summary.value * grad_summary_value) + sum(summary.bias *
    grad_summary_bias).

    Parameters
    ----------
    grad_summary_key, grad_summary_value, grad_summary_bias : of the shape and dtype of the summary's key, value and
        bias; None for zeros.
    saved : returned by `summarize_forward`.

    Returns
    -------
    Gradients : each of its input's shape and dtype, a sum over what a term was broadcast to; those after the first
        three None unless these inputs were given.

    Raises
    ------
    TypeError, ValueError : a `saved` of another function; a gradient of a wrong kind, dtype or shape.

    Notes
    -----
    About 2.5 times the time of `summarize`.
    """
    given = grad_summary_key, grad_summary_value, grad_summary_bias
    gradients = run_backward("summarize_forward", saved, None, None, *given)
    return Gradients(*gradients[:5], *gradients[6:])


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
    out: Array | None = None,
    **options: Unpack[AttendOptions[Array, int]],
) -> Array: ...
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
    out: Array | None = None,
    **options: Unpack[AttendOptions[Array, int]],
) -> tuple[Array, Array]: ...
@any_library
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
    layout: Layout = "BHLD",
    dropout_p: float = 0.0,
    seed: int | None = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
    offset: int | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Stage 2 alone: each query's one softmax over its direct keys and the regions given (eq 7, 9).

    Parameters
    ----------
    region_key : `[..., Hk, R, D]` or `[..., Hq, R, D]`: k_R, as in ``Summary.key``.
    region_value : `[..., Hq, R, Dv]`: h_R, as in ``Summary.value``.
    region_bias : `[..., Hk, R]` or `[..., Hq, R]`: b_R, as in ``Summary.bias``; None: regions have no bias.
    offset : the position of the first query, where some consecutive positions alone are queries: query is
        `[..., Hq, Lq, D]` with Lq <= L, its rows are positions offset .. offset + Lq - 1, and so are those of out and
        lse, which have the bits that they have among all L. key_mask, cu_seqlens and biases are of all keys. None:
        every position is a query.
    query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, layout, dropout_p, seed, softcap, key_bias,
        sink, return_lse, out : as in `attention`.

    Returns
    -------
    out, lse : as `attention`; lse if ``return_lse``.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError : as `attention`.

    Notes
    -----
    Time O(B Hq P (D + Dv)), P the pairs of queries and their direct keys and regions, ``Plan.pairs``. With an offset P
    are those of the queries given; a pattern makes the plan of all L positions when it first meets this length, and a
    key mask or size_bias takes time for each position below the queries' regions.
    """
    given = query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, layout, None, region_key
    terms = Terms(softcap, key_bias, region_bias, sink)
    problem = make_problem(ATTEND, *given, dropout_p, seed, region_value, terms, offset)
    return run_attention(problem, layout, out, return_lse)


@any_library
def attend_forward(
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
    layout: Layout = "BHLD",
    dropout_p: float = 0.0,
    seed: int | None = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
    offset: int | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """`attend`, and an object that `attend_backward` needs, as `attention_forward` returns one.

    Parameters and errors are those of `attend`; out is `[..., Hq, L, Dv]`, or with an offset
    `[..., Hq, Lq, Dv]`.
    """
    given = query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, layout, None, region_key
    terms = Terms(softcap, key_bias, region_bias, sink)
    problem = make_problem(ATTEND, *given, dropout_p, seed, region_value, terms, offset)
    results, saved = run_forward(problem, "attend_forward", layout, out)
    return results[0], saved


@any_library
def attend_backward(grad_out: Array, saved: Saved, *, grad_lse: Array | None = None) -> AttendGradients:
    """Gradients of sum(out * grad_out) + sum(lse * grad_lse) through stage 2.

    Parameters
    ----------
    grad_out : of out's shape, the dtype of the inputs.
    saved : returned by `attend_forward`.
    grad_lse : of the shape and dtype of lse; None for zeros.

    Returns
    -------
    AttendGradients : each of its input's shape and dtype; those of the terms None unless they were given.

    Raises
    ------
    TypeError, ValueError : a `saved` of another function; a gradient of a wrong kind, dtype or shape.

    Notes
    -----
    About 2.5 times the time of `attend`.
    """
    gradients = run_backward("attend_forward", saved, grad_out, grad_lse)
    return AttendGradients(*gradients[:3], *gradients[4:])


@any_library
def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Joins the softmaxes over two disjoint sets of parts: (out, lse) over both, from those over each.

    Parameters
    ----------
    out_a, out_b : `[..., Dv]`, the same shape and dtype.
    lse_a, lse_b : `[...]`, the same shape without the last axis, float64 for float64, else float32; -inf where nothing
        was attended.

    Raises
    ------
    TypeError, ValueError : an array of a wrong kind, dtype or shape.

    Notes
    -----
    ``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``, 0 where both
    sets are empty. Nothing overflows, however large lse_a and lse_b are. Time and memory are linear in the arrays. The
    formula is that of blockwise softmax, not the paper's.
    """
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in given.items():
        if not is_real(x):
            got = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
            raise TypeError(f"{name} must be {REAL_ARRAY}, got {got}")
    check_merged(out_a.dtype if out_a.dtype.itemsize > 2 else np.dtype(np.float32), **given)
    lse = np.logaddexp(lse_a, lse_b)
    with np.errstate(invalid="ignore"):  # -inf - -inf, where neither side attends to anything
        weight_a, weight_b = (np.where(x == -np.inf, x.dtype.type(0), np.exp(x - lse)) for x in (lse_a, lse_b))
    out = weight_a[..., None] * widened(out_a) + weight_b[..., None] * widened(out_b)
    return out.astype(out_a.dtype, copy=False), lse
