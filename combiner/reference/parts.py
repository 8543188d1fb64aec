# SPDX-License-Identifier: Apache-2.0
"""Factorizations: the parts of every query's support, by brute force, straight from their definitions.

docs/mathematics.md, "Factorizations", defines them in words.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..composed import Mixture, Selected
from ..patterns import (
    Axial,
    AxialMixture,
    Dense,
    Factorization,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Routing,
    Sparse,
    Tree,
    Window,
)

Lists: TypeAlias = list[list[int]]


@dataclass(frozen=True)
class Parts:
    """A factorization of L positions as lists (section 3.1).

    Rows are numbered as in `passes`: row j < L is position j, row L + r is region r. A row listed twice counts twice.

    Parameters
    ----------
    direct : for each query the positions that it attends directly.
    regions : for each query the numbers of the regions that it attends.
    members : for each region its rows: positions, or L + r' for an earlier region r'.
    pooling, size_bias : as in `combiner.patterns.Factorization`.
    pick : for each region positions, the most wanted first: the region takes the query and key of the first one that
        is unmasked, in place of pooling. None where regions are pooled.
    weighted : whether k_R is ``sum_m p(m | R) K[m]``, in place of the pool.
    """

    direct: Lists
    regions: Lists
    members: Lists
    pooling: str = "max"
    size_bias: bool = False
    pick: Lists | None = None
    weighted: bool = False


Pattern: TypeAlias = Factorization | Sparse | Selected | Parts | Mixture


def parts(pattern: Pattern, length: int, is_causal: bool = False) -> Parts:
    """The parts of `pattern` for L = `length` positions. O(L^2) or more.

    Raises
    ------
    TypeError : a pattern without parts of its own, such as a `Mixture`.
    """
    if isinstance(pattern, Parts):
        return pattern
    if isinstance(pattern, Sparse):
        return _sparse_parts(pattern.pattern, length, is_causal)
    if isinstance(pattern, Selected):
        return _selected_parts(pattern, length, is_causal)
    L = length
    regions: Lists
    members: Lists

    def support(i: int) -> range:
        return range(i + 1 if is_causal else L)

    def earlier_or_other(t: int, own: int) -> bool:
        return t < own or (not is_causal and t > own)

    match pattern:
        case Dense():
            direct, regions, members = [list(support(i)) for i in range(L)], [[] for i in range(L)], []
        case Fixed():
            s = square_root(L) if pattern.span is None else pattern.span
            spans = range(-(-L // s))
            near = [range(max(0, i - pattern.window + 1), min(L, i + pattern.window)) for i in range(L)]
            met = [{j // s for j in near[i] if j in support(i)} for i in range(L)]  # spans that the window meets
            direct = [[j for j in support(i) if j // s in met[i]] for i in range(L)]
            regions = [[t for t in spans if t not in met[i] and earlier_or_other(t, i // s)] for i in range(L)]
            members = [[j for j in range(L) if j // s == t] for t in spans]
        case LogSparse():
            # Block n of a level holds the positions j with j >> level == n. Regions: level by level, left to right.
            levels = [level for level in range(1, L.bit_length() + 1) if 1 << level < L]
            blocks = [(level, n) for level in levels for n in range(((L - 1) >> level) + 1)]
            number = {block: r for r, block in enumerate(blocks)}
            direct = [[j for j in support(i) if j in (i, i ^ 1)] for i in range(L)]
            regions = [
                [
                    number[level, sibling]
                    for level in levels
                    if (level, sibling := (i >> level) ^ 1) in number and earlier_or_other(sibling, i >> level)
                ]
                for i in range(L)
            ]
            members = [
                [L + number[level - 1, half] for half in (2 * n, 2 * n + 1) if (level - 1, half) in number]
                if pattern.hierarchical and level >= 2
                else [j for j in range(L) if j >> level == n]
                for level, n in blocks
            ]
        case Axial() | AxialMixture():
            return _axial_parts(pattern, L, is_causal)
        case Tree():
            b = pattern.branching
            levels = [t for t in range(1, 1 + min(pattern.levels or L, L.bit_length())) if b**t < L]
            nodes = [(t, n) for t in levels for n in range(-(-L // b**t))]
            number = {node: r for r, node in enumerate(nodes)}
            direct = [[j for j in support(i) if j // b == i // b] for i in range(L)]
            regions = [
                [
                    r
                    for r, (t, n) in enumerate(nodes)
                    if (t == levels[-1] or n // b == i // b ** (t + 1)) and earlier_or_other(n, i // b**t)
                ]
                for i in range(L)
            ]
            members = [
                [j for j in range(L) if j // b == n]
                if t == 1
                else [L + number[t - 1, c] for c in range(n * b, n * b + b) if (t - 1, c) in number]
                for t, n in nodes
            ]
        case Routing():
            of: list[int] = pattern.clusters.tolist()
            direct = [[j for j in support(i) if of[j] == of[i]] for i in range(L)]
            if is_causal:
                members = [[j for j in range(t + 1) if of[j] == of[t]] for t in range(L)]
                latest = [{of[j]: j for j in range(i + 1)} for i in range(L)]
                regions = [sorted(t for c, t in latest[i].items() if c != of[i]) for i in range(L)]
            else:
                ids = range(max(of, default=-1) + 1)
                members = [[j for j in range(L) if of[j] == c] for c in ids]
                regions = [[c for c in ids if c != of[i] and members[c]] for i in range(L)]
        case Window():
            near = [range(max(0, i - pattern.size + 1), min(L, i + pattern.size)) for i in range(L)]
            direct = [[j for j in support(i) if j in near[i]] for i in range(L)]
            regions, members = [[] for i in range(L)], []
        case HeavilyCompressed():
            spans, n = range(-(-L // pattern.rate)), pattern.rate
            direct = [[j for j in support(i) if abs(i - j) < pattern.window] for i in range(L)]
            regions = [[t for t in spans if not is_causal or (t + 1) * n <= i + 1] for i in range(L)]
            members = [[j for j in range(L) if j // n == t] for t in spans]
        case _:
            raise TypeError(f"pattern must be a factorization or Parts, got {type(pattern).__name__}")
    return Parts(direct, regions, members, pattern.pooling, pattern.size_bias)


def _axial_parts(pattern: Axial | AxialMixture, length: int, is_causal: bool) -> Parts:
    """Position i lies in row i // m and column i % m of a grid."""
    L, m = length, square_root(length) if pattern.width is None else pattern.width
    order = pattern.order if isinstance(pattern, Axial) else "mixture"
    row, col, n = [i // m for i in range(L)], [i % m for i in range(L)], -(-L // m)
    members: Lists = []
    regions: Lists = [[] for _ in range(L)]

    def add_region(positions: list[int], queries: Iterable[int]) -> None:
        """The next region, which these queries attend unless it is empty."""
        for i in queries if positions else ():
            regions[i].append(len(members))
        members.append(positions)

    def reads_row(i: int, r: int) -> bool:
        return r < row[i] or (not is_causal and r > row[i])

    if order in ("vertical", "mixture"):  # t's column down to t, then, bidirectional, t's column from t on
        for t in range(L):
            below = [i for i in range(L) if row[i] == row[t] + 1 and col[i] != col[t]]
            add_region([j for j in range(t + 1) if col[j] == col[t]], below)
        for t in range(0 if is_causal else L):
            above = [i for i in range(L) if row[i] == row[t] - 1 and col[i] != col[t]]
            add_region([j for j in range(t, L) if col[j] == col[t]], above)
    if order in ("horizontal", "mixture"):  # row r without column c, or what lies left, then right, of column c
        sides = [{-1, 1}] if order == "horizontal" else [{-1}, {1}]
        for side, r, c in itertools.product(sides, range(n), range(m)):
            positions = [j for j in range(L) if row[j] == r and _sign(col[j] - c) in side]
            add_region(positions, [i for i in range(L) if col[i] == c and reads_row(i, r)])
    pick = None
    if order == "rowmajor":  # the row of t, with the query and key at t
        for t in range(L):
            # A row that ends before the query's column is picked at its last position.
            queries = [i for i in range(L) if col[t] == col[i] or (t == L - 1 and col[t] < col[i])]
            add_region([j for j in range(L) if row[j] == row[t]], [i for i in queries if reads_row(i, row[t])])
        # Where t is masked, the nearest position of its row before t, else the nearest after.
        pick = [[j for j in (*range(t, -1, -1), *range(t + 1, L)) if row[j] == row[t]] for t in range(L)]
    direct = [
        [j for j in range(i + 1 if is_causal else L) if row[j] == row[i] or (order != "rowmajor" and col[j] == col[i])]
        for i in range(L)
    ]
    weighted = isinstance(pattern, Axial) and pattern.row_key == "weighted"
    return Parts(direct, regions, members, pattern.pooling, pattern.size_bias, pick, weighted)


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)


def _sparse_parts(pattern: Factorization, length: int, is_causal: bool = False) -> Parts:
    """The parts of the sparse baseline of `pattern`: direct positions, and no regions for the others."""
    L = length
    match pattern:
        case Dense():

            def sees(i: int, j: int) -> bool:
                return True
        case Fixed():
            s = square_root(L) if pattern.span is None else pattern.span
            window = pattern.window

            def sees(i: int, j: int) -> bool:
                first, last = max(0, i - window + 1) // s, min(L - 1, i + window - 1) // s
                return first <= j // s <= last or j % s == s - 1
        case LogSparse():

            def sees(i: int, j: int) -> bool:
                level = (i ^ j).bit_length() - 1  # j lies in the sibling block of i at this level, or is i
                return i == j or j == (j | (1 << level) - 1 if j < i else j >> level << level)
        case Axial() | AxialMixture():
            m = square_root(L) if pattern.width is None else pattern.width

            def sees(i: int, j: int) -> bool:
                return i // m == j // m or i % m == j % m
        case Tree():
            b = pattern.branching

            def sees(i: int, j: int) -> bool:
                return i // b == j // b
        case Routing():
            of: list[int] = pattern.clusters.tolist()

            def sees(i: int, j: int) -> bool:
                return of[i] == of[j]
        case Window(size=size) | HeavilyCompressed(window=size):

            def sees(i: int, j: int) -> bool:
                return abs(i - j) < size
        case _:
            raise TypeError(f"pattern must be a factorization, got {type(pattern).__name__}")
    direct = [[j for j in range(i + 1 if is_causal else L) if sees(i, j)] for i in range(L)]
    return Parts(direct, [[] for _ in range(L)], [], pattern.pooling, pattern.size_bias)


def _selected_parts(pattern: Selected, length: int, is_causal: bool) -> Parts:
    """The parts of the pattern that it selects from, with each query's listed regions opened."""
    base = parts(pattern.pattern, length, is_causal)
    rows: Lists = [[j] for j in range(length)]
    for members in base.members:
        rows.append([j for m in members for j in rows[m]])
    of_blocks = pattern.regions.tolist()
    direct, regions = [], []
    for i in range(length):
        listed = {r for r in (of_blocks if pattern.regions.ndim == 1 else of_blocks[i // pattern.block]) if r >= 0}
        opened = [r for r in base.regions[i] if pattern.open and r in listed]
        below = {j for r in opened for j in rows[length + r]}
        direct.append(base.direct[i] + sorted(below - set(base.direct[i])))
        kept = [r for r in base.regions[i] if (r not in listed if pattern.rest else r in listed)]
        regions.append([] if pattern.open and not pattern.rest else kept)
    has_regions = pattern.rest or not pattern.open
    return Parts(direct, regions, base.members if has_regions else [], base.pooling, base.size_bias)


def square_root(length: int) -> int:
    """The power of two nearest sqrt(L): the default span and width."""
    return 1 << (length.bit_length() // 2)


def parts_of_heads(pattern: Pattern, B: int, Hk: int, length: int, is_causal: bool) -> dict[tuple[int, int], Parts]:
    """The parts of each batch entry and key head: one object for all, unless the pattern differs between them."""
    heads = list(itertools.product(range(B), range(Hk)))
    alone = _alone(pattern, len(heads))
    if len(alone) == 1:
        return dict.fromkeys(heads, parts(alone[0], length, is_causal))
    return {at: parts(each, length, is_causal) for at, each in zip(heads, alone, strict=True)}


def _alone(pattern: Pattern, heads: int) -> list[Any]:
    """The pattern of each batch entry and key head; one pattern where it is the same for all."""
    match pattern:
        case Routing() if pattern.clusters.ndim > 1:
            return [_with(pattern, clusters=x) for x in pattern.clusters.reshape(heads, -1)]
        case Sparse():
            return [Sparse(each) for each in _alone(pattern.pattern, heads)]
        case Selected():
            inner = _alone(pattern.pattern, heads)
            sets = [pattern.regions]
            if pattern.regions.ndim > 2:
                sets = list(pattern.regions.reshape(heads, *pattern.regions.shape[-2:]))
            count = max(len(inner), len(sets))
            return [_with(pattern, pattern=inner[n % len(inner)], regions=sets[n % len(sets)]) for n in range(count)]
    return [pattern]


def region_count(pattern: Any, B: int, Hk: int, length: int, is_causal: bool) -> int:
    """R: of heads with parts of their own the largest of theirs, of a mixture the sum of its components'."""
    if isinstance(pattern, Mixture):
        return sum([region_count(each, B, Hk, length, is_causal) for each in pattern.patterns])
    own = parts_of_heads(pattern, B, Hk, length, is_causal)
    return max((len(each.members) for each in own.values()), default=0)


def of_sequences(pattern: Any, cu_seqlens: Sequence[int]) -> list[Any]:
    """The patterns of packed sequences, each alone: clusters are cut, and the lists of blocks."""
    count = len(cu_seqlens) - 1
    segments = [slice(start, end) for start, end in itertools.pairwise(cu_seqlens)]
    match pattern:
        case Mixture():
            each = [of_sequences(component, cu_seqlens) for component in pattern.patterns]
            return [Mixture(*(component[s] for component in each)) for s in range(count)]
        case Sparse():
            return [Sparse(own) for own in of_sequences(pattern.pattern, cu_seqlens)]
        case Routing():
            return [_with(pattern, clusters=pattern.clusters[..., positions]) for positions in segments]
        case Selected():
            own = of_sequences(pattern.pattern, cu_seqlens)
            if pattern.regions.ndim == 1:
                return [_with(pattern, pattern=each) for each in own]
            first, found = 0, []
            for each, positions in zip(own, segments, strict=True):
                blocks = -(-(positions.stop - positions.start) // pattern.block)
                lists = pattern.regions[..., first : first + blocks, :]
                found.append(_with(pattern, pattern=each, regions=lists))
                first += blocks
            return found
    return [pattern] * count


def _with(pattern: Routing | Selected, /, **changed: object) -> Any:
    """The same pattern with other attributes, which are not checked."""
    own = copy.copy(pattern)
    for name, value in changed.items():
        object.__setattr__(own, name, value)
    return own
