# SPDX-License-Identifier: Apache-2.0
"""Times a Decoder beside PyTorch's dense attention: the prefill, and steps of 1, 16 and 1,024 tokens after it.

All run in one process, on tokens of N(0, 1), `[1, H, n, D]` float32. Steps follow one another, and are rolled back
where the tokens end. Without PyTorch only ours are timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from report import decode_table

import combiner
from combiner import Axial, Dense, Fixed, HeavilyCompressed, LogSparse, Tree, Window

PATTERNS = (
    Dense(),
    Fixed(256),
    Fixed(256, window=256),
    Window(256),
    LogSparse(),
    LogSparse(hierarchical=True),
    Tree(16),
    HeavilyCompressed(128, 128),
    Axial(256, "rowmajor"),
    Axial(256, "vertical"),
    Axial(256, "horizontal"),
)
CONTEXTS = (1024, 16384, 65536)  # tokens before the steps
PEER = "PyTorch, dense"
SETTLE_SECONDS = 0.02  # the pause around PyTorch's calls: threads of the library timed before may still spin
MOST_CALLS = 512  # of a timing
QUICK: dict[str, Any] = {"contexts": (16, 64), "steps": (1, 16), "budget": 0.0}

Call = Callable[[], Any]


def times_of(call: Call, budget: float, before: Call = lambda: None) -> list[float]:
    """The seconds of calls until they have taken the budget, at least one; `before` each is not timed."""
    times: list[float] = []
    while not times or (sum(times) < budget and len(times) < MOST_CALLS):
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


class Ours:
    """A decoder of one pattern over the tokens `inputs`, of which the first `context` are prefilled."""

    def __init__(self, pattern: Any, inputs: list[np.ndarray], context: int) -> None:
        self._pattern, self._inputs, self._context = pattern, inputs, context
        self._room = inputs[0].shape[2] - context
        self.begin()

    def begin(self) -> None:
        self.decoder = combiner.Decoder(self._pattern, rollback=self._room)

    def prefill(self) -> np.ndarray:
        return self.decoder.prefill(*(x[:, :, : self._context] for x in self._inputs))

    def make_room(self, n: int) -> None:
        """Goes back to the context where there are less than n tokens left."""
        taken = self.decoder.length - self._context
        if taken + n > self._room:
            self.decoder.rollback(taken)

    def step(self, n: int) -> np.ndarray:
        at = self.decoder.length
        return self.decoder.step(*(x[:, :, at : at + n] for x in self._inputs))

    def times(self, steps: Sequence[int], budget: float) -> dict[int, list[float]]:
        """Of the prefill, as steps of 0 tokens, and of steps of each size."""
        found = {0: times_of(self.prefill, budget, self.begin)}
        for n in steps:
            found[n] = times_of(partial(self.step, n), budget, partial(self.make_room, n))
        return found


class Peer:
    """PyTorch's attention of the queries of the same tokens over all their keys."""

    def __init__(self, inputs: list[np.ndarray], context: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._inputs, self._context = [torch.from_numpy(x) for x in inputs], context
        self._attend = torch.no_grad()(torch.nn.functional.scaled_dot_product_attention)
        self._ones = torch.ones

    def prefill(self) -> Any:
        return self._attend(*(x[:, :, : self._context] for x in self._inputs), is_causal=True)

    def step(self, n: int) -> Call:
        """A call for the n tokens after the context; for several, with a mask made before."""
        end = self._context + n
        query, key, value = (x[:, :, :end] for x in self._inputs)
        mask = self._ones(n, end).tril(self._context).log() if n > 1 else None
        return lambda: self._attend(query[:, :, self._context :], key, value, attn_mask=mask)

    def times(self, steps: Sequence[int], budget: float) -> dict[int, list[float]]:
        calls = {0: self.prefill} | {n: self.step(n) for n in steps}
        return {n: times_of(call, budget, lambda: time.sleep(SETTLE_SECONDS)) for n, call in calls.items()}


def check(ours: Ours, peer: Peer, n: int) -> None:
    """Compares a step of n tokens with PyTorch's."""
    ours.make_room(n)
    np.testing.assert_allclose(ours.step(n), peer.step(n)().numpy(), rtol=0, atol=1e-3)


def measure_decode(
    *,
    contexts: Sequence[int] = CONTEXTS,
    steps: Sequence[int] = (1, 16, 1024),
    heads: int = 8,
    dim: int = 64,
    threads: int = 2,
    budget: float = 0.3,
) -> list[dict[str, Any]]:
    """For each number of tokens before, PyTorch and then each pattern: the median seconds of the prefill and of each
    step, and the bytes that the decoder keeps.

    Parameters
    ----------
    budget : about the seconds that each timing may take, at least one call.
    """
    combiner.set_num_threads(threads)
    rng = np.random.default_rng(0)
    rows = []
    for context in contexts:
        shape = 3, 1, heads, context + max(steps), dim
        inputs = list(rng.standard_normal(shape, dtype=np.float32))
        peer = Peer(inputs, context, threads) if importlib.util.find_spec("torch") else None
        for pattern in (None, *PATTERNS) if peer else PATTERNS:
            run: Any = Ours(pattern, inputs, context) if pattern else peer
            times = run.times(steps, budget)
            if pattern == Dense() and peer:
                check(run, peer, max(steps))
            rows.append(
                {
                    "pattern": repr(pattern) if pattern else PEER,
                    "tokens": context,
                    "heads": heads,
                    "dim": dim,
                    "threads": threads,
                    "prefill": statistics.median(times.pop(0)),
                    "steps": {str(n): statistics.median(each) for n, each in times.items()},
                    "nbytes": run.decoder.nbytes if pattern else None,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every pattern once, after few tokens: does it run?")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens before the steps")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = vars(parser.parse_args())
    print(decode_table(measure_decode(**(args | QUICK if args.pop("quick") else args))))


if __name__ == "__main__":
    main()
