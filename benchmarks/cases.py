# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data. Arrays are `[B, H, L, D]`; a ratio is a peer's time divided by ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from combiner import (
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Mixture,
    Routing,
    Selected,
    Tree,
    Window,
)
from combiner.patterns import Pattern

Made: TypeAlias = Pattern | Mixture | Callable[[int], Pattern]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One timing: a pattern at one length, beside its peers on the same arrays.

    Neighbouring cases that differ only in name, pattern and target are timed together if their peers are dense.
    """

    name: str
    made: Made  # the pattern, or a function from the length to it
    length: int
    backward: bool = False  # True: forward and backward together; False: forward
    threads: int = 2
    batch: int = 1
    heads: int = 8
    key_heads: int | None = None  # None: as many as heads
    dim: int = 64
    is_causal: bool = True
    dtype: str = "float32"
    terms: tuple[str, ...] = ()  # of the logits: names of TERMS
    selects: bool = False  # True: `select` is timed, in place of attention
    with_select: bool = False  # True: `select` is timed, and the attention that opens what it selects
    peers: tuple[str, ...] = ()  # keys of peers.PEERS, or of run.OURS
    target: float | None = None  # the least ratio to the fastest of the peers
    limit: float | None = None  # the most seconds of a call, or the most memory in units of the query
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
    """One pattern at several lengths: the slope of log(seconds) over log(L), to compare with that of a law."""

    cases: tuple[Case, ...]
    law: str  # a key of LAWS
    limit: float | None  # the most that the time at the last length may be, divided by that at a quarter of it


LAWS: dict[str, Callable[[int], float]] = {
    "L sqrt(L)": lambda length: length * math.sqrt(length),
    "L log(L)": lambda length: length * math.log(length),
}

PASSES = (False, True)


def routing(length: int, *heads: int) -> Routing:
    """128 random clusters: one set, or one for each head."""
    return Routing(np.random.default_rng(0).integers(0, min(128, length), (*heads, length)))


def routing_heads(length: int) -> Routing:
    """128 random clusters for each of 8 heads."""
    return routing(length, 8)


OPENED, BLOCK = 4, 64  # regions, for each block of as many queries


def selected(length: int) -> Selected:
    """`Fixed(128)` with random regions opened for each of 8 heads, all of them before the block."""
    starts = np.arange(0, length, BLOCK)
    regions = np.full((8, len(starts), OPENED), -1)
    rng = np.random.default_rng(0)
    for block, count in enumerate(starts // 128):
        chosen = min(OPENED, count)
        regions[:, block, :chosen] = rng.permuted(np.tile(np.arange(count), (8, 1)), axis=1)[:, :chosen]
    return Selected(Fixed(128), regions, block=BLOCK)


# Patterns with their targets: the least ratios to dense attention at L = 16384, forward and with backward. README.md
# beside this file says how large the ratio of a window can be.
PATTERNS: tuple[tuple[str, Made, float, float], ...] = (
    ("dense", Dense(), 1, 1),
    ("fixed", Fixed(128), 75, 70),
    ("logsparse", LogSparse(), 80, 70),
    ("logsparse-hierarchical", LogSparse(hierarchical=True), 65, 60),
    ("tree", Tree(8), 100, 100),
    ("rowmajor", Axial(128, "rowmajor"), 38, 35),
    ("vertical", Axial(128), 24, 24),
    ("horizontal", Axial(128, "horizontal"), 24, 24),
    ("axial-mixture", AxialMixture(128), 15, 13),
    ("routing", routing, 22, 24),
    ("routing-heads", routing_heads, 22, 24),
    ("mixture", Mixture(Fixed(128), LogSparse()), 35, 28),
    ("window", Window(128), 55, 55),
    ("fixed-window", Fixed(128, window=128), 30, 30),
    ("heavily-compressed", HeavilyCompressed(128, 128), 35, 35),
    ("selected", selected, 12, 11),
)

# From this length on, the target of every pattern is the time of dense attention.
FIRST_FAST = 512

# Every pattern at every length. The longest has the targets above. The shorter ones run on one thread: PyTorch's second
# one sleeps through the pause before a timing, and waking it takes longer than a short call.
TWO_THREADS_FROM = 1024
LENGTHS = tuple(
    Case(
        name=name,
        made=pattern,
        length=length,
        backward=b,
        threads=2 if length >= TWO_THREADS_FROM else 1,
        peers=("sdpa",),
        target=targets[b] if length == 16384 else 1 if length >= FIRST_FAST else None,
        rounds=5 if length >= 8192 else 9,
    )
    for length in (1 << k for k in range(6, 15))
    for b in PASSES
    for name, pattern, *targets in PATTERNS
)

# The terms of the logits, by their names in `attention`.
TERMS = ("softcap", "key_bias", "region_bias", "sink")

# torch.compile takes minutes for the levels of LogSparse, whose peers are only "torch" and "jax".
FRAMEWORKS = ("torch", "jax", "torch-compiled")

RATIOS = (
    *(
        Case(name="dense", made=Dense(), length=4096, backward=b, threads=n, peers=("sdpa",), target=target, rounds=9)
        for n in (1, 2)
        for b, target in zip(PASSES, (1.35, 1.45), strict=True)
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
        Case(name="one-head", made=pattern, length=length, backward=True, heads=1, peers=("one-thread",), target=target)
        for pattern, length, target in (
            (Dense(), 4096, 1.7),
            (Fixed(128), 16384, 1.7),
            (LogSparse(), 16384, 1.5),
            (Axial(128), 16384, 1.7),
        )
    ),
    *(
        Case(
            name="terms",
            made=Fixed(128),
            length=16384,
            backward=b,
            terms=terms,
            peers=("without-terms",),
            target=target,
        )
        for terms in (("softcap",), ("key_bias",), ("region_bias",), ("sink",), TERMS)
        for b, target in zip(PASSES, (1 / 1.1, 1 / 1.15), strict=True)
    ),
    *(
        Case(name="grouped-heads", made=pattern, length=length, backward=b, key_heads=2, peers=peers, target=1)
        for pattern, length, peers in ((Dense(), 4096, ("sdpa", "ungrouped")), (Fixed(128), 16384, ("ungrouped",)))
        for b in PASSES
    ),
    Case(name="select", made=selected, length=16384, selects=True, peers=("attention",), target=2),
    Case(name="tiny", made=Fixed(), length=16, heads=1, peers=("sdpa",), limit=15e-6, rounds=101),
)

# Time over the length, of a pattern and of the same pattern with regions selected and opened in each call.
SELECTION = tuple(
    Case(
        name=name,
        made=pattern,
        length=1 << k,
        backward=b,
        with_select=opens,
        peers=("sdpa",),
        rounds=9 if k < 13 else 5,
    )
    for k in range(10, 15)
    for b in PASSES
    for name, pattern, opens in (("selection-none", Fixed(128), False), ("selection", selected, True))
)

GROWTH = tuple(
    Growth(
        law=law,
        limit=limit,
        cases=tuple(
            Case(name=name, made=pattern, length=1 << k, backward=b, rounds=7)
            for k in range(12, 17)  # the spans of Fixed() are 64, 128, 128, 256, 256
        ),
    )
    for name, pattern, law, limit in (
        ("growth-fixed", Fixed(), "L sqrt(L)", 8.4),
        ("growth-logsparse", LogSparse(), "L log(L)", 4.8),
    )
    for b in PASSES
)

# One call each, in a fresh process: the bytes that it takes beyond its inputs and outputs.
MEMORY = tuple(
    Case(
        name=f"memory-{name}",
        made=pattern,
        length=length,
        backward=b,
        limit=(1, 3.5 if "mixture" in name else 3)[b] if length == 65536 else None,
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

# Whole calls on one core: their arithmetic, beside the most that the core can do.
ARITHMETIC = tuple(
    Case(name=f"arithmetic-{name}", made=pattern, length=length, backward=b, threads=1, rounds=9)
    for name, pattern, length in (
        ("dense", Dense(), 4096),
        *(
            (name, made, 16384)
            for name, made, *_ in PATTERNS
            if name not in ("dense", "routing-heads", "mixture", "selected")
        ),
    )
    for b in PASSES
)

# Products of a tile, by its lanes: the least share of the rate of PyTorch's sgemm.
PRODUCTS = {16: 0.85, 32: 0.95, 64: 1.0}

# Plans: the time to make one beside a forward at L = 16384, and its bytes beside those of the arrays at 65536.
PLANS = tuple(Case(name=f"plan-{name}", made=pattern, length=16384, rounds=3) for name, pattern, *_ in PATTERNS)
