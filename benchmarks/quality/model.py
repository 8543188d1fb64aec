# SPDX-License-Identifier: Apache-2.0
"""A small causal Transformer whose attention is an argument of the call: its weights serve any pattern.

Letters: B sequences, L positions, H heads, D features of a head, E = H * D the width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tasks import IGNORED, Batch, Task
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

STARTS = (0, 64, 128, 256, 512)  # of the parts of a sequence for which a loss is given
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of query, key and value, `[B, H, L, D]` each."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Parameters
    ----------
    recent : a position is embedded as the sum of its last `recent` tokens, from one table with a matrix for each
        distance. It tells a value which key stands before it, and is the only encoding of positions unless `rotary`.
    rotary : whether queries and keys are rotated by their position (Su et al., 2021), before keys are pooled.
    """

    vocabulary: int
    recent: int = 2
    rotary: bool = False
    width: int = 64
    heads: int = 2
    depth: int = 2


class Transformer(nn.Module):
    """Blocks of attention and MLP, each behind an RMSNorm; the logits are products with the embeddings.

    The last matrix of each branch starts as zero.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        E = shape.width
        self.embedding = nn.Embedding(shape.vocabulary, E)
        self.before = nn.ModuleList(nn.Linear(E, E, bias=False) for _ in range(1, shape.recent))
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(E, eps=1e-6)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=E**-0.5)
        for block in self.blocks:
            nn.init.zeros_(block.project.weight)
            nn.init.zeros_(block.down.weight)

    def forward(self, batch: Batch, attention: Attention) -> tuple[Tensor, Tensor]:
        """Logits `[N, vocabulary]` at the N positions where an answer is wanted, and the answers `[N]`."""
        length = batch.tokens.shape[1]
        x = own = self.embedding(batch.tokens)
        for n, matrix in enumerate(self.before, 1):
            x = x + functional.pad(matrix(own), (0, 0, n, 0))[:, :length]
        for block in self.blocks:
            x = block(x, attention)
        wanted = batch.answers != IGNORED
        return self.norm(x[wanted]) @ self.embedding.weight.T, batch.answers[wanted]


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        E = shape.width
        self.heads, self.rotary = shape.heads, shape.rotary
        self.norm_attention, self.norm_mlp = nn.RMSNorm(E, eps=1e-6), nn.RMSNorm(E, eps=1e-6)
        self.qkv, self.project = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E, bias=False)
        self.up, self.down = nn.Linear(E, 4 * E, bias=False), nn.Linear(4 * E, E, bias=False)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        B, L, E = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = _rotated(q), _rotated(k)
        x = x + self.project(attention(q, k, v).transpose(1, 2).reshape(B, L, E))
        return x + self.down(functional.relu(self.up(self.norm_mlp(x))).square())


def _rotated(x: Tensor) -> Tensor:
    """x `[B, H, L, D]` with the pairs (n, n + D / 2) of features rotated by 10000^(-2n / D) radians a position."""
    length, dim = x.shape[-2:]
    angles = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, dim, 2) / dim)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


@dataclass(frozen=True)
class Training:
    """How a model is trained: AdamW, the rate rising for a tenth of the steps and falling over the last half.

    Parameters
    ----------
    length : positions of a sequence.
    steps : the number of updates.
    tokens : tokens of a step: of `tokens` / L sequences.
    rate : the largest learning rate.
    short : share of the steps that are made on sequences of a quarter of the length, which teach the same for less.
    """

    length: int
    steps: int
    tokens: int
    rate: float = 3e-3
    short: float = 0.0


def train(model: Transformer, task: Task, training: Training, attention: Attention, seed: int) -> None:
    """Trains the model in place; the same seed gives the same batches."""
    rng = np.random.default_rng(seed)
    optimizer = optimizer_of(model)
    seen = sys.stderr.isatty()
    bar = tqdm(range(training.steps), "training", unit="step", ascii=not seen, mininterval=0.1 if seen else 20)
    for step in bar:
        length = training.length // 4 if step < training.short * training.steps else training.length
        batch = task.batch(rng, max(1, training.tokens // length), length)
        rising, falling = (step + 1) / (0.1 * training.steps), (training.steps - step) / (0.5 * training.steps)
        optimizer.param_groups[0]["lr"] = training.rate * min(1, rising, falling)
        bits = update(model, optimizer, batch, attention)
        bar.set_postfix_str(f"bits {bits:.3f}", refresh=False)


def optimizer_of(model: Transformer) -> torch.optim.Optimizer:
    """The optimizer of every training; its rate is set before each step."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))


def update(model: Transformer, optimizer: torch.optim.Optimizer, batch: Batch, attention: Attention) -> float:
    """One step of training. Returns the loss of the batch before the step, in bits."""
    loss = functional.cross_entropy(*model(batch, attention))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item() / math.log(2)


class Score(NamedTuple):
    """How good a model's answers are.

    Attributes
    ----------
    recall : the share of answers that are the most probable ones.
    bits : the mean of -log2 of their probability.
    by_position : the same mean for the positions from each of STARTS on to the next; NaN where no answer is wanted.
    """

    recall: float
    bits: float
    by_position: list[float]


@torch.no_grad()
def evaluate(model: Transformer, batch: Batch, attention: Attention, sequences: int = 8) -> Score:
    """The model's score on a batch, so many sequences at a time."""
    right, bits, positions = [], [], []
    for part in map(Batch, batch.tokens.split(sequences), batch.answers.split(sequences)):
        logits, answers = model(part, attention)
        right.append(logits.argmax(-1) == answers)
        bits.append(functional.cross_entropy(logits, answers, reduction="none").double() / math.log(2))
        positions.append((part.answers != IGNORED).nonzero()[:, 1])
    each, part_of = torch.cat(bits), torch.bucketize(torch.cat(positions), torch.tensor(STARTS), right=True) - 1
    by_position = [float(each[part_of == n].mean()) for n in range(len(STARTS))]
    return Score(float(torch.cat(right).double().mean()), float(each.mean()), by_position)
