# SPDX-License-Identifier: Apache-2.0
"""Some rows of the effective attention W (docs/mathematics.md, section 2), and dense attention of some queries alone.

W has L^2 numbers. What is here takes O(L) memory for each row that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np

from .arguments import Array, widened
from .composed import AnyPattern
from .functional import attention_backward, attention_forward
from .plan import Plan
from .signatures import AttentionOptions


def weight_rows(
    query: Array,
    key: Array,
    pattern: AnyPattern,
    queries: Sequence[int],
    **options: Unpack[AttentionOptions[Array, int]],
) -> Array:
    """The rows of W of some queries, of one head: `[n, L]`.

    Row i of W is the gradient of one output number of query i with respect to a feature of every value. One backward
    call with n features has n rows: each feature is read at a query of its own.

    Parameters
    ----------
    query, key : `[L, D]`; 16-bit dtypes are computed as float32.
    queries : n positions, at most 1,024.
    options : those of `attention`.

    Notes
    -----
    Time of attention forward and backward with Dv = n; memory O(L n).
    """
    query, key = widened(query), widened(key)
    value = np.zeros((len(query), len(queries)), query.dtype)
    grad_out = np.zeros_like(value)
    grad_out[list(queries), np.arange(len(queries))] = 1
    _, saved = attention_forward(query, key, value, pattern, **options)
    return attention_backward(grad_out, saved).value.T


def dense_rows(length: int, queries: Sequence[int], is_causal: bool) -> Plan:
    """Dense attention of some queries; the others attend nothing. O(n L) memory for n queries."""
    size = np.zeros(length, np.int64)
    at = np.unique(np.array(queries, np.int64))
    size[at] = at + 1 if is_causal else length
    keys = [np.zeros(0, np.int64), *(np.arange(size[i]) for i in at.tolist())]
    offsets = np.concatenate([[0], np.cumsum(size)])
    return Plan.from_parts((offsets, np.concatenate(keys)), is_causal=is_causal)
