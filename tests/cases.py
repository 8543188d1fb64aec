# SPDX-License-Identifier: Apache-2.0
"""Problems as data, what the reference says of each, and how far from it an answer may lie.

Every input is a float32 number, so that one float64 reference judges both dtypes.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

import combiner
from combiner import (
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Plan,
    Routing,
    Selected,
    Tree,
    Window,
    reference,
)
from combiner.patterns import Factorization, Sparse
from combiner.problem import Saved
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


@dataclass(frozen=True, repr=False)
class Opened(Factorization):
    """Selected for any length. Prefixes list the same regions if `base` numbers its regions from the first position on,
    as Fixed does; a region that a prefix does not have is left out."""

    base: Factorization
    block: int
    count: int = 3
    open: bool = True

    def at(self, length: int) -> Selected:
        """The pattern for one length."""
        R = self.base.plan(length).region_count

        def listed(t: int, c: int) -> int:
            r = (t * 7919 + c * c * 104729) % 1009 % (1 + (t + 1) * self.block // 4) - 1
            return r if r < R else -1

        blocks = -(-length // self.block)
        regions = [[listed(t, c) for c in range(self.count)] for t in range(blocks)]
        return Selected(
            self.base,
            np.array(regions, int).reshape(blocks, self.count),
            block=self.block,
            open=self.open,
            rest=self.open,
        )

    def _build(self, length: int, is_causal: bool, sparse: bool):
        pattern = self.at(length)
        return (pattern.sparse() if sparse else pattern)._build(length, is_causal, False)


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


def of_length(pattern, L: int):
    """The pattern for one length, of `Clustered`, `Opened` and their sparse baselines."""
    if isinstance(pattern, Sparse) and hasattr(pattern.pattern, "at"):
        return pattern.pattern.at(L).sparse()
    return pattern.at(L) if hasattr(pattern, "at") else pattern


NAMES = [*PATTERNS, *OF_LENGTH]  # a new pattern comes last: a case's options depend on the place of its pattern
for size in (1, 7, 16, 500):
    PATTERNS[f"window{size}"] = lambda size=size, **options: Window(size, **options)
    NAMES.append(f"window{size}")
for span, width in ((7, 5), (16, 40), (100, 30)):
    PATTERNS[f"fixed{span} window{width}"] = lambda a=span, b=width, **options: Fixed(a, window=b, **options)
    NAMES.append(f"fixed{span} window{width}")
PATTERNS["sparse fixed window"] = lambda **options: Fixed(8, window=12, **options).sparse()
NAMES.append("sparse fixed window")
OPENED = {
    "opened fixed7": lambda **options: Opened(Fixed(7, **options), 16),
    "opened fixed16": lambda **options: Opened(Fixed(16, **options), 64, 5),
    "opened fixed window": lambda **options: Opened(Fixed(8, window=12, **options), 10),
    "opened logsparse": lambda **options: Opened(LogSparse(**options), 1),
    "opened hierarchical": lambda **options: Opened(LogSparse(hierarchical=True, **options), 32),
    "opened tree3": lambda **options: Opened(Tree(3, **options), 5),
    "sparse opened tree": lambda **options: Opened(Tree(3, **options), 1).sparse(),
    "summaries of fixed5": lambda **options: Opened(Fixed(5, **options), 3, 8, open=False),
}
for name, make in OPENED.items():
    OF_LENGTH[name] = lambda L, make=make, **options: of_length(make(**options), L)
    NAMES.append(name)
for rate, width in ((1, 3), (4, 6), (16, 40), (33, 20), (500, 64)):
    PATTERNS[f"heavy{rate} window{width}"] = lambda a=rate, b=width, **options: HeavilyCompressed(a, b, **options)
    NAMES.append(f"heavy{rate} window{width}")
PATTERNS["sparse heavy"] = lambda **options: HeavilyCompressed(8, 12, **options).sparse()
NAMES.append("sparse heavy")
OF_LENGTH["opened heavy"] = lambda L, **options: of_length(Opened(HeavilyCompressed(8, 12, **options), 16), L)
NAMES.append("opened heavy")
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
TERMS = (  # of the logit
    {"terms": "softcap"},
    {"terms": "key_bias"},
    {"terms": "sink", "masked": 0.3},
    {"terms": "key_bias region_bias sink", "dropout_p": 0.3},
    {"terms": "softcap key_bias sink", "pooling": "mean", "size_bias": True, "masked": 0.7},
    {"terms": "key_bias", "pooling": "sum", "given": "key"},
    {"terms": "softcap region_bias", "given": "query"},
    {"terms": "softcap key_bias sink", "scale": 0.3},
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
    terms: str = ""

    def __str__(self) -> str:
        text = f"{self.pattern}-L{self.L}-B{self.B}H{self.Hq}.{self.Hk}D{self.D}.{self.Dv}"
        words = [
            self.pooling,
            "causal" * self.is_causal,
            "bias" * self.size_bias,
            "masked" * bool(self.masked),
            self.given,
            "dropout" * bool(self.dropout_p),
            self.terms,
        ]
        return "-".join([text, *(word.replace(" ", "+") for word in words if word)])


def grid() -> list[Case]:
    """Every pattern, length and direction, each with the next shape and the next options in turn."""
    cases = []
    for n, name in enumerate(NAMES):
        for m, L in enumerate(LENGTHS):
            for is_causal in (True, False):
                turn = 5 * n + 3 * m + 7 * is_causal
                B, Hq, Hk, D, Dv = SHAPES[turn % len(SHAPES)]
                options = OPTIONS[(turn + turn // len(SHAPES)) % len(OPTIONS)]
                cases.append(Case(name, L, B, Hq, Hk, D, Dv, is_causal, **options))
    return cases


def grid_of_terms() -> list[Case]:
    """Every pattern and direction with the terms of a logit."""
    cases = []
    for n, name in enumerate(NAMES):
        for m, L in enumerate((17, 64)):
            for is_causal in (True, False):
                turn = 4 * n + 2 * m + is_causal
                B, Hq, Hk, D, Dv = SHAPES[(turn + turn // len(SHAPES)) % len(SHAPES)]
                options = TERMS[(turn + turn // len(TERMS)) % len(TERMS)]
                cases.append(Case(name, L, B, Hq, Hk, D, Dv, is_causal, **options))
    return cases


STAGED = [case for case in [*grid(), *grid_of_terms()] if case.L in (2, 17, 64, 97)]
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


TERM_ARRAYS = ("key_bias", "region_bias", "sink")


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
        return {name: x for name, x in self.options.items() if name not in ("dropout_p", "seed", "sink")}

    @property
    def of_attend(self) -> dict:
        """The options that stage 2 takes."""
        return {name: x for name, x in self.options.items() if not name.startswith("region")}

    @property
    def of_weights(self) -> dict:
        """The options of the effective attention."""
        return {name: x for name, x in self.options.items() if name not in ("dropout_p", "seed")}

    def as_type(self, dtype: type) -> Problem:
        of_terms = np.promote_types(dtype, np.float32) if dtype != ml_dtypes.bfloat16 else np.float32

        def cast(x, to=dtype):
            return x.astype(to) if isinstance(x, np.ndarray) and x.dtype != bool else x

        options = {name: cast(x, of_terms if name in TERM_ARRAYS else dtype) for name, x in self.options.items()}
        return Problem(tuple(map(cast, self.inputs)), self.pattern, options, cast(self.grad_out), cast(self.grad_lse))


PAIRING = ("avx512_bf16", "amx")  # multiply pairs of bfloat16, rounded weights among them; in all else they are avx512


def each_isa(*, pairing: bool = False) -> Iterator[str]:
    """The instruction sets of this machine, forced in turn; what was in force comes back at the end."""
    before = combiner.info()["isa"]
    try:
        for isa in combiner.info()["isas"]:
            if isa not in PAIRING or pairing:
                combiner.set_isa(isa)
                yield isa
    finally:
        combiner.set_isa(before)


def draw_cancelling(rng: np.random.Generator, *shape: int) -> list[np.ndarray]:
    """query, key and value in bfloat16: all weights are equal, and values cancel, so that another order of a sum has
    another result."""
    value = rng.choice([2.0**24, -(2.0**24), 1, 3], shape)
    return [x.astype(ml_dtypes.bfloat16) for x in (np.zeros(shape), np.zeros(shape), value)]


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
    terms = case.terms.split()
    if "softcap" in terms:
        options["softcap"] = 1.5
    if "key_bias" in terms:  # one for all batch entries, and one for each query head
        options["key_bias"] = normal(Hk, L) if L % 2 else normal(B, Hq, L)
    if "region_bias" in terms:
        options["region_bias"] = normal(B, 1, R) if L % 2 else normal(B, Hk, R)
    if "sink" in terms:
        options["sink"] = normal(Hq)
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


def takes_pairs(dtype) -> bool:
    return dtype == ml_dtypes.bfloat16 and combiner.info()["isa"] in PAIRING


def unit(dtype) -> float:
    """What rounding to a 16-bit dtype loses at most, as a share of a number's size."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


class Judge:
    """What the reference says of a problem, and whether an answer lies near enough to it.

    Lenient: the worst of many thousand random problems is four times as far off as the worst of the grid, its logits
    may be small beside the terms that they are sums of, and dense attention, whose logits may be far smaller than those
    of summed keys, is no measure for it. Pooled biases, which may
    be far larger than the logits, are rounded to their own size.
    """

    def __init__(self, problem: Problem, lenient: bool = False):
        self.problem, self.lenient, self.slack = problem, lenient, 4 if lenient else 1
        self.out, self.saved = reference.attention_forward(*problem.inputs, problem.pattern, **problem.options)
        self.lse, heads = self.saved["lse"], self.saved["heads"]
        self.S = heads.write(heads.Hq, (heads.L,), lambda table: _largest_logits(table, np.asarray, lenient))
        self.S_terms = heads.write(heads.Hq, (heads.L,), lambda table: _largest_logits(table, np.abs, lenient))
        if lenient or "sink" in problem.options:  # beside a sink even a lone key's weight has the error of its logit
            self.S = self.S_terms
        self.weighted = any(x.weighted for x in heads.parts.values())
        self.averages = any(x.weighted or x.pooling in ("mean", "sum") for x in heads.parts.values())
        self.stages = 1
        for parts in heads.parts.values():
            depth = [0] * heads.L
            for members in parts.members:
                depth.append(1 + max((depth[t] for t in members), default=0))
            self.stages = max(self.stages, 1 + max(depth, default=0))
        value = np.repeat(problem.inputs[2], heads.Hq // heads.Hk, axis=1)
        self.kept = 1 / (1 - problem.options.get("dropout_p", 0))  # the largest factor of a weight
        self.spread = (
            self.kept * heads.write(heads.Hq, (heads.L, heads.L), lambda table: table.weights()) @ np.abs(value)
        )

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
            # Beside a large sink the weights of all keys are small: those below 2^-126 are 0.
            lost = self.out.shape[-2] * _largest(self.problem.inputs[2]) if self.lenient else 0
            within = self.stages * (8 + 8 * self.S[..., None]) * 2.0**-24 * self.spread + 2.0**-126 * (1 + lost)
            # The largest of few errors is a matter of luck, and of NumPy's BLAS.
            is_measured = self.out.shape[-2] >= 64 and self.out.shape[-1] > 1 and "sink" not in self.problem.options
            if is_measured and not self.lenient:
                dense = self.kept * max(2, self.stages) * self.dense_error[0]
                within = np.minimum(within, dense + 2.0**-22 * _largest(self.problem.inputs[2]))
            size = np.abs(np.where(np.isfinite(self.lse), self.lse, 0))  # it is rounded to its own size
            within_lse = (8 + 8 * self.S_terms + size) * 2.0**-24
            if self.lenient and self.weighted:  # a weighted key is off by the error of its weights' logits
                within_lse = within_lse + self.S_terms * (8 + 8 * self.S_terms) * 2.0**-24
        if out.dtype.itemsize == 2:
            within = within + unit(out.dtype) * np.abs(self.out) + ml_dtypes.finfo(out.dtype).smallest_subnormal
            if takes_pairs(out.dtype):  # weights are rounded too
                moved = self.moved(out.dtype)
                within = within + (self.stages * unit(out.dtype) + 2 * moved[..., None]) * self.spread
                within_lse = within_lse + moved
        close(out.astype(self.out.dtype), self.out, self.slack * within, "out")
        if lse is not None:
            close(lse, self.lse, self.slack * within_lse, "lse")

    def moved(self, dtype) -> np.ndarray:
        """How far each logit moves where queries and keys that are averages are rounded, once in every stage."""
        return 2 * self.averages * self.stages * unit(dtype) * self.S_terms

    def accepts_backward(self, gradients, but: str = "") -> None:
        """But for one of them, by name."""
        for name, actual in gradients._asdict().items():
            expected = getattr(self.gradients, name)
            if name == but:
                continue
            assert (actual is None) == (expected is None), name
            if actual is not None:
                within = self.allowed_of(name, actual.dtype, gradients.query.dtype)
                close(actual.astype(expected.dtype), expected, within, f"gradient of {name}")

    def allowed_of(self, name: str, dtype: np.dtype, dtype_of_inputs: np.dtype) -> float:
        """How far a gradient of this name and dtype may lie from the reference's."""
        q, k, v = (_largest(x) for x in self.problem.inputs)
        k, q = (
            max(k, _largest(self.problem.options.get("region_key"))),
            max(q, _largest(self.problem.options.get("region_query"))),
        )
        D, Dv = self.problem.inputs[0].shape[-1], self.problem.inputs[2].shape[-1]
        scale = D**-0.5 if self.problem.options["scale"] is None else abs(self.problem.options["scale"])
        grad_p = self.kept * _largest(self.problem.grad_out) * v * Dv**0.5 + _largest(self.problem.grad_lse)
        sizes = (
            scale * grad_p * k,
            scale * grad_p * q,
            self.kept * _largest(self.problem.grad_out),
            scale * grad_p * k,
            scale * grad_p * q,
        )
        lost = [*self.dense_error[1:], *self.dense_error[1:3]]
        of_logit = self.dense_error[2] / (scale * q) if scale * q else 0.0  # as in dk, a sum of logits' times queries
        sizes, lost = (*sizes, *[grad_p] * 3), [*lost, *[of_logit] * 3]
        place, expected = self.gradients._fields.index(name), getattr(self.gradients, name)
        size, error = max(sizes[place], _largest(expected)), lost[place]
        if dtype == np.float64:
            within = 1e-10 * max(size, 1)
        else:
            within = self.kept * max(2, self.stages) * error + (4 + self.S.max(initial=0)) * 2.0**-24 * size
        if dtype.itemsize == 2:  # out and the summaries' values were rounded on their way here too
            within = within + unit(dtype) * (np.abs(expected) + 2 * self.stages * size)
        is_kept_rounded = self.weighted and dtype_of_inputs.itemsize == 2  # forward's weighted keys, for backward
        if takes_pairs(dtype_of_inputs) or is_kept_rounded:
            within = within + 2 * self.moved(dtype_of_inputs).max(initial=0) * size
        if self.lenient and name in TERM_ARRAYS:  # a sum over queries and what the term was broadcast to
            B, Hq, L = self.problem.inputs[0].shape[:3]
            summed = B * Hq * L / max(1, expected.size if name == "sink" else math.prod(expected.shape[:-1]))
            rounded = unit(dtype_of_inputs) if dtype_of_inputs.itemsize == 2 else 2.0**-24
            within = within * summed / max(L, 1) + 2 * self.stages * rounded * grad_p * summed * (dtype != np.float64)
        return self.slack * within


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


def agree(actual: tuple, expected: tuple, within: float = 1e-10) -> None:
    """Two named tuples of float64 arrays or None: each within a share of 1 and the largest number."""
    for name, x, exact in zip(actual._fields, actual, expected, strict=True):
        assert (x is None) == (exact is None), name
        if x is not None:
            close(x, exact, within * (1 + np.abs(np.where(np.isfinite(exact), exact, 0)).max(initial=0)), name)


def content(result) -> list[bytes]:
    """The bytes of an array, of a tuple of them, or of a plan."""
    if isinstance(result, Plan):
        return [x.tobytes() for x in result.arrays.values()]
    return [x.tobytes() for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def _largest(x: np.ndarray | None, floor: float = 0.0) -> float:
    return floor if x is None else float(np.abs(x).max(initial=floor))


def _largest_logits(table, of=np.asarray, with_biases: bool = False) -> np.ndarray:
    """Of each query: the largest |logit| of its softmax and of those of the regions in it, without the biases or with;
    of=np.abs: of the sums of their terms' sizes, which is what rounding goes by where the terms cancel."""
    logits = np.abs(table.scale * of(table.Q) @ of(table.K).swapaxes(-1, -2))
    if with_biases:
        logits = logits + np.abs(table.B).swapaxes(-1, -2)
    largest, of_regions = np.zeros((table.n, table.L)), np.zeros((table.n, table.L + table.R))
    for x in [*table.summarized, *range(table.L)]:
        if rows := table.rows[x]:
            of_row = largest if x < table.L else of_regions
            of_row[:, x] = np.maximum(logits[:, x, rows].max(axis=1), of_regions[:, rows].max(axis=1))
    return largest


def _dense(q, k, v, grad_out, grad_lse, is_causal: bool, scale: float | None) -> tuple[np.ndarray, ...]:
    """out, dq, dk, dv of plain dense attention, in the dtype of its inputs."""
    (B, Hq, L, D), Hk = q.shape, k.shape[1]
    scale = q.dtype.type(D**-0.5 if scale is None else scale)
    k, v = (np.repeat(x, Hq // Hk, axis=1) for x in (k, v))
    S = q @ k.swapaxes(-1, -2) * scale
    if is_causal:
        S = np.where(np.tri(L, dtype=bool), S, -np.inf).astype(q.dtype)
    P = np.exp(S - S.max(axis=-1, keepdims=True, initial=-np.inf))
    P /= P.sum(axis=-1, keepdims=True)
    out = P @ v
    dS = (
        P * (grad_out @ v.swapaxes(-1, -2) - (grad_out * out).sum(axis=-1, keepdims=True) + grad_lse[..., None]) * scale
    )
    grouped = (B, Hk, Hq // Hk, L)
    dk, dv = ((x.swapaxes(-1, -2) @ y).reshape(*grouped, y.shape[-1]).sum(axis=2) for x, y in ((dS, q), (P, grad_out)))
    return out, dS @ k, dk, dv


def rebuilt(saved: Saved, **changed: object) -> Saved:
    """A `saved` as its pickle makes it, with other arguments or results."""
    make, arguments = saved.problem.__reduce__()
    names = ("stages", "query", "key", "value", "plan", "is_causal", "scale", "key_mask", "cu_seqlens", "region_query",
             "region_key", "region_value", "dropout", "softcap", "key_bias", "region_bias", "sink",
             "is_mixture", "offset")  # fmt: skip
    given = dict(zip(names, arguments, strict=True))
    problem = make(**given | {name: x for name, x in changed.items() if name in given})
    results = {name: x for name, x in changed.items() if name not in given}
    return Saved(saved.function, saved.layout, problem, saved.results).with_results(**results)
