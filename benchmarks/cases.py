# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data. Arrays are `[B, H, L, D]`; ratios are the peer's time over ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from combiner import Dense, Fixed, LogSparse
from combiner.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class Case:
    """One timing: a pattern at one length, beside a peer's attention on the same arrays if `peer` names one."""

    name: str
    pattern: Pattern
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

RATIOS = (
    *(
        Case(name="dense", pattern=Dense(), length=4096, backward=b, threads=n, peer="sdpa", target=1.0)
        for n in (1, 2)
        for b in PASSES
    ),
    *(
        Case(name=name, pattern=pattern, length=16384, backward=b, peer="sdpa", target=target, rounds=5)
        for name, pattern, targets in (
            ("fixed", Fixed(128), (30.0, 25.0)),
            ("logsparse", LogSparse(), (30.0, 25.0)),
            ("logsparse-hierarchical", LogSparse(hierarchical=True), (None, None)),
        )
        for b, target in zip(PASSES, targets, strict=True)
    ),
)

GROWTH = tuple(
    Growth(
        law=law,
        cases=tuple(
            Case(name=name, pattern=pattern, length=1 << k, backward=b, rounds=9)
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
    Case(name=name, pattern=pattern, length=length, backward=b)
    for name, pattern, lengths in (
        ("memory-dense", Dense(), (4096, 16384)),
        ("memory-fixed", Fixed(), (4096, 16384, 65536)),
        ("memory-logsparse", LogSparse(), (4096, 16384, 65536)),
    )
    for b in PASSES
    for length in lengths
)
