# SPDX-License-Identifier: Apache-2.0
"""Random problems against the float64 reference, and the same bits for any instruction set, threads and layout.

python tests/fuzz.py --seconds 60             problems of a new seed, which is printed
python tests/fuzz.py --seed 7 --case 1234     one of them again
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import ml_dtypes
import numpy as np
from cases import PAIRING, Judge, Problem, agree, close, each_isa, random_parts, takes_pairs, unit

import combiner
from combiner import (
    Axial,
    AxialMixture,
    Decoder,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Mixture,
    Plan,
    Routing,
    Selected,
    Tree,
    Window,
    reference,
)
from combiner.patterns import Sparse
from combiner.reference.parts import of_sequences, parts_of_heads, region_count
from combiner.reference.selection import scores

POOLINGS = ("max", "mean", "sum")
DTYPES = (np.float32, np.float32, ml_dtypes.bfloat16, np.float16)
THREADS = (1, 2, 3, 5)
BLOCKS = (1, 2, 5, 16, 64, 100)  # of queries that select together
SELECTABLE = Fixed, HeavilyCompressed, LogSparse, Tree  # patterns whose regions queries share in either direction


@dataclass(frozen=True)
class Sizes:
    """B, Hq, Hk, L, D and Dv of a problem."""

    B: int
    Hq: int
    Hk: int
    L: int
    D: int
    Dv: int


@dataclass(frozen=True)
class Fuzzed:
    """A problem, what the library is given for its pattern, and the dtype beside float64 that holds its numbers."""

    problem: Problem
    pattern: object
    dtype: type

    def __str__(self) -> str:
        def describe(x: object) -> object:
            return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else x

        options = {name: describe(x) for name, x in self.problem.options.items()}
        shapes = [x.shape for x in self.problem.inputs]
        return f"{self.pattern} of {shapes} in {np.dtype(self.dtype).name} with {options}"

    def of_type(self, dtype: type) -> Problem:
        """The cotangent of lse is float32 where the inputs have 16 bits, as lse is."""
        lse_dtype = np.promote_types(dtype, np.float32) if dtype != ml_dtypes.bfloat16 else np.float32
        return dataclasses.replace(self.problem.as_type(dtype), grad_lse=self.problem.grad_lse.astype(lse_dtype))


# ---- what is drawn


def chance(rng: np.random.Generator, p: float) -> bool:
    return bool(rng.random() < p)


def pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def draw(rng: np.random.Generator, large: bool) -> Fuzzed:
    """A problem: mostly of few heads and up to 80 positions, now and then up to 300."""
    L = int(rng.integers(0, pick(rng, (20, 20, 40, 40, 80, 80, 80, 300 if chance(rng, 0.2) else 10))))
    B, Hk, group = (pick(rng, (1, 1, 1, 2, 3)) for _ in range(3))
    widest = 16 if chance(rng, 0.7) else 130
    D, Dv = (int(rng.integers(1, widest)) for _ in range(2))
    sizes = Sizes(B, Hk * group, Hk, L, D, Dv)
    is_causal = chance(rng, 0.6)
    exact = given = draw_pattern(rng, sizes)
    packed = chance(rng, 0.2) and L
    ends = [0, *(sorted(rng.integers(0, L, int(rng.integers(0, 4)), endpoint=True).tolist()) if packed else []), L]
    if isinstance(exact, SELECTABLE) or (isinstance(exact, Routing) and not is_causal):
        exact = given = draw_selected(rng, exact, sizes, ends) if chance(rng, 0.3) else exact
    if not packed and chance(rng, 0.12):
        options = {"pooling": pick(rng, POOLINGS), "size_bias": chance(rng, 0.5)}
        exact = random_parts(rng, L, int(rng.integers(0, 30)), is_causal, **options)
        given = Plan.from_parts(exact.direct, exact.regions, exact.members, is_causal=is_causal, **options)
    options = {"is_causal": is_causal, "scale": pick(rng, (None, None, 0.3, 1.0, -0.2))}
    if chance(rng, 0.25):
        options |= {"dropout_p": pick(rng, (0.1, 0.5, 0.9)), "seed": int(rng.integers(2**64, dtype=np.uint64))}
    if chance(rng, 0.3):
        options["key_mask"] = rng.random((B, L)) < rng.random() * 1.2
    if packed:
        options["cu_seqlens"] = ends
    dtype = pick(rng, DTYPES)
    numbers = draw_numbers(rng, dtype, large)
    R = count_regions(exact, sizes, options)
    for name, heads in (("region_query", sizes.Hq), ("region_key", sizes.Hk)):
        if chance(rng, 0.12):
            options[name] = numbers(B, heads, R, D)
    options |= draw_terms(rng, sizes, R, numbers)
    inputs = numbers(B, sizes.Hq, L, D), numbers(B, Hk, L, D), numbers(B, Hk, L, Dv)
    cotangents = numbers(B, sizes.Hq, L, Dv), numbers(B, sizes.Hq, L)
    return Fuzzed(Problem(inputs, exact, options, *cotangents), given, dtype)


def draw_terms(rng: np.random.Generator, sizes: Sizes, R: int, numbers: Callable[..., np.ndarray]) -> dict:
    """Terms of the logit, mostly none; biases of each head or key head, or one for several."""
    options: dict = {}
    if chance(rng, 0.15):
        options["softcap"] = pick(rng, (0.5, 3.0, 50.0))
    heads = ((sizes.B, sizes.Hq), (sizes.B, sizes.Hk), (sizes.B, 1), (1, sizes.Hk))
    for name, length in (("key_bias", sizes.L), ("region_bias", R)):
        if chance(rng, 0.15):
            options[name] = numbers(*pick(rng, heads), length)
    if chance(rng, 0.15):
        options["sink"] = numbers(pick(rng, (1, sizes.B)), sizes.Hq)
    return options


def draw_numbers(rng: np.random.Generator, dtype: type, large: bool) -> Callable[..., np.ndarray]:
    """A function of a shape: float64 numbers that the dtype holds, of one kind for all arrays of a problem."""
    kind = pick(
        rng,
        (
            "normal",
            "normal",
            "integers",
            "one for all heads",
            *(["large", "heavy tails"] if large and dtype != np.float16 else []),
        ),
    )
    size = 10 ** rng.uniform(1, 3)  # products of such numbers are beyond float16

    def numbers(*shape: int) -> np.ndarray:
        x = {
            "normal": lambda: rng.standard_normal(shape),
            "integers": lambda: rng.integers(-1, 2, shape),  # ties in every pool
            "one for all heads": lambda: np.broadcast_to(rng.standard_normal((shape[0], 1, *shape[2:])), shape),
            "large": lambda: size * rng.standard_normal(shape),
            "heavy tails": lambda: np.clip(rng.standard_t(2, shape), -1e3, 1e3),
        }[kind]()
        return x.astype(np.float32).astype(dtype).astype(np.float64)

    return numbers


def draw_pattern(rng: np.random.Generator, sizes: Sizes, in_mixture: bool = False):
    """Any factorization, its sparse baseline, or a mixture; spans and widths below, at and above the length."""
    options = {"pooling": pick(rng, POOLINGS), "size_bias": chance(rng, 0.4)}
    span = int(rng.integers(1, 20)) if chance(rng, 0.8) else int(rng.integers(1, sizes.L + 4))
    if not in_mixture and chance(rng, 0.1):
        return Mixture(*(draw_pattern(rng, sizes, True) for _ in range(int(rng.integers(1, 4)))))
    by_head = pick(rng, ((), (sizes.B, sizes.Hk)))
    clusters = rng.integers(0, min(max(sizes.L, 1), int(rng.integers(1, 12))), (*by_head, sizes.L))
    pattern = pick(
        rng,
        (
            lambda: Dense(),
            lambda: Fixed(pick(rng, (None, span, span)), **options),
            lambda: LogSparse(hierarchical=chance(rng, 0.5), **options),
            lambda: Axial(pick(rng, (None, span, span)), pick(rng, ("vertical", "horizontal")), **options),
            lambda: Axial(span, "rowmajor", pick(rng, ("pick", "weighted")), size_bias=options["size_bias"]),
            lambda: AxialMixture(pick(rng, (None, span, span)), **options),
            lambda: Tree(max(2, span), pick(rng, (None, 1, 2, 3)), **options),
            lambda: Tree(2, **options),
            lambda: Routing(clusters, **options),
            lambda: Window(span, **options),
            lambda: Fixed(pick(rng, (None, span)), window=int(rng.integers(1, 30)), **options),
            lambda: HeavilyCompressed(span, int(rng.integers(1, 30)), **options),
        ),
    )()
    return pattern.sparse() if chance(rng, 0.1) else pattern


def draw_selected(rng: np.random.Generator, pattern, sizes: Sizes, ends: list[int]) -> Selected:
    """Any of the pattern's regions, repeats and -1 among them, for all queries, for blocks, or for blocks and heads."""
    block, k = pick(rng, BLOCKS), int(rng.integers(0, 5))
    by_head = pick(rng, ((), (sizes.B, sizes.Hk)))
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    counts = []
    for own, length in zip(of_sequences(pattern, ends), lengths, strict=True):
        parts = parts_of_heads(own, sizes.B, sizes.Hk, length, False)
        counts.append(min((len(each.members) for each in parts.values()), default=0))
    if chance(rng, 0.2):
        regions = rng.integers(-1, min(counts), k)
    else:
        blocks = [(*by_head, -(-length // block), k) for length in lengths]
        each = [rng.integers(-1, R, shape) for R, shape in zip(counts, blocks, strict=True)]
        regions = np.concatenate(each, axis=-2)
    is_open = chance(rng, 0.8)
    rest = is_open and chance(rng, 0.6)
    return Selected(pattern, regions, block=block, open=is_open, rest=rest)


def count_regions(pattern, sizes: Sizes, options: dict) -> int:
    """R: over packed sequences their sum."""

    def count(own, length: int) -> int:
        return region_count(own, sizes.B, sizes.Hk, length, options["is_causal"])

    ends = options.get("cu_seqlens", [0, sizes.L])
    lengths = (b - a for a, b in itertools.pairwise(ends))
    return sum(map(count, of_sequences(pattern, ends), lengths))


def laid_out(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """The same numbers in another order in memory, with gaps, backwards, off their alignment, or one for many."""
    if x.ndim < 3 or x.dtype == bool:
        return x
    for axis in (0, 1):
        if x.shape[axis] > 1 and (x == x[(slice(None),) * axis + (slice(1),)]).all():
            return np.broadcast_to(x[(slice(None),) * axis + (slice(1),)], x.shape)
    unaligned = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    return pick(
        rng,
        (
            x,
            np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),  # [B, L, H, D]
            np.asfortranarray(x),
            np.ascontiguousarray(x[..., ::-1])[..., ::-1],
            np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1],
            np.repeat(x, 2, axis=2)[:, :, ::2],
            np.repeat(x, 3, axis=-1)[..., ::3],
            unaligned,
        ),
    )


# ---- what is judged


def segments(problem: Problem, sizes: Sizes) -> Iterator[tuple[Problem, tuple[slice, slice]]]:
    """The problem of each packed sequence alone, and where its positions and its regions lie in the whole."""
    options = dict(problem.options)
    ends, first = options.pop("cu_seqlens"), 0
    for (a, b), pattern in zip(itertools.pairwise(ends), of_sequences(problem.pattern, ends), strict=True):
        count = count_regions(pattern, dataclasses.replace(sizes, L=b - a), options)
        here, there = slice(a, b), slice(first, first + count)
        first = there.stop
        rows = {
            "key_mask": (..., here),
            "region_query": (..., there, slice(None)),
            "region_key": (..., there, slice(None)),
            "key_bias": (..., here),
            "region_bias": (..., there),
        }
        own = {name: x[rows[name]] if name in rows else x for name, x in options.items()}
        inputs = tuple(x[..., here, :] for x in problem.inputs)
        grads = problem.grad_out[..., here, :], problem.grad_lse[..., here]
        yield Problem(inputs, pattern, own, *grads), (here, there)


class PackedJudge:
    """A judge for each sequence."""

    def __init__(self, problem: Problem, sizes: Sizes):
        self.parts = []
        for part, (here, there) in segments(problem, sizes):
            length = here.stop - here.start
            self.parts.append((judge_of(part, dataclasses.replace(sizes, L=length)), here, there))

    def accepts_forward(self, out: np.ndarray, lse: np.ndarray | None) -> None:
        for judge, here, _ in self.parts:
            judge.accepts_forward(out[..., here, :], None if lse is None else lse[..., here])

    def accepts_backward(self, gradients) -> None:
        """A sink is of all sequences: its gradient is the sum of theirs."""
        for judge, here, there in self.parts:
            rows = (here, here, here, there, there)
            own = [None if x is None else x[..., at, :] for x, at in zip(gradients, rows, strict=False)]
            biases = [None if x is None else x[..., at] for x, at in zip(gradients[5:7], (here, there), strict=True)]
            judge.accepts_backward(type(gradients)(*own, *biases), but="sink")
        if gradients.sink is not None:
            judges = [judge for judge, *_ in self.parts]
            exact = sum(judge.gradients.sink for judge in judges)
            dtypes = gradients.sink.dtype, gradients.query.dtype
            within = sum(judge.allowed_of("sink", *dtypes) for judge in judges)
            close(gradients.sink.astype(np.float64), exact, within, "gradient of sink")


class MixtureJudge:
    """float64 to 1e-10 of the sizes; the others to what rounding loses in the worst of the components."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.out, self.saved = reference.attention_forward(*problem.inputs, problem.pattern, **problem.options)
        self.gradients = reference.attention_backward(problem.grad_out, self.saved)
        regions = ("region_query", "region_key", "region_bias")
        rest = {name: x for name, x in problem.options.items() if name not in regions}
        components = problem.pattern.patterns
        judges = [Judge(dataclasses.replace(problem, pattern=each, options=rest)) for each in components]
        given = [problem.options[name] for name in regions[:2] if name in problem.options]
        q, k, v = (largest(x) for x in problem.inputs)
        q, k = (max(x, *map(largest, given)) if given else x for x in (q, k))
        D, Dv = problem.inputs[0].shape[-1], problem.inputs[2].shape[-1]
        scale = D**-0.5 if problem.options["scale"] is None else abs(problem.options["scale"])
        S = max(judge.S.max(initial=0) for judge in judges) if not given else scale * D * q * k
        S += largest(problem.options.get("region_bias", np.zeros(0)))
        self.stages = max(judge.stages for judge in judges)
        self.lost = self.stages * (64 + 64 * S)  # of a float32, in units of 2^-24
        kept = max(judge.kept for judge in judges)
        self.size_out = kept * v
        grad_v = kept * largest(problem.grad_out)
        self.sizes = [scale * grad_v * v * Dv**0.5 * x for x in (k, q)] + [grad_v]
        self.sizes += self.sizes[:2][::-1]
        B, Hq, L = problem.inputs[0].shape[:3]
        self.sizes += [B * Hq * L * grad_v * v * Dv**0.5] * 3  # of terms, which are sums over queries and heads

    def share(self, dtype) -> float:
        if dtype == np.float64:
            return 1e-10
        moved = unit(dtype) * (4 + 4 * self.lost / 64) if np.dtype(dtype).itemsize == 2 else 0
        return self.lost * 2.0**-24 + moved

    def accepts_forward(self, out: np.ndarray, lse: None) -> None:
        assert lse is None
        close(out.astype(np.float64), self.out, self.share(out.dtype) * max(self.size_out, 1), "out")

    def accepts_backward(self, gradients, but: str = "") -> None:
        """But for one of them, by name."""
        for name, x in gradients._asdict().items():
            exact = getattr(self.gradients, name)
            if name == but:
                continue
            assert (x is None) == (exact is None), name
            if x is not None:
                within = self.allowed_of(name, x.dtype, gradients.query.dtype)
                close(x.astype(np.float64), exact, within, f"gradient of {name}")

    def allowed_of(self, name: str, dtype: np.dtype, dtype_of_inputs: np.dtype) -> float:
        size = dict(zip(self.gradients._fields, self.sizes, strict=True))[name]
        return self.share(dtype_of_inputs) * max(size, largest(getattr(self.gradients, name)), 1)


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=0))


def judge_of(problem: Problem, sizes: Sizes):
    if "cu_seqlens" in problem.options:
        return PackedJudge(problem, sizes)
    return MixtureJudge(problem) if isinstance(problem.pattern, Mixture) else Judge(problem, lenient=True)


# ---- what is compared


def check(fuzzed: Fuzzed, rng: np.random.Generator) -> None:
    """Every instruction set, on any threads and layouts: near the reference, and the same bits where promised."""
    p = fuzzed.problem
    (B, Hq, L, D), Hk, Dv = p.inputs[0].shape, p.inputs[1].shape[1], p.inputs[2].shape[3]
    judge = judge_of(p, Sizes(B, Hq, Hk, L, D, Dv))
    for dtype in {np.float64, fuzzed.dtype}:
        own, bits = fuzzed.of_type(dtype), {}
        for isa in each_isa(pairing=dtype == ml_dtypes.bfloat16):
            for is_plain in (True, False):
                with combiner.num_threads(1 if is_plain else pick(rng, THREADS)):
                    results = run(own, fuzzed.pattern, lambda x, is_plain=is_plain: x if is_plain else laid_out(rng, x))
                kind = isa if isa in ("base", *PAIRING) else "fused multiply-add"
                found = [None if x is None else np.ascontiguousarray(x).tobytes() for x in itertools.chain(*results)]
                if kind not in bits:
                    bits[kind] = found
                    judge.accepts_forward(*results[0])
                    judge.accepts_backward(results[1])
                assert found == bits[kind], f"other bits on {isa} where {'plain' if is_plain else 'laid out'}"
    if chance(rng, 0.3):
        check_stages(fuzzed, rng)
    if chance(rng, 0.3) and not isinstance(fuzzed.pattern, Mixture | Selected):
        check_select(fuzzed, rng)
    check_decoder(fuzzed, rng)


def run(p: Problem, pattern, lay: Callable):
    """(out, lse) and the gradients."""
    inputs = [lay(x) for x in p.inputs]
    options = {name: lay(x) if isinstance(x, np.ndarray) else x for name, x in p.options.items()}
    out, saved = combiner.attention_forward(*inputs, pattern, **options)
    assert combiner.attention(*inputs, pattern, **options).tobytes() == out.tobytes()
    grad_lse = None if isinstance(pattern, Mixture) else p.grad_lse
    gradients = combiner.attention_backward(lay(p.grad_out), saved, grad_lse=grad_lse)
    return (out, None if isinstance(pattern, Mixture) else saved["lse"]), gradients


def check_stages(fuzzed: Fuzzed, rng: np.random.Generator) -> None:
    """In float64: each stage alone, forward and backward; and stage 2 of some positions, with the bits of all."""
    p, pattern = fuzzed.problem, fuzzed.pattern
    if isinstance(pattern, Mixture):
        return
    summary, saved = combiner.summarize_forward(*p.inputs, pattern, **p.of_summarize)
    expected, exact = reference.summarize_forward(*p.inputs, p.pattern, **p.of_summarize)
    agree(summary, expected)
    # A gradient adds up products of three numbers, as many as there are features, which may cancel.
    top = max(map(largest, (*p.inputs, *summary[:2], p.grad_out)))
    within = max(1e-10, 2.0**-50 * p.inputs[2].shape[-1] * top**3)
    agree(
        combiner.summarize_backward(summary.key, summary.value, saved),
        reference.summarize_backward(summary.key, summary.value, exact),
        within,
    )
    given = (*p.inputs, summary.key, summary.value)
    out, saved = combiner.attend_forward(*given, pattern, **p.of_attend)
    expected, exact = reference.attend_forward(*given, p.pattern, **p.of_attend)
    close(out, expected, 1e-10 * max(1, largest(expected)), "out of attend")
    agree(
        combiner.attend_backward(p.grad_out, saved, grad_lse=p.grad_lse),
        reference.attend_backward(p.grad_out, exact, grad_lse=p.grad_lse),
        within,
    )
    if "cu_seqlens" not in p.of_attend:
        first, end = np.sort(rng.integers(0, out.shape[-2] + 1, 2))
        query, *others = given
        own = combiner.attend(query[..., first:end, :], *others, pattern, offset=int(first), **p.of_attend)
        assert own.tobytes() == out[..., first:end, :].tobytes(), f"other bits at offset {first} of {end - first} rows"


def check_select(fuzzed: Fuzzed, rng: np.random.Generator) -> None:
    """The choice of regions: the same on every instruction set but "base", on any threads and layouts; of packed
    sequences that of each alone; and in float64 the regions that score highest by the definition."""
    p, k, block = fuzzed.problem, int(rng.integers(0, 6)), pick(rng, BLOCKS)
    names = ("is_causal", "scale", "key_mask", "region_query", "region_key", "cu_seqlens")
    options = {"score": pick(rng, ("max", "mean")), "causal_score": pick(rng, (None, None, True, False))}

    def choose(own: Problem, pattern, lay: Callable = np.asarray) -> np.ndarray:
        given = {name: lay(x) if isinstance(x, np.ndarray) else x for name, x in own.options.items() if name in names}
        return combiner.select(*map(lay, own.inputs[:2]), pattern, k, block=block, **given, **options)

    for dtype in {np.float64, fuzzed.dtype}:
        own, found = fuzzed.of_type(dtype), {}
        for isa in each_isa():
            for threads in (1, pick(rng, THREADS)):
                with combiner.num_threads(threads):
                    regions = choose(own, fuzzed.pattern, lambda x, n=threads: x if n == 1 else laid_out(rng, x))
                assert np.array_equal(regions, found.setdefault(isa == "base", regions)), f"another choice on {isa}"
    if "cu_seqlens" not in p.options:
        judge_choice(p, p.pattern, choose(p, fuzzed.pattern), block, **options)
        return
    whole, first = choose(p, fuzzed.pattern), 0
    (B, Hq, L, D), Hk = p.inputs[0].shape, p.inputs[1].shape[1]
    for part, _ in segments(p, Sizes(B, Hq, Hk, L, D, D)):
        regions = choose(part, part.pattern)
        end = first + regions.shape[-2]
        assert np.array_equal(whole[..., first:end, :], regions), f"another choice alone, from block {first} on"
        judge_choice(part, part.pattern, regions, block, **options)
        first = end


def judge_choice(p: Problem, pattern, chosen: np.ndarray, block: int, score: str, causal_score: bool | None) -> None:
    """No region that is left out scores higher than one that is chosen, and none higher than one before it; -1 comes
    last, where there are no more."""
    options = {name: p.options.get(name) for name in ("scale", "key_mask")} | {"is_causal": p.options["is_causal"]}
    given = {name: p.options.get(name) for name in ("region_query", "region_key")}
    keys = given["region_key"]
    if keys is None:
        keys = reference.summarize(*p.inputs[:2], p.inputs[1][..., :1], pattern, **options, **given).key
    D = p.inputs[0].shape[-1]
    scale = D**-0.5 if options["scale"] is None else abs(options["scale"])
    within = 1e-12 * (1 + scale * D * largest(p.inputs[0]) * largest(keys))
    found = scores(*p.inputs[:2], pattern, block, score=score, causal_score=causal_score, **options, **given)
    for at, of_block in found.items():
        own = chosen[at].tolist()
        count = min(len(own), len(of_block))
        assert len(set(own[:count])) == count and set(own[count:]) <= {-1}, f"block {at} chose {own}"
        ranked = [of_block[r] for r in own[:count]] + [x for r, x in of_block.items() if r not in own]
        best = [ranked[n] - max(ranked[n:]) for n in range(count)]
        assert min(best, default=0) >= -within, f"block {at} chose {own}, whose scores are {ranked[:count]}"


def check_decoder(fuzzed: Fuzzed, rng: np.random.Generator) -> None:
    """Where it can: steps of any number of tokens, with rollbacks, give the rows of attention, to the bit."""
    p, pattern = fuzzed.problem, fuzzed.pattern
    taken = {"is_causal", "scale", "softcap", "key_bias", "sink"}
    given = {name for name, x in p.options.items() if x is not None}
    if given - taken or not p.options["is_causal"] or not is_decodable(pattern) or p.inputs[0].shape[2] == 0:
        return
    k = int(rng.integers(0, 6)) if isinstance(pattern, SELECTABLE) and chance(rng, 0.4) else None
    for dtype in {np.float64, fuzzed.dtype}:
        own = fuzzed.of_type(dtype)
        out = decode(own, pattern, k, rng)
        whole = pattern
        if k is not None:
            given = {name: own.options[name] for name in ("is_causal", "scale")}
            whole = Selected(pattern, combiner.select(*own.inputs[:2], pattern, k, block=1, **given), block=1)
        expected = combiner.attention(*own.inputs, whole, **own.options)
        if takes_pairs(dtype) and isinstance(pattern, Tree) and pattern.branching.bit_count() != 1:
            within = 2 * unit(dtype) * np.abs(expected.astype(np.float64)) + 2.0**-20 * largest(p.inputs[2])
            close(out.astype(np.float64), expected.astype(np.float64), within, "out of a decoder")
            continue
        assert out.tobytes() == expected.tobytes(), f"a decoder has other bits in {np.dtype(dtype).name}, select={k}"


def decode(p: Problem, pattern, select: int | None, rng: np.random.Generator) -> np.ndarray:
    """The rows of a decoder that rolls back now and then, its last step in part or whole."""
    options, bias, rows = p.options, p.options.get("key_bias"), []
    terms = {name: options.get(name) for name in ("scale", "softcap", "sink")}
    decoder = Decoder(pattern, rollback=30, select=select, **terms)
    while (first := decoder.length) < p.inputs[0].shape[2]:
        here = slice(first, first + int(rng.integers(1, 30)))
        step = decoder.step if rows else pick(rng, (decoder.prefill, decoder.step))
        rows.append(step(*(x[:, :, here] for x in p.inputs), key_bias=None if bias is None else bias[..., here]))
        if chance(rng, 0.2):
            decoder.rollback(back := int(rng.integers(0, rows[-1].shape[2], endpoint=True)))
            rows[-1] = rows[-1][:, :, : rows[-1].shape[2] - back]
    return np.concatenate(rows, axis=2)


def is_decodable(pattern) -> bool:
    own = pattern.pattern if isinstance(pattern, Sparse) else pattern
    only_sparse = [AxialMixture] if isinstance(pattern, Sparse) else []
    kinds = (Dense, Fixed, LogSparse, Tree, Axial, Window, HeavilyCompressed, *only_sparse)
    return isinstance(own, kinds) and getattr(own, "span", 1) is not None and getattr(own, "width", 1) is not None


# ---- the run


def check_case(seed: int, case: int, large: bool) -> None:
    rng = np.random.default_rng([seed, case])
    fuzzed = draw(rng, large)
    try:
        check(fuzzed, rng)
    except Exception:
        print(f"seed {seed}, case {case}: {fuzzed}", file=sys.stderr)
        raise


def work(seed: int, first: int, step: int, seconds: float, large: bool, at, failed) -> None:
    """Cases first, first + step, .. until the time is over or a worker has failed; `at` is the one in work."""
    end = time.monotonic() + seconds
    for case in itertools.count(first, step):
        if time.monotonic() > end or failed.is_set():
            return
        at.value = case
        try:
            check_case(seed, case, large)
        except Exception:
            failed.set()
            traceback.print_exc()
            sys.exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="of the problems; new where it is not given")
    parser.add_argument("--case", type=int, default=None, help="one case alone")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--large", action=argparse.BooleanOptionalAction, default=True, help="large numbers and outliers"
    )
    given = parser.parse_args()
    seed = int.from_bytes(os.urandom(4)) if given.seed is None else given.seed
    if given.case is not None:
        check_case(seed, given.case, given.large)
        return 0
    print(f"fuzzing for {given.seconds:g} s with seed {seed}", flush=True)
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    failed = context.Event()
    at = [context.Value("q", n - given.workers, lock=False) for n in range(given.workers)]
    workers = [
        context.Process(target=work, args=(seed, n, given.workers, given.seconds, given.large, at[n], failed))
        for n in range(given.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for worker, case in zip(workers, at, strict=True):
        if worker.exitcode:
            print(f"again: python tests/fuzz.py --seed {seed} --case {case.value}")
    done = sum(1 + (case.value - n) // given.workers for n, case in enumerate(at))
    print(f"{done} cases in {time.monotonic() - began:.0f} s, seed {seed}")
    return int(any(worker.exitcode for worker in workers))


if __name__ == "__main__":
    sys.exit(main())
