# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole process: threads, memory and instruction sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

from . import _core
from .plan import as_integer


class Info(TypedDict):
    """What `info` returns."""

    version: str
    isa: str
    isas: tuple[str, ...]
    threads: int
    compiler: str
    numpy: str
    blas: None


def set_num_threads(count: int | None) -> None:
    """Let each call use up to `count` threads, the calling one included; None restores the default.

    The default is COMBINER_NUM_THREADS, else OMP_NUM_THREADS, else the processors this process may run on, capped by
    its cgroup's quota. Results have the same bits for any number. Concerns all threads of the process.

    Raises
    ------
    TypeError, ValueError : a count that is no integer, below 1 or above what the library allows.
    """
    _core.set_num_threads(0 if count is None else as_integer("count", count, 1))


def get_num_threads() -> int:
    """Threads that a call may use, the calling one included."""
    return _core.get_num_threads()


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Set the number of threads for the duration of a ``with`` block, for the whole process."""
    before = get_num_threads()
    set_num_threads(count)
    try:
        yield
    finally:
        set_num_threads(before)


def release_memory() -> None:
    """Give back to the system what is kept of released memory.

    Workspaces and large results, once nothing refers to them, are kept for the calls that follow, up to 512 MiB in all:
    having the system map and clear them anew costs up to a fifth of a call.
    """
    _core.release_memory()


def set_isa(name: str) -> None:
    """Use the kernels of one of ``info()["isas"]``, to test or compare them.

    The default is the highest that this machine has, or what COMBINER_ISA names. Intel's processors take avx512 rather
    than avx512_bf16, whose products of bfloat16 pairs are slower there than float32's.

    Raises
    ------
    TypeError, ValueError : no str, or none of this machine's instruction sets.
    """
    _core.set_isa(name)


def info() -> Info:
    """What was built and what runs: version, isa in use and isas to be had, threads, compiler, the NumPy version at
    build time, and blas, which is None: the library uses none.
    """
    return {
        "version": _core.VERSION,
        "isa": _core.get_isa(),
        "isas": _core.isas(),
        "threads": get_num_threads(),
        "compiler": _core.COMPILER,
        "numpy": _core.NUMPY,
        "blas": None,
    }
