# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4's attention: a window of positions, and compressed keys, each of which stands for a span of positions.

heavily compressed     a query attends the entries of all spans that are complete
compressed sparse      a query attends the entries that the layer's indexer chose for it
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..composed import Selected
from ..patterns import HeavilyCompressed
from ..plan import Plan
from ..torch import attend


def attend_entries(
    query: Tensor, key: Tensor, length: int, pattern: HeavilyCompressed, seen: Tensor | None, **options: Any
) -> Tensor:
    """out `[B, Hq, n, D]` of the last n of `length` positions, in O(n (window + k)) for k entries of each query.

    Parameters
    ----------
    query : `[B, Hq, n, D]`.
    key : `[B, 1, m + E, D]`, keys and values in one: the last m positions, which hold the queries' windows, then an
        entry for each of the E complete spans.
    seen : bool `[B, n, E]`, which of these entries each query attends, where the span is complete; None for all.
    options : scale, dropout_p and the terms of the logit, for `combiner.torch.attend`.
    """
    n, E = query.shape[-2], length // pattern.rate
    m = key.shape[-2] - E
    spans = -(-length // pattern.rate)
    entries = torch.nn.functional.pad(key[..., m:, :], (0, 0, 0, spans - E))  # that of the last span is not attended
    position = torch.nn.functional.pad(key[..., :m, :], (0, 0, length - m, 0))  # nor are keys before the windows
    chosen: HeavilyCompressed | Selected = pattern
    if seen is not None:
        regions = _numbers(seen.numpy(), length - n)[:, None]
        chosen = Selected(pattern, regions, block=1, open=False, rest=False)
    values = entries.expand(-1, query.shape[1], -1, -1)
    options |= {"is_causal": True, "offset": length - n if n < length else None}
    out: Tensor = attend(query, position, position, entries, values, chosen, **options)
    return out


def attend_entries_of_tokens(
    query: Tensor, key: Tensor, is_token: Tensor, window: int, seen: Tensor, **options: Any
) -> Tensor:
    """The same of whole sequences beside padding: windows count the positions of a row, and a plan of each row lists
    who attends what.

    Parameters
    ----------
    is_token : bool `[B, n]`, False for padding, whose keys no query attends.
    seen : bool `[B, n, E]`, the entries that each query attends.
    """
    n = query.shape[-2]
    plans = tuple(_plan_of_row(*row, window) for row in zip(is_token.numpy(), seen.numpy(), strict=True))
    position, entries = key[..., :n, :], key[..., n:, :]
    values = entries.expand(-1, query.shape[1], -1, -1)
    out: Tensor = attend(query, position, position, entries, values, plans, **options)
    return out


def _numbers(seen: npt.NDArray[np.bool_], earlier: int) -> npt.NDArray[np.int64]:
    """The numbers of the entries that are True in each row of `[B, n, E]`, after `earlier` rows without any:
    `[B, earlier + n, k]`, -1 where there are fewer than k."""
    B, n, E = seen.shape
    row, number = np.divmod(np.flatnonzero(seen), max(E, 1))
    count = np.bincount(row, minlength=B * n)
    place = np.arange(len(row)) - np.repeat(count.cumsum() - count, count)
    numbers = np.full((B, earlier + n, count.max(initial=0)), -1)
    numbers[row // n, earlier + row % n, place] = number
    return numbers


def _plan_of_row(is_token: npt.NDArray[np.bool_], seen: npt.NDArray[np.bool_], window: int) -> Plan:
    """The plan of one row: `is_token` `[L]`, `seen` `[L, E]`."""
    L, E = seen.shape
    key = np.arange(L)[:, None] + np.arange(1 - min(window, L), 1)
    is_direct = (key >= 0) & is_token[np.maximum(key, 0)]
    direct = _offsets(is_direct), key[is_direct]
    regions = _offsets(seen), seen.nonzero()[1]
    members = np.arange(E + 1), np.zeros(E, np.int64)  # of entries, which are given: any position
    return Plan.from_parts(direct, regions, members)


def _offsets(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Where the list of each row of a mask begins and ends."""
    return np.concatenate([[0], chosen.sum(1).cumsum()])
