# SPDX-License-Identifier: Apache-2.0
"""Right arguments of `attention`, for the tests that make them wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from combiner import Fixed

B, HQ, HK, L, D, DV, SPAN = 2, 4, 2, 12, 8, 5, 4
R = L // SPAN
PATTERN = Fixed(SPAN)


def normal(*shape: int, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def good(dtype: type = np.float64) -> dict[str, Any]:
    """Every argument of `attention`, all of them right."""
    return {
        "query": normal(B, HQ, L, D, dtype=dtype),
        "key": normal(B, HK, L, D, dtype=dtype),
        "value": normal(B, HK, L, DV, dtype=dtype),
        "pattern": PATTERN,
        "is_causal": True,
        "scale": 0.3,
        "key_mask": np.random.default_rng(0).random((B, L)) < 0.8,
        "region_query": normal(B, HQ, R, D, dtype=dtype),
        "region_key": normal(B, HK, R, D, dtype=dtype),
        "out": np.full((B, HQ, L, DV), 7, dtype),
    }


HUGE = 2**45
