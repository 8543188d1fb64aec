# SPDX-License-Identifier: Apache-2.0
"""Train a small model whose layers attend as DeepSeek-V4's heavily compressed ones do, on Python's own sources.

In one softmax a query attends the keys of a window, one compressed entry of every complete span of positions, and a
sink. All query heads share one key head, whose keys are the values too. An entry is, in each feature, a mean of its
span's keys under a learned softmax. In Transformers such layers need a mask `[L, L + L / rate]`; here the window and
the entries are a pattern, `HeavilyCompressed(rate, window)`, and the cost of a query is that of the keys that it sees.

    python examples/deepseek_v4_layer.py                    # about a minute on two cores
    python examples/deepseek_v4_layer.py --out mask.png     # and a picture of who attends what in the trained model

Letters: B batch, H query heads, L positions, R spans, D features of a head, E model width.
"""

import argparse
import math
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from train_bytes import BYTES, read_text, windows

import combiner
import combiner.torch

HEADS = 4
DEPTH = 2
ROWS_PER_STEP = 4096
LEARNING_RATE = 3e-3


class Attention(nn.Module):
    """`[B, L, E]` to `[B, L, E]`."""

    def __init__(self, width: int, rate: int, window: int):
        super().__init__()
        self.pattern, D = combiner.HeavilyCompressed(rate, window), width // HEADS
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.gate = nn.Linear(width, D, bias=False), nn.Linear(width, D, bias=False)
        self.place = nn.Parameter(torch.zeros(rate, D))  # joins the gate: where in its span a position is
        self.sink = nn.Parameter(torch.zeros(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        query, key, entries = self.project(x)
        out = self.attend(query, key, key, entries, entries)
        return self.out(out.transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The query `[B, H, L, D]`, the key `[B, 1, L, D]` and the entries `[B, 1, R, D]`."""
        query, key = self.query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2), self.key(x)
        return query, key[:, None], self.compress(key, self.gate(x))[:, None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, entries: Tensor, entry_values: Tensor) -> Tensor:
        heads = entry_values.expand(-1, HEADS, -1, -1)  # a region has a value for each query head
        return combiner.torch.attend(query, key, value, entries, heads, self.pattern, is_causal=True, sink=self.sink)

    def weights(self, x: Tensor) -> Tensor:
        """The softmax's weights of all keys and entries, `[B, H, L, L + R]`: attention of the identity."""
        query, key, entries = self.project(x)
        L, R = key.shape[2], entries.shape[2]
        value, entry_values = torch.eye(L + R).expand(len(x), 1, -1, -1).split((L, R), dim=2)
        return self.attend(query, key, value, entries, entry_values)

    def compress(self, key: Tensor, gate: Tensor) -> Tensor:
        """`[B, L, D]` to the entries of all spans, `[B, R, D]`. No query sees an entry before its span is complete."""
        rate = len(self.place)
        spans = (-key.shape[1] % rate + key.shape[1]) // rate
        key, gate = (functional.pad(x, (0, 0, 0, spans * rate - x.shape[1])) for x in (key, gate))
        weight = (gate.unflatten(1, (spans, rate)) + self.place).softmax(2)
        return (weight * key.unflatten(1, (spans, rate))).sum(2)


class Model(nn.Module):
    """Logits of the byte after each of tokens `[B, L]`."""

    def __init__(self, width: int, length: int, rate: int, window: int):
        super().__init__()
        self.byte, self.position = nn.Embedding(BYTES, width), nn.Parameter(torch.randn(length, width) * 0.02)
        self.attention = nn.ModuleList(Attention(width, rate, window) for _ in range(DEPTH))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(DEPTH)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(DEPTH))
        self.logits = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, BYTES))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.byte(tokens) + self.position[: tokens.shape[1]]
        for norm, attention, mlp in zip(self.norm, self.attention, self.mlp, strict=True):
            x = x + attention(norm(x))
            x = x + mlp(x)
        return self.logits(x)


def bits(model: Model, text: np.ndarray, count: int, length: int, rng: np.random.Generator) -> Tensor:
    """Mean bits per byte of `count` pieces of the text."""
    starts = rng.integers(0, len(text) - length - 1, count)
    tokens, targets = (torch.as_tensor(x) for x in windows(text, starts, length))
    return functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) / math.log(2)


@torch.no_grad()
def draw(model: Model, text: np.ndarray, path: str) -> None:
    """The weights of the first layer's first head on a text `[L]`: the mask [L, L + R] that the layer never makes."""
    import matplotlib.pyplot as plt

    tokens = torch.as_tensor(text.astype(np.int64))[None]
    x = model.norm[0](model.byte(tokens) + model.position[: tokens.shape[1]])
    weight, L = model.attention[0].weights(x)[0, 0], len(text)
    entries = weight.shape[1] - L
    seen = torch.where(weight > 0, weight, torch.nan)  # white: not attended
    panels = {"ncols": 2, "sharey": True, "layout": "constrained", "width_ratios": (L, max(entries, L // 4))}
    figure, (left, right) = plt.subplots(**panels, figsize=(7, 5))
    for ax, part, name in ((left, seen[:, :L], "position of the key"), (right, seen[:, L:], "span of the entry")):
        image = ax.imshow(part, cmap="viridis_r", norm="log", vmin=1e-3, vmax=1, aspect="auto", interpolation="nearest")
        ax.set_xlabel(name)
    left.set_ylabel("position of the query")
    figure.colorbar(image, label="weight")
    figure.suptitle(f"{model.attention[0].pattern!r}: {int((weight > 0).sum()):,} of {L * (L + entries):,} weights")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--length", type=int, default=1024, help="L (default %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="steps of training (default %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="E (default %(default)s)")
    parser.add_argument("--rate", type=int, default=16, help="positions of a span (default %(default)s)")
    parser.add_argument("--window", type=int, default=32, help="keys that a query sees (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    parser.add_argument("--out", metavar="PNG", help="where to draw who attends what")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    text = read_text()
    model = Model(args.width, args.length, args.rate, args.window)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    started = time.perf_counter()
    for step in range(args.steps + 1):
        if step % 50 == 0:
            with torch.no_grad():
                score = bits(model, text.held_out, 4, args.length, np.random.default_rng(1))
            print(f"step {step:4}  {score:.3f} bits per byte  {time.perf_counter() - started:5.1f} s", flush=True)
        loss = bits(model, text.train, max(1, ROWS_PER_STEP // args.length), args.length, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("sinks of the first layer:", *(f"{x:+.2f}" for x in model.attention[0].sink))
    if args.out:
        draw(model, text.held_out[: min(args.length, 128)], args.out)


if __name__ == "__main__":
    main()
