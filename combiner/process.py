# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole process: threads, memory and instruction sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

from . import _core
from .arguments import as_integer, choice_number
from .plan_cache import PlanCache


class Info(TypedDict):
    """The result of `info`."""

    version: str
    isa: str
    isas: tuple[str, ...]
    threads: int
    compiler: str
    numpy: str
    blas: None


def set_num_threads(count: int | None) -> None:
    """Let each call use up to `count` threads, the calling thread included; None restores the default.

    The default is COMBINER_NUM_THREADS, else OMP_NUM_THREADS, else the number of processors that this process may run
    on, capped by the quota of its cgroup. Results have the same bits for any number. The setting is the process's.

    Raises
    ------
    TypeError, ValueError : `count` is not an integer, is below 1, or is above the library's limit.
    """
    _core.set_num_threads(0 if count is None else as_integer("count", count, 1))


def get_num_threads() -> int:
    """The number of threads that a call may use, the calling thread included."""
    return _core.get_num_threads()


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Set the process's number of threads for the duration of a ``with`` block."""
    before = get_num_threads()
    set_num_threads(count)
    try:
        yield
    finally:
        set_num_threads(before)


def release_memory() -> None:
    """Give memory that the library keeps for later calls back to the system.

    The library keeps the memory of workspaces, and of large results that nothing refers to, up to 512 MiB in all:
    mapping and clearing such memory anew costs up to a fifth of a call. It also keeps the plans made last, by
    patterns and for shards: up to 64 MiB of each kind, or two plans larger than that.
    """
    PlanCache.clear_all()
    _core.release_memory()


def set_isa(name: str) -> None:
    """Use the kernels of one instruction set of ``info()["isas"]``, to test or compare them.

    The default is the one that COMBINER_ISA names, else the highest of this machine. On Intel's processors without AMX
    the default is avx512, not avx512_bf16, because there products of bfloat16 pairs are slower than float32's.

    Raises
    ------
    TypeError, ValueError : `name` is not a str, or not one of this machine's instruction sets.
    """
    choice_number("name", name, _core.isas())
    _core.set_isa(name)


def info() -> Info:
    """The build and the settings: version, the instruction set in use and those of this machine (isa, isas), threads,
    compiler, the NumPy version at build time, and blas, which is None because the library uses no BLAS.
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
