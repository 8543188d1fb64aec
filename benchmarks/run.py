# SPDX-License-Identifier: Apache-2.0
"""Times attention beside its peers on the same arrays in one process, and prints tables.

Rounds alternate, ours, the peer, ours, the peer, so that whatever else the machine does meets both alike. A ratio is
the median over rounds of the peer's time over ours. Without torch our own times alone are measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from cases import GROWTH, LAWS, MEMORY, RATIOS, Case, Growth
from report import RESULTS, tables

import combiner

Arrays = list[np.ndarray]
Call = Callable[[], Arrays]

# Between two timings: a library's threads may spin for a while after their work, on the other's time.
SETTLE_SECONDS = 0.02


def inputs(case: Case) -> Arrays:
    """query, key, value and the gradient of out, `[B, H, L, D]` of N(0, 1), the same in every process."""
    rng = np.random.default_rng(0)
    arrays = [np.empty((case.batch, case.heads, case.length, case.dim), case.dtype) for _ in range(4)]
    for array in arrays:
        rng.standard_normal(dtype=case.dtype, out=array)
    return arrays


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


def sdpa(case: Case, arrays: Arrays) -> Call:
    """The same of PyTorch's scaled_dot_product_attention, which is dense whatever our pattern is."""
    import torch

    attention = torch.nn.functional.scaled_dot_product_attention
    *tensors, grad_out = map(torch.from_numpy, arrays)
    torch.set_num_threads(case.threads)

    def forward() -> Arrays:
        with torch.no_grad():
            return [attention(*tensors, is_causal=case.is_causal).numpy()]

    def both() -> Arrays:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = attention(*leaves, is_causal=case.is_causal)
        out.backward(grad_out)
        return [out.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]

    return both if case.backward else forward


PEERS = {"sdpa": sdpa}


def package_version(name: str) -> str | None:
    """The version installed, None without one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def seconds(call: Call) -> float:
    """How long one call takes."""
    time.sleep(SETTLE_SECONDS)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def describe(case: Case) -> dict[str, Any]:
    """The case as JSON can hold it."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    del fields["made"]
    return {**fields, "pattern": repr(case.pattern), "passes": case.passes}


def time_case(case: Case) -> dict[str, Any]:
    """The case, the seconds of every round, ours and the peer's, the ratio and whether it meets the target."""
    arrays = inputs(case)
    calls = [ours(case, arrays)]
    if case.peer and package_version("torch"):
        calls.append(PEERS[case.peer](case, arrays))

    results = [call() for call in calls]  # warms up
    if len(calls) == 2 and isinstance(case.pattern, combiner.Dense):
        for name, a, b in zip(("out", "grad_query", "grad_key", "grad_value"), *results, strict=False):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3, err_msg=f"{case.name}: {name} is not the peer's")
    del results

    rounds = [[seconds(call) for call in calls] for _ in range(case.rounds)]
    row = describe(case)
    for whose, times in zip(("ours", "peers"), zip(*rounds, strict=True), strict=False):
        row[whose] = {"median": statistics.median(times), "min": min(times), "rounds": times}
    row["ratio"] = statistics.median(peer / own for own, peer in rounds) if len(calls) == 2 else None
    row["met"] = None if row["ratio"] is None or case.target is None else row["ratio"] >= case.target
    return row


def slope(lengths: Iterable[int], values: Iterable[float]) -> float:
    """The slope of the straight line fitted to log(value) over log(length)."""
    return float(np.polyfit(np.log(list(lengths)), np.log(list(values)), 1)[0])


def time_growth(growth: Growth) -> dict[str, Any]:
    """The rows of its cases, the slope of their medians and the law's own over the same lengths."""
    rows = [time_case(case) for case in growth.cases]
    lengths = [case.length for case in growth.cases]
    return {
        "law": growth.law,
        "rows": rows,
        "slope": slope(lengths, (row["ours"]["median"] for row in rows)),
        "law_slope": slope(lengths, map(LAWS[growth.law], lengths)),
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
    return {**describe(case), "excess_bytes": excess, "query_bytes": query}


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
        "combiner": combiner.info(),
    }


def shortened(case: Case) -> Case:
    """The case at 1/64 of its length, without a target: for a look at whether all runs."""
    return dataclasses.replace(case, length=case.length // 64, rounds=2, target=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short lengths, two rounds, no targets: does all run?")
    parser.add_argument("--only", metavar="NAME", default="", help="only the cases whose name contains NAME")
    parser.add_argument("--out", type=Path, help="where to write the JSON (a full run: results/bench.json beside this)")
    args = parser.parse_args()

    def wanted(cases: Iterable[Case]) -> tuple[Case, ...]:
        chosen = (case for case in cases if args.only in case.name)
        return tuple(map(shortened, chosen) if args.quick else chosen)

    def measure(function: Callable[[Any], dict[str, Any]], items: Iterable[Any]) -> list[dict[str, Any]]:
        rows = []
        for item in items:
            first = item if isinstance(item, Case) else item.cases[0]
            print(f"{first.name}, {first.passes}, {first.threads} threads", file=sys.stderr)
            rows.append(function(item))
        return rows

    growth = (dataclasses.replace(growth, cases=wanted(growth.cases)) for growth in GROWTH)
    results = {
        "machine": machine(),
        "ratios": measure(time_case, wanted(RATIOS)),
        "growth": measure(time_growth, (growth for growth in growth if growth.cases)),
        "memory": measure(measure_memory, wanted(MEMORY)) if Path("/proc/self/status").exists() else [],
    }
    print(tables(results))

    out = args.out or (None if args.quick or args.only else RESULTS)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
