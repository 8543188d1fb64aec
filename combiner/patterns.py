# SPDX-License-Identifier: Apache-2.0
"""The factorizations: small values that make a plan for any length (spec: "Factorizations").

A pattern is compared, hashed and printed by its parameters. Queries see positions up to their own when the plan is
causal, else all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np

from .plan import POOLINGS, Plan, Pooling, as_integer, pooling_number


class Pattern(Protocol):
    """What attention takes for a pattern: anything that makes plans."""

    def plan(self, length: int, is_causal: bool = False, /) -> Plan | tuple[Plan, ...]:
        """A plan, or one for each batch entry and key head in that order."""
        ...


AnyPattern: TypeAlias = Pattern | Plan | tuple[Plan, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Factorization:
    """What all factorizations have in common.

    Parameters
    ----------
    pooling : "max", "mean" or "sum": how a region's key and query come from its members' (section 3.3).
    size_bias : whether the log of the unmasked positions below a region joins its logit (not in the paper).
    """

    pooling: Pooling = field(default="max", kw_only=True)
    size_bias: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        pooling_number(self.pooling, POOLINGS[:3])
        _check_bool("size_bias", self.size_bias)

    def plan(self, length: int, is_causal: bool = False) -> Plan:
        """The plan for L = `length` positions. The last ones made are kept.

        Raises
        ------
        TypeError, ValueError, OverflowError : a length that is no integer, is negative, or exceeds 2^30.
        """
        _check_bool("is_causal", is_causal)
        return _plan(self, as_integer("length", length, 0), bool(is_causal))

    def sparse(self) -> Factorization | Sparse:
        """The sparse baseline: the direct keys alone, without regions; what they leave out is not attended."""
        return Sparse(self)

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        raise NotImplementedError

    def _options(self, is_causal: bool, sparse: bool) -> tuple[bool, bool, int, bool]:
        return is_causal, sparse, POOLINGS.index(self.pooling), self.size_bias

    def __repr__(self) -> str:
        changed = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed)})"


@dataclass(frozen=True, slots=True, repr=False)
class Dense(Factorization):
    """Every query attends its whole support: exact full attention, L^2 pairs."""

    def sparse(self) -> Dense:
        """Itself: there is nothing to leave out."""
        return self

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        return Plan._build("dense", length, 0, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class Fixed(Factorization):
    """Combiner-Fixed (section 4.1): the own span directly, every earlier (or other) span as one region.

    L (span + L / span) pairs: L * sqrt(L) for the default span. Region t is span t. The sparse baseline attends the
    own span and the last position of each other span.

    Parameters
    ----------
    span : positions in a span; None for the power of two nearest sqrt(L).
    """

    span: int | None = None

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        if self.span is not None:
            object.__setattr__(self, "span", as_integer("span", self.span, 1))

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        span = 1 << (length.bit_length() // 2) if self.span is None else self.span
        return Plan._build("fixed", length, span, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class LogSparse(Factorization):
    """Combiner-Logsparse (section 4.2): one region of size 2^l for each l, the siblings from leaf to root.

    L * log(L) pairs. Regions: level 1, 2, .. while 2^l < L, in each the blocks from left to right. The sparse baseline
    attends the last position of each left sibling block and the first of each right one.

    Parameters
    ----------
    hierarchical : whether a block of level 2 or more summarises its two halves' summaries in place of its positions
        (the paper's remark on a partition tree): stage 1 then costs O(L), not O(L log L).
    """

    hierarchical: bool = False

    def __post_init__(self) -> None:
        Factorization.__post_init__(self)
        _check_bool("hierarchical", self.hierarchical)

    def _build(self, length: int, is_causal: bool, sparse: bool) -> Plan:
        return Plan._build("logsparse", length, self.hierarchical, *self._options(is_causal, sparse))


@dataclass(frozen=True, slots=True, repr=False)
class Sparse:
    """The sparse baseline of a factorization, as its ``sparse()`` returns it."""

    pattern: Factorization

    def plan(self, length: int, is_causal: bool = False) -> Plan:
        """The plan for L = `length` positions, without regions."""
        _check_bool("is_causal", is_causal)
        return _plan(self, as_integer("length", length, 0), bool(is_causal))

    def sparse(self) -> Sparse:
        """Itself."""
        return self

    def __repr__(self) -> str:
        return f"{self.pattern!r}.sparse()"


@lru_cache(maxsize=64)
def _plan(pattern: Factorization | Sparse, length: int, is_causal: bool) -> Plan:
    if isinstance(pattern, Sparse):
        return pattern.pattern._build(length, is_causal, True)
    return pattern._build(length, is_causal, False)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
