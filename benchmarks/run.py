# SPDX-License-Identifier: Apache-2.0
"""Times attention beside its peers on the same arrays in one process, and prints tables.

Rounds alternate, ours, the peers, ours, the peers, so that whatever else the machine does meets all alike. A ratio is
the median over rounds of a peer's time over ours. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import heapq
import importlib.util
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - gives NumPy the name bfloat16
import numpy as np
from cases import ARITHMETIC, GROWTH, LAWS, LENGTHS, MEMORY, PLANS, PRODUCTS, RATIOS, Case, Growth
from peers import PEERS, Arrays, Call
from report import RESULTS, plot, slope, tables

import combiner
from combiner.patterns import _plan

# Between two timings: a library's threads may spin for a while after their work, on the other's time.
SETTLE_SECONDS = 0.02

# A timing takes at least this long: as many calls one after the other as that needs.
LEAST_SECONDS = 0.002

KERNELS = Path(__file__).parent.parent / "build" / "plain" / "test_kernels"

# One thread of the BLAS that NumPy brings, which chooses its own kernels. In a process of its own.
SGEMM = """
import time, numpy
a, b, out = numpy.random.default_rng(0).standard_normal((3, 1536, 1536), numpy.float32)
times = []
for _ in range(12):
    start = time.perf_counter()
    numpy.matmul(a, b, out)
    times.append(time.perf_counter() - start)
print(2 * 1536**3 / min(times) * 1e-9)
"""


def inputs(case: Case) -> Arrays:
    """query, key, value and the gradient of out, `[B, H, L, D]` of N(0, 1), the same in every process."""
    rng = np.random.default_rng(0)
    arrays = [np.empty((case.batch, case.heads, case.length, case.dim), np.float32) for _ in range(4)]
    for array in arrays:
        rng.standard_normal(dtype=np.float32, out=array)
    return [array.astype(case.dtype, copy=False) for array in arrays]


def ours(case: Case, arrays: Arrays) -> Call:
    """A call of combiner that returns out and, with the backward, the gradients."""
    query, key, value, grad_out = arrays
    pattern = case.pattern
    combiner.set_num_threads(case.threads)

    def forward() -> Arrays:
        return [combiner.attention(query, key, value, pattern, is_causal=case.is_causal)]

    def both() -> Arrays:
        out, saved = combiner.attention_forward(query, key, value, pattern, is_causal=case.is_causal)
        return [out, *combiner.attention_backward(grad_out, saved)[:3]]

    return both if case.backward else forward


def one_thread(case: Case, arrays: Arrays) -> Call:
    """Ours with one thread, as a peer."""
    call = ours(case, arrays)

    def alone() -> Arrays:
        combiner.set_num_threads(1)
        try:
            return call()
        finally:
            combiner.set_num_threads(case.threads)

    return alone


def in_float32(case: Case, arrays: Arrays) -> Call:
    """Ours on the same numbers in float32, as a peer."""
    return ours(case, [array.astype(np.float32) for array in arrays])


OURS = {"one-thread": one_thread, "float32": in_float32}


def peers(case: Case, arrays: Arrays) -> dict[str, Call]:
    """The case's peers that are there."""
    made = {name: PEERS[name].make for name in case.peers if name in PEERS and PEERS[name].is_there}
    made |= {name: OURS[name] for name in case.peers if name in OURS}
    return {name: make(case, arrays) for name, make in made.items()}


def package_version(name: str) -> str | None:
    """The version installed, None without one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def seconds(call: Call, count: int = 1) -> float:
    """How long one of `count` calls takes."""
    time.sleep(SETTLE_SECONDS)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def calls_to_time(call: Call) -> int:
    """So many that they take LEAST_SECONDS, however long the first takes after a rest."""
    count = 1
    while seconds(call, count) * count < LEAST_SECONDS:
        count *= 2
    return count


def describe(case: Case) -> dict[str, Any]:
    """The case as JSON can hold it."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    del fields["made"]
    return {**fields, "pattern": repr(case.pattern), "passes": case.passes}


def times_of(rounds: Sequence[float]) -> dict[str, Any]:
    """The times of every round, and what tables show of them."""
    return {"median": statistics.median(rounds), "min": min(rounds), "rounds": rounds}


def check(case: Case, own: Arrays, peer: str, theirs: Arrays) -> None:
    """That a peer of the same function gives the same, gradients that sum over 16384 queries included."""
    within = 1e-3 if case.dtype == "float32" else 0.1
    for name, a, b in zip(("out", "grad_query", "grad_key", "grad_value"), own, theirs, strict=False):
        message = f"{case.name}: {name} is not that of {peer}"
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=within, atol=within, err_msg=message)


def is_dense(peer: str) -> bool:
    """Whether the peer is dense attention, whatever the pattern."""
    return peer in PEERS and PEERS[peer].is_dense


def together(case: Case) -> object:
    """Neighbours for which this is equal are timed together: those with dense peers; any other case alone."""
    if not case.peers or not all(map(is_dense, case.peers)):
        return case
    return dataclasses.replace(case, name="", made=combiner.Dense(), target=None, limit=None)


def time_group(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Each case, the seconds of every round, ours and the peers', the ratios and whether all is as it should be."""
    first = cases[0]
    arrays = inputs(first)
    own = [ours(case, arrays) for case in cases]
    others = peers(first, arrays)
    for name, call in others.items():
        theirs = call()
        for case, mine in zip(cases, own, strict=True):
            if not is_dense(name) or isinstance(case.pattern, combiner.Dense):
                check(case, mine(), name, theirs)
        del theirs

    calls = [*own, *others.values()]
    for call in own:
        call()  # warms up, as the check did the peers
    counts = list(map(calls_to_time, calls))
    rounds = [list(map(seconds, calls, counts)) for _ in range(first.rounds)]
    times = list(zip(*rounds, strict=True))
    theirs_all = dict(zip(others, times[len(own) :], strict=True))

    rows = []
    for case, mine in zip(cases, times, strict=False):
        ratios = {
            name: statistics.median(their / my for their, my in zip(theirs, mine, strict=True))
            for name, theirs in theirs_all.items()
        }
        row = {
            **describe(case),
            "ours": times_of(mine),
            "theirs": {name: times_of(theirs) for name, theirs in theirs_all.items()},
            "ratios": ratios,
            "ratio": min(ratios.values(), default=None),  # to the fastest
        }
        met = [row["ours"]["median"] <= case.limit] if case.limit else []
        met += [row["ratio"] >= case.target] if case.target and ratios else []
        rows.append({**row, "met": all(met) if met else None})
    return rows


def time_growth(growth: Growth) -> dict[str, Any]:
    """The rows of its cases, the slope of their medians and the law's own over the same lengths."""
    rows = [time_group([case])[0] for case in growth.cases]
    lengths = [case.length for case in growth.cases]
    times = {case.length: row["ours"]["median"] for case, row in zip(growth.cases, rows, strict=True)}
    ratio = times[lengths[-1]] / times[lengths[-1] // 4]
    return {
        "law": growth.law,
        "rows": rows,
        "slope": slope(times),
        "law_slope": slope({length: LAWS[growth.law](length) for length in lengths}),
        "ratio": ratio,  # of the time of the last length to that of a quarter of it
        "limit": growth.limit,
        "met": None if growth.limit is None else ratio <= growth.limit,
    }


def resident_bytes(name: str) -> int:
    """VmRSS or VmHWM: the resident memory of this process, now or at its peak.

    Not getrusage's ru_maxrss: that starts from the parent's peak, through fork and exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def excess_bytes(case: Case) -> int:
    """By how much the case's call raises this process's peak memory, less what it returns. For a fresh process.

    The library and its threads are there before; the plan is made in the call and counts.
    """
    short = dataclasses.replace(case, length=16)
    ours(short, inputs(short))()
    call = ours(case, inputs(case))
    before = resident_bytes("VmRSS")
    results = call()
    return resident_bytes("VmHWM") - before - sum(result.nbytes for result in results)


def measure_memory(case: Case) -> dict[str, Any]:
    """The case, its bytes over inputs and outputs and those of its query."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        excess = fresh.submit(excess_bytes, case).result()
    query = case.batch * case.heads * case.length * case.dim * np.dtype(case.dtype).itemsize
    met = None if case.limit is None else excess <= case.limit * query
    return {**describe(case), "excess_bytes": excess, "query_bytes": query, "met": met}


def kernel_gflops() -> dict[str, float]:
    """By name, of the instruction set in use in float32: the loop of multiply-adds and the products of a tile of 64.

    Empty where the C tests have not been built.
    """
    if not KERNELS.exists():
        return {}
    text = subprocess.run([KERNELS, "--bench"], check=True, capture_output=True, text=True).stdout
    section = next(part for part in text.split("\n\n") if part.strip().startswith(f"{combiner.info()['isa']} float"))
    rates = dict(re.findall(r"^\s*(\S.*?)  +\d+ x 64 x \d+ +\d+ ns +([\d.]+) GFLOP/s$", section, re.M))
    limit = re.search(r"multiply-add loop +([\d.]+) GFLOP/s", section)
    assert limit, text
    return {"multiply-add loop": float(limit[1])} | {name: float(rate) for name, rate in rates.items()}


def measure_arithmetic(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """GFLOP/s of one core, the best of each, and their share of the loop of multiply-adds."""
    cases = list(cases)
    if not cases:
        return []
    rates = kernel_gflops()
    limit = rates.get("multiply-add loop")
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL")}
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"} | threads
    done = subprocess.run([sys.executable, "-c", SGEMM], check=True, capture_output=True, text=True, env=environment)
    rows = [{"what": name, "gflops": rate, "target": PRODUCTS.get(name)} for name, rate in rates.items()]
    rows.append({"what": "NumPy's sgemm, 1536 x 1536 x 1536", "gflops": float(done.stdout), "target": None})
    for case in cases:
        plan = case.pattern.plan(case.length, case.is_causal)
        attended, summarized, computed, *_ = plan._measured()
        flops = plan.flops(case.dim) + (plan.flops(case.dim, backward=True) if case.backward else 0)
        (row,) = time_group([case])
        rate = case.batch * case.heads * flops / row["ours"]["min"] * 1e-9
        what = f"{case.name.removeprefix('arithmetic-')}, L {case.length}, {case.passes}, all included"
        useful = (attended + summarized) / computed  # the rest are lanes that masks and widths leave idle
        rows.append({"what": what, "gflops": rate, "target": case.target, "useful": useful})
    for row in rows:
        row["share"] = row["gflops"] / limit if limit else None
        row["met"] = row["share"] >= row["target"] if limit and row["target"] else None
    return rows


def plan_bytes(plan: Any) -> int:
    """The bytes of a plan, or of all in a tuple."""
    return sum(map(plan_bytes, plan)) if isinstance(plan, tuple) else plan.nbytes


MANY_THREADS, IN_FLIGHT = 16, 4  # heads that a forward on so many threads has in flight (engine.c), at L = 16384


def balance(plan: Any) -> float:
    """How busy a forward's threads are on a machine with many, if a pair takes as long as any other.

    Counted, not timed: threads take the tasks of each wave from the last on, and wait for each other between waves.
    """
    arrays = plan.arrays
    tile, run = arrays["tile"], arrays["run"]
    rows = np.add.reduceat(np.append(run[:, 2], 0), tile[:, 3])[:-1] if len(run) else np.zeros(len(tile) - 1)
    pairs = np.append(0, np.cumsum(rows * tile[:-1, 4]))
    cost = np.diff(pairs[arrays["task"][:, 1]])
    took = 0.0
    for first, end in itertools.pairwise(arrays["wave"]):
        threads = [0.0] * MANY_THREADS
        for each in np.tile(cost[first:end], IN_FLIGHT)[::-1]:
            heapq.heapreplace(threads, threads[0] + each)
        took += max(threads)
    return float(IN_FLIGHT * cost.sum() / (MANY_THREADS * took))


def measure_plan(case: Case) -> dict[str, Any]:
    """How long the case's plan takes to make, beside a call with it made; its bytes at four times the length."""
    pattern = case.pattern

    def build() -> Arrays:
        _plan.cache_clear()
        pattern.plan(case.length, case.is_causal)
        return []

    (row,) = time_group([case])
    took = min(seconds(build) for _ in range(case.rounds))
    long = dataclasses.replace(case, length=4 * case.length)
    size = plan_bytes(long.pattern.plan(long.length, long.is_causal))
    arrays = 4 * long.batch * long.heads * long.length * long.dim * np.dtype(long.dtype).itemsize
    return {
        **describe(case),
        "build": took,
        "build_share": took / row["ours"]["median"],
        "long_length": long.length,
        "nbytes": size,
        "nbytes_share": size / arrays,
        "balance": balance(plan)
        if isinstance(plan := pattern.plan(case.length, case.is_causal), combiner.Plan)
        else None,
    }


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # what else was running
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "jax": package_version("jax"),
        "combiner": combiner.info(),
    }


def shortened(case: Case) -> Case:
    """The case at 1/64 of its length, without a target: for a look at whether all runs."""
    return dataclasses.replace(case, length=max(1, case.length // 64), rounds=2, target=None, limit=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short lengths, two rounds, no targets: does all run?")
    parser.add_argument("--only", metavar="NAME", default="", help="only the cases whose name contains NAME")
    parser.add_argument("--out", type=Path, help="where to write the JSON (a full run: results/bench.json beside this)")
    args = parser.parse_args()

    def wanted(cases: Iterable[Case]) -> tuple[Case, ...]:
        chosen = (case for case in cases if args.only in case.name)
        return tuple(map(shortened, chosen) if args.quick else chosen)

    def measure(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        rows = []
        for item in items:
            first = item if isinstance(item, Case) else item.cases[0] if isinstance(item, Growth) else item[0]
            print(f"{first.name}, L {first.length}, {first.passes}, {first.threads} threads", file=sys.stderr)
            rows.append(function(item))
        return rows

    def time_all(cases: Iterable[Case]) -> list[dict[str, Any]]:
        groups = [list(group) for _, group in itertools.groupby(wanted(cases), together)]
        return [row for rows in measure(time_group, groups) for row in rows]

    growth = (
        dataclasses.replace(growth, cases=wanted(growth.cases), limit=None if args.quick else growth.limit)
        for growth in GROWTH
    )
    results = {
        "machine": machine(),
        "ratios": time_all(RATIOS),
        "lengths": time_all(LENGTHS),
        "growth": measure(time_growth, (each for each in growth if each.cases)),
        "memory": measure(measure_memory, wanted(MEMORY)) if Path("/proc/self/status").exists() else [],
        "arithmetic": measure_arithmetic(wanted(ARITHMETIC)),
        "plans": measure(measure_plan, wanted(PLANS)),
    }
    print(tables(results))

    out = args.out or (None if args.quick or args.only else RESULTS)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
        if importlib.util.find_spec("matplotlib"):
            plot(results, out.parent)


if __name__ == "__main__":
    main()
