# SPDX-License-Identifier: Apache-2.0
"""Python threads that share inputs and plans, beside one that changes every setting, for the thread sanitizer to watch.

``make tsan-ext SECONDS=60`` builds the extension under it and runs this. A report, a hang or another bit is a failure.
"""

import argparse
import faulthandler
import itertools
import sys
import threading
import time

from test_threads import PATTERNS, draw, run

import combiner
from combiner import _core

CALLERS, LENGTH = 4, 600


def call_until(end: float, first: int, expected: list[list[bytes]], full: list[bool], wrong: list[str]) -> None:
    """Every operation in turn, on arrays that all threads read, in both of the ways that a pattern can be given."""
    arrays = draw(LENGTH, 2, 8)
    for n in itertools.count(first):
        pattern = PATTERNS[n % len(PATTERNS)]
        if time.monotonic() > end:
            return
        plan = pattern._build(LENGTH, True, False)  # anew: plans are cached
        if run(arrays, plan if n % 2 else pattern) != expected[n % len(PATTERNS)]:
            wrong.append(f"{pattern}: other bits")
        if plan.is_full != full[n % len(PATTERNS)]:
            wrong.append(f"{pattern}: is_full is {plan.is_full}")
        combiner.cluster(arrays[0][0, 0], 7, iterations=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    seconds = parser.parse_args().seconds
    print(_core.__file__, flush=True)
    combiner.set_num_threads(3)
    arrays = draw(LENGTH, 2, 8)
    expected = [run(arrays, pattern) for pattern in PATTERNS]
    full = [pattern.plan(LENGTH, True).is_full for pattern in PATTERNS]
    end, wrong = time.monotonic() + seconds, list[str]()
    faulthandler.dump_traceback_later(seconds + 600, exit=True)
    callers = [threading.Thread(target=call_until, args=(end, n, expected, full, wrong)) for n in range(CALLERS)]
    for caller in callers:
        caller.start()
    isas = [isa for isa in _core.isas() if isa not in ("base", "avx512_bf16", "amx")] or _core.isas()[:1]
    for n in itertools.count():
        if time.monotonic() > end:
            break
        combiner.set_num_threads((1, 2, 7, 3)[n % 4])
        combiner.set_isa(isas[n % len(isas)])
        (_core.stop_threads if n % 50 == 0 else combiner.release_memory if n % 50 == 25 else _core.get_isa)()
        time.sleep(0.001)
    for caller in callers:
        caller.join()
    print(*wrong[:10] or ["all bits the same"], sep="\n", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
