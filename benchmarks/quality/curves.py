# SPDX-License-Identifier: Apache-2.0
"""The results of over_time.py as a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PARTS = (1 / 4, 1 / 2, 3 / 4, 1)  # of the time of a training
COLORS = ("k", "C0", "C1", "C2")  # of the attentions, of which the first is dense


class Curves:
    """The loss of each attention over processor seconds. The first attention is the one to compare with."""

    def __init__(self, path: Path) -> None:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        self.by_name: dict[str, list[dict[str, Any]]] = {}  # a row for each seed
        for row in rows:
            self.by_name.setdefault(row["attention"], []).append(row)
        self.made, self.first = rows[0], rows[0]["attention"]

    @staticmethod
    def points(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Seconds, and bits per byte after them."""
        return np.array(row["steps"]) * row["step_seconds"], np.array(row["bits"])

    def title(self) -> str:
        made, seeds = self.made, len(self.by_name[self.first])
        return (
            f"**loss over time** (bits per byte; L {made['length']}; seeds: {seeds}; processor seconds of one thread, "
            f"{made['machine']}, PyTorch {made['torch']}, load {made['load']} at the start)"
        )

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of a table: the loss after parts of the time, and when the first one's is reached."""
        times = [self.made["seconds"] * part for part in PARTS]
        header = ["trained with", "a step", *(f"{t:.0f} s" for t in times), "as good as the first in the end"]
        rows = []
        for name, each in self.by_name.items():
            curves = [self.points(row) for row in each]
            losses = (np.mean([np.interp(t, *curve) for curve in curves]) for t in times)
            step = np.mean([row["step_seconds"] for row in each])
            reached = [
                self.reached(row, row_of_first)
                for row, row_of_first in zip(each, self.by_name[self.first], strict=True)
            ]
            after = "never" if np.isnan(reached).any() else f"{np.mean(reached):.0f} s"
            rows.append([name, f"{step * 1e3:.0f} ms", *(f"{loss:.2f}" for loss in losses), after])
        return header, rows

    def reached(self, row: dict[str, Any], other: dict[str, Any]) -> float:
        """Seconds after which a curve is as low as the other one's last point; NaN if it never is."""
        seconds, bits = self.points(row)
        lowest, goal = np.minimum.accumulate(bits), other["bits"][-1]
        return float(np.interp(-goal, -lowest, seconds)) if lowest[-1] <= goal else np.nan

    def plot(self, path: Path) -> None:
        """Bits over seconds: a line for each attention and seed."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
        for (name, each), color, marker in zip(self.by_name.items(), COLORS, "s*od", strict=True):
            step = np.mean([row["step_seconds"] for row in each])
            for n, row in enumerate(each):
                seconds, bits = self.points(row)
                label = f"{name.strip('`')}, {step * 1e3:.0f} ms a step" if n == 0 else None
                axis.plot(seconds[1:], bits[1:], f"{marker}-", color=color, markersize=4, label=label)
        axis.set(xlabel="processor seconds of training, one thread", ylabel="bits per held-out byte")
        axis.set_title(f"Byte models, L {self.made['length']}")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        figure.savefig(path, dpi=120)
        plt.close(figure)
