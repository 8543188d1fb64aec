# SPDX-License-Identifier: Apache-2.0
"""The regions that matter to a block of queries: what `Selected` opens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from . import _core
from .arguments import Array, as_integer, check_bool, choice_number, is_real, widened
from .composed import AnyPattern, Mixture, block_bounds
from .interchange import any_library
from .problem import SUMMARIZE, make_problem

SCORES = ("max", "mean")  # numbered as in combiner.h


@any_library
def select(
    query: Array,
    key: Array,
    pattern: AnyPattern,
    k: int,
    *,
    block: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    region_query: Array | None = None,
    region_key: Array | None = None,
    score: Literal["max", "mean"] = "max",
    causal_score: bool | None = None,
) -> Array:
    """The k regions of `pattern` that score highest, for each block of queries: the `regions` of `Selected`. Ours.

    ::

        regions = combiner.select(query, key, pattern, 4, is_causal=True)
        out = combiner.attention(query, key, value, combiner.Selected(pattern, regions), is_causal=True)

    A region's score is the maximum or the mean of its logits ``scale * query . k_R`` over the block's queries that
    attend the region, and over the query heads of the key head. With the pattern's size_bias, the log of the region's
    unmasked positions is added. A region that no query of the block attends is never chosen, nor is one that `key_mask`
    leaves empty.

    With a score over the whole block, the choice for a query depends on later queries of its block, up to block - 1
    positions ahead; attention itself does not. With `causal_score` a region is scored by the first query of the block
    alone, among the regions that this query attends, so that nothing of a later position reaches the choice.

    Parameters
    ----------
    query : `[..., Hq, L, D]` or `[L, D]`, of a dtype that `attention` takes.
    key : `[..., Hk, L, D]` or `[L, D]`, the same dtype.
    pattern : as in `attention`, but for `Mixture`.
    k : regions for each block, 0 or more.
    block : queries of a block, as in `Selected`.
    is_causal, scale, key_mask, region_query, region_key : as in `attention`. A `region_key` given is k_R; else keys are
        pooled.
    cu_seqlens : as in `attention`: the boundaries of packed sequences. Each chooses as if alone: its blocks begin at
        its first position, and its regions are numbered from 0.
    score : "max" or "mean".
    causal_score : whether the first query of a block scores alone; by default where the plan is causal.

    Returns
    -------
    regions : `[..., Hk, T, k]` or `[T, k]`, int64, T = ceil(L / block): region numbers from the highest score down; of
        equal scores the lowest number comes first. -1 where a block has less than k regions. Of packed sequences, the
        blocks of one after those of another, and T is the number of all.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError : an argument is of the wrong kind, shape or range.

    Notes
    -----
    Time O(Hq P D) for the P pairs of queries and regions, or of the blocks' first queries and regions, beside that of
    pooling the keys, O(L D). Ctrl-C, threads and bits are as in `attention`. There are no gradients.
    """
    count, size = as_integer("k", k, 0, bits=31), as_integer("block", block, 1)
    number = choice_number("score", score, SCORES)
    if isinstance(pattern, Mixture):
        raise ValueError("pattern must have one softmax, got a Mixture, whose components have one each")
    query, key = (widened(x) if is_real(x) else x for x in (query, key))  # the core refuses other objects
    region_query, region_key = (widened(x) if is_real(x) else x for x in (region_query, region_key))
    one = key[..., :1] if is_real(key) else key
    given = key, one, pattern, is_causal, scale, key_mask, cu_seqlens
    problem = make_problem(SUMMARIZE, query, *given, region_query=region_query, region_key=region_key)
    plan, mask, bounds = problem.plan, problem.key_mask, problem.cu_seqlens
    first = plan[0] if isinstance(plan, tuple) and plan else plan
    if region_key is not None:
        keys = region_key
    elif key.ndim == 2 or key.shape[-3] == 0 or getattr(first, "weighted", True):
        keys = problem.forward().summary_key
    else:  # a pooled k_R is the same for all query heads of a key head
        group = query.shape[-3] // key.shape[-3]
        keys = make_problem(SUMMARIZE, query[..., :: max(1, group), :, :], *given).forward().summary_key
    if causal_score is None:
        causal_score = is_causal or getattr(first, "is_causal", False)
    else:
        check_bool("causal_score", causal_score)
    options = size, count, number, bool(causal_score)
    if bounds is None:
        return _core.select(query, key, keys, plan, is_causal, scale, mask, *options)
    blocks = block_bounds(bounds.tolist(), size)
    chosen = np.empty((*key.shape[:-2], blocks[-1], count), np.int64)
    each, end = len(plan) // max(1, len(bounds) - 1), 0  # plans of a sequence, and the first region of the next one
    for s, (here, there) in enumerate(zip(_slices(bounds), _slices(blocks), strict=True)):
        own = plan[s * each : (s + 1) * each]
        first, end = end, end + max((one.region_count for one in own), default=0)
        chosen[..., there, :] = _core.select(
            query[..., here, :], key[..., here, :], keys[..., first:end, :], own[0] if each == 1 else own, is_causal,
            scale, None if mask is None else mask[..., here], *options,
        )  # fmt: skip
    return chosen


def _slices(bounds: Iterable[int]) -> Iterator[slice]:
    """From each bound to the next."""
    return itertools.starmap(slice, itertools.pairwise(bounds))
