# SPDX-License-Identifier: Apache-2.0
"""The effective attention: what a factorization's softmaxes amount to, as one matrix of queries and positions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .arguments import Array
from .composed import AnyPattern
from .functional import attention
from .interchange import any_library
from .problem import is_turned, turn
from .signatures import AttentionOptions, Layout


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
    layout: Layout = "BHLD",
    region_query: Array | None = None,
    region_key: Array | None = None,
    softcap: float | None = None,
    key_bias: Array | None = None,
    region_bias: Array | None = None,
    sink: Array | None = None,
) -> Array:
    """The effective attention W: how much of each position's value is in each query's output (eq 8).

    ``W @ value == attention(query, key, value, ...)``; a row sums to 1 less the weight of a sink, or to 0 with nothing
    to attend to. Parameters and errors are those of `attention`.

    Returns
    -------
    W : `[..., Hq, L, L]` (`[L, L]` for `[L, D]` inputs)

    Notes
    -----
    W is `attention` with the identity for values, at most 512 columns at a time: O(L^2) memory and L / 512 times the
    time of attention with Dv = 512. It serves inspection and pictures.
    """
    options: AttentionOptions[Array, int] = {
        "is_causal": is_causal,
        "scale": scale,
        "key_mask": key_mask,
        "cu_seqlens": cu_seqlens,
        "region_query": region_query,
        "region_key": region_key,
        "softcap": softcap,
        "key_bias": key_bias,
        "region_bias": region_bias,
        "sink": sink,
    }
    if is_turned(layout):
        query, key = turn(query), turn(key)
        options |= {"region_query": turn(region_query), "region_key": turn(region_key)}
    like = attention(query, key, key, pattern, **options)  # checks every argument, L = 0 too
    L = like.shape[-2]
    weights = np.empty((*like.shape[:-1], L), like.dtype)
    for first in range(0, L, 512):
        columns = np.eye(L, min(512, L - first), -first, like.dtype)
        value = np.broadcast_to(columns, (*np.shape(key)[:-1], columns.shape[1]))
        attention(query, key, value, pattern, out=weights[..., first : first + 512], **options)
    return weights
