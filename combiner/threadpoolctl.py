# SPDX-License-Identifier: Apache-2.0
"""Importing this has threadpoolctl count combiner's threads among those it limits, as user_api "combiner".

Importing combiner does it too where threadpoolctl is imported already; combiner itself imports NumPy alone, and leaves
Python's import as it is.

    import combiner.threadpoolctl

    with threadpoolctl.threadpool_limits(1):
        combiner.attention(...)
"""

from __future__ import annotations

import threadpoolctl

from . import _core, process


class CombinerController(threadpoolctl.LibController):
    """What threadpoolctl asks of a library: the number of threads, for the whole process, and the version."""

    user_api = internal_api = "combiner"
    filename_prefixes = ("_core",)
    check_symbols = ("cmb_get_num_threads",)  # other packages have a _core too

    def get_num_threads(self) -> int:
        """Threads that a call may use."""
        return process.get_num_threads()

    def set_num_threads(self, num_threads: int) -> None:
        """As ``combiner.set_num_threads``."""
        process.set_num_threads(num_threads)

    def get_version(self) -> str:
        """That of combiner."""
        return _core.VERSION


threadpoolctl.register(CombinerController)
