# SPDX-License-Identifier: Apache-2.0
"""Threads, forks, floating-point modes and the end of the process: the same bits, no hang, nothing changed outside."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from fresh import fresh_process

import combiner
from combiner import Dense, Fixed, LogSparse, _core

PATTERNS = [Dense(), Fixed(16), LogSparse(), LogSparse(hierarchical=True)]
COUNT = 600 * 4 * 32 * 2  # query features in all: enough for the pool to be used


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
            thread.join(60)
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


def right_in_a_child(arrays, expected, inside=lambda: None) -> None:
    """Forks; the child must have the same bits, forward and backward, within 10 s."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(10)  # ends a child that hangs
            if run_all(arrays) == expected:
                inside()
                status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"


@pytest.mark.parametrize("threads", (1, 2, 5))
@fresh_process()
def test_fork_before_and_after_use_and_nested(threads):
    combiner.set_num_threads(threads)
    arrays = draw()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        run_all(arrays)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    expected = run_all(arrays)
    for _ in range(5):
        right_in_a_child(arrays, expected, lambda: right_in_a_child(arrays, expected))
        assert run_all(arrays) == expected
