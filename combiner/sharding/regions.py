# SPDX-License-Identifier: Apache-2.0
"""Which regions of the whole sequence's plan a rank's regions are.

Regions are listed level by level and, within a level, from left to right (docs/mathematics.md, "Region order"). The
regions of a level begin at equal steps, and a shard of n positions holds whole steps:

    the whole, level 1   | 0  1 | 2  3 | 4  5 | 6  7 |     2 positions to a region, 2 regions to a shard of 4
    the whole, level 2   |   8  |   9  |  10  |  11  |     a shard to a region: the rows that ranks send
    the whole, level 3   |      12     |      13     |     blocks of shards, which no shard holds
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..arguments import Array
from ..patterns import Axial, Factorization, Fixed, Tree


class RegionNumbers(NamedTuple):
    """Numbers of regions in the plan of the whole sequence; -1 for a region that this plan does not have, which is a
    shard of one position or a shard that is the whole sequence."""

    total: int  # R of the whole
    near: Array  # the regions of the shard as if it were the whole
    own: Array  # the regions that the rank summarizes
    blocks: Array  # blocks of shards


def region_numbers(
    pattern: Factorization, n: int, ranks: int, rank: int, own_steps: tuple[int, ...], blocks: int
) -> RegionNumbers:
    """The numbers of one rank's regions.

    Parameters
    ----------
    n : positions of a rank.
    own_steps : the positions from one region of the rank's own to the next, level by level.
    blocks : the number of blocks of shards.
    """
    first: dict[int, int] = {}  # of each level of the whole
    count = 0
    for step in _steps(pattern, n * ranks):
        first[step] = count
        count += -(-n * ranks // step)

    def of(steps: tuple[int, ...]) -> Array:
        here = [np.arange(n // step) + first[step] + rank * (n // step) if step in first else [-1] for step in steps]
        return np.concatenate([np.zeros(0, np.int64), *here]).astype(np.int64)

    return RegionNumbers(count, of(_steps(pattern, n)), of(own_steps), np.arange(count - blocks, count))


def _steps(pattern: Factorization, length: int) -> tuple[int, ...]:
    """The positions from one region to the next, level by level, in the plan of a sequence of this length."""
    match pattern:
        case Fixed(span=int(span)):
            return (span,)
        case Axial():  # row-major: a region for each position
            return (1,)
        case Tree(branching=base, levels=levels):
            pass
        case _:  # LogSparse
            base, levels = 2, None
    steps: list[int] = []
    while len(steps) != levels and base ** (len(steps) + 1) < length:
        steps.append(base ** (len(steps) + 1))
    return tuple(steps)


def check_region_bias(shape: tuple[int, ...], count: int) -> None:
    """Refuses biases of another number of regions than the whole sequence has. The core checks the other axes."""
    if shape[-1:] != (count,):
        raise ValueError(f"region_bias must be of all {count} regions of the whole sequence, got shape {tuple(shape)}")


def has_own_biases(numbers: RegionNumbers, has_key_bias: bool) -> bool:
    """Whether a rank's own regions have given biases: a shard of one position has the bias of its key, if keys have
    any."""
    return not has_key_bias or bool((numbers.own >= 0).any())


class GivenBiases:
    """The biases of a rank's regions out of `region_bias` `[..., heads, R]`, and their gradients: None without it."""

    def __init__(self, region_bias: Array | None, numbers: RegionNumbers, has_key_bias: bool) -> None:
        self.near = self.own = self.blocks = self._padded = None
        if region_bias is None:
            return
        check_region_bias(region_bias.shape, numbers.total)
        # A region that the whole sequence does not have, number -1, has the bias 0 at the end.
        self._padded = padded = np.append(
            region_bias, np.zeros((*region_bias.shape[:-1], 1), region_bias.dtype), axis=-1
        )
        self.near, self.blocks = padded[..., numbers.near], padded[..., numbers.blocks]
        if has_own_biases(numbers, has_key_bias):
            self.own = padded[..., numbers.own]

    def zeros(self) -> Array | None:
        """A gradient to add to, with the 0 at the end."""
        return None if self._padded is None else np.zeros_like(self._padded)

    @staticmethod
    def add(total: Array | None, numbers: Array, part: Array | None) -> None:
        """Adds the gradients of these regions."""
        if total is not None and part is not None:
            total[..., numbers] += part
