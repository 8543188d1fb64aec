# SPDX-License-Identifier: Apache-2.0
"""The functions of `combiner`, in float64 NumPy. Arguments and results are those of `combiner.functional`.

`saved` is a dict of the tables, or of what is saved for each sequence or each component.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arguments import Array
from ..composed import Mixture
from ..signatures import AttendGradients, Gradients, Summary
from .composed import (
    Rows,
    Saved,
    cut,
    join,
    join_gradients,
    mean_of_gradients,
    mixture_forward,
    packed_backward,
    packed_forward,
    packed_out,
)
from .heads import Heads, flat
from .parts import Pattern
from .passes import Table


def attention(
    query: Array, key: Array, value: Array, pattern: Pattern, *, return_lse: bool = False, **options: Any
) -> Array | tuple[Array, Array]:
    """Both stages: out `[..., Hq, L, Dv]`, or (out, lse) with lse `[..., Hq, L]`. Options are `attention_forward`'s."""
    out, saved = attention_forward(query, key, value, pattern, **options)
    return (out, saved["lse"]) if return_lse else out


def attention_forward(
    query: Array,
    key: Array,
    value: Array,
    pattern: Pattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: Sequence[int] | None = None,
    region_query: Array | None = None,
    region_key: Array | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    dropout_row: int = 0,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
) -> tuple[Array, Saved]:
    """out and what `attention_backward` needs. `dropout_row` is the number of the first row that dropout numbers."""
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p, "seed": seed}
    options |= {"softcap": softcap, "sink": sink}
    rows: Rows = {"region_query": region_query, "region_key": region_key}
    rows |= {"key_bias": key_bias, "region_bias": region_bias}
    if cu_seqlens is not None:
        given = (query, key, value), pattern, cu_seqlens, key_mask, rows, options
        return packed_out(*packed_forward(attention_forward, *given))
    if isinstance(pattern, Mixture):
        return mixture_forward(attention_forward, (query, key, value), pattern, key_mask, rows, options)
    inputs = query, key, value, pattern, is_causal, scale, key_mask
    heads = Heads(*inputs, dropout_p, seed, dropout_row, softcap, key_bias, sink)
    for at, table in heads:
        _stage_1(heads, at, table, rows)
        table.attend()
    out = heads.write(heads.Hq, (heads.L, heads.Dv), lambda table: table.out)
    lse = heads.write(heads.Hq, (heads.L,), lambda table: table.lse[:, : heads.L])
    return out, {"heads": heads, "out": out, "lse": lse, "sink": sink, **rows}


def _stage_1(heads: Heads, at: tuple[Array, Array], table: Table, rows: Rows) -> None:
    region_bias = rows["region_bias"]
    table.abstract(
        heads.read_if_given(rows["region_query"], *at),
        heads.read_if_given(rows["region_key"], *at),
        None if region_bias is None else heads.read_biases(region_bias, *at),
    )
    table.summarize(rows["region_key"] is not None, region_bias is not None)


def _stage_1_backward(table: Table, saved: Saved) -> None:
    given = [saved[name] is not None for name in ("region_query", "region_key", "region_bias")]
    table.summarize_backward(*given[1:])
    table.abstract_backward(*given)


def _gradients(heads: Heads, saved: Saved) -> Gradients:
    return Gradients(
        *heads.backward(),
        heads.region_backward(saved["region_query"], "dQ"),
        heads.region_backward(saved["region_key"], "dK"),
        heads.biases_backward(saved["key_bias"]),
        heads.biases_backward(saved["region_bias"], of_regions=True),
        heads.sink_backward(saved["sink"]),
    )


def attention_backward(grad_out: Array, saved: Saved, *, grad_lse: Array | None = None) -> Gradients:
    """The exact derivatives of sum(out * grad_out) + sum(lse * grad_lse)."""
    if "sequences" in saved:
        return Gradients(**packed_backward(attention_backward, grad_out, saved, grad_lse))
    if "components" in saved:
        return Gradients(**mean_of_gradients([attention_backward(grad_out, own) for own in saved["components"]]))
    heads: Heads = saved["heads"]
    for at, table in heads:
        table.zero_gradients()
        table.attend_backward(heads.read(grad_out, *at), _lse_rows(heads, grad_lse, *at))
        _stage_1_backward(table, saved)
    return _gradients(heads, saved)


def _lse_rows(heads: Heads, grad_lse: Array | None, b: Array, h: Array) -> Array:
    return (
        np.zeros((len(b), heads.L)) if grad_lse is None else heads.read(np.asarray(grad_lse)[..., None], b, h)[..., 0]
    )


def summarize(query: Array, key: Array, value: Array, pattern: Pattern, **options: Any) -> Summary:
    """Stage 1. Rows of regions that no query attends, or whose members are all masked, are zero, their lse -inf."""
    return summarize_forward(query, key, value, pattern, **options)[0]


def summarize_forward(
    query: Array,
    key: Array,
    value: Array,
    pattern: Pattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: Sequence[int] | None = None,
    region_query: Array | None = None,
    region_key: Array | None = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
) -> tuple[Summary, Saved]:
    """The summary and what `summarize_backward` needs."""
    rows: Rows = {"region_query": region_query, "region_key": region_key}
    rows |= {"key_bias": key_bias, "region_bias": region_bias}
    if cu_seqlens is not None:
        options = {"is_causal": is_causal, "scale": scale, "softcap": softcap}
        given = (query, key, value), pattern, cu_seqlens, key_mask, rows, options
        results, saved = packed_forward(summarize_forward, *given)
        k_R, h_R = (np.concatenate(x, axis=-2) for x in zip(*(own[:2] for own in results), strict=True))
        lse, b_R = (join(x, axis=-1) for x in zip(*(own[2:] for own in results), strict=True))
        assert lse is not None
        return Summary(k_R, h_R, lse, b_R), saved
    heads = Heads(query, key, value, pattern, is_causal, scale, key_mask, softcap=softcap, key_bias=key_bias)
    for at, table in heads:
        _stage_1(heads, at, table, rows)
    if region_key is not None:
        key_heads = flat(region_key).shape[1]
    else:
        key_heads = heads.Hq if heads.weighted else heads.Hk
    bias = key_bias if region_bias is None else region_bias
    bias_heads = max(heads.Hk, *np.shape(bias)[-2:-1]) if bias is not None else 0
    bias_heads = heads.Hq if heads.weighted and region_bias is None else bias_heads
    summary = Summary(
        heads.write_regions(key_heads, lambda table: table.K, add=False),
        heads.write_regions(heads.Hq, lambda table: table.V),
        heads.write_regions(heads.Hq, lambda table: table.lse, empty=-np.inf),
        None if bias is None else heads.write_regions(bias_heads, lambda table: table.B[..., 0], add=False),
    )
    return summary, {"heads": heads, "sink": None, **rows}


def summarize_backward(
    grad_summary_key: Array | None,
    grad_summary_value: Array | None,
    saved: Saved,
    *,
    grad_summary_bias: Array | None = None,
) -> Gradients:
    """The exact derivatives of sum(key * grad_summary_key) + sum(value * grad_summary_value) + sum(bias *
    grad_summary_bias); each may be None."""
    if "sequences" in saved:
        each = [
            summarize_backward(
                cut(grad_summary_key, regions),
                cut(grad_summary_value, regions),
                own,
                grad_summary_bias=cut(grad_summary_bias, regions, axis=-1),
            )
            for own, regions in zip(saved["sequences"], saved["regions"], strict=True)
        ]
        return Gradients(**join_gradients(each))
    heads: Heads = saved["heads"]
    share_bias = 1 if grad_summary_bias is None else heads.Hq // flat(grad_summary_bias[..., None]).shape[1]
    share = 1 if grad_summary_key is None else heads.Hq // flat(grad_summary_key).shape[1]
    for at, table in heads:
        table.zero_gradients()
        used = np.array(table.summarized, int)
        if grad_summary_key is not None:
            first = at[1] % share == 0  # query heads share a k_R: its gradient enters at the first of them
            table.dK[np.ix_(first, used)] = heads.read(grad_summary_key, *at)[np.ix_(first, used - heads.L)]
        if grad_summary_value is not None:
            table.dV[:, used] = heads.read(grad_summary_value, *at)[:, used - heads.L]
        if grad_summary_bias is not None:
            first = at[1] % share_bias == 0
            table.dB[np.ix_(first, used)] = heads.read(grad_summary_bias[..., None], *at)[np.ix_(first, used - heads.L)]
        _stage_1_backward(table, saved)
    return _gradients(heads, saved)


def attend(
    query: Array,
    key: Array,
    value: Array,
    region_key: Array,
    region_value: Array,
    pattern: Pattern,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """Stage 2, with given k_R and h_R: out, or (out, lse). Options are `attend_forward`'s."""
    out, saved = attend_forward(query, key, value, region_key, region_value, pattern, **options)
    return (out, saved["lse"]) if return_lse else out


def attend_forward(
    query: Array,
    key: Array,
    value: Array,
    region_key: Array,
    region_value: Array,
    pattern: Pattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
    offset: int | None = None,
) -> tuple[Array, Saved]:
    """out and what `attend_backward` needs."""
    rows: Rows = {"region_key": region_key, "region_value": region_value}
    rows |= {"key_bias": key_bias, "region_bias": region_bias}
    if offset is not None:  # those rows of a call whose other queries are 0
        some, L = slice(offset, offset + np.shape(query)[-2]), np.shape(key)[-2]
        every: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "key_mask": key_mask, "dropout_p": dropout_p}
        every |= {"seed": seed, "softcap": softcap, "key_bias": key_bias, "region_bias": region_bias, "sink": sink}
        every |= {"cu_seqlens": cu_seqlens}
        whole = _among(query, L, some)
        out, saved = attend_forward(whole, key, value, region_key, region_value, pattern, **every)
        own: Saved = {"among": saved, "L": L, "rows": some, "out": out[..., some, :], "lse": saved["lse"][..., some]}
        return own["out"], own
    if cu_seqlens is not None:
        options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p, "seed": seed}
        options |= {"softcap": softcap, "sink": sink}
        given = (query, key, value), pattern, cu_seqlens, key_mask, rows, options
        return packed_out(*packed_forward(attend_forward, *given))
    inputs = query, key, value, pattern, is_causal, scale, key_mask
    heads = Heads(*inputs, dropout_p, seed, 0, softcap, key_bias, sink)
    for at, table in heads:
        if region_bias is not None:
            table.B[:, heads.L :] = heads.read_biases(region_bias, *at)[:, : table.R]
        table.K[:, heads.L :] = heads.read(region_key, *at)[:, : table.R]
        table.V[:, heads.L :] = heads.read(region_value, *at)[:, : table.R]
        table.attend()
    out = heads.write(heads.Hq, (heads.L, heads.Dv), lambda table: table.out)
    lse = heads.write(heads.Hq, (heads.L,), lambda table: table.lse[:, : heads.L])
    return out, {"heads": heads, "out": out, "lse": lse, "sink": sink, **rows}


def attend_backward(grad_out: Array, saved: Saved, *, grad_lse: Array | None = None) -> AttendGradients:
    """The exact derivatives of sum(out * grad_out) + sum(lse * grad_lse) through stage 2."""
    if "sequences" in saved:
        return AttendGradients(**packed_backward(attend_backward, grad_out, saved, grad_lse))
    if "among" in saved:
        some, L = saved["rows"], saved["L"]
        of_lse = None if grad_lse is None else _among(grad_lse[..., None], L, some)[..., 0]
        every = attend_backward(_among(grad_out, L, some), saved["among"], grad_lse=of_lse)
        return every._replace(query=every.query[..., some, :])
    heads: Heads = saved["heads"]
    for at, table in heads:
        table.zero_gradients()
        table.attend_backward(heads.read(grad_out, *at), _lse_rows(heads, grad_lse, *at))
    return AttendGradients(
        *heads.backward(),
        heads.write_regions(flat(saved["region_key"]).shape[1], lambda table: table.dK),
        heads.write_regions(flat(saved["region_value"]).shape[1], lambda table: table.dV),
        heads.biases_backward(saved["key_bias"]),
        heads.biases_backward(saved["region_bias"], of_regions=True),
        heads.sink_backward(saved["sink"]),
    )


def _among(x: Array, L: int, some: slice) -> Array:
    """x `[..., n, features]` as some of L rows, the others 0."""
    whole = np.zeros((*np.shape(x)[:-2], L, np.shape(x)[-1]))
    whole[..., some, :] = x
    return whole


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """(out, lse) of one softmax over the parts of a and the parts of b."""
    out_a, lse_a, out_b, lse_b = (np.asarray(x, np.float64) for x in (out_a, lse_a, out_b, lse_b))
    lse: Array = np.logaddexp(lse_a, lse_b)
    with np.errstate(invalid="ignore"):  # -inf - -inf: neither side attends to anything
        a, b = (np.where(x == -np.inf, 0.0, np.exp(x - lse)) for x in (lse_a, lse_b))
    out: Array = a[..., None] * out_a + b[..., None] * out_b
    return out, lse


def attention_weights(query: Array, key: Array, pattern: Pattern, **options: Any) -> Array:
    """The effective attention W `[..., Hq, L, L]` (eq 8). Rows sum to 1, or to 0 with nothing to attend to."""
    nothing = np.zeros((*np.shape(key)[:-1], 0))
    return _weights(attention_forward(query, key, nothing, pattern, **options)[1])


def _weights(saved: Saved) -> Array:
    if "components" in saved:
        mean: Array = np.mean([_weights(own) for own in saved["components"]], axis=0)
        return mean
    if "sequences" in saved:
        whole = np.zeros((*saved["out"].shape[:-1], saved["out"].shape[-2]))
        for own, positions in zip(saved["sequences"], saved["positions"], strict=True):
            whole[..., positions, positions] = _weights(own)
        return whole
    heads: Heads = saved["heads"]
    return heads.write(heads.Hq, (heads.L, heads.L), lambda table: table.weights())
