# SPDX-License-Identifier: Apache-2.0
"""Train small models, with dense attention or with a pattern, put patterns in its place, and measure what is left.

    python benchmarks/quality/measure.py                 # what is missing in the results: a quarter of an hour
    python benchmarks/quality/measure.py --long          # and the cases that take hours
    python benchmarks/quality/measure.py --only recall-512/opened --seeds 0  # one case: some minutes
    python benchmarks/quality/measure.py --quick --out quick.jsonl   # every case at a size at which nothing is learned

Each result is a line that is appended to the results as soon as it is there, and is not measured again. So a run may be
stopped at any time, and goes on when it is started again.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import torch
from model import Transformer, evaluate, train
from results import RESULTS, ROOT, Results, Row, described
from swap import DENSE, Counted, Swap
from sweeps import CASES, LONG_CASES, MODELS, SEEDS, SWEEPS, Model, quick
from tasks import Batch

import combiner

WEIGHTS = ROOT / "build" / "quality"
DENSE_SWAP = Swap(DENSE)
TUNING_SEED = 1 << 10  # seeds of training are smaller


def trained(model: Model, seed: int, folder: Path | None, swap: Swap = DENSE_SWAP) -> Transformer:
    """The model, trained with dense attention or another; from the folder, or newly trained and put there."""
    torch.manual_seed(seed)
    made = Transformer(model.shape)
    name = f"{model.weights}-{seed}"
    if swap != DENSE_SWAP:
        name += re.sub(r"\W+", "-", f" {swap.pattern} {swap.selection or ''}").rstrip("-")
    path = folder / f"{name}.pt" if folder else None
    if path and path.exists():
        made.load_state_dict(torch.load(path, weights_only=True))
        return made
    start = time.perf_counter()
    train(made, model.task, model.training, swap, seed)
    print(f"{name}: trained in {time.perf_counter() - start:.0f} s", flush=True)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(made.state_dict(), path)
    return made


def tuned(model: Model, seed: int, made: Transformer, swap: Swap) -> Transformer:
    """A copy of the model, trained some more with the swap in place, at a third of the rate."""
    made = copy.deepcopy(made)
    training = replace(
        model.training, steps=min(swap.tuned, model.training.steps), rate=model.training.rate / 3, short=0
    )
    train(made, model.task, training, swap, TUNING_SEED + seed)
    return made


def measured(model: Model, seed: int, made: Transformer, swap: Swap) -> Row:
    """The row of a swap. Its share of dense attention's pairs is counted on two sequences."""
    if swap.tuned:
        made = tuned(model, seed, made, swap)
    batch = model.task.held_out(model.held_out, model.length)
    start = time.perf_counter()
    score = evaluate(made, batch, swap)
    seconds = time.perf_counter() - start
    counted = Counted(swap)
    evaluate(made, Batch(*(x[:2] for x in batch)), counted)
    return described(model.name, seed, swap) | {
        "recall": round(score.recall, 4),
        "bits": round(score.bits, 4),
        "pairs": round(counted.pairs / counted.dense_pairs, 4),
        "by_position": [None if math.isnan(bits) else round(bits, 4) for bits in score.by_position],
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases, MODEL/SWEEP, whose names contain it")
    parser.add_argument("--long", action="store_true", help="the long cases too; so do --only and --quick")
    parser.add_argument("--seeds", type=int, nargs="+", help="of weights and batches (0 1 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch and of combiner (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results (benchmarks/results/quality.jsonl)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of trained weights (build/quality)")
    parser.add_argument("--quick", action="store_true", help="every case of one seed, small and not trained, for tests")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    combiner.set_num_threads(args.threads)
    models = {model.name: quick(model) if args.quick else model for model in MODELS}
    results = Results(args.out)
    cases = CASES + LONG_CASES if args.long or args.only or args.quick else CASES
    for seed in args.seeds or (SEEDS[:1] if args.quick else SEEDS):
        for name, sweep in cases:
            if args.only not in f"{name}/{sweep}":
                continue
            model = models[name]
            folder = None if args.quick else args.weights
            missing = [swap for swap in SWEEPS[sweep](model) if results.find(name, seed, swap) is None]
            dense = None if all(swap.fresh for swap in missing) else trained(model, seed, folder)
            for swap in missing:
                if results.find(name, seed, swap) is None:  # a sweep may name one twice
                    made = trained(model, seed, folder, Swap(swap.pattern, swap.selection)) if swap.fresh else dense
                    assert made is not None
                    row = measured(model, seed, made, swap)
                    results.append(row)
                    chosen = f", {swap.selection}" if swap.selection else ""
                    print(f"{name}, seed {seed}: {swap.pattern}{chosen}: {row['recall']}, {row['bits']}", flush=True)


if __name__ == "__main__":
    main()
