# SPDX-License-Identifier: Apache-2.0
"""Time the attention of a heavily compressed layer of DeepSeek-V4 in Transformers: ours, and the model's eager one.

    python benchmarks/deepseek_v4.py                   # L 4,096: half a minute
    python benchmarks/deepseek_v4.py --length 16384    # some minutes, and 2.4 GB for the eager attention's matrices

Prints the least time of forward, and of forward with backward, how much the process's peak memory grew, and how far the
two are from each other. Needs Linux or macOS, torch and transformers.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.deepseek_v4.modeling_deepseek_v4 import eager_attention_forward

import combiner
import combiner.transformers

DIM = 64  # features of a head
MEBIBYTE = 2**20 if sys.platform == "darwin" else 2**10  # in units of ru_maxrss


class Layer(nn.Module):
    """What an attention function reads of the model's layer, and its input."""

    layer_type = "heavily_compressed_attention"
    is_causal = True

    def __init__(self, heads: int, length: int, rate: int, window: int) -> None:
        super().__init__()
        self.compressor = SimpleNamespace(compress_rate=rate)
        self.num_key_value_groups, self.window = heads, window
        self.sinks = nn.Parameter(torch.randn(heads))
        self.query = nn.Parameter(torch.randn(1, heads, length, DIM))
        self.key = nn.Parameter(torch.randn(1, 1, length + length // rate, DIM))  # the values too; compressed keys last

    def ours(self) -> Callable[[], Tensor]:
        length, options = self.query.shape[2], {"sliding_window": self.window, "s_aux": self.sinks}
        within = sliding_window_causal_mask_function(self.window)
        mask = combiner.transformers.masks.mask(
            batch_size=1, q_length=length, kv_length=length, q_offset=0, kv_offset=0, mask_function=within
        )
        attention = AttentionInterface()["combiner"]
        return lambda: attention(self, self.query, self.key, self.key, mask, scaling=DIM**-0.5, **options)[0]

    def eager(self) -> Callable[[], Tensor]:
        length, spans = self.query.shape[2], self.key.shape[2] - self.query.shape[2]
        i, key, span = torch.arange(length)[:, None], torch.arange(length), torch.arange(spans)
        near = (key <= i) & (i - key < self.window)
        complete = span < (i + 1) // self.compressor.compress_rate
        mask = torch.where(torch.cat([near, complete], dim=1), 0.0, -torch.inf)[None, None]
        return lambda: eager_attention_forward(self, self.query, self.key, self.key, mask, DIM**-0.5)[0]


def peak() -> float:
    """MiB that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEBIBYTE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="L (default %(default)s)")
    parser.add_argument("--heads", type=int, default=1, help="query heads; there is one key head (default %(default)s)")
    parser.add_argument("--rate", type=int, default=128, help="positions of a span (default %(default)s)")
    parser.add_argument("--window", type=int, default=128, help="keys that a query sees (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and of combiner (default %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    combiner.set_num_threads(args.threads)
    combiner.transformers.register()
    layer = Layer(args.heads, args.length, args.rate, args.window)
    grad = torch.randn(1, args.length, args.heads, DIM)
    results = []
    for name, rounds in (("ours", 3), ("eager", 1)):  # in this order: a peak does not fall
        before, forward, both = peak(), [], []
        attention = getattr(layer, name)()
        for _ in range(rounds):
            layer.zero_grad()
            start = time.perf_counter()
            out = attention()
            forward.append(time.perf_counter() - start)
            out.backward(grad)
            both.append(time.perf_counter() - start)
        results.append([out.detach(), *(weight.grad for weight in layer.parameters())])
        grown = peak() - before
        print(f"{name:5}: forward {min(forward):.3g} s, with backward {min(both):.3g} s, {grown:.0f} MiB", flush=True)
    apart = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))
    print(f"out and gradients are apart by at most {apart:.1e} of the largest")


if __name__ == "__main__":
    main()
