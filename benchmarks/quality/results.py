# SPDX-License-Identifier: Apache-2.0
"""The results: a file of JSON lines, one for each model, seed and swap."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from swap import Swap

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"  # committed: docs/quality.md comes from it
OVER_TIME = RESULTS.with_name("quality_over_time.jsonl")  # committed too

Row = dict[str, Any]


def described(model: str, seed: int, swap: Swap) -> Row:
    """The part of a row that tells what was measured."""
    selection = asdict(swap.selection) if swap.selection else None
    return {
        "model": model,
        "seed": seed,
        "pattern": repr(swap.pattern),
        "selection": selection,
        "tuned": swap.tuned,
        "fresh": swap.fresh,
    }


def _identity(row: Row) -> str:
    return json.dumps([row[name] for name in ("model", "seed", "pattern", "selection", "tuned", "fresh")])


class Results:
    """The rows of a file, found by what they measure. A file that is not there is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._rows = {_identity(row): row for row in map(json.loads, lines)}
        self.seeds = sorted({int(row["seed"]) for row in self._rows.values()})

    def find(self, model: str, seed: int, swap: Swap) -> Row | None:
        """The row of a swap, if it was measured."""
        return self._rows.get(_identity(described(model, seed, swap)))

    def append(self, row: Row) -> None:
        """Adds a row, to the file at once."""
        self._rows[_identity(row)] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def values(self, model: str, swap: Swap, name: str) -> np.ndarray:
        """The figure `name` of a swap, of each seed that was measured: `[seeds]`, or `[seeds, n]` of a list."""
        rows = (self.find(model, seed, swap) for seed in self.seeds)
        return np.array([row[name] for row in rows if row is not None and name in row])

    def of_common_seeds(self, model: str, swaps: Iterable[Swap]) -> Results:
        """The results of the seeds for which all of these swaps were measured."""
        each = list(swaps)
        common = copy.copy(self)
        common.seeds = [seed for seed in self.seeds if all(self.find(model, seed, swap) for swap in each)]
        return common
