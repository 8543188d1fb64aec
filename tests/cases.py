# SPDX-License-Identifier: Apache-2.0
"""Problems as data, what the reference says of each, and how far from it an answer may lie.

Every input is a float32 number, so that one float64 reference judges both dtypes.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

import combiner
from combiner import Axial, AxialMixture, Dense, Fixed, LogSparse, Routing, Tree, reference
from combiner.patterns import Factorization
from combiner.reference import Parts


@dataclass(frozen=True, repr=False)
class Clustered(Factorization):
    """Routing for any length: a position's cluster depends on the position alone, so that prefixes have the same."""

    clusters: int

    def at(self, length: int) -> Routing:
        """The pattern for one length."""
        i = np.arange(length)
        clusters = i * 7919 % 1009 % np.minimum(self.clusters, i + 1)
        return Routing(clusters, pooling=self.pooling, size_bias=self.size_bias)

    def _build(self, length: int, is_causal: bool, sparse: bool):
        return self.at(length)._build(length, is_causal, sparse)


PATTERNS = {
    "dense": Dense,
    "fixed": Fixed,
    "fixed7": lambda **options: Fixed(7, **options),
    "fixed16": lambda **options: Fixed(16, **options),
    "logsparse": LogSparse,
    "hierarchical": lambda **options: LogSparse(hierarchical=True, **options),
    "sparse fixed": lambda **options: Fixed(16, **options).sparse(),
    "sparse logsparse": lambda **options: LogSparse(**options).sparse(),
    "vertical": Axial,
    "horizontal": lambda **options: Axial(order="horizontal", **options),
    "rowmajor": lambda **options: Axial(order="rowmajor", **options),
    "rowmajor weighted": lambda **options: Axial(7, "rowmajor", "weighted", **options),
    "vertical7": lambda **options: Axial(7, **options),
    "horizontal5": lambda **options: Axial(5, "horizontal", **options),
    "mixture": AxialMixture,
    "mixture6": lambda **options: AxialMixture(6, **options),
    "sparse axial": lambda **options: Axial(7, **options).sparse(),
    "tree2": lambda **options: Tree(2, **options),
    "tree3": lambda **options: Tree(3, **options),
    "tree5.2": lambda **options: Tree(5, 2, **options),
    "sparse tree": lambda **options: Tree(7, **options).sparse(),
}
OF_LENGTH = {  # patterns that fit one length alone
    "routing": lambda L, **options: Clustered(5, **options).at(L),
    "sparse routing": lambda L, **options: Clustered(5, **options).at(L).sparse(),
}
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 53, 64, 97, 130, 211)
SHAPES = (  # B, Hq, Hk, D, Dv
    (1, 1, 1, 64, 64),
    (2, 2, 1, 8, 5),
    (1, 4, 2, 59, 64),
    (1, 2, 2, 1, 3),
    (1, 3, 1, 5, 111),
    (2, 1, 1, 111, 1),
)
OPTIONS = (
    {},
    {"pooling": "mean"},
    {"size_bias": True},
    {"masked": 0.3},
    {"pooling": "sum", "size_bias": True, "masked": 0.7},
    {"given": "query key"},
    {"given": "key", "masked": 0.3},
    {"pooling": "mean", "given": "query", "scale": 0.3},
    {"dropout_p": 0.3},
    {"dropout_p": 0.5, "masked": 0.3, "size_bias": True},
)


@dataclass(frozen=True)
class Case:
    """One problem: its pattern by name, its sizes and its options. `masked` is the share of keys left out."""

    pattern: str
    L: int
    B: int = 1
    Hq: int = 1
    Hk: int = 1
    D: int = 8
    Dv: int = 8
    is_causal: bool = True
    pooling: str = "max"
    size_bias: bool = False
    masked: float = 0.0
    given: str = ""
    scale: float | None = None
    dropout_p: float = 0.0

    def __str__(self) -> str:
        text = f"{self.pattern}-L{self.L}-B{self.B}H{self.Hq}.{self.Hk}D{self.D}.{self.Dv}"
        words = [
            self.pooling,
            "causal" * self.is_causal,
            "bias" * self.size_bias,
            "masked" * bool(self.masked),
            self.given,
            "dropout" * bool(self.dropout_p),
        ]
        return "-".join([text, *(word.replace(" ", "+") for word in words if word)])


def grid() -> list[Case]:
    """Every pattern, length and direction, each with the next shape and the next options in turn."""
    cases = []
    for n, name in enumerate([*PATTERNS, *OF_LENGTH]):
        for m, L in enumerate(LENGTHS):
            for is_causal in (True, False):
                turn = 5 * n + 3 * m + 7 * is_causal
                B, Hq, Hk, D, Dv = SHAPES[turn % len(SHAPES)]
                options = OPTIONS[(turn + turn // len(SHAPES)) % len(OPTIONS)]
                cases.append(Case(name, L, B, Hq, Hk, D, Dv, is_causal, **options))
    return cases


STAGED = [case for case in grid() if case.L in (2, 17, 64, 97)]
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


def golden_pattern(variant: str, width: int):
    """The pattern of a golden file, from its meta data."""
    return {
        "logn": LogSparse(),
        "fixed_causal": Fixed(width),
        "axial_none_causal": Axial(width, "rowmajor"),
        "axial_wsum_causal": Axial(width, "rowmajor", "weighted"),
        "axial_kr_causal": Axial(width, "rowmajor"),
        "mixture_max_causal": AxialMixture(width),
        "mixture_sum_causal": AxialMixture(width, pooling="sum"),
    }[variant]


@dataclass(frozen=True)
class Problem:
    """The arrays and arguments of a case."""

    inputs: tuple  # query, key, value
    pattern: object
    options: dict
    grad_out: np.ndarray
    grad_lse: np.ndarray

    @property
    def of_summarize(self) -> dict:
        """The options that stage 1 takes."""
        return {name: x for name, x in self.options.items() if name not in ("dropout_p", "seed")}

    @property
    def of_attend(self) -> dict:
        """The options that stage 2 takes."""
        return {name: x for name, x in self.options.items() if not name.startswith("region")}

    def as_type(self, dtype: type) -> Problem:
        def cast(x):
            return x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype != bool else x

        options = {name: cast(x) for name, x in self.options.items()}
        return Problem(tuple(map(cast, self.inputs)), self.pattern, options, cast(self.grad_out), cast(self.grad_lse))


PAIRING = "avx512_bf16"  # multiplies pairs of bfloat16, rounded weights among them; in all else it is avx512


def each_isa(*, pairing: bool = False) -> Iterator[str]:
    """The instruction sets of this machine, forced in turn; what was in force comes back at the end."""
    before = combiner.info()["isa"]
    try:
        for isa in combiner.info()["isas"]:
            if isa != PAIRING or pairing:
                combiner.set_isa(isa)
                yield isa
    finally:
        combiner.set_isa(before)


def draw(rng: np.random.Generator, pattern, case: Case, **flags) -> Problem:
    """Normal inputs and cotangents for a pattern with the case's sizes and options, float64 but float32-exact."""
    R = len(reference.parts(pattern, case.L, case.is_causal).members)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32).astype(np.float64)

    B, Hq, Hk, L, D, Dv = case.B, case.Hq, case.Hk, case.L, case.D, case.Dv
    options = {"is_causal": case.is_causal, "scale": case.scale, **flags}
    if case.dropout_p:
        options |= {"dropout_p": case.dropout_p, "seed": 2**60 + case.L}
    if case.masked:
        options["key_mask"] = rng.random((B, L)) >= case.masked
    if "query" in case.given:
        options["region_query"] = normal(B, Hq, R, D)
    if "key" in case.given:
        options["region_key"] = normal(B, Hk, R, D)
    inputs = normal(B, Hq, L, D), normal(B, Hk, L, D), normal(B, Hk, L, Dv)
    return Problem(inputs, pattern, options, normal(B, Hq, L, Dv), normal(B, Hq, L))


@functools.cache
def problem(case: Case) -> Problem:
    """The arrays of a case, from a seed that is its name's."""
    options = {"pooling": case.pooling, "size_bias": case.size_bias}
    name = case.pattern
    pattern = OF_LENGTH[name](case.L, **options) if name in OF_LENGTH else PATTERNS[name](**options)
    return draw(np.random.default_rng(zlib.crc32(str(case).encode())), pattern, case)


def random_parts(rng: np.random.Generator, L: int, R: int, is_causal: bool, pick=False, **flags) -> Parts:
    """A factorization without rhyme: any direct sets, regions that overlap, nest, repeat a row or hold nothing."""
    below: list[list[int]] = [[j] for j in range(L)]
    members = []
    for r in range(R):
        size = int(rng.integers(0, min(L, 6) + 1))
        last = int(rng.integers(1, L + 1)) if is_causal and L else L
        rows = [t for t in range(L + (0 if pick else r)) if max(below[t], default=-1) < last]
        members.append(rng.choice(rows, size, replace=rng.random() < 0.1 or size > len(rows)).tolist() if rows else [])
        below.append([j for t in members[-1] for j in below[t]])
    direct, regions = [], []
    for i in range(L):
        support = np.arange(i + 1 if is_causal else L)
        direct.append(rng.choice(support, int(rng.integers(0, min(len(support), 5) + 1)), replace=False).tolist())
        seen = [r for r in range(R) if max(below[L + r], default=-1) <= i or not is_causal]
        regions.append([r for r in seen if rng.random() < 0.4])
    picks = [rng.permutation(positions).tolist() for positions in below[L:]] if pick else None
    return Parts(direct, regions, members, pick=picks, **flags)


def below(parts: Parts, L: int) -> list[list[int]]:
    """The positions below each region, ascending, as often as its members hold them."""
    rows = [[j] for j in range(L)]
    for members in parts.members:
        rows.append(sorted(j for m in members for j in rows[m]))
    return rows[L:]


# The tolerance rule. float64: 1e-10 of the scale of the values. float32: a logit S is off by 2^-24 S, which moves its
# weight by that share; and the largest error is at most twice that of plain dense attention in float32. Both grow with
# the number of softmaxes that stand on one another: a region's error adds to its reader's. The 16-bit dtypes: that of
# float32, and what rounding the results loses.


def unit(dtype) -> float:
    """What rounding to a 16-bit dtype loses at most, as a share of a number's size."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


class Judge:
    """What the reference says of a problem, and whether an answer lies near enough to it."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.out, self.saved = reference.attention_forward(*problem.inputs, problem.pattern, **problem.options)
        self.lse, heads = self.saved["lse"], self.saved["heads"]
        self.S = heads.write(heads.Hq, (heads.L,), _largest_logits)
        self.S_terms = heads.write(heads.Hq, (heads.L,), lambda head: _largest_logits(head, np.abs))
        self.averages = any(x.weighted or x.pooling in ("mean", "sum") for x in heads.parts.values())
        self.stages = 1
        for parts in heads.parts.values():
            depth = [0] * heads.L
            for members in parts.members:
                depth.append(1 + max((depth[t] for t in members), default=0))
            self.stages = max(self.stages, 1 + max(depth, default=0))
        value = np.repeat(problem.inputs[2], heads.Hq // heads.Hk, axis=1)
        self.kept = 1 / (1 - problem.options.get("dropout_p", 0))  # the largest factor of a weight
        self.spread = self.kept * heads.write(heads.Hq, (heads.L, heads.L), lambda head: head.weights()) @ np.abs(value)

    @functools.cached_property
    def gradients(self) -> reference.Gradients:
        return reference.attention_backward(self.problem.grad_out, self.saved, grad_lse=self.problem.grad_lse)

    @functools.cached_property
    def dense_error(self) -> list[float]:
        """What dense attention in float32 loses on the same inputs: of out, dq, dk and dv."""
        p = self.problem
        arrays = [*p.inputs, p.grad_out, p.grad_lse]
        exact, rounded = (
            _dense(*(x.astype(dtype) for x in arrays), p.options["is_causal"], p.options["scale"])
            for dtype in (np.float64, np.float32)
        )
        return [np.abs(a - b).max(initial=0) for a, b in zip(exact, rounded, strict=True)]

    def accepts_forward(self, out: np.ndarray, lse: np.ndarray | None = None) -> None:
        if out.dtype == np.float64:
            within = np.full_like(self.out, 1e-10 * _largest(self.out, 1))
            within_lse = 1e-10 * (1 + np.abs(self.lse))
        else:
            within = self.stages * (8 + 8 * self.S[..., None]) * 2.0**-24 * self.spread + 2.0**-126
            if self.out.shape[-2] >= 64:  # the largest of few errors is a matter of luck, and of NumPy's BLAS
                dense = self.kept * max(2, self.stages) * self.dense_error[0]
                within = np.minimum(within, dense + 2.0**-22 * _largest(self.problem.inputs[2]))
            size = np.abs(np.where(np.isfinite(self.lse), self.lse, 0))  # it is rounded to its own size
            within_lse = (8 + 8 * self.S_terms + size) * 2.0**-24
        if out.dtype.itemsize == 2:
            within = within + unit(out.dtype) * np.abs(self.out) + ml_dtypes.finfo(out.dtype).smallest_subnormal
            if out.dtype == ml_dtypes.bfloat16 and combiner.info()["isa"] == PAIRING:
                # rounded too: weights, and queries and keys that are averages, each as often as there are stages
                moved = 2 * self.averages * self.stages * unit(out.dtype) * self.S_terms
                within = within + (self.stages * unit(out.dtype) + 2 * moved[..., None]) * self.spread
                within_lse = within_lse + moved
        close(out.astype(self.out.dtype), self.out, within, "out")
        if lse is not None:
            close(lse, self.lse, within_lse, "lse")

    def accepts_backward(self, gradients) -> None:
        q, k, v = (_largest(x) for x in self.problem.inputs)
        k, q = (
            max(k, _largest(self.problem.options.get("region_key"))),
            max(q, _largest(self.problem.options.get("region_query"))),
        )
        D, Dv = self.problem.inputs[0].shape[-1], self.problem.inputs[2].shape[-1]
        scale = D**-0.5 if self.problem.options["scale"] is None else self.problem.options["scale"]
        grad_p = self.kept * _largest(self.problem.grad_out) * v * Dv**0.5 + _largest(self.problem.grad_lse)
        sizes = (
            scale * grad_p * k,
            scale * grad_p * q,
            self.kept * _largest(self.problem.grad_out),
            scale * grad_p * k,
            scale * grad_p * q,
        )
        lost = [*self.dense_error[1:], *self.dense_error[1:3]]
        for name, actual, expected, size, error in zip(
            gradients._fields, gradients, self.gradients, sizes, lost, strict=True
        ):
            assert (actual is None) == (expected is None), name
            if actual is None:
                continue
            size = max(size, _largest(expected))
            if actual.dtype == np.float64:
                within = 1e-10 * max(size, 1)
            else:
                within = self.kept * max(2, self.stages) * error + (8 + 8 * self.S.max(initial=0)) * 2.0**-24 * size
            if actual.dtype.itemsize == 2:  # out and the summaries' values were rounded on their way here too
                within = within + unit(actual.dtype) * (np.abs(expected) + 2 * self.stages * size)
            close(actual.astype(expected.dtype), expected, within, f"gradient of {name}")


def close(actual: np.ndarray, expected: np.ndarray, within: float | np.ndarray, name: str) -> None:
    """Equal infinities, and everything else within the bound; says where it is worst."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    with np.errstate(invalid="ignore"):
        error = np.where(actual == expected, 0.0, np.abs(actual - expected))
        share = error / np.broadcast_to(within, error.shape)
    bad = ~(error <= within)
    if bad.any():
        worst = np.unravel_index(np.nanargmax(np.where(bad, np.nan_to_num(share, nan=np.inf), -1)), bad.shape)
        raise AssertionError(
            f"{name}: {bad.sum()} of {bad.size} out of tolerance; at {tuple(map(int, worst))} got {actual[worst]!r}, "
            f"expected {expected[worst]!r}: {share[worst]:.3g} times what is allowed"
        )


def _largest(x: np.ndarray | None, floor: float = 0.0) -> float:
    return floor if x is None else float(np.abs(x).max(initial=floor))


def _largest_logits(head, of=np.asarray) -> np.ndarray:
    """Of each query: the largest |logit| of its softmax and of those of the regions in it; of=np.abs: of the sums of
    their terms' sizes, which is what rounding goes by where the terms cancel."""
    S = np.zeros(head.L + head.R)
    for x in [*head.summarised, *range(head.L)]:
        if rows := head.rows[x]:
            S[x] = max(
                np.abs(head.scale * of(head.K[rows]) @ of(head.Q[x])).max(),
                S[[t for t in rows if t >= head.L]].max(initial=0),
            )
    return S[: head.L]


def _dense(q, k, v, grad_out, grad_lse, is_causal: bool, scale: float | None) -> tuple[np.ndarray, ...]:
    """out, dq, dk, dv of plain dense attention, in the dtype of its inputs."""
    (B, Hq, L, D), Hk = q.shape, k.shape[1]
    scale = q.dtype.type(D**-0.5 if scale is None else scale)
    k, v = (np.repeat(x, Hq // Hk, axis=1) for x in (k, v))
    S = q @ k.swapaxes(-1, -2) * scale
    if is_causal:
        S = np.where(np.tri(L, dtype=bool), S, -np.inf).astype(q.dtype)
    P = np.exp(S - S.max(axis=-1, keepdims=True))
    P /= P.sum(axis=-1, keepdims=True)
    out = P @ v
    dS = (
        P * (grad_out @ v.swapaxes(-1, -2) - (grad_out * out).sum(axis=-1, keepdims=True) + grad_lse[..., None]) * scale
    )
    grouped = (B, Hk, Hq // Hk, L, -1)
    dk, dv = ((x.swapaxes(-1, -2) @ y).reshape(grouped).sum(axis=2) for x, y in ((dS, q), (P, grad_out)))
    return out, dS @ k, dk, dv
