# SPDX-License-Identifier: Apache-2.0
"""Combiner attention as functions of arrays: both stages at once, each alone, and their gradients.

Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", NeurIPS 2021 (arXiv 2107.05768);
equation numbers are the paper's. Letters: Hq query heads, Hk key / value heads, L positions, D features of query and
key, Dv of value, R regions of the plan. What every function here has in common:

- Arrays are `[..., heads, L, features]` with equal leading axes, or `[L, features]` each; Hq is a multiple of Hk, and
  query head h uses key head ``h // (Hq // Hk)``. A view with any strides is taken without a copy as long as its last
  axis is contiguous. Inputs are never written.
- Their dtypes are float32, float64, float16 or bfloat16 (of the package ml_dtypes), never mixed; results are of the
  inputs' dtype. With the 16-bit ones sums and softmaxes are float32, and so is every lse.
- Arrays are NumPy's or, all alike, another library's on the CPU (PyTorch's, JAX's, any with DLPack): these are taken
  without a copy too, and results are of the same library. For gradients and tracing there are the adapters.
- Functions may be called from any thread at once and release the GIL. Ctrl-C ends a call within 0.1 s. Results have
  the same bits for any number of threads, batch or head composition and memory layout.
- TypeError: an argument of the wrong kind or dtype. ValueError: a wrong shape or value. OverflowError, MemoryError:
  sizes beyond the machine. Messages name the argument, what it was and what was expected; after an error nothing has
  been written to `out`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np
import numpy.typing as npt

from . import calls
from .calls import ATTEND, BOTH, SUMMARIZE, Inputs, Saved
from .interchange import any_library
from .patterns import AnyPattern, Mixture
from .plan import REAL_ARRAY, Array, is_real, widened


class AttendOptions(TypedDict, total=False):
    """What `attend` takes by name, with the defaults that it says."""

    is_causal: bool
    scale: float | None
    key_mask: Array | None
    cu_seqlens: npt.ArrayLike | None
    dropout_p: float
    seed: int | None


class AttentionOptions(AttendOptions, total=False):
    """What `attention` takes by name, with the defaults that it says."""

    region_query: Array | None
    region_key: Array | None


class Gradients(NamedTuple):
    """Gradients of one scalar, shaped as the inputs; the last two None unless these were given."""

    query: Array
    key: Array
    value: Array
    region_query: Array | None
    region_key: Array | None


class AttendGradients(NamedTuple):
    """Gradients of one scalar through stage 2 alone, shaped as the inputs."""

    query: Array
    key: Array
    value: Array
    region_key: Array
    region_value: Array


class Summary(NamedTuple):
    """What stage 1 makes of the regions. Rows of regions that no query attends are zero, lse -inf.

    key: k_R `[..., Hk, R, D]`, or `[..., Hq, R, D]` where it differs between query heads.
    value: h_R `[..., Hq, R, Dv]`, the local expectations.
    lse: `[..., Hq, R]`, the log of the normaliser of each.
    """

    key: Array
    value: Array
    lse: Array


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    pattern: AnyPattern,
    *,
    return_lse: Literal[False] = False,
    out: Array | None = None,
    **options: Unpack[AttentionOptions],
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
    **options: Unpack[AttentionOptions],
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
    region_query: Array | None = None,
    region_key: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Combiner attention: each query's softmax over its direct keys and, as one key each, its regions (eq 7, 9).

    Parameters
    ----------
    query : `[..., Hq, L, D]` or `[L, D]`, of one of the four dtypes; 1 <= D <= 1024.
    key : `[..., Hk, L, D]` or `[L, D]`, the same dtype.
    value : `[..., Hk, L, Dv]` or `[L, Dv]`, the same dtype; 1 <= Dv <= 1024.
    pattern : how each query's support is factorised: a pattern such as `Fixed`, or a `Plan` for length L, or a tuple of
        plans, one for each batch entry and key head in that order.
    is_causal : whether query i sees positions up to i only. A Plan carries its own causality; True with a bidirectional
        one is an error.
    scale : factor of the logits, finite; 1 / sqrt(D) by default.
    key_mask : bool, key's leading axes without the heads, then L; True for positions that take part. Masked keys,
        values and pooled queries are never read; a masked position's own query still attends.
    cu_seqlens : integers `[N + 1]` from 0 to L, not decreasing: positions cu_seqlens[n] to cu_seqlens[n + 1] are a
        sequence of their own, as if computed alone, in every batch entry; R sums over the sequences. None for one.
        A default span or width goes by each sequence's length; a Plan, which is of one length, is an error.
    region_query : `[..., Hq, R, D]` in place of the pooled q_R, in the plan's region order.
    region_key : `[..., Hk, R, D]` or `[..., Hq, R, D]` in place of the pooled k_R.
    dropout_p : the share of weights, of keys and of regions as wholes, that become 0; the others are divided by
        ``1 - dropout_p``. lse does not know of it.
    seed : of 64 bits: which weights fall, by Philox4x32-10 of position, key or region, head and batch entry, so that
        they are the same in backward and for any threads. None draws one from the operating system.
    return_lse : whether to return lse too.
    out : array to write the result to: writeable, of its shape and dtype, overlapping no input.

    Returns
    -------
    out : `[..., Hq, L, Dv]`; zeros for a query with nothing to attend to.
    lse : `[..., Hq, L]` if `return_lse`: the natural log of each query's normaliser; -inf with nothing to attend to.

    Notes
    -----
    Time O(Hq (pairs + pairs of stage 1) (D + Dv)), see ``Plan.pairs``; memory beyond the arrays O(Hq L (D + Dv)).
    """
    given = query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, region_query, region_key
    inputs = Inputs(*given, calls.dropout(dropout_p, seed))
    if not isinstance(pattern, Mixture):
        done, _ = calls.forward(BOTH, inputs, out=out)
        return done[:2] if return_lse else done[0]
    if return_lse:
        raise ValueError("return_lse must be False with a Mixture, whose components have a normaliser each")
    return calls.mean_forward(inputs, out=out)[0]


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
    region_query: Array | None = None,
    region_key: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """`attention`, and what `attention_backward` needs.

    Returns
    -------
    out : `[..., Hq, L, Dv]`
    saved : dict with the inputs as given (not copied: leave them as they are until the backward), "plan", "scale",
        "out", "lse" `[..., Hq, L]`, "summary_value" `[..., Hq, R, Dv]`, "summary_lse" `[..., Hq, R]` and, for plans
        with weighted keys, "summary_key" `[..., Hq, R, D]`. With a `Mixture`: "components", one such dict each.
    """
    given = query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, region_query, region_key
    inputs = Inputs(*given, calls.dropout(dropout_p, seed))
    if isinstance(pattern, Mixture):
        return calls.mean_forward(inputs, out=out, function="attention_forward")
    done, saved = calls.forward(BOTH, inputs, out=out, function="attention_forward")
    return done[0], saved


@any_library
def attention_backward(grad_out: Array, saved: Saved, *, grad_lse: Array | None = None) -> Gradients:
    """Gradients of sum(out * grad_out) + sum(lse * grad_lse), the exact derivatives of `attention`.

    Where the maximum of a pool has ties, the lowest position gets the gradient. Gradients of key, value and region_key
    sum over the query heads that share them.

    Parameters
    ----------
    grad_out : `[..., Hq, L, Dv]`, the dtype of the inputs.
    saved : what `attention_forward` returned.
    grad_lse : `[..., Hq, L]`; none by default.

    Notes
    -----
    About 2.5 times the time of the forward pass; memory beyond the arrays O(Hq L (D + Dv)).
    """
    function = "attention_forward"
    if not isinstance(saved, dict) or "components" not in saved:
        return Gradients(*calls.backward(BOTH, function, saved, grad_out, grad_lse, None, None)[:5])
    if grad_lse is not None:
        raise ValueError("grad_lse must be None with a Mixture, whose components have a normaliser each")
    return Gradients(*calls.mean_backward(function, saved, grad_out))  # type: ignore[arg-type]


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
    region_query: Array | None = None,
    region_key: Array | None = None,
    dropout_p: float = 0.0,
    backward: bool = False,
) -> int:
    """The memory that `attention`, or `attention_backward`, takes beside plan and results, in bytes.

    Nothing is computed. `attention_forward` takes no more. It goes by the threads in force (`set_num_threads`).

    Parameters
    ----------
    query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, region_query, region_key, dropout_p : as in
        `attention`; of the arrays only shapes, strides and dtypes count.
    backward : whether to tell of the backward pass.
    """
    given = query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, region_query, region_key
    return calls.workspace_bytes(Inputs(*given, calls.dropout(dropout_p, 0)), backward)


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
    """Stage 1 alone: each region's abstraction and local expectation (section 3.3, eq 6).

    ``k_R = pool(k_j)``, ``q_R = pool(q_j)`` and ``h_R = sum_j softmax_j(scale * q_R . k_j) v_j`` over its members j.
    With `attend` this is `attention`: for incremental or distributed use. Parameters as in `attention`.
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
        region_query=region_query,
        region_key=region_key,
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
    region_query: Array | None = None,
    region_key: Array | None = None,
) -> tuple[Summary, Saved]:
    """`summarize`, and what `summarize_backward` needs: a dict as `attention_forward` returns it."""
    inputs = Inputs(query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, region_query, region_key)
    done, saved = calls.forward(SUMMARIZE, inputs, function="summarize_forward")
    return Summary(*done[2:5]), saved


@any_library
def summarize_backward(grad_summary_key: Array | None, grad_summary_value: Array | None, saved: Saved) -> Gradients:
    """Gradients of sum(summary.key * grad_summary_key) + sum(summary.value * grad_summary_value).

    Parameters
    ----------
    grad_summary_key, grad_summary_value : shaped as the summary's key and value; None for zero.
    saved : what `summarize_forward` returned.
    """
    gradients = None, None, grad_summary_key, grad_summary_value
    return Gradients(*calls.backward(SUMMARIZE, "summarize_forward", saved, *gradients)[:5])


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
    **options: Unpack[AttendOptions],
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
    **options: Unpack[AttendOptions],
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
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Stage 2 alone: each query's one softmax over its direct keys and the regions given (eq 7, 9).

    Parameters
    ----------
    region_key : `[..., Hk, R, D]` or `[..., Hq, R, D]`: k_R, as in ``Summary.key``.
    region_value : `[..., Hq, R, Dv]`: h_R, as in ``Summary.value``.
    query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, dropout_p, seed, return_lse, out : as in
        `attention`.

    Returns
    -------
    out, or (out, lse), as `attention`.
    """
    given = query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, None, region_key
    inputs = Inputs(*given, calls.dropout(dropout_p, seed))
    done, _ = calls.forward(ATTEND, inputs, region_value=region_value, out=out)
    return done[:2] if return_lse else done[0]


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
    dropout_p: float = 0.0,
    seed: int | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """`attend`, and what `attend_backward` needs: a dict as `attention_forward` returns it."""
    given = query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, None, region_key
    inputs = Inputs(*given, calls.dropout(dropout_p, seed))
    done, saved = calls.forward(ATTEND, inputs, region_value=region_value, out=out, function="attend_forward")
    saved.update(region_key=None, summary_key=region_key, summary_value=region_value)
    return done[0], saved


@any_library
def attend_backward(grad_out: Array, saved: Saved, *, grad_lse: Array | None = None) -> AttendGradients:
    """Gradients of sum(out * grad_out) + sum(lse * grad_lse) through stage 2.

    Parameters
    ----------
    grad_out : `[..., Hq, L, Dv]`, the dtype of the inputs.
    saved : what `attend_forward` returned.
    grad_lse : `[..., Hq, L]`; none by default.
    """
    done = calls.backward(ATTEND, "attend_forward", saved, grad_out, grad_lse, None, None)
    return AttendGradients(*done[:3], *done[5:])


@any_library
def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """One softmax over two sets of parts, from the results over each: (out, lse).

    Parameters
    ----------
    out_a, out_b : `[..., Dv]`, the same shape and dtype.
    lse_a, lse_b : `[...]`, the same shape without the last axis, float64 for float64, else float32; -inf where nothing
        was attended.

    Notes
    -----
    ``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``, 0 where both
    are empty; no overflow whatever the sizes of the lse.
    """
    for name, x in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if not is_real(x):
            got = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
            raise TypeError(f"{name} must be {REAL_ARRAY}, got {got}")
        dtype = out_a.dtype if name.startswith("out") or out_a.dtype.itemsize > 2 else np.dtype(np.float32)
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} like out_a, got {x.dtype}")
        shape = out_a.shape if name.startswith("out") else out_a.shape[:-1]
        if x.shape != shape or not out_a.ndim:
            raise ValueError(f"{name} must have shape {shape if out_a.ndim else '(..., Dv)'}, got {x.shape}")
    lse = np.logaddexp(lse_a, lse_b)
    with np.errstate(invalid="ignore"):  # -inf - -inf, where neither side attends to anything
        weight_a, weight_b = (np.where(x == -np.inf, x.dtype.type(0), np.exp(x - lse)) for x in (lse_a, lse_b))
    out = weight_a[..., None] * widened(out_a) + weight_b[..., None] * widened(out_b)
    return out.astype(out_a.dtype, copy=False), lse


@any_library
def attention_weights(
    query: Array,
    key: Array,
    pattern: AnyPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    region_query: Array | None = None,
    region_key: Array | None = None,
) -> Array:
    """The effective attention W: how much of each position's value is in each query's output (eq 8).

    ``W @ value == attention(query, key, value, ...)``; rows sum to 1, or to 0 with nothing to attend to. Parameters as
    in `attention`.

    Returns
    -------
    W : `[..., Hq, L, L]` (`[L, L]` for `[L, D]` inputs)

    Notes
    -----
    This is `attention` with the identity for values, up to 512 columns at a time: O(L^2) memory and L / 512 times the
    cost of attention with Dv = 512. To look at, not to compute with.
    """
    options: AttentionOptions = {
        "is_causal": is_causal,
        "scale": scale,
        "key_mask": key_mask,
        "cu_seqlens": cu_seqlens,
        "region_query": region_query,
        "region_key": region_key,
    }
    like = attention(query, key, key, pattern, **options)  # checks every argument, L = 0 too
    L = like.shape[-2]
    weights = np.empty((*like.shape[:-1], L), like.dtype)
    for first in range(0, L, 512):
        columns = np.eye(L, min(512, L - first), -first, like.dtype)
        value = np.broadcast_to(columns, (*np.shape(key)[:-1], columns.shape[1]))
        attention(query, key, value, pattern, out=weights[..., first : first + 512], **options)
    return weights
