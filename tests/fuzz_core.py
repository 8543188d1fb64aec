# SPDX-License-Identifier: Apache-2.0
"""Calls every function of `combiner._core` with hostile arguments, against an extension built with sanitizers.

A call may succeed, or raise one of `EXPECTED` or what the argument itself raises. A crash, a report of a sanitizer, any
other exception and an input whose bytes have changed are failures. ``make fuzz-core SECONDS=60`` builds and runs it;
every case follows from the seed, which is printed, and its number alone: ``--seed S --case N`` repeats one.
"""

import argparse
import faulthandler
import hashlib
import inspect
import mmap
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

import combiner
from combiner import _core

EXPECTED = (TypeError, ValueError, OverflowError, MemoryError)
SECONDS_OF_A_CALL = 120  # more: it hangs

B, HQ, HK, L, D, DV = 2, 4, 2, 12, 5, 3
PATTERN = combiner.Fixed(4)
PLAN = PATTERN.plan(L)
R = PLAN.region_count


class HostileError(Exception):
    """What hostile objects raise; a library must let it through."""


# ---- hostile objects


class Raising:
    """Whatever is asked of it."""

    def _raise(self, *arguments: Any, **options: Any) -> Any:
        raise HostileError

    __array__ = __index__ = __int__ = __float__ = __bool__ = __len__ = __iter__ = __getitem__ = __str__ = _raise
    __repr__ = __hash__ = __eq__ = __call__ = _raise  # type: ignore[assignment]


class RaisingAttributes:
    def __getattr__(self, name: str) -> Any:
        raise HostileError(name)


class Answering:
    """The given object, whatever is asked of it."""

    def __init__(self, answer: Any) -> None:
        self.answer = self.plan = self.shape = self.dtype = answer

    def _answer(self, *arguments: Any, **options: Any) -> Any:
        return self.answer

    __array__ = __index__ = __int__ = __float__ = __bool__ = __len__ = __iter__ = __getitem__ = _answer


class Planning:
    """A pattern that makes what is given, or raises."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def plan(self, *arguments: Any) -> Any:
        if self.made is HostileError:
            raise HostileError
        return self.made


class Subclass(np.ndarray):
    """Does not tell its shape, and cannot be made of an array of more than DEEPEST dimensions."""

    DEEPEST = 6

    def __array_finalize__(self, source: Any) -> None:
        if source is not None and source.ndim > self.DEEPEST:
            raise HostileError

    @property
    def shape(self) -> Any:
        raise HostileError


CONSTANTS: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, -(2**31), 2**62, -(2**63), 2**70, 0.5, -0.0, 1e308, float("nan"), 1j),
    *(float("inf"), "x", "fixed", b"x", (), [], {}, set(), range(3), ..., int, np, len, slice(3), ((((),),),)),
    *(np.float32(1), np.int8(3), np.bool_(True), np.datetime64(3, "s"), [[0], [1, 2]], [[True, False]] * 2),
    *((PLAN,) * n for n in range(1, 6)),
    *((None,) * n for n in range(1, 4)),
]
ANSWERS = None, -1, 2**70, "x", np.array(3), np.ones(3), (1, 2), [[1], [2, 3]]
PLANS = None, HostileError, PLAN, (PLAN,) * 4, (PLAN, 3), (), combiner.Dense().plan(7)
OBJECTS: list[Callable[[], Any]] = [
    *(lambda x=x: x for x in CONSTANTS),
    *(lambda x=x: Answering(x) for x in ANSWERS),
    *(lambda x=x: Planning(x) for x in PLANS),
    *(Raising, RaisingAttributes, object, lambda: (x for x in range(3)), lambda: memoryview(b"abcdefgh")),
    lambda: np.ma.masked_array(np.ones((2, 3)), [[True, False, True]] * 2),
    lambda: np.rec.array([(1, 2.0)], dtype=[("a", int), ("b", float)]),
    lambda: np.ones((2, 3)).view(Subclass),
    lambda: np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (2**40, 0, 3), (0, 0, 4)),
    lambda: combiner.Dense().plan(0),
    lambda: combiner.Axial(3, "rowmajor", "weighted").plan(L),
]
DTYPES = [*"f4 f8 f2 >f4 >i8 i1 u1 i4 u4 i8 u8 ? c8 g O S3 U2 m8[s] M8[s] V4".split(), [("x", "f4"), ("y", "i4")]]


def odd_array(rng: np.random.Generator) -> np.ndarray:
    """Of any type, shape and numbers."""
    shape = tuple(rng.choice([0, 1, 2, 3, 4, 5, L, L + 1], rng.integers(0, 6)))
    numbers = rng.integers(-3, 2 * L, shape) if rng.random() < 0.9 else rng.integers(-(2**62), 2**62, shape)
    return twist(rng, cast(rng, numbers))


def cast(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """To any type, where NumPy can."""
    try:
        return x.astype(np.dtype(DTYPES[rng.integers(len(DTYPES))]))
    except (*EXPECTED, RuntimeError):
        return x


def twist(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """The same numbers or some of them in another layout, type or shape."""
    kind = rng.integers(16)
    if kind == 0 and x.ndim:
        return np.flip(x, rng.integers(x.ndim))
    if kind == 1:
        return x.T
    if kind == 2:
        return np.broadcast_to(x, (int(rng.integers(0, 4)), *x.shape))
    if kind == 3 and x.ndim:
        return x[..., : int(rng.integers(0, x.shape[-1] + 1))]
    if kind == 4 and x.ndim:
        return np.broadcast_to(x[..., :1], x.shape)
    if kind == 5 and x.ndim:
        return x[0] if len(x) else x
    if kind == 6:
        return x[..., None]
    if kind == 7:  # misaligned, beyond what describes it
        bytes_ = np.zeros(x.nbytes + 1, np.uint8)
        bytes_[1:] = np.frombuffer(x.tobytes(), np.uint8) if not x.dtype.hasobject else 0
        return x if x.dtype.hasobject else np.frombuffer(bytes_, x.dtype, x.size, 1).reshape(x.shape)
    if kind == 8:
        return x.astype(x.dtype.newbyteorder()) if x.dtype.kind in "fiu" else x
    if kind == 9:
        return cast(rng, x)
    if kind == 10:
        y = x.copy()
        y.flags.writeable = False
        return y
    if kind == 11:
        return x.reshape(-1)
    if kind == 12 and x.dtype.kind == "f" and x.size:
        y = x.copy()
        y.flat[rng.integers(x.size)] = rng.choice([np.nan, np.inf, -np.inf, 1e30])
        return y
    if kind == 13 and x.dtype.kind in "iu" and x.size and x.ndim:
        y = x.copy()
        np.ndarray.view(y, np.uint8).flat[rng.integers(x.nbytes)] = rng.choice([0, 1, 100, 127, 128, 255])
        return y
    if kind == 14:
        return x.view(Subclass) if type(x) is np.ndarray and x.ndim <= Subclass.DEEPEST else x
    return x.reshape(1, *x.shape)


def hostile(rng: np.random.Generator, good: Any) -> Any:
    """Something in the place of a good argument."""
    kind = rng.random()
    if type(good) is np.ndarray and kind < 0.5:
        return twist(rng, good)
    if isinstance(good, tuple) and good and kind < 0.6:
        changed = list(good)
        n = rng.integers(len(changed))
        changed[n] = hostile(rng, changed[n])
        return tuple(changed)[: len(changed) - (rng.random() < 0.1)]
    return odd_array(rng) if kind < 0.75 else OBJECTS[rng.integers(len(OBJECTS))]()


# ---- good calls


Call: TypeAlias = tuple[Callable[..., Any], list[Any]]


def named(function: Callable[..., Any], known: dict[str, Any]) -> Call:
    """A call with arguments by name; None for those that are not known."""
    return function, [known.get(name) for name in inspect.signature(function).parameters]


def good_calls(rng: np.random.Generator) -> dict[str, Call]:
    """By name: every function of `_core` with arguments that it takes."""
    dtype = rng.choice([np.float32, np.float64, np.float16])

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    query, key, value = draw(B, HQ, L, D), draw(B, HK, L, D), draw(B, HK, L, DV)
    mask = rng.random((B, L)) < 0.8 if rng.random() < 0.5 else None
    wide = np.float64 if dtype == np.float64 else np.float32
    terms = draw(B, rng.choice([HK, HQ]), L).astype(wide), draw(HQ).astype(wide)
    biases = [None if rng.random() < 0.5 else x for x in terms]
    segments = np.array([0, 5, L]) if rng.random() < 0.3 else None
    plans = PLAN if segments is None else tuple(PATTERN.plan(n) for n in (5, 7))
    count = R if segments is None else sum(plan.region_count for plan in plans)
    dropout = (0.3, 7) if rng.random() < 0.3 else None
    is_mixture = bool(rng.random() < 0.3)
    region_query = draw(B, HQ, count + count * is_mixture, D) if rng.random() < 0.3 else None
    given = {
        "stages": 3, "query": query, "key": key, "value": value, "plan": (plans, plans) if is_mixture else plans,
        "is_causal": False, "scale": 0.5, "is_mixture": is_mixture,
        "key_mask": mask, "cu_seqlens": segments, "region_query": region_query, "dropout": dropout,
    }  # fmt: skip
    if rng.random() < 0.5:
        biases = {
            "key_bias": draw(1, HK, L),
            "region_bias": draw(B, HQ, count + count * is_mixture),
            "sink": draw(B, HQ),
        }
        of_lse = np.promote_types(dtype, np.float32)
        given |= {"softcap": 9.0} | {name: x.astype(of_lse) for name, x in biases.items() if rng.random() < 0.7}
    problem = _core.Problem(**given)
    results = problem.forward(keep=2)
    gradients = {"grad_out": draw(B, HQ, L, DV)}
    flags = {"wants_lse": True, "keep": 2, "backward": True}
    x, centroids = rng.standard_normal((B, L, D)), rng.standard_normal((B, 3, D))
    arrays = list(PLAN.arrays.values())
    direct = np.arange(L + 1), np.arange(L)
    lists = [direct, (np.zeros(L + 1, int), np.zeros(0, int)), (np.array([0, 2]), np.array([0, 1]))]
    options = [False, False, 0, False]
    builders: dict[str, list[Any]] = {
        "_dense": [L],
        "_fixed": [L, 4, 2],
        "_logsparse": [L, True],
        "_axial": [L, 4, 2, True],
        "_axial_mixture": [L, 4],
        "_tree": [L, 4, 2],
        "_window": [L, 4],
        "_heavily_compressed": [L, 4, 6],
        "_routing": [rng.integers(0, 5, L)],
    }
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    return {
        "Problem": named(run_problem, given),
        "Problem with an offset": named(
            run_slice,
            {"query": query[..., 3:8, :], "key": key, "value": value, "plan": PLAN, "is_causal": False, "offset": 3}
            | {"key_mask": mask, "region_key": draw(B, HK, R, D), "region_value": draw(B, HQ, R, DV)},
        ),
        "Decoder": (
            run_decoder,
            [
                *pattern,
                query,
                key,
                value,
                0.5,
                9.0,
                3,
                rng.integers(0, L + 1, B),
                [2, 1],
                draw(B, HQ, L, D),
                *biases,
                int(rng.integers(0, 3)) if pattern in WITH_REGIONS else 0,
            ],
        ),
        "forward": named(problem.forward, flags),
        "forward to out": named(problem.forward, {**flags, "out": np.zeros_like(results.out)}),
        "backward": named(problem.backward, {"results": results, **gradients}),
        "Results": (run_results(problem, gradients["grad_out"]), list(results)),
        "workspace_bytes": named(problem.workspace_bytes, flags),
        "cluster": (_core.cluster, [x, 3, 2, 1, True, False]),
        "assign": (_core.assign, [x, centroids, True]),
        "update_centroids": (_core.update_centroids, [centroids, x, rng.integers(0, 3, (B, L)), 0.9]),
        "select": (_core.select, [query, key, draw(B, HK, R, D), PLAN, False, None, None, 4, 2, 0, True]),
        **{name: (getattr(combiner.Plan, name), [*own, *options]) for name, own in builders.items()},
        "_selected": (combiner.Plan._selected, [PLAN, rng.integers(-1, R, 2 * -(-L // 4)), 2, 4, True, True]),
        "_from_parts": (combiner.Plan._from_parts, [L, *lists, 0, False, 0, False]),
        "_from_arrays": (combiner.Plan._from_arrays, [*arrays, L, R, PLAN.scratch_count, False, 0, False, False]),
        "set_num_threads": (_core.set_num_threads, [2]),
        "set_isa": (_core.set_isa, [_core.isas()[0]]),
        "xla_keep_plan": (_core.xla_keep_plan, [3, PLAN]),
        "no arguments": (lambda function, *rest: function(*rest), [WITHOUT_ARGUMENTS[rng.integers(6)]]),
    }


def run_problem(
    stages: Any, query: Any, key: Any, value: Any, plan: Any, is_causal: Any, scale: Any, key_mask: Any,
    cu_seqlens: Any, region_query: Any, region_key: Any, region_value: Any, dropout: Any, softcap: Any, key_bias: Any,
    region_bias: Any, sink: Any, is_mixture: Any,
) -> None:  # fmt: skip
    """A problem of these arguments, and every call of it."""
    given = key_mask, cu_seqlens, region_query, region_key, region_value, dropout, softcap, key_bias, region_bias, sink
    problem = _core.Problem(stages, query, key, value, plan, is_causal, scale, *given, is_mixture=is_mixture)
    problem.workspace_bytes(True)
    if not is_mixture:
        problem.summarize()
    results = problem.forward(keep=2)
    of_summary = results.summary_key, results.summary_value, results.summary_bias
    problem.backward(results, results.out, results.lse, *of_summary)
    make, arguments = problem.__reduce__()  # type: ignore[misc]
    make(*arguments)


def run_slice(
    query: Any, key: Any, value: Any, plan: Any, is_causal: Any, key_mask: Any, region_key: Any, region_value: Any,
    offset: Any,
) -> None:  # fmt: skip
    """The same of stage 2, where some positions alone are queries."""
    regions = {"region_key": region_key, "region_value": region_value}
    given = query, key, value, plan, is_causal, None, key_mask
    problem = _core.Problem(2, *given, **regions, offset=offset)
    problem.workspace_bytes(True)
    results = problem.forward(keep=2)
    problem.backward(results, results.out, results.lse)
    make, arguments = problem.__reduce__()  # type: ignore[misc]
    make(*arguments)


PATTERNS = (  # kind, size, window, levels, hierarchical, sparse, size_bias, pooling
    (0, 0, 0, 0, False, False, False, 0),
    (1, 4, 3, 0, False, False, True, 1),
    (1, 4, 1, 0, False, True, False, 0),
    (2, 0, 0, 0, True, False, False, 0),
    (3, 2, 0, 2, False, False, False, 2),
    (4, 5, 0, 0, False, False, False, 0),
    (5, 4, 6, 0, False, False, False, 1),
    (5, 4, 6, 0, False, True, False, 0),
)
WITH_REGIONS = PATTERNS[1], PATTERNS[3], PATTERNS[4]


def run_decoder(
    kind: Any, size: Any, window: Any, levels: Any, hierarchical: Any, sparse: Any, size_bias: Any, pooling: Any,
    query: Any, key: Any, value: Any, scale: Any, softcap: Any, rollback: Any, lengths: Any, back: Any, other: Any,
    key_bias: Any, sink: Any, select: Any,
) -> None:  # fmt: skip
    """A decoder of these arguments, and every call of it; one of them with another query."""
    pattern = kind, size, window, levels, hierarchical, sparse, size_bias, pooling
    decoder = _core.Decoder(pattern, query, key, value, scale, softcap, rollback, select, key_bias, sink)
    decoder.step(query, key, value, None, key_bias)
    decoder.step(query, key, value, lengths, key_bias)
    decoder.__deepcopy__(None).step(other, key, value, lengths, key_bias)
    decoder.rollback(back)
    decoder.step(query, key, value, None, key_bias)
    assert decoder.nbytes >= 0 and len(decoder.lengths) >= 0


def run_results(problem: _core.Problem, grad_out: np.ndarray) -> Callable[..., Any]:
    """Backward of these results."""
    return lambda *results: problem.backward(_core.Results(results), grad_out)


WITHOUT_ARGUMENTS = (
    _core.get_num_threads, _core.get_isa, _core.isas, _core.stop_threads, _core.release_memory, PLAN._measure,
)  # fmt: skip
COVERED = {
    "Problem", "Results", "Decoder", "cluster", "assign", "update_centroids", "select", "set_num_threads",
    "set_isa", "xla_keep_plan", "get_num_threads", "get_isa", "isas", "stop_threads", "release_memory",
    "xla_targets",  # has no arguments, and is JAX's
}  # fmt: skip


# ---- the cases


def fingerprint(object_: Any) -> Any:
    """The bytes of every array in the arguments."""
    if isinstance(object_, tuple | list):
        return [fingerprint(part) for part in object_]
    if isinstance(object_, np.ndarray) and not object_.dtype.hasobject and object_.nbytes < 10**6:
        return hashlib.blake2b(np.ndarray.tobytes(object_)).digest()
    return None


def run_case(seed: int, case: int) -> str | None:
    """What went wrong, or None."""
    rng = np.random.default_rng([seed, case])
    calls = good_calls(rng)
    name = str(rng.choice(list(calls)))
    function, arguments = calls[name]
    for _ in range(rng.integers(1, 4)):
        n = int(rng.integers(len(arguments)))
        arguments[n] = hostile(rng, arguments[n])
    if name == "cluster" and isinstance(arguments[2], int):
        arguments[2] = min(arguments[2], 3)  # rounds, as many as asked for
    if rng.random() < 0.02:
        del arguments[int(rng.integers(len(arguments)))]
    parameters = list(inspect.signature(function).parameters) if name == "forward to out" else []
    inputs = [x for n, x in enumerate(arguments) if parameters[n : n + 1] != ["out"]]
    before = fingerprint(inputs)
    try:
        result = function(*arguments)
        if isinstance(result, combiner.Plan) and result.length <= 10**4 and result.region_count <= 10**4:
            use_plan(rng, result)
    except (*EXPECTED, HostileError) as error:
        if isinstance(error, ValueError | TypeError) and not str(error):
            return f"{name}: {type(error).__name__} without a message"
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    return None if fingerprint(inputs) == before else f"{name}: an input has changed"


def use_plan(rng: np.random.Generator, plan: combiner.Plan) -> None:
    """What the check lets through the engine must bear."""
    plan._measure()
    q, k, v = (rng.standard_normal((1, plan.length, 3)).astype(np.float32) for _ in range(3))
    _, saved = combiner.attention_forward(q, k, v, plan)
    combiner.attention_backward(v, saved)


def run_cases(seed: int, seconds: float, only: int | None, at: mmap.mmap) -> int:
    """The exit code. Before each case its number is written into shared memory, for whoever finds the process dead."""
    warnings.simplefilter("ignore")
    threads, end = _core.get_num_threads(), time.monotonic() + seconds
    failures = done = 0
    case = 0 if only is None else only
    while time.monotonic() < end and failures < 10:
        at[:8] = case.to_bytes(8, "little")
        faulthandler.dump_traceback_later(SECONDS_OF_A_CALL, exit=True)
        wrong = run_case(seed, case)
        faulthandler.cancel_dump_traceback_later()
        _core.set_num_threads(threads)
        done += 1
        if wrong:
            failures += 1
            print(f"case {case}: {wrong}", flush=True)
        if only is not None:
            break
        case += 1
    print(f"{done} cases, {failures} failures", flush=True)
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    missing = {name for name, x in vars(_core).items() if callable(x) and name[0] != "_" and name != "Plan"} - COVERED
    assert not missing, f"functions that no case calls: {missing}"
    print(f"{_core.__file__}, seed {options.seed}", flush=True)
    at = mmap.mmap(-1, 8)
    child = os.fork()  # before any thread is started
    if child == 0:
        faulthandler.enable()
        os._exit(run_cases(options.seed, options.seconds, options.case, at))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1) or (code == 1 and not at):
        print(f"ended with {code} in --seed {options.seed} --case {int.from_bytes(at[:8], 'little')}", flush=True)
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
