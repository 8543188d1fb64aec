# SPDX-License-Identifier: Apache-2.0
"""Times attention beside its peers on the same arrays in one process, and prints tables.

Rounds alternate: ours, the peers, ours, the peers. So other work on the machine slows all of them alike. A ratio is the
median over rounds of a peer's time divided by ours. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import heapq
import importlib.util
import itertools
import math
import os
import platform
import re
import shlex
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
from cases import ARITHMETIC, GROWTH, LAWS, LENGTHS, MEMORY, PLANS, PRODUCTS, RATIOS, SELECTION, Case, Growth
from decode import QUICK, measure_decode
from peers import PEERS, Arrays, Call
from report import RESULTS, plot, slope, tables, write

import combiner
from combiner.patterns import made_plan

# The pause before each timing: threads of the library timed before may still spin on a processor.
SETTLE_SECONDS = 0.02

# The least time of a timing. A shorter call is repeated until it takes as long.
LEAST_SECONDS = 0.002

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "build" / "plain" / "test_kernels"

# One thread of the BLAS of NumPy, and of PyTorch's, which is MKL, in a process of their own.
SGEMM = """
import time, numpy, torch
a, b, out = numpy.random.default_rng(0).standard_normal((3, 1536, 1536), numpy.float32)
for library, array in (numpy, numpy.asarray), (torch, torch.from_numpy):
    times = []
    for _ in range(12):
        start = time.perf_counter()
        library.matmul(array(a), array(b), out=array(out))
        times.append(time.perf_counter() - start)
    print(2 * 1536**3 / min(times) * 1e-9)
"""


def inputs(case: Case) -> Arrays:
    """query, key, value and the gradient of out, `[B, H, L, D]` of N(0, 1), the same in every process."""
    rng = np.random.default_rng(0)
    key_heads = case.key_heads or case.heads
    heads = case.heads, key_heads, key_heads, case.heads
    arrays = [np.empty((case.batch, n, case.length, case.dim), np.float32) for n in heads]
    for array in arrays:
        rng.standard_normal(dtype=np.float32, out=array)
    return [array.astype(case.dtype, copy=False) for array in arrays]


def term(name: str, case: Case) -> Any:
    """A term of the logits, of a size that a model would have."""
    rng = np.random.default_rng(1)
    if name == "softcap":
        return 30.0
    plan = case.pattern.plan(case.length, case.is_causal)
    assert isinstance(plan, combiner.Plan)
    last = {"key_bias": (case.length,), "region_bias": (plan.region_count,), "sink": ()}[name]
    return rng.standard_normal((case.heads, *last), dtype=np.float32)


def ours(case: Case, arrays: Arrays) -> Call:
    """A call of combiner that returns out and, with the backward, the gradients; or the choice of regions."""
    if case.with_select:
        return selecting(case, arrays)
    query, key, value, grad_out = arrays
    pattern = case.pattern
    combiner.set_num_threads(case.threads)
    options = {"is_causal": case.is_causal} | {name: term(name, case) for name in case.terms}

    def forward() -> Arrays:
        return [combiner.attention(query, key, value, pattern, **options)]

    def both() -> Arrays:
        out, saved = combiner.attention_forward(query, key, value, pattern, **options)
        return [out, *combiner.attention_backward(grad_out, saved)[:3]]

    def choose() -> Arrays:
        assert isinstance(pattern, combiner.Selected)
        block, k = pattern.block, pattern.regions.shape[-1]
        return [combiner.select(query, key, pattern.pattern, k, block=block, is_causal=case.is_causal)]

    return choose if case.selects else both if case.backward else forward


def selecting(case: Case, arrays: Arrays) -> Call:
    """A call that selects regions, and returns what attention that opens them returns."""
    choose = ours(dataclasses.replace(case, with_select=False, selects=True), arrays)
    base = case.pattern
    assert isinstance(base, combiner.Selected)

    def call() -> Arrays:
        pattern = combiner.Selected(base.pattern, choose()[0], block=base.block)
        return ours(dataclasses.replace(case, with_select=False, made=pattern), arrays)()

    return call


def one_thread(case: Case, arrays: Arrays) -> Call:
    """A peer: our call with one thread."""
    call = ours(case, arrays)

    def alone() -> Arrays:
        combiner.set_num_threads(1)
        try:
            return call()
        finally:
            combiner.set_num_threads(case.threads)

    return alone


def in_float32(case: Case, arrays: Arrays) -> Call:
    """A peer: our call on the same numbers in float32."""
    return ours(case, [array.astype(np.float32) for array in arrays])


def without_terms(case: Case, arrays: Arrays) -> Call:
    """A peer: our call without the terms of the logits."""
    return ours(dataclasses.replace(case, terms=()), arrays)


def ungrouped(case: Case, arrays: Arrays) -> Call:
    """A peer: keys and values are repeated for every query head, and their gradients summed, in each call."""
    query, key, value, grad_out = arrays
    group = case.heads // key.shape[1]
    alone = dataclasses.replace(case, key_heads=None)

    def call() -> Arrays:
        repeated = [x.repeat(group, axis=1) for x in (key, value)]
        out, *gradients = ours(alone, [query, *repeated, grad_out])()
        shared = [x.reshape(*key.shape[:2], group, *x.shape[2:]).sum(2) for x in gradients[1:]]
        return [out, *gradients[:1], *shared]

    return call


def served(case: Case, arrays: Arrays) -> Call:
    """A peer: the attention that opens as many regions as the case selects."""
    return ours(dataclasses.replace(case, selects=False), arrays)


# Peers that are calls of ours.
OURS = {
    "one-thread": one_thread,
    "float32": in_float32,
    "without-terms": without_terms,
    "ungrouped": ungrouped,
    "attention": served,
}
UNLIKE = {"without-terms", "attention"}  # of these, the peers that compute something else than the case


def peers(case: Case, arrays: Arrays) -> dict[str, Call]:
    """The case's peers that are installed."""
    made = {name: PEERS[name].make for name in case.peers if name in PEERS and PEERS[name].is_there}
    made |= {name: OURS[name] for name in case.peers if name in OURS}
    return {name: make(case, arrays) for name, make in made.items()}


def package_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def seconds(call: Call, count: int = 1) -> float:
    """The mean time of `count` calls."""
    time.sleep(SETTLE_SECONDS)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def calls_to_time(call: Call) -> int:
    """The number of calls that takes LEAST_SECONDS. It is a power of two."""
    count = 1
    while seconds(call, count) * count < LEAST_SECONDS:
        count *= 2
    return count


def describe(case: Case) -> dict[str, Any]:
    """The case, for JSON."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    del fields["made"]
    return {**fields, "pattern": repr(case.pattern), "passes": case.passes}


def times_of(rounds: Sequence[float]) -> dict[str, Any]:
    """The times of all rounds, for JSON."""
    return {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds), "rounds": len(rounds)}


def check(case: Case, own: Arrays, peer: str, theirs: Arrays) -> None:
    """Check that a peer of the same function has the same results. Gradients may sum over 16384 queries."""
    within = 1e-3 if case.dtype == "float32" else 0.1
    for name, a, b in zip(("out", "grad_query", "grad_key", "grad_value"), own, theirs, strict=False):
        message = f"{case.name}: {name} differs from that of {peer}"
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=within, atol=within, err_msg=message)


def is_dense(peer: str) -> bool:
    """Whether the peer computes dense attention whatever the pattern is."""
    return peer in PEERS and PEERS[peer].is_dense


def together(case: Case) -> object:
    """A key: neighbouring cases with equal keys are timed together. They differ in pattern and in whether they select,
    and all peers are dense."""
    if not case.peers or not all(map(is_dense, case.peers)):
        return case
    return dataclasses.replace(case, name="", made=combiner.Dense(), with_select=False, target=None, limit=None)


def time_group(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For each case: the times of ours and of the peers, the ratios, and whether targets are met."""
    first = cases[0]
    arrays = inputs(first)
    own = [ours(case, arrays) for case in cases]
    others = peers(first, arrays)
    for name, call in others.items():
        theirs = call()
        for case, mine in zip(cases, own, strict=True):
            if name not in UNLIKE and (not is_dense(name) or isinstance(case.pattern, combiner.Dense)):
                check(case, mine(), name, theirs)
        del theirs

    calls = [*own, *others.values()]
    for call in own:
        call()  # the check has called the peers
    counts = list(map(calls_to_time, calls))
    rounds = [list(map(seconds, calls, counts)) for _ in range(first.rounds)]
    times = [list(each) for each in zip(*rounds, strict=True)]
    peers_times = dict(zip(others, times[len(own) :], strict=True))

    rows = []
    for case, own_times in zip(cases, times, strict=False):
        ratios = {
            name: statistics.median(their / our for their, our in zip(peer_times, own_times, strict=True))
            for name, peer_times in peers_times.items()
        }
        row = {
            **describe(case),
            "ours": times_of(own_times),
            "theirs": {name: times_of(peer_times) for name, peer_times in peers_times.items()},
            "ratios": ratios,
            "ratio": min(ratios.values(), default=None),  # to the fastest
        }
        met = [row["ours"]["median"] <= case.limit] if case.limit else []
        met += [row["ratio"] >= case.target] if case.target and ratios else []
        rows.append({**row, "met": all(met) if met else None})
    return rows


def time_growth(growth: Growth) -> dict[str, Any]:
    """The rows of the cases, the slope of their medians, and the slope of the law over the same lengths."""
    rows = [time_group([case])[0] for case in growth.cases]
    lengths = [case.length for case in growth.cases]
    times = {case.length: row["ours"]["median"] for case, row in zip(growth.cases, rows, strict=True)}
    ratio = times[lengths[-1]] / times[lengths[-1] // 4]
    return {
        "law": growth.law,
        "rows": rows,
        "slope": slope(times),
        "law_slope": slope({length: LAWS[growth.law](length) for length in lengths}),
        "ratio": ratio,  # the time at the last length divided by the time at a quarter of it
        "limit": growth.limit,
        "met": None if growth.limit is None else ratio <= growth.limit,
    }


def resident_bytes(name: str) -> int:
    """VmRSS or VmHWM: the resident memory of this process, at this moment or at its peak.

    getrusage's ru_maxrss will not do: after fork and exec it starts from the parent's peak.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def excess_bytes(case: Case) -> int:
    """The bytes by which one call raises this process's peak memory, without its results. For a fresh process.

    A short call first loads the library and starts its threads. The plan is made in the call, and counts.
    """
    short = dataclasses.replace(case, length=16)
    ours(short, inputs(short))()
    call = ours(case, inputs(case))
    before = resident_bytes("VmRSS")
    results = call()
    return resident_bytes("VmHWM") - before - sum(result.nbytes for result in results)


def measure_memory(case: Case, *, in_fresh_process: bool = True) -> dict[str, Any]:
    """The bytes that a call takes beyond its inputs and outputs, and the bytes of its query."""
    if in_fresh_process:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            excess = fresh.submit(excess_bytes, case).result()
    else:
        excess = excess_bytes(case)
    query = case.batch * case.heads * case.length * case.dim * np.dtype(case.dtype).itemsize
    met = None if case.limit is None else excess <= case.limit * query
    return {**describe(case), "excess_bytes": excess, "query_bytes": query, "met": met}


def kernel_gflops() -> tuple[float | None, dict[tuple[str, int], float]]:
    """GFLOP/s in float32 on the instruction set in use: of a bare multiply-add loop, and of each product of a tile, by
    the tile's lanes. Nothing if the C tests have not been built.
    """
    if not KERNELS.exists():
        return None, {}
    text = subprocess.run([KERNELS, "--bench"], check=True, capture_output=True, text=True).stdout
    section = next(part for part in text.split("\n\n") if part.strip().startswith(f"{combiner.info()['isa']} float"))
    products = re.findall(r"^\s*(\S+ \+?= .*?)  +(\d+) x (\d+) x (\d+) +\d+ ns +([\d.]+) GFLOP/s$", section, re.M)
    limit = re.search(r"multiply-add loop +([\d.]+) GFLOP/s", section)
    assert limit, text
    rows, features = 96, 64  # the third size of a product is the number of lanes
    return float(limit[1]), {
        (name, math.prod(map(int, sizes)) // (rows * features)): float(rate) for name, *sizes, rate in products
    }


def measure_arithmetic(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """The best GFLOP/s of one core, in products and in whole calls, and their shares of the multiply-add loop and of
    PyTorch's sgemm. What is wanted of the products is a share of the latter.
    """
    cases = list(cases)
    if not cases:
        return []
    limit, rates = kernel_gflops()
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL")}
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"} | threads
    done = subprocess.run([sys.executable, "-c", SGEMM], check=True, capture_output=True, text=True, env=environment)
    sgemm = dict(zip(("NumPy", "PyTorch"), map(float, done.stdout.split()), strict=True))
    rows: list[dict[str, Any]] = [{"what": "multiply-add loop", "gflops": limit}] if limit else []
    rows += [{"what": f"{library}'s sgemm, 1536 x 1536 x 1536", "gflops": rate} for library, rate in sgemm.items()]
    rows += [
        {"what": f"{name}, {lanes} lanes", "gflops": rate, "target": PRODUCTS[lanes]}
        for (name, lanes), rate in rates.items()
        if lanes in PRODUCTS
    ]
    for case in cases:
        plan = case.pattern.plan(case.length, case.is_causal)
        assert isinstance(plan, combiner.Plan)
        attended, summarized, computed, *_ = plan._measured()
        flops = plan.flops(case.dim) + (plan.flops(case.dim, backward=True) if case.backward else 0)
        (row,) = time_group([case])
        rate = case.batch * case.heads * flops / row["ours"]["min"] * 1e-9
        what = f"{case.name.removeprefix('arithmetic-')}, L {case.length}, {case.passes}, all included"
        useful = (attended + summarized) / computed  # the other lanes are idle: masked, or beyond a tile's queries
        rows.append({"what": what, "gflops": rate, "useful": useful})
    for row in rows:
        row["share"] = row["gflops"] / limit if limit else None
        row["share_of_sgemm"] = row["gflops"] / sgemm["PyTorch"]
        row["met"] = row["share_of_sgemm"] >= row["target"] if "target" in row else None
    return rows


def plan_bytes(plan: Any) -> int:
    """The bytes of a plan, or of all plans of a tuple or a mixture."""
    if isinstance(plan, combiner.Mixture):
        plan = plan.patterns
    return sum(map(plan_bytes, plan)) if isinstance(plan, tuple) else int(plan.nbytes)


MANY_THREADS, IN_FLIGHT = 16, 4  # threads, and the heads that the engine runs side by side on them at L = 16384


def balance(plan: combiner.Plan) -> float:
    """The share of time in which 16 threads are busy in a forward pass, if every pair takes equally long.

    It is counted, not timed: threads take the tasks of a wave from the last on, and wait for each other between waves.
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
    """The time to make the case's plan, as a share of a call with a plan; the plan's bytes at four times the length."""
    pattern = case.pattern

    def build() -> Arrays:
        made_plan.clear()
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


def commit() -> str | None:
    """The commit of the checkout, with "+" if files differ from it; None outside of one."""
    try:
        git = functools.partial(subprocess.run, cwd=ROOT, check=True, capture_output=True, text=True)
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return head + "+" * bool(git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout)
    except (OSError, subprocess.CalledProcessError):
        return None


MAKERS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}


def processor() -> dict[str, str]:
    """The first processor's `maker` and model, as `cpu`."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    said = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    architecture = platform.machine()
    return {
        "maker": MAKERS.get(said.get("vendor_id", ""), architecture),
        "cpu": said.get("model name", platform.processor() or architecture),
    }


def machine() -> dict[str, Any]:
    """What a figure depends on: the machine, the code, the command, the other libraries."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
        **processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # of other work, before the first timing
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "jax": package_version("jax"),
        "combiner": combiner.info(),
    }


def shortened(case: Case) -> Case:
    """The case for --quick: 1/64 of the length, one round, no target, and nothing that takes seconds to compile."""
    peers = tuple(peer for peer in case.peers if peer != "torch-compiled")
    return dataclasses.replace(case, length=max(1, case.length // 64), peers=peers, rounds=1, target=None, limit=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every case once, at 1/64 of its length: does it run?")
    parser.add_argument("--only", metavar="NAME", default="", help="only the cases whose name contains NAME")
    parser.add_argument("--out", type=Path, help="where to write the JSON (a full run: results/MAKER.json beside this)")
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
    memory = functools.partial(measure_memory, in_fresh_process=not args.quick)
    results: dict[str, Any] = {
        "machine": machine(),
        "ratios": time_all(RATIOS),
        "lengths": time_all(LENGTHS),
        "selection": time_all(SELECTION),
        "growth": measure(time_growth, (each for each in growth if each.cases)),
        "memory": measure(memory, wanted(MEMORY)) if Path("/proc/self/status").exists() else [],
        "arithmetic": measure_arithmetic(wanted(ARITHMETIC)),
        "plans": measure(measure_plan, wanted(PLANS)),
        "decode": measure_decode(**(QUICK if args.quick else {})) if args.only in "decode" else [],
    }
    print(tables(results))

    of_maker = RESULTS / f"{results['machine']['maker'].lower()}.json"
    out = args.out or (None if args.quick or args.only else of_maker)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(results, out)
        if not args.only and importlib.util.find_spec("matplotlib"):
            plot(results, out.parent)


if __name__ == "__main__":
    main()
