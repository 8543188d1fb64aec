# SPDX-License-Identifier: Apache-2.0
"""The time of a call."""

from __future__ import annotations

import time
from collections.abc import Callable


def fastest(call: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of some calls, after one that is not counted: other work on the machine only adds time."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
