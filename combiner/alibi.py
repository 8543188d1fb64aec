# SPDX-License-Identifier: Apache-2.0
"""ALiBi's biases (Press et al., "Train Short, Test Long", ICLR 2022) as a `key_bias`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .arguments import Array, as_array, as_integer


def alibi_slopes(heads: int) -> npt.NDArray[np.float64]:
    """The slope of each head, `[heads]`, float64.

    For n heads, n a power of two, a geometric sequence from 2^(-8 / n) to 2^-8. For other numbers that of the next
    smaller power of two, and then every second slope of twice as many heads.

    Parameters
    ----------
    heads : at least 0.

    Raises
    ------
    TypeError, ValueError : heads of a wrong kind or value.
    """
    count = as_integer("heads", heads, 0, bits=31)
    n = 1 << max(count.bit_length() - 1, 0)
    exponents = [*np.arange(1, n + 1) / n, *np.arange(1, 2 * n, 2) / (2 * n)][:count]
    slopes: npt.NDArray[np.float64] = 2.0 ** (-8 * np.array(exponents, np.float64))
    return slopes


def alibi_bias(
    heads: int, length: int, *, slopes: npt.ArrayLike | None = None, dtype: npt.DTypeLike = np.float32
) -> Array:
    """The `key_bias` of ALiBi, `[heads, length]`: ``slope[h] * j`` for key j.

    ALiBi adds ``slope * (j - i)`` to the logit of query i and key j <= i. The part of i is the same for all keys of the
    query, so that it changes no weight; lse is that of the biases without it. Causal attention only: a bidirectional
    query would prefer later keys. Without a `sink`: its logit has no such part, which then would not cancel. Exact in
    float32 up to 2^24 positions for the slopes that are powers of two.

    Parameters
    ----------
    heads, length : Hq, or Hk for a slope that query heads share, and L; at least 0.
    slopes : `[heads]`; None: `alibi_slopes`.
    dtype : of the result, that of lse: float64 for float64 inputs, else float32.

    Raises
    ------
    TypeError, ValueError : an argument of a wrong kind or value.
    """
    count = as_integer("length", length, 0, bits=31)
    own = alibi_slopes(heads) if slopes is None else as_array("slopes", slopes, "an array of numbers")
    if own.shape != (heads,):
        raise ValueError(f"slopes must have shape ({heads},), got {own.shape}")
    bias: Array = (own.astype(np.float64)[:, None] * np.arange(count)).astype(dtype)
    return bias
