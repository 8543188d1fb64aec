# SPDX-License-Identifier: Apache-2.0
"""Registers combiner with threadpoolctl, which then limits combiner's threads too, as user_api "combiner".

`import combiner` does the same where threadpoolctl is already imported. It imports nothing but NumPy otherwise.

    import combiner.threadpoolctl

    with threadpoolctl.threadpool_limits(1):
        combiner.attention(...)
"""

from __future__ import annotations

import threadpoolctl

from . import _core, process


class CombinerController(threadpoolctl.LibController):
    """The interface of threadpoolctl to the number of threads of the process, and to the version."""

    user_api = internal_api = "combiner"
    filename_prefixes = ("_core",)
    check_symbols = ("cmb_get_num_threads",)  # other packages have a _core too

    def get_num_threads(self) -> int:
        """The number of threads that a call may use."""
        return process.get_num_threads()

    def set_num_threads(self, num_threads: int) -> None:
        """Calls ``combiner.set_num_threads``."""
        process.set_num_threads(num_threads)

    def get_version(self) -> str:
        """The version of combiner."""
        return _core.VERSION


threadpoolctl.register(CombinerController)
