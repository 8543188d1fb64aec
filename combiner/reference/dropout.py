# SPDX-License-Identifier: Apache-2.0
"""Dropout: which weights become 0 follows from seed and position alone, by the generator Philox4x32-10."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arguments import Array


def dropout_factors(dropout_p: float, seed: int, b: Array, h: Array, queries: int, rows: int) -> Array:
    """The factor of each weight `[n, queries, rows]` of the n heads (b, h): 0 with the probability dropout_p, else
    1 / (1 - dropout_p).

    The random number of row t is made of the upper 24 bits of word ``t mod 4`` of Philox4x32-10 (Salmon et al., SC
    2011), whose counter is (t div 4, query, head, batch entry) and whose key is the seed.
    """
    shape = (len(b), queries, rows)
    if dropout_p in (0, 1):
        return np.broadcast_to(1.0 - dropout_p, shape)
    fours, i = np.arange(-(-rows // 4)), np.arange(queries)[:, None]
    words = philox((fours, i, h[:, None, None], b[:, None, None]), (seed % 2**32, seed // 2**32))
    u = (np.moveaxis(words, 0, -1).reshape(*shape[:2], 4 * len(fours))[:, :, :rows] >> 8) / 2**24
    return np.where(u >= dropout_p, 1 / (1 - dropout_p), 0.0)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> Array:
    """The four 32-bit words of Philox4x32-10, `[4, ...]`, for counters of four broadcast words each."""
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    mask = np.uint64(2**32 - 1)
    for n in range(10):
        k0, k1 = (np.uint64((k + n * weyl) % 2**32) for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        ac, cc = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (cc >> np.uint64(32)) ^ b ^ k0, cc & mask, (ac >> np.uint64(32)) ^ d ^ k1, ac & mask
    return np.stack([a, b, c, d])
