# SPDX-License-Identifier: Apache-2.0
"""Train byte models of 4,096 positions that differ in their attention, and measure their loss over processor time.

    python benchmarks/quality/over_time.py               # some four minutes on one core; writes the results
    python benchmarks/quality/over_time.py --quick --out quick.jsonl    # a short run, for tests

The models start from the same weights and see the same batches. They take turns in one process: the one that has used
the least processor time makes the next step. So what disturbs one disturbs all, and they end together. The time of a
step is the median over all steps of a model; other work on the machine hardly moves that. `show.py` draws the losses
over the steps times that median.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from model import Attention, Transformer, evaluate, optimizer_of, update
from results import OVER_TIME
from swap import Swap
from sweeps import MODELS
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

import combiner
from combiner import Fixed, Window

LENGTH = 4096
HELD_OUT = 8  # sequences
RATE, WARM_UP = 3e-3, 20  # the rate rises for so many steps, and stays: no schedule depends on where a run ends
POINTS = 10  # evaluations of each model


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's dense attention."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


ATTENTIONS: dict[str, Attention] = {
    "PyTorch's SDPA, dense": sdpa,
    **{f"`{pattern!r}`": Swap(pattern) for pattern in (Fixed(64), Fixed(64, window=64), Window(96))},
}
MODEL = next(model for model in MODELS if model.name == "bytes-1024")


@dataclass
class Run:
    """A model in training, with the seconds of its steps and the held-out loss after some of them, in bits."""

    name: str
    seed: int
    length: int
    model: Transformer = field(init=False)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = Transformer(MODEL.shape)
        self._optimizer, self._rng = optimizer_of(self.model), np.random.default_rng(self.seed)

    @property
    def used(self) -> float:
        """Processor seconds of all steps."""
        return sum(self.seconds)

    def step(self) -> None:
        """One sequence."""
        batch = MODEL.task.batch(self._rng, 1, self.length)
        self._optimizer.param_groups[0]["lr"] = RATE * min(1, (len(self.seconds) + 1) / WARM_UP)
        start = time.process_time()
        update(self.model, self._optimizer, batch, ATTENTIONS[self.name])
        self.seconds.append(time.process_time() - start)

    def judge(self, held_out: int) -> None:
        """Adds a point to the curve."""
        batch = MODEL.task.held_out(held_out, self.length)
        self.steps.append(len(self.seconds))
        self.bits.append(round(evaluate(self.model, batch, ATTENTIONS[self.name], sequences=1).bits, 4))

    def row(self) -> dict[str, Any]:
        return {
            "attention": self.name,
            "seed": self.seed,
            "length": self.length,
            "step_seconds": float(f"{median(self.seconds):.4g}"),
            "steps": self.steps,
            "bits": self.bits,
        }


def trained(seed: int, length: int, budget: float, held_out: int) -> list[dict[str, Any]]:
    """The rows of all models, each of which is trained for so many processor seconds."""
    runs = [Run(name, seed, length) for name in ATTENTIONS]
    for run in runs:
        run.judge(held_out)
    bar = tqdm(total=POINTS * len(runs), desc=f"seed {seed}", unit="point", mininterval=1)
    while (run := min(runs, key=lambda each: each.used)).used < budget:
        run.step()
        if run.used >= budget * len(run.steps) / POINTS:
            run.judge(held_out)
            bar.update()
    return [run.row() for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40, help="processor time of each training (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and batches (0)")
    parser.add_argument("--out", type=Path, default=OVER_TIME, help="the results (results/quality_over_time.jsonl)")
    parser.add_argument("--quick", action="store_true", help="short sequences and a second for all, for tests")
    args = parser.parse_args()
    torch.set_num_threads(1)
    combiner.set_num_threads(1)
    length, budget, held_out = (128, 0.1, 1) if args.quick else (LENGTH, args.seconds, HELD_OUT)
    load = os.getloadavg()[0]
    rows = [row for seed in args.seeds for row in trained(seed, length, budget, held_out)]
    common = {
        "seconds": budget,
        "machine": f"{platform.machine()}, {combiner.info()['isa']}",
        "load": round(load, 1),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    args.out.write_text("".join(json.dumps(row | common) + "\n" for row in rows))


if __name__ == "__main__":
    main()
