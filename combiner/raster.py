# SPDX-License-Identifier: Apache-2.0
"""A plan as pixels: what a picture of any size shows of what each query attends.

                    keys, b to a pixel
                 0    b    2b   3b  ..
    query b - 1  [DIR][   ][   ][   ]       a row of pixels is one query: the last of each b queries, so that a
    query 2b - 1 [REG][DIR][   ][   ]       causal picture has its diagonal at any length
    query 3b - 1 [REG][REG][DIR][   ]       a pixel is b keys of that query, and shows the rarest that is among them

Up to 512 positions b is 1: every pair of a query and a key has a pixel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ._core import Plan
from .arguments import Array
from .plan_lists import positions_below, rows_of

# What a pixel shows, the rarest last: a pixel has the largest number of its keys.
NOTHING, FUTURE, REGION, SEVERAL, DIRECT, DIRECT_TOO = range(6)
SHADES = 8  # regions are told apart by this many shades
MIXED_SHADE = 3  # of a pixel whose keys lie in different regions
MIXED = -2  # the owner of a pixel whose keys lie in different regions
MOST_REGIONS = 2048  # with more, the shades of regions follow from where they start alone
PIXELS = 512  # in a row of a picture; where there are more cells than that, half as many


@dataclass(frozen=True, slots=True)
class Raster:
    """What the queries of a plan attend, in pixels: a row for each of n queries, of n' pixels (n' = n but for chosen
    queries)."""

    length: int
    block: int  # b, the keys of a pixel
    queries: Array  # [n]
    kind: Array  # [n, n] uint8: NOTHING .. DIRECT_TOO
    shade: Array  # [n, n]: 0 .. SHADES - 1, where the kind is REGION or SEVERAL
    parts: Array  # [n, n] float64: where b is 1, equal numbers mean that the same parts cover two cells of one plan


def block_of(count: int, most: int = PIXELS) -> int:
    """How many of `count` things a pixel has: one each while there are at most `most` of them."""
    return 1 if count <= most else -(-2 * count // most)


def last_queries(length: int, most: int = PIXELS) -> Array:
    """The queries that a picture shows: the last of each block."""
    block = block_of(length, most)
    return np.minimum(np.arange(block, length + block, block), length) - 1


def raster(
    plan: Plan, most: int = PIXELS, *, queries: Sequence[int] | None = None, keep: Array | None = None
) -> Raster:
    """The pixels of a plan: L in a row up to `most` positions, at most half of `most` beyond.

    Parameters
    ----------
    queries : the queries to show; None for the last of each b.
    keep : bool `[L]`: the keys that take part; None for all.

    Notes
    -----
    Time O(n L + P) and memory O(n^2 + L + P), with P the pairs of the n queries that are shown.
    """
    L = plan.length
    block = block_of(L, most)
    starts = np.arange(0, L, block)
    shown = last_queries(L, most) if queries is None else np.array(queries, np.int64)
    attended = rows_of(plan, shown.tolist())
    regions = {row - L for rows in attended for row in rows[np.searchsorted(rows, L) :].tolist()}
    below = positions_below(plan, sorted(regions))
    # A part's random number; a cell has the sum over its parts. All direct keys count as one part.
    number = np.random.default_rng(0).random(L + plan.region_count)
    number[:L] = 2
    shape = len(shown), len(starts)
    kind, owner, parts = np.zeros(shape, np.uint8), np.full(shape, -1), np.zeros(shape)
    for at, (query, rows) in enumerate(zip(shown.tolist(), attended, strict=True)):
        direct, of_regions = np.split(rows, [np.searchsorted(rows, L)])
        members = [below[r] for r in (of_regions - L).tolist()]
        keys = np.concatenate([direct, *members])
        sizes = np.fromiter(map(len, members), np.int64, len(members))
        row = np.repeat(rows, np.concatenate([np.ones(len(direct), np.int64), sizes]))
        if keep is not None:
            keys, row = keys[keep[keys]], row[keep[keys]]
        count = np.bincount(keys, minlength=L)
        is_direct = np.zeros(L, bool)
        is_direct[keys[row < L]] = True
        kinds = np.where(count > 0, REGION, NOTHING)
        kinds[count > 1] = SEVERAL
        kinds[is_direct] = np.where(count[is_direct] > 1, DIRECT_TOO, DIRECT)
        first = np.full(L, -1)
        first[keys[::-1]] = row[::-1]  # the first region, where several overlap
        first[is_direct] = -1
        if plan.is_causal:
            kinds[query + 1 :] = FUTURE
        kind[at] = np.maximum.reduceat(kinds, starts)
        last = np.maximum.reduceat(first, starts)
        lowest = np.minimum.reduceat(np.where(first < 0, L + plan.region_count, first), starts)
        owner[at] = np.where(last < 0, -1, np.where(last == lowest, last, MIXED))
        parts[at] = np.bincount(keys // block, number[row], len(starts))
    return Raster(L, block, shown, kind, _shades(owner, {L + r: below[r] for r in regions}), parts)


def together(pictures: Sequence[Raster]) -> Raster:
    """The pixels of several plans of the same positions, whose attentions are averaged.

    A pixel that one plan attends is as in that plan. One that several attend is DIRECT if all of them attend it
    directly, DIRECT_TOO if some do, SEVERAL if none does.
    """
    first, *others = pictures
    if not others:
        return first
    kinds = np.stack([each.kind for each in pictures])
    is_seen, is_direct = kinds >= REGION, kinds >= DIRECT
    kind = kinds.max(axis=0)
    several = is_seen.sum(axis=0) > 1
    kind[several] = np.where(
        (is_direct == is_seen).all(axis=0), DIRECT, np.where(is_direct.any(axis=0), DIRECT_TOO, SEVERAL)
    )[several]
    return replace(first, kind=kind)


def _shades(owner: Array, below: dict[int, Array]) -> Array:
    """A shade for each pixel: that of the region that owns it, 0 where none does.

    Parameters
    ----------
    owner : `[n, n]` the row of the table of a pixel's region; -1 for none, MIXED for several.
    below : the positions of each region, by its row of the table.

    Regions choose one after another. A region avoids the shades of regions that it touches. Among the others it takes
    the shade that the fewest regions of the same queries have; then that of a region that starts at the same position;
    then the first.
    """
    regions, number = np.unique(owner, return_inverse=True)
    number = number.reshape(owner.shape)
    first = int(np.searchsorted(regions, 0))
    regions, number = regions[first:], number - first  # negative for what no single region owns
    R = len(regions)
    starts = [int(below[row][0]) for row in regions.tolist()]
    if R > MOST_REGIONS:
        of_region = np.unique(starts, return_inverse=True)[1] % SHADES
    else:
        of_region = _spread(number, starts)
    of_number = np.concatenate([of_region, [MIXED_SHADE, 0]]).astype(np.int64)  # the last two: -2 and -1
    return of_number[np.where(number >= 0, number, np.where(owner == MIXED, R, R + 1))]


def _spread(number: Array, starts: list[int]) -> Array:
    """The shades of the regions `0 .. R - 1` that own the pixels, as `_shades` says."""
    n, R = len(number), len(starts)
    sees = np.zeros((n, R + 1), np.float32)
    sees[np.arange(n)[:, None], np.where(number < 0, R, number)] = 1
    together = sees[:, :R].T @ sees[:, :R] > 0
    left, right = number[:, :-1], number[:, 1:]
    both = (left >= 0) & (right >= 0)
    touching = np.zeros((R, R), bool)
    touching[left[both], right[both]] = touching[right[both], left[both]] = True
    shade = np.zeros(R, np.int64)
    starting: dict[int, int] = {}  # from a region's first position to the last shade chosen there
    for r, start in enumerate(starts):
        cost = 2 * np.bincount(shade[:r][together[r, :r]], minlength=SHADES)
        cost += 4 * R * np.bincount(shade[:r][touching[r, :r]], minlength=SHADES)
        if start in starting:
            cost[starting[start]] -= 1
        starting[start] = shade[r] = int(cost.argmin())
    return shade
