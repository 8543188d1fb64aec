# SPDX-License-Identifier: Apache-2.0
"""Compare the time of two builds of the package, call by call in one process.

    python benchmarks/compare_builds.py ../before . "Fixed(128)" "Tree(8)"

Each directory is a checkout in which the package was built in place (`pip install -e .`). The builds take turns, one
call each, so that other work on the machine slows both alike. The ratio is the median over turns: from ten turns on it
repeats within 1%, on a machine whose times differ by 10% from one minute to the next. Float32, causal, one batch entry.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pages import table

PASSES = "forward", "backward"


def load(directory: str) -> ModuleType:
    """The package of a checkout, beside those of others that were loaded before. One without a build is refused: it
    would take the compiled module of an installed package."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "combiner"]:
        del sys.modules[name]
    root = Path(directory).resolve()
    sys.path.insert(0, str(root))
    try:
        package, core, _ = map(importlib.import_module, ("combiner", "combiner._core", "combiner.pattern_arguments"))
    finally:
        sys.path.remove(str(root))
    for loaded in package, core:
        if Path(loaded.__file__ or "").parent != root / "combiner":
            raise SystemExit(f"no build in {directory}: {loaded.__name__} is {loaded.__file__}")
    return package


def call(package: ModuleType, text: str, arrays: list[Any], passes: str) -> Callable[[], object]:
    pattern = package.pattern_arguments.written_pattern(text)
    query, key, value, grad_out = arrays
    if passes == "forward":
        return lambda: package.attention(query, key, value, pattern, is_causal=True)
    saved = package.attention_forward(query, key, value, pattern, is_causal=True)[1]
    return lambda: package.attention_backward(grad_out, saved)


def times_in_turns(calls: list[Callable[[], object]], seconds: float) -> list[list[float]]:
    """The times of each call, as many as fit into `seconds`, after one call of each that is not timed."""
    times: list[list[float]] = [[] for _ in calls]
    for each in calls:
        each()
    end = time.perf_counter() + seconds
    while not times[0] or time.perf_counter() < end:
        for each, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            each()
            taken.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a checkout")
    parser.add_argument("after", help="another checkout")
    parser.add_argument("patterns", nargs="+", help='such as "Fixed(128)"')
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="of each pattern and pass")
    args = parser.parse_args()
    packages = [load(directory) for directory in (args.before, args.after)]
    for package in packages:
        package.set_num_threads(args.threads)
    shape = 4, 1, args.heads, args.length, args.dim
    arrays = list(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    rows = []
    for text in args.patterns:
        for passes in PASSES:
            times = times_in_turns([call(package, text, arrays, passes) for package in packages], args.seconds)
            before, after = (f"{statistics.median(each) * 1e3:.4g} ms" for each in times)
            ratio = statistics.median(new / old for old, new in zip(*times, strict=True))
            rows.append((text, passes, before, after, f"{ratio:.3f}", len(times[0])))
    print(table(("pattern", "pass", "before", "after", "after / before", "calls"), rows))


if __name__ == "__main__":
    main()
