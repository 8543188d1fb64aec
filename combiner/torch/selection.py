# SPDX-License-Identifier: Apache-2.0
"""The choice of regions: `combiner.select` of tensors, as an operator without gradients."""

from __future__ import annotations

from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor

from .. import selection
from ..arguments import as_integer, choice_number
from ..composed import AnyPattern
from ..foreign_names import explains_foreign_names
from .arguments import as_bounds, check_scale, check_tensors, whole_key_mask
from .library import define
from .pattern_text import pattern_of, text_of
from .patterns import Routing, choices_of


def _compute(query: Any, key: Any, pattern: str, clusters: Any, k: int, block: int, *given: Any) -> Any:
    names = ("is_causal", "scale", "key_mask", "cu_seqlens", "region_query", "region_key", "score", "causal_score")
    own = pattern_of(pattern, clusters)
    return selection.select(query, key, own, k, block=block, **dict(zip(names, given, strict=True)))


def _fake(
    query: Tensor,
    key: Tensor,
    pattern: str,
    clusters: Tensor | None,
    k: int,
    block: int,
    is_causal: bool,
    scale: float | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *_: Any,
) -> Tensor:
    is_packed = cu_seqlens is not None  # its numbers say how many blocks there are
    blocks = torch.library.get_ctx().new_dynamic_size() if is_packed else (key.shape[-2] + block - 1) // block
    return key.new_empty((*key.shape[:-2], blocks, k), dtype=torch.int64)


_select = define(
    "select(Tensor query, Tensor key, str pattern, Tensor? clusters, int k, int block, bool is_causal, float? scale, "
    "Tensor? key_mask, Tensor? cu_seqlens, Tensor? region_query, Tensor? region_key, str score, bool? causal_score) "
    "-> Tensor",
    _compute,
    _fake,
    breaks_graph=True,
)


@explains_foreign_names
def select(
    query: Tensor,
    key: Tensor,
    pattern: AnyPattern | Routing,
    k: int,
    *,
    block: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: npt.ArrayLike | Tensor | None = None,
    region_query: Tensor | None = None,
    region_key: Tensor | None = None,
    score: Literal["max", "mean"] = "max",
    causal_score: bool | None = None,
) -> Tensor:
    """`combiner.select` of tensors: the k regions that score highest for each block of queries; no gradients.

    ::

        regions = ct.select(query, key, pattern, 4, is_causal=True)
        out = ct.attention(query, key, value, ct.Selected(pattern, regions), is_causal=True)

    Parameters
    ----------
    query, key, pattern, k, block, is_causal, scale, key_mask, cu_seqlens, region_query, region_key, score,
        causal_score : as in `combiner.select`; `pattern` may be a `Routing` of a tensor.

    Returns
    -------
    regions : `[..., Hk, T, k]` or `[T, k]`, int64, T as in `combiner.select`: what `Selected` takes.

    Raises
    ------
    TypeError, ValueError : as `attention`, and as `combiner.select`; compiled code raises the latter at run time.

    Notes
    -----
    Time of `combiner.select`. An operator: compiled without a break of the graph, and exported for any length. With
    cu_seqlens, whose numbers decide T, the graph breaks, unless
    ``torch._dynamo.config.capture_dynamic_output_shape_ops`` is True. vmap calls it once for each entry.
    """
    query, key, _, region_query, region_key = (
        x if x is None else x.detach()
        for x in check_tensors(
            "BHLD", query=query, key=key, value=key, region_query=region_query, region_key=region_key
        )
    )
    check_scale(scale)
    if not torch.compiler.is_compiling():  # there k and block may be symbolic
        k, block = as_integer("k", k, 0, bits=31), as_integer("block", block, 1)
    choice_number("score", score, selection.SCORES)
    regions: Tensor = _select(
        query,
        key,
        text_of(pattern),
        choices_of(pattern).clusters,
        k,
        block,
        is_causal,
        scale,
        whole_key_mask(key_mask, query),
        as_bounds(cu_seqlens),
        region_query,
        region_key,
        score,
        causal_score,
    )
    return regions
