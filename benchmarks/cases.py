# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data. Arrays are `[B, H, L, D]`; ratios are the peer's time over ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from combiner import Axial, AxialMixture, Dense, Fixed, LogSparse, Mixture, Routing, Tree
from combiner.patterns import Pattern

Made: TypeAlias = Pattern | Mixture | Callable[[int], Routing]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One timing: a pattern at one length, beside a peer's attention on the same arrays if `peer` names one."""

    name: str
    made: Made  # the pattern, or what makes one for a length
    length: int
    backward: bool  # forward and backward together, else forward alone
    threads: int = 2
    batch: int = 1
    heads: int = 8
    dim: int = 64
    is_causal: bool = True
    dtype: str = "float32"
    peer: str | None = None
    target: float | None = None  # the least ratio to reach
    rounds: int = 15

    @property
    def pattern(self) -> Pattern | Mixture:
        """The pattern for the case's length."""
        return self.made(self.length) if callable(self.made) else self.made

    @property
    def passes(self) -> str:
        """What is timed, in words."""
        return "forward + backward" if self.backward else "forward"


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The same pattern at several lengths; the slope of log(seconds) over log(L) is set beside the law's own."""

    cases: tuple[Case, ...]
    law: str  # in LAWS


LAWS: dict[str, Callable[[int], float]] = {
    "L sqrt(L)": lambda length: length * math.sqrt(length),
    "L log(L)": lambda length: length * math.log(length),
}

PASSES = (False, True)


def routing(length: int, *heads: int) -> Routing:
    """128 clusters at random, one set or one for each head."""
    return Routing(np.random.default_rng(0).integers(0, min(128, length), (*heads, length)))


def routing_heads(length: int) -> Routing:
    """The same with a set for each of 8 heads."""
    return routing(length, 8)


# At L = 16384, beside dense attention: the least ratios to reach, forward and with backward.
PATTERNS: tuple[tuple[str, Made, float, float], ...] = (
    ("fixed", Fixed(128), 65, 65),
    ("logsparse", LogSparse(), 70, 60),
    ("logsparse-hierarchical", LogSparse(hierarchical=True), 8, 8),
    ("tree", Tree(8), 8, 8),
    ("rowmajor", Axial(128, "rowmajor"), 35, 30),
    ("vertical", Axial(128), 18, 15),
    ("horizontal", Axial(128, "horizontal"), 18, 15),
    ("axial-mixture", AxialMixture(128), 14, 12),
    ("routing", routing, 8, 8),
    ("routing-heads", routing_heads, 8, 8),
    ("mixture", Mixture(Fixed(128), LogSparse()), 8, 8),
)

RATIOS = (
    *(
        Case(name="dense", made=Dense(), length=4096, backward=b, threads=n, peer="sdpa", target=target)
        for n in (1, 2)
        for b, target in zip(PASSES, (1.3, 1.4), strict=True)
    ),
    *(
        Case(name=name, made=pattern, length=16384, backward=b, peer="sdpa", target=target, rounds=5)
        for name, pattern, *targets in PATTERNS
        for b, target in zip(PASSES, targets, strict=True)
    ),
)

GROWTH = tuple(
    Growth(
        law=law,
        cases=tuple(
            Case(name=name, made=pattern, length=1 << k, backward=b, rounds=9)
            for k in range(12, 17)  # Fixed's own span is then 64, 128, 128, 256, 256
        ),
    )
    for name, pattern, law in (
        ("growth-fixed", Fixed(), "L sqrt(L)"),
        ("growth-logsparse", LogSparse(), "L log(L)"),
    )
    for b in PASSES
)

# One call each, in a fresh process: the bytes it takes beyond its inputs and outputs.
MEMORY = tuple(
    Case(name=name, made=pattern, length=length, backward=b)
    for name, pattern, lengths in (
        ("memory-dense", Dense(), (4096, 16384)),
        ("memory-fixed", Fixed(), (4096, 16384, 65536)),
        ("memory-logsparse", LogSparse(), (4096, 16384, 65536)),
    )
    for b in PASSES
    for length in lengths
)
