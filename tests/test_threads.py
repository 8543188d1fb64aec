# SPDX-License-Identifier: Apache-2.0
"""Threads, forks, floating-point modes and the end of the process: the same bits, no hang, nothing changed outside."""

import ctypes
import hashlib
import itertools
import mmap
import multiprocessing
import os
import platform
import signal
import threading
import time

import numpy as np
import pytest
from fresh import TIMEOUT, fresh_process, run_python

import combiner
from combiner import (
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Routing,
    Selected,
    Tree,
    Window,
    _core,
)

PATTERNS = [
    Dense(),
    Fixed(16),
    LogSparse(),
    LogSparse(hierarchical=True),
    Axial(24),
    Axial(24, "horizontal"),
    Axial(24, "rowmajor"),
    Axial(24, "rowmajor", "weighted"),
    AxialMixture(24),
    Tree(4),
    Routing(np.arange(600) * 7 % 25),
    Window(24),
    Fixed(16, window=24),
    Selected(Fixed(16), np.arange(40).reshape(10, 4) * 7 % 37),
    HeavilyCompressed(16, 24),
]


def draw(L=600, H=4, D=32, dtype=np.float32) -> list[np.ndarray]:
    """query, key, value and the cotangent of out."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, H, L, D)).astype(dtype) for _ in range(4)]


def run(arrays, pattern, **options) -> list[bytes]:
    """The bytes of out, dq, dk and dv."""
    q, k, v, grad_out = arrays
    out, saved = combiner.attention_forward(q, k, v, pattern, is_causal=True, **options)
    return [out.tobytes(), *(x.tobytes() for x in combiner.attention_backward(grad_out, saved)[:3])]


def run_all(arrays) -> list[list[bytes]]:
    return [run(arrays, pattern) for pattern in PATTERNS]


# ---- many threads at once


def test_many_threads_with_shared_inputs():
    """Eight call at once while the number of threads changes and the pool's threads end: all bits equal."""
    arrays = draw()
    plans = [pattern.plan(600, True) for pattern in PATTERNS]
    expected = run_all(arrays)
    before = combiner.get_num_threads()
    wrong, done = [], threading.Event()

    def call(first: int) -> None:
        for turn in range(20):
            n = (first + turn) % len(plans)
            if run(arrays, plans[n] if turn % 2 else PATTERNS[n]) != expected[n]:
                wrong.append((first, turn))

    def change() -> None:
        for turn in range(10**6):
            combiner.set_num_threads((1, 2, 7, 3, 16)[turn % 5])
            if turn % 50 == 0:
                _core.stop_threads()
            if done.wait(0.001):
                return

    callers = [threading.Thread(target=call, args=(n,)) for n in range(8)]
    changer = threading.Thread(target=change)
    try:
        for thread in (*callers, changer):
            thread.start()
        for thread in callers:
            thread.join(TIMEOUT / 2)
            assert not thread.is_alive(), "a call hangs"
    finally:
        done.set()
        changer.join()
        combiner.set_num_threads(before)
    assert not wrong


def test_arguments_may_go_while_a_call_runs():
    """What a call reads lives until it ends, whoever else lets go of it."""
    x = np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32)
    expected = combiner.attention(x, x, x, Dense()).tobytes()
    holders = [{"query": x.copy(), "key": x.copy(), "value": x.copy(), "pattern": Dense().plan(4096)} for _ in range(8)]
    results = []

    def call(holder: dict) -> None:
        results.append(combiner.attention(*(holder[name] for name in ("query", "key", "value", "pattern"))).tobytes())

    for holder in holders:
        caller = threading.Thread(target=call, args=(holder,))
        caller.start()
        time.sleep(0.005)
        holder.clear()
        np.full((3, 4096, 64), np.nan, np.float32)  # takes the memory that was freed
        caller.join()
    assert results == [expected] * 8


# ---- fork


def digest(arrays) -> bytes:
    return hashlib.sha256(b"".join(itertools.chain(*run_all(arrays)))).digest()


def digest_of_child(arrays, generations: int = 1) -> bytes:
    """What a forked child, after its own children, finds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(TIMEOUT // 2)  # ends a child that hangs
            found = {digest(arrays)}
            if generations > 1:
                found |= {digest_of_child(arrays, generations - 1), digest(arrays)}
            os.write(writer, found.pop() if len(found) == 1 else b"children differ")
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        found = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"
    return found


@pytest.mark.parametrize("threads", (1, 2, 5))
@fresh_process()
def test_fork_before_and_after_use(threads):
    combiner.set_num_threads(threads)
    arrays = draw()
    before = digest_of_child(arrays)
    assert before == digest(arrays)
    for _ in range(10):
        assert digest_of_child(arrays) == before
        assert digest(arrays) == before
    _core.stop_threads()
    assert digest_of_child(arrays) == before


@fresh_process()
def test_nested_fork():
    combiner.set_num_threads(3)
    arrays = draw()
    expected = digest(arrays)
    assert digest_of_child(arrays, 4) == expected == digest(arrays)


@pytest.mark.parametrize("callers", (1, 4))
@fresh_process()
def test_fork_while_other_threads_are_in_a_call(callers):
    combiner.set_num_threads(3)
    arrays = draw()
    expected = digest(arrays)
    done, wrong = threading.Event(), []

    def call() -> None:
        while not done.is_set():
            wrong.extend([1] * (digest(arrays) != expected))

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            assert digest_of_child(arrays) == expected
    finally:
        done.set()
    for thread in threads:
        thread.join()
    assert not wrong


@fresh_process()
def test_fork_from_a_signal_handler_within_a_call():
    """The parent's call goes on; the child's ends in KeyboardInterrupt, and its next call is right."""
    combiner.set_num_threads(2)
    arrays = draw()
    expected = digest(arrays)
    long = np.random.default_rng(0).standard_normal((24000, 64)).astype(np.float32)
    plan = Dense().plan(len(long))
    out = combiner.attention(long, long, long, plan)
    children = []
    signal.signal(signal.SIGALRM, lambda number, frame: children.append(os.fork()))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        again = combiner.attention(long, long, long, plan)
    except KeyboardInterrupt:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TIMEOUT // 2)
        os._exit(0 if children == [0] and digest(arrays) == expected else 1)
    assert children and children[0] > 0
    _, status = os.waitpid(children[0], 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert again.tobytes() == out.tobytes() and digest(arrays) == expected


def digest_in_pool(seed: int) -> bytes:
    return digest(draw())


@pytest.mark.parametrize("method", ("fork", "spawn", "forkserver"))
@fresh_process()
def test_multiprocessing(method):
    combiner.set_num_threads(2)
    expected = digest(draw())
    with multiprocessing.get_context(method).Pool(3) as pool:
        assert pool.map_async(digest_in_pool, range(6)).get(TIMEOUT // 2) == [expected] * 6
    assert digest(draw()) == expected


# ---- the floating-point mode

DEFAULT, FLUSH, UPWARD, DOWNWARD, TOWARDS_ZERO = 0x1F80, 0x8040, 0x4000, 0x2000, 0x6000  # bits of MXCSR
ON_OVERFLOW, ON_INVALID = 0x0400, 0x0080  # masks of traps


def mxcsr_functions():
    """Functions store(uint32) and load(uint32) of this thread's MXCSR, in machine code."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("0fae1f c3 0fae17 c3"))  # stmxcsr [rdi]; ret; ldmxcsr [rdi]; ret
    start = ctypes.addressof(ctypes.c_char.from_buffer(code))
    store, load = (ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32))(start + at) for at in (0, 4))
    store.code = load.code = code  # lives as long as they do
    return store, load


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets the mode through MXCSR")
@pytest.mark.parametrize("dtype", ("float32", "float64"))
@fresh_process()
def test_floating_point_mode_of_the_caller(dtype):
    """Flushing to zero, rounding and traps change no bit, whoever starts the threads, and are there afterwards."""
    store, load = mxcsr_functions()
    arrays = draw(H=1, dtype=dtype, D=30)  # few: subnormals may cost a hundred times as much as normal numbers
    smallest = np.finfo(dtype).smallest_normal
    arrays[2] *= smallest  # results are subnormal
    combiner.set_num_threads(3)
    expected = run_all(arrays)
    before, after = ctypes.c_uint32(), ctypes.c_uint32()
    flushed = np.empty(1, dtype)
    for mode in (FLUSH, UPWARD, DOWNWARD, TOWARDS_ZERO, FLUSH | UPWARD):
        _core.stop_threads()  # a thread of this mode starts the next ones
        store(before)
        load(ctypes.c_uint32(DEFAULT | mode))
        actual = run_all(arrays)
        np.multiply(smallest, 0.25, out=flushed)
        store(after)
        load(before)
        assert after.value & ~0x3F == DEFAULT | mode, hex(after.value)  # but for flags of what has happened
        assert (flushed[0] == 0) == bool(mode & FLUSH), "the mode was not in force"
        assert actual == expected, hex(mode)
    arrays[0][0, 0, 5] = np.inf
    arrays[1][0, 0, 7] = np.finfo(dtype).max
    expected = run_all(arrays)
    load(ctypes.c_uint32(DEFAULT & ~ON_INVALID & ~ON_OVERFLOW))
    actual = run_all(arrays)
    load(before)
    assert actual == expected


# ---- the process


def test_import_changes_nothing():
    """No threads, files, environment, signal handlers or floating-point mode, no output, no heavy modules."""
    done = run_python(
        """
import ctypes, gc, locale, os, signal, sys, threading
import numpy

libm = ctypes.CDLL(None)

def state():
    return {
        "threads": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count(),
        "files": sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None,
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "masked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "locale": locale.setlocale(locale.LC_ALL),
        "rounding": libm.fegetround(),
        "subnormal": float(numpy.float32(1e-38) / numpy.float32(8)),
        "numpy": (numpy.geterr(), numpy.get_printoptions()),
        "path": list(sys.path),
        "directory": os.getcwd(),
        "limit": sys.getrecursionlimit(),
        "collector": (gc.isenabled(), gc.get_threshold()),
    }

before = state()
import combiner
after = state()
assert before == after, [(name, before[name], after[name]) for name in before if before[name] != after[name]]
assert before["subnormal"] > 0
heavy = {"torch", "jax", "matplotlib", "scipy", "tqdm", "multiprocessing"} & set(sys.modules)
assert not heavy, heavy
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


LIVE_POOL = """
LENGTH = 200000
import os, signal, sys, threading, time
import numpy as np
import combiner

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
combiner.set_num_threads(3)
few = np.ones((8, 600, 32), np.float32)
many = np.broadcast_to(np.float32(1), (2, LENGTH, 64))  # minutes of work, and no memory

def run():
    assert (combiner.attention(few, few, few, combiner.Fixed()) == 1).all()

def forward():
    combiner.attention(many, many, many, combiner.Dense())

def backward():
    nothing = np.zeros((2, 0, 64), np.float32)
    problem = combiner._core.Problem(3, many, many, many, combiner.Dense().plan(LENGTH))
    results = combiner._core.Results((many, None, many[..., :2], None, nothing, None, nothing[..., :2], None))
    problem.backward(results, many)

def in_thread(function, daemon=False):
    threading.Thread(target=function, daemon=daemon).start()
    time.sleep(0.2)

def signal_soon(number):
    time.sleep(0.3)
    os.kill(os.getpid(), number)

run()
"""
ENDS = {
    "plain": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "sys.exit in a thread": ("in_thread(lambda: sys.exit(4))", 0),
    "os._exit": ("os._exit(5)", 5),
    "os._exit in a thread": ("in_thread(lambda: os._exit(6)); time.sleep(10)", 6),
    "os._exit during a call": ("in_thread(forward); os._exit(7)", 7),
    "exception": ("raise LookupError", 1),
    "exception in a thread": ("in_thread(lambda: 1 / 0)", 0),
    "daemon in a forward call": ("in_thread(forward, daemon=True)", 0),
    "daemon in a backward call": ("in_thread(backward, daemon=True)", 0),
    "thread still calling": ("in_thread(lambda: [run() for _ in range(100)])", 0),
    "call at exit": ("import atexit; atexit.register(run)", 0),
    "SIGTERM during a call": (
        "in_thread(lambda: signal_soon(signal.SIGTERM)); forward()",
        -15,
    ),
    "SIGINT during a call": (
        "in_thread(lambda: signal_soon(signal.SIGINT)); forward()",
        -2,
    ),
    "no more modules": ("del combiner.attention; sys.modules.clear()", 0),
}


@pytest.mark.parametrize("name", ENDS)
def test_end_of_the_process_with_a_live_pool(name):
    """The exit code is what it would be without the pool, and nobody waits for a call to end."""
    code, expected = ENDS[name]
    done = run_python(LIVE_POOL + code, timeout=60, OPENBLAS_NUM_THREADS="1")
    assert done.returncode == expected, done.stderr
