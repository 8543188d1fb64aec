# SPDX-License-Identifier: Apache-2.0
"""The library for a long time: small calls, threads, forks and interrupts, after which it holds what it held before.

python tests/soak.py --minutes 10     each part ends when its share of the time is over, or all that it has is done
"""

import argparse
import contextlib
import gc
import itertools
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["COMBINER_TEST_ALLOCATOR"] = "1"  # counts the bytes that the library holds
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import combiner
from combiner import (
    Axial,
    AxialMixture,
    Decoder,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Mixture,
    Plan,
    Routing,
    Selected,
    Tree,
    Window,
    _core,
)

PATTERNS = [
    Dense(),
    Fixed(4),
    LogSparse(),
    LogSparse(hierarchical=True),
    Axial(5),
    Axial(5, "horizontal"),
    Axial(5, "rowmajor", "weighted"),
    AxialMixture(4),
    Tree(3),
    Routing(np.arange(17) % 4),
    Window(5),
    Fixed(4, window=3),
    Selected(Fixed(4), [0, 1], block=8),
    HeavilyCompressed(4, 3),
    Fixed(4).sparse(),
    Mixture(Fixed(4), LogSparse()),
]
rng = np.random.default_rng(0)
SMALL = [rng.standard_normal((2, 17, 5)).astype(np.float32) for _ in range(4)]
MIDDLE = [rng.standard_normal((4, 300, 32)).astype(np.float32) for _ in range(4)]
LARGE = [rng.standard_normal((2, 16384, 64)).astype(np.float32) for _ in range(4)]


def result(arrays: list[np.ndarray], pattern) -> bytes:
    """The bytes of out and of the gradients."""
    out, saved = combiner.attention_forward(*arrays[:3], pattern, is_causal=True)
    gradients = combiner.attention_backward(arrays[3], saved)
    return b"".join(x.tobytes() for x in (out, *gradients[:3]))


# ---- what is held


@dataclass
class Held:
    """What the process holds: its memory, the library's bytes, Python's blocks, references to the inputs."""

    resident: int
    library: int
    blocks: int
    references: int

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        combiner.release_memory()  # what is kept for the calls that follow
        statm = Path("/proc/self/statm")  # Linux has one
        resident = int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.exists() else 0
        references = sum(sys.getrefcount(x) for x in (*SMALL, *MIDDLE, *LARGE))
        return cls(resident, _core._live_bytes(), sys.getallocatedblocks(), references)


def repeat(name: str, count: int, seconds: float, act: Callable[[int], None]) -> None:
    """act(0), act(1), .. until all are done or the time is over; from a tenth of them on nothing may grow."""
    began, before, done = time.monotonic(), None, 0
    while done < count and time.monotonic() < began + seconds:
        act(done)
        done += 1
        if before is None and (done >= count / 10 or time.monotonic() > began + seconds / 10):
            before = Held.now()
    after = Held.now()
    assert before is not None, f"{name}: no time at all"
    grown = {key: value - getattr(before, key) for key, value in vars(after).items()}
    print(f"{name}: {done} of {count} in {time.monotonic() - began:.0f} s, grown by {grown}", flush=True)
    assert grown["references"] == 0, name
    assert grown["library"] <= 2**16, name  # the plans kept last are others
    assert grown["blocks"] <= 4000, name
    assert grown["resident"] <= 2**22, name


# ---- the parts

PER_TURN = 5  # small calls


def small_calls() -> Callable[[int], None]:
    """Of every kind, those that raise and ever other plans among them."""
    q, k, v = SMALL[:3]
    summary = combiner.summarize(q, k, v, Fixed(4))
    plans = itertools.cycle([(each, result(SMALL, each)) for each in PATTERNS])

    def act(turn: int) -> None:
        pattern, expected = next(plans)
        assert result(SMALL, pattern) == expected
        combiner.attend(q, k, v, summary.key, summary.value, Fixed(4))
        combiner.attend(q[:, 1:3], k, v, summary.key, summary.value, Fixed(4), offset=1)
        L = turn % 13
        combiner.attention(q[:, :L], k[:, :L], v[:, :L], Fixed(turn % 97 + 1))
        if turn % 3 == 0:
            Decoder(Fixed(4)).prefill(q, k, v)
        elif turn % 3 == 1:
            Plan.from_parts([[0], [1]], [[], [0]], [[0]], is_causal=True)
        else:
            with contextlib.suppress(ValueError):
                combiner.attention(q, k[:, 1:], v, Fixed())

    return act


def eight_threads() -> Callable[[int], None]:
    """All at once, while the number of threads changes and those of the library end: the same bits."""
    expected = [result(SMALL, each) for each in PATTERNS]

    def act(turn: int) -> None:
        wrong = []

        def call(first: int) -> None:
            for n in range(first, first + len(PATTERNS)):
                n %= len(PATTERNS)
                if result(SMALL, PATTERNS[n]) != expected[n]:
                    wrong.append(n)

        threads = [threading.Thread(target=call, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        combiner.set_num_threads(turn % 5 + 1)
        if turn % 7 == 0:
            _core.stop_threads()
        if turn % 11 == 0:
            combiner.release_memory()
        for thread in threads:
            thread.join()
        assert not wrong

    return act


def forks() -> Callable[[int], None]:
    """A child of a process whose threads are alive finds the same bits and ends, every other beside a call."""
    combiner.set_num_threads(3)
    pattern = Fixed(16)
    expected = result(MIDDLE, pattern)

    def act(turn: int) -> None:
        beside = threading.Thread(target=result, args=(MIDDLE, LogSparse()))
        if turn % 2:
            beside.start()
        child = os.fork()
        if child == 0:
            signal.alarm(120)  # ends a child that hangs
            os._exit(0 if result(MIDDLE, pattern) == expected else 1)
        assert result(MIDDLE, pattern) == expected
        assert os.waitpid(child, 0)[1] == 0
        if turn % 2:
            beside.join()

    return act


def interrupts() -> Callable[[int], None]:
    """Ctrl-C at any moment of a long call: nothing is lost, and the next call is right."""
    combiner.set_num_threads(2)
    q, k, v, grad_out = LARGE
    plan = Dense().plan(q.shape[1], True)
    saved = combiner.attention_forward(q, k, v, plan)[1]
    calls = (
        lambda: combiner.attention(q, k, v, plan),
        lambda: combiner.attention_backward(grad_out, saved),
        lambda: combiner.fit_centroids(q, 256, iterations=100),
        lambda: combiner.attention(q, k, v, LogSparse(), is_causal=True),
    )
    expected = [result(SMALL, each) for each in PATTERNS]
    moments = random.Random(0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)

    def live_bytes() -> int:
        combiner.release_memory()  # of plans too: an interrupt may keep one from being kept
        return _core._live_bytes()

    def act(turn: int) -> None:
        held = live_bytes()
        try:
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.001, 0.3))
            for _ in itertools.count():
                calls[turn % len(calls)]()
        except KeyboardInterrupt:
            pass
        assert live_bytes() == held
        n = turn % len(PATTERNS)
        assert result(SMALL, PATTERNS[n]) == expected[n]

    return act


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    seconds = 60 * parser.parse_args().minutes
    repeat(f"turns of {PER_TURN} small calls", 1_000_000 // PER_TURN, 0.4 * seconds, small_calls())
    repeat("turns of 8 threads", 2_000, 0.2 * seconds, eight_threads())
    repeat("forks", 1_000, 0.2 * seconds, forks())
    repeat("interrupts", 100, 0.2 * seconds, interrupts())


if __name__ == "__main__":
    main()
