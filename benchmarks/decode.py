# SPDX-License-Identifier: Apache-2.0
"""Times one step of a Decoder beside PyTorch's dense attention of one query over a cache of the same tokens.

Both in one process in turn, on tokens of N(0, 1), `[1, H, 1, D]` float32; medians. Without torch our times alone.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

import combiner

SETTLE_SECONDS = 0.02  # a library's threads may spin for a while after their work, on the other's time
STEPS = 12  # of each round

PATTERNS = (
    combiner.Fixed(256),
    combiner.LogSparse(),
    combiner.LogSparse(hierarchical=True),
    combiner.Tree(16),
    combiner.Axial(256, "rowmajor"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536, help="before the steps")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    combiner.set_num_threads(options.threads)
    past, length = options.tokens, options.tokens + STEPS * options.rounds
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((1, options.heads, length, options.dim), dtype=np.float32) for _ in range(3)]

    def tokens(first: int, end: int) -> list[np.ndarray]:
        return [x[..., first:end, :] for x in inputs]

    decoders = {repr(pattern): combiner.Decoder(pattern) for pattern in PATTERNS}
    for decoder in decoders.values():
        decoder.prefill(*tokens(0, past))
    try:
        import torch
    except ImportError:
        torch = None
    else:
        torch.set_num_threads(options.threads)
        dense = torch.nn.functional.scaled_dot_product_attention
        cache = [torch.from_numpy(np.ascontiguousarray(x)) for x in tokens(0, past)[1:]]
    times: dict[str, list[float]] = {name: [] for name in (*decoders, "dense")}
    for n in range(options.rounds):
        for name, decoder in decoders.items():
            for at in range(past + STEPS * n, past + STEPS * (n + 1)):
                given = tokens(at, at + 1)
                start = time.perf_counter()
                decoder.step(*given)
                times[name].append(time.perf_counter() - start)
        if torch:
            time.sleep(SETTLE_SECONDS)
            query = torch.from_numpy(np.ascontiguousarray(tokens(past + n, past + n + 1)[0]))
            start = time.perf_counter()
            with torch.no_grad():
                dense(query, *cache)
            times["dense"].append(time.perf_counter() - start)
            time.sleep(SETTLE_SECONDS)
    peer = statistics.median(times["dense"]) if torch else float("nan")
    print(f"one step after {past} tokens, H {options.heads}, D {options.dim}, float32, {options.threads} threads")
    for name, seconds in times.items():
        if seconds:
            median, mean = statistics.median(seconds), statistics.mean(seconds)
            size = f", {decoders[name].nbytes / 1e6:.1f} MB" if name in decoders else ""
            print(f"{name}: median {median * 1e6:.0f} us, mean {mean * 1e6:.0f} us, {peer / median:.0f}x{size}")


if __name__ == "__main__":
    main()
