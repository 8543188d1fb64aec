# SPDX-License-Identifier: Apache-2.0
"""Train a small byte-level language model on the Python standard library's own sources, in PyTorch.

It shows `CombinerAttention` in place of ``torch.nn.MultiheadAttention``, and the module's decoder. The decoder writes
the sample byte by byte, and keeps only the rows that later bytes attend, most of which are summaries. The score is the
number of bits per byte on files that are not trained on, beside that of unigram and bigram counts.

    python examples/torch_bytes.py                  # less than a minute on two cores
    python examples/torch_bytes.py --length 8192    # longer context

Letters: B batch, L positions, E model width.
"""

import argparse
import math
import sys
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from train_bytes import BYTES, RECENT, count_models, read_text, windows

import combiner
from combiner.torch import CombinerAttention

DEPTH = 2
HEADS = 4
ROWS_PER_STEP = 2048
LEARNING_RATE = 4e-3


class Block(nn.Module):
    """Attention and an MLP, each added to its input."""

    def __init__(self, dim: int, pattern: combiner.Fixed):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CombinerAttention(dim, HEADS, pattern, batch_first=True, is_causal=True, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))[0]
        return x + self.mlp(self.norm_mlp(x))


class Model(nn.Module):
    """Logits of the byte after each of tokens [B, L]. A token is embedded together with the bytes before it."""

    def __init__(self, dim: int, pattern: combiner.Fixed):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(BYTES, dim) for _ in range(RECENT))
        self.blocks = nn.ModuleList(Block(dim, pattern) for _ in range(DEPTH))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, BYTES))

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, L, E]: each position's last `RECENT` bytes, zeros before the first: the only encoding of positions."""
        padded = functional.pad(tokens, (RECENT - 1, 0))
        return sum(table(padded[:, n : n + tokens.shape[1]]) for n, table in enumerate(self.embeddings))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.out(x)

    @torch.no_grad()
    def sample(self, prompt: Tensor, count: int) -> bytes:
        """`count` bytes after the prompt [L], at temperature 0.7. The cost of a byte is that of one query."""
        decoders = [block.attention.decoder() for block in self.blocks]
        tokens = prompt[None]
        for n in range(count):
            x = self.embed(tokens if n == 0 else tokens[:, -RECENT:])
            x = x if n == 0 else x[:, -1:]
            for block, decoder in zip(self.blocks, decoders, strict=True):
                y = block.norm_attention(x)
                x = x + (decoder.prefill(y) if n == 0 else decoder.step(y))
                x = x + block.mlp(block.norm_mlp(x))
            weights = (self.out(x[:, -1]) / 0.7).softmax(-1)
            tokens = torch.cat([tokens, weights.multinomial(1)], dim=1)
        return bytes(tokens[0, len(prompt) :].tolist())


def bits(model: Model, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean bits per byte of targets [B, L]."""
    return functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="training steps (default %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="positions of one window (default %(default)s)")
    parser.add_argument("--span", type=int, default=16, help="span of the Fixed pattern (default %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="width of the model (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and sample (default %(default)s)")
    args = parser.parse_args()
    if args.dim % HEADS:
        parser.error(f"--dim must be a multiple of {HEADS}, got {args.dim}")
    if args.length <= args.span:
        parser.error(f"--length must be greater than --span, got {args.length} and {args.span}")
    started = time.perf_counter()
    torch.set_num_threads(1)  # more threads spin while they wait, which slows other work on the machine
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    print(f"combiner {combiner.__version__}, PyTorch {torch.__version__}: {combiner.info()}")

    text = read_text()
    if min(len(text.train), len(text.held_out)) <= args.length:
        sys.exit(f"the standard library's sources are not here, or shorter than --length {args.length}")
    starts = np.linspace(0, len(text.held_out) - args.length - 1, max(1, 2**16 // args.length)).astype(int)
    held_out = windows(text.held_out, starts, args.length)
    unigram, bigram = count_models(text.train, *held_out)

    pattern = combiner.Fixed(args.span)
    model = Model(args.dim, pattern)
    size = sum(weight.numel() for weight in model.parameters())
    print(
        f"model: {DEPTH} blocks of width {args.dim}, {HEADS} heads, {size:,} weights; length {args.length}, {pattern}"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=args.steps + 1)
    for number in range(1, args.steps + 1):
        starts = rng.integers(0, len(text.train) - args.length, max(1, ROWS_PER_STEP // args.length))
        loss = bits(model, *map(torch.from_numpy, windows(text.train, starts, args.length)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if number == args.steps or number % max(1, args.steps // 10) == 0:
            print(f"step {number:5}: {loss.item():.2f} bits per byte, {time.perf_counter() - started:.0f} s")

    model.eval()
    with torch.no_grad():
        pairs = zip(*(torch.from_numpy(part).split(1) for part in held_out), strict=True)
        score = torch.stack([bits(model, *pair) for pair in pairs]).mean().item()
    print("held-out bits per byte:")
    for name, value in (("unigram", unigram), ("bigram", bigram), ("Combiner-Fixed", score)):
        print(f"  {name:<16}{value:7.3f}")

    prompt = torch.from_numpy(text.held_out[: args.length])
    drawn = bytes(prompt[-60:].tolist()) + b" >>> " + model.sample(prompt, 200)
    print(f"sample, after {len(prompt)} held-out bytes:")
    print("  " + drawn.decode("utf-8", "replace").replace("\n", "\n  "))
    print(f"total: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
