# SPDX-License-Identifier: Apache-2.0
"""A table of faults and invariances: what this library does, beside PyTorch's scaled_dot_product_attention.

Each cell is a process of its own with a time limit, so that a hang or a crash is an answer too. Both libraries compute
the same function, causal dense attention, in float32 with two threads. The exit status is 1 if a cell of ours is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from pages import table

FORK_SECONDS = 10.0
LIMIT_SECONDS = 120.0


class Library(Protocol):
    """Causal dense attention of `[B, H, L, D]` arrays."""

    def set_threads(self, count: int) -> None: ...

    def forward(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray: ...

    def masked(self, arrays: list[np.ndarray], key_mask: np.ndarray) -> list[np.ndarray]:
        """out and the gradients of its sum; only keys where `[L]` key_mask is True take part."""
        ...


class Combiner:
    """This library."""

    def __init__(self) -> None:
        import combiner

        self.combiner = combiner
        self.set_threads(2)

    def set_threads(self, count: int) -> None:
        self.combiner.set_num_threads(count)

    def forward(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        return self.combiner.attention(query, key, value, self.combiner.Dense(), is_causal=True)

    def masked(self, arrays: list[np.ndarray], key_mask: np.ndarray) -> list[np.ndarray]:
        query, key, value = arrays
        out, saved = self.combiner.attention_forward(
            query, key, value, self.combiner.Dense(), is_causal=True, key_mask=key_mask
        )
        return [out, *self.combiner.attention_backward(np.ones_like(out), saved)[:3]]


class Torch:
    """PyTorch."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.attention = torch.nn.functional.scaled_dot_product_attention
        self.set_threads(2)

    def set_threads(self, count: int) -> None:
        self.torch.set_num_threads(count)

    def forward(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            q, k, v = map(self.torch.from_numpy, (query, key, value))
            out: np.ndarray = self.attention(q, k, v, is_causal=True).numpy()
            return out

    def masked(self, arrays: list[np.ndarray], key_mask: np.ndarray) -> list[np.ndarray]:
        q, k, v = (self.torch.from_numpy(array).requires_grad_() for array in arrays)
        mask = self.torch.from_numpy(np.tril(np.ones(key_mask.shape * 2, bool)) & key_mask)
        out = self.attention(q, k, v, attn_mask=mask)
        gradients = self.torch.autograd.grad(out.sum(), (q, k, v))
        return [out.detach().numpy(), *(gradient.numpy() for gradient in gradients)]


LIBRARIES: dict[str, Callable[[], Library]] = {"combiner": Combiner, "torch": Torch}

Answer = tuple[bool, str]  # whether the library did right, and what happened


def arrays(length: int, heads: int = 8, dim: int = 64) -> list[np.ndarray]:
    """query, key and value, `[1, H, L, D]` of N(0, 1)."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, heads, length, dim), np.float32) for _ in range(3)]


def fork(library: Library) -> Answer:
    """a process forks after its first call, and its child calls"""
    qkv = arrays(1024)
    expected = library.forward(*qkv)
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(library.forward(*qkv), expected) else 1)
    while time.perf_counter() - start < FORK_SECONDS:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            right = status == 0
            return right, "the child has the same bits" if right else f"the child fails, status {status}"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, f"the child hangs (killed after {FORK_SECONDS:g} s)"


def interrupt(library: Library) -> Answer:
    """Ctrl-C one second into a call of ten seconds"""
    length, least = 4096, math.inf
    qkv = arrays(length)
    for _ in range(2):
        start = time.perf_counter()
        library.forward(*qkv)
        least = min(least, time.perf_counter() - start)
    qkv = arrays(int(length * math.sqrt(10.0 / least)))
    sent, ended = math.inf, False

    def press() -> None:
        nonlocal sent
        sent = time.perf_counter()
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1.0, press).start()
    try:
        library.forward(*qkv)
        ended = True
        time.sleep(1.0)
    except KeyboardInterrupt:
        late = time.perf_counter() - sent
        return late <= 0.1 and not ended, f"KeyboardInterrupt after {late:.3f} s{', the call having ended' * ended}"
    return False, "nothing"


def poison(library: Library) -> Answer:
    """value 40 of 64 is NaN: the 24 queries from there on depend on it"""
    query, key, value = arrays(64)
    clean = library.forward(query, key, value)
    value[:, :, 40] = np.nan
    out = library.forward(query, key, value)
    rows = int(np.isnan(out).any(axis=(0, 1, 3)).sum())
    same = np.array_equal(out[:, :, :40], clean[:, :, :40])
    return rows == 24 and same, f"{rows} of 64 rows are NaN"


def masked(library: Library) -> Answer:
    """a query has every key masked"""
    key_mask = np.ones(64, bool)
    key_mask[:3] = False
    out, *gradients = library.masked(arrays(64), key_mask)
    row = "zeros" if not out[:, :, :3].any() else "NaN" if np.isnan(out[:, :, :3]).any() else "not zero"
    finite = all(np.isfinite(gradient).all() for gradient in gradients)
    zero = not gradients[0][:, :, :3].any()
    gradient = "zero" if finite and zero else "finite" if finite else "NaN"
    return (row, gradient) == ("zeros", "zero"), f"out {row}, gradient {gradient}"


def prefix(library: Library) -> Answer:
    """the first rows of a longer sequence, bit for bit"""
    qkv = arrays(1000)
    whole = library.forward(*qkv)
    lengths = range(1, 1000, 37)
    equal = 0
    for length in lengths:
        part = library.forward(*(np.ascontiguousarray(array[:, :, :length]) for array in qkv))
        equal += np.array_equal(part, whole[:, :, :length])
    return equal == len(lengths), f"equal for {equal} of {len(lengths)} lengths"


def threads(library: Library) -> Answer:
    """other numbers of threads, bit for bit"""
    qkv = arrays(1000)
    expected = library.forward(*qkv)
    counts = (1, 3, 7)
    equal = 0
    for count in counts:
        library.set_threads(count)
        equal += np.array_equal(library.forward(*qkv), expected)
    return equal == len(counts), f"equal for {equal} of {len(counts)}"


def memory(library: Library) -> Answer:
    """there is no memory for the result"""
    qkv = arrays(1 << 16, heads=1)
    library.forward(*(array[:, :, :64].copy() for array in qkv))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 22), resource.RLIM_INFINITY))
    try:
        library.forward(*qkv)
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        return isinstance(error, MemoryError), type(error).__name__
    return False, "nothing"


QUESTIONS = (fork, interrupt, poison, masked, prefix, threads, memory)


def ask(question: Callable[[Library], Answer], library: str) -> Answer:
    """The answer of a fresh process."""
    command = [sys.executable, __file__, "--ask", question.__name__, library]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"hangs (killed after {LIMIT_SECONDS:g} s)"
    if done.returncode:
        return False, f"the process ends with {done.returncode}"
    right, what = json.loads(done.stdout)
    return right, what


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", choices=[question.__name__ for question in QUESTIONS])
    parser.add_argument("--ask", nargs=2, metavar=("NAME", "LIBRARY"), help="answer one question in this process")
    args = parser.parse_args()
    questions = {question.__name__: question for question in QUESTIONS}
    if args.ask:
        name, library = args.ask
        print(json.dumps(questions[name](LIBRARIES[library]())))
        return 0

    present = [library for library in LIBRARIES if library == "combiner" or importlib.util.find_spec(library)]
    rows, failed = [], False
    for name, question in questions.items():
        if args.only in (None, name):
            answers = {library: ask(question, library) for library in present}
            failed |= not answers["combiner"][0]
            cells = (f"{'yes' if right else '**no**'}: {what}" for right, what in answers.values())
            rows.append((question.__doc__, *cells))
    print(table(("as it should be when", *present), rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
