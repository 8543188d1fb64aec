# SPDX-License-Identifier: Apache-2.0
"""The choice of regions, by brute force from the definition of `combiner.select`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arguments import Array
from .composed import Rows, packed_forward
from .functional import summarize
from .heads import flat
from .parts import Pattern, parts_of_heads


def select(
    query: Array,
    key: Array,
    pattern: Pattern,
    k: int,
    *,
    block: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    cu_seqlens: Sequence[int] | None = None,
    score: str = "max",
    causal_score: bool | None = None,
    **given: Any,
) -> Array:
    """`combiner.select` in float64; `given` holds region_query and region_key."""
    if cu_seqlens is not None:
        rows: Rows = {name: given.get(name) for name in ("region_query", "region_key")}
        options = {"k": k, "block": block, "is_causal": is_causal, "scale": scale, "score": score}
        options |= {"causal_score": causal_score}

        def alone(query: Array, key: Array, **own: Any) -> tuple[Array, None]:
            return select(query, key, **own), None

        each, _ = packed_forward(alone, (query, key), pattern, cu_seqlens, key_mask, rows, options)
        return np.concatenate(each, axis=-2)
    found = scores(query, key, pattern, block, is_causal, scale, key_mask, score, causal_score, **given)
    lead, L = np.shape(key)[:-2], np.shape(key)[-2]
    chosen = np.full((*flat(key).shape[:2], -(-L // block), k), -1)
    for at, of_block in found.items():
        best = sorted(of_block, key=lambda r: (-of_block[r], r))[:k]
        chosen[at][: len(best)] = best
    return chosen.reshape((*lead, *chosen.shape[2:]))


def scores(
    query: Array,
    key: Array,
    pattern: Pattern,
    block: int,
    is_causal: bool,
    scale: float | None,
    key_mask: Array | None,
    score: str,
    causal_score: bool | None,
    **given: Any,
) -> dict[tuple[int, int, int], dict[int, float]]:
    """The score of each region that a block may choose, by batch entry, key head and block; the arguments of `select`,
    without packed sequences."""
    q = flat(query)
    (B, Hq, L, D), Hk = q.shape, flat(key).shape[1]
    options = {"is_causal": is_causal, "scale": scale, "key_mask": key_mask}
    keys = given.get("region_key")
    keys = flat(summarize(query, key, key[..., :1], pattern, **options, **given).key if keys is None else keys)
    live = np.ones((B, L), bool) if key_mask is None else np.broadcast_to(key_mask, (B, L))
    factor = 1 / math.sqrt(D) if scale is None else scale
    blocks, of_first = -(-L // block), is_causal if causal_score is None else causal_score
    parts = parts_of_heads(pattern, B, Hk, L, is_causal)
    found: dict[tuple[int, int, int], dict[int, float]] = {}
    for b, hk, t in itertools.product(range(B), range(Hk), range(blocks)):
        own = parts[b, hk]
        rows = [[j] for j in range(L)]
        for members in own.members:
            rows.append([j for m in members for j in rows[m]])
        queries = range(t * block, t * block + 1 if of_first else min(L, (t + 1) * block))
        logits: dict[int, list[float]] = {}
        for h, i in itertools.product(range(hk * Hq // Hk, (hk + 1) * Hq // Hk), queries):
            for r in own.regions[i]:
                if size := int(live[b, rows[L + r]].sum()):
                    x = factor * float(q[b, h, i] @ keys[b, h * keys.shape[1] // Hq, r])
                    logits.setdefault(r, []).append(x + own.size_bias * math.log(size))
        found[b, hk, t] = {r: float(np.mean(x)) if score == "mean" else max(x) for r, x in logits.items()}
    return found
