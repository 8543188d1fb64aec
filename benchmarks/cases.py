# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data. Arrays are `[B, H, L, D]`; ratios are a peer's time over ours."""

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
    """One timing: a pattern at one length, beside its peers on the same arrays.

    Neighbours that differ in name, pattern and target alone are timed together where their peers are dense.
    """

    name: str
    made: Made  # the pattern, or what makes one for a length
    length: int
    backward: bool = False  # forward and backward together, else forward alone
    threads: int = 2
    batch: int = 1
    heads: int = 8
    dim: int = 64
    is_causal: bool = True
    dtype: str = "float32"
    peers: tuple[str, ...] = ()  # in peers.PEERS, or ours: "one-thread", "float32"
    target: float | None = None  # the least ratio to reach, to the fastest of the peers
    limit: float | None = None  # the most that may be: seconds of a call, or its memory in units of the query
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
    limit: float | None  # the most that the time of the last length may be of that of a quarter of it


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


# The least ratios to dense attention to reach at L = 16384, forward and with backward.
PATTERNS: tuple[tuple[str, Made, float, float], ...] = (
    ("dense", Dense(), 1, 1),
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

# From this length on every pattern is to be as fast as dense attention.
FIRST_FAST = 512

# Every pattern at every length: at the longest with the ratios above.
LENGTHS = tuple(
    Case(
        name=name,
        made=pattern,
        length=length,
        backward=b,
        peers=("sdpa",),
        target=targets[b] if length == 16384 else 1 if length >= FIRST_FAST else None,
        rounds=5 if length >= 8192 else 9,
    )
    for length in (1 << k for k in range(6, 15))
    for b in PASSES
    for name, pattern, *targets in PATTERNS
)

# torch.compile takes minutes over LogSparse's levels: its peers are "torch" and "jax".
FRAMEWORKS = ("torch", "jax", "torch-compiled")

RATIOS = (
    *(
        Case(name="dense", made=Dense(), length=4096, backward=b, threads=n, peers=("sdpa",), target=target, rounds=9)
        for n in (1, 2)
        for b, target in zip(PASSES, (1.3, 1.4), strict=True)
    ),
    *(
        Case(name=f"{name}-frameworks", made=pattern, length=16384, backward=b, peers=peers, target=target, rounds=5)
        for name, pattern, peers, target in (
            ("fixed", Fixed(128), (*FRAMEWORKS, "torch-masked"), 5.5),
            ("logsparse", LogSparse(), FRAMEWORKS[:2], None),
            ("rowmajor", Axial(128, "rowmajor"), FRAMEWORKS, None),
        )
        for b in PASSES
    ),
    *(
        Case(name="threads", made=pattern, length=length, backward=b, peers=("one-thread",), target=1.9, rounds=9)
        for pattern, length in ((Fixed(128), 16384), (LogSparse(), 16384), (Dense(), 4096))
        for b in PASSES
    ),
    *(
        Case(name="bfloat16", made=pattern, length=length, backward=b, dtype="bfloat16", peers=(peer,), target=target)
        for pattern, length, peer, target in (
            (Dense(), 4096, "float32", 1.5),
            (Dense(), 4096, "sdpa", 2),
            (Fixed(128), 16384, "float32", 1.5),
        )
        for b in PASSES
    ),
    *(
        Case(name="one-head", made=pattern, length=length, backward=True, heads=1, peers=("one-thread",))
        for pattern, length in ((Dense(), 4096), (Fixed(128), 16384), (LogSparse(), 16384), (Axial(128), 16384))
    ),
    Case(name="tiny", made=Fixed(), length=16, heads=1, peers=("sdpa",), limit=15e-6, rounds=101),
)

GROWTH = tuple(
    Growth(
        law=law,
        limit=limit,
        cases=tuple(
            Case(name=name, made=pattern, length=1 << k, backward=b, rounds=7)
            for k in range(12, 17)  # Fixed's own span is then 64, 128, 128, 256, 256
        ),
    )
    for name, pattern, law, limit in (
        ("growth-fixed", Fixed(), "L sqrt(L)", 8.4),
        ("growth-logsparse", LogSparse(), "L log(L)", 4.8),
    )
    for b in PASSES
)

# One call each, in a fresh process: the bytes it takes beyond its inputs and outputs.
MEMORY = tuple(
    Case(
        name=f"memory-{name}",
        made=pattern,
        length=length,
        backward=b,
        limit=(1, 3)[b] if length == 65536 else None,
    )
    for name, pattern, lengths in (
        ("dense", Dense(), (4096, 16384)),
        ("fixed", Fixed(), (4096, 16384, 65536)),
        ("logsparse", LogSparse(), (4096, 16384, 65536)),
        *((name, pattern, (65536,)) for name, pattern, *_ in PATTERNS if name not in ("dense", "fixed", "logsparse")),
    )
    for b in PASSES
    for length in lengths
)

# The arithmetic of attention on one core, beside what the core can do: of whole calls.
ARITHMETIC = tuple(
    Case(name=f"arithmetic-{name}", made=pattern, length=length, backward=b, threads=1, rounds=9)
    for name, pattern, length in (
        ("dense", Dense(), 4096),
        *((name, made, 16384) for name, made, *_ in PATTERNS if name not in ("dense", "routing-heads", "mixture")),
    )
    for b in PASSES
)

# By the names that test_kernels --bench gives them: the least share of the core.
PRODUCTS = {"S = K Q^T": 0.80, "O += P^T V": 0.80, "dV += P dO": 0.85}

# How long a plan takes to make beside a forward at L = 16384, and its bytes beside query, key, value and out at 65536.
PLANS = tuple(Case(name=f"plan-{name}", made=pattern, length=16384, rounds=3) for name, pattern, *_ in PATTERNS)
