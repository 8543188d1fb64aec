# SPDX-License-Identifier: Apache-2.0
"""Tables and a picture of what run.py wrote."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cases import LAWS

RESULTS = Path(__file__).parent / "results" / "bench.json"
PEERS = {"sdpa": "PyTorch SDPA (dense)"}


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(map(str, cells)) for cells in (header, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _seconds(times: dict[str, Any] | None) -> str:
    return f"{times['median']:.4g} ({times['min']:.4g})" if times else ""


def _machine(machine: dict[str, Any]) -> str:
    library = machine["combiner"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']:.2f} at the start; combiner "
        f"{library['version']} ({library['isa']}), torch {machine['torch'] or 'not installed'}, "
        f"Python {machine['python']}, {machine['date']}. Seconds: median (least)."
    )


def _ratios(rows: list[dict[str, Any]]) -> str:
    header = ("case", "L", "threads", "passes", "ours", "peer", "ratio", "target", "met")
    return table(
        header,
        (
            (
                row["pattern"],
                row["length"],
                row["threads"],
                row["passes"],
                _seconds(row["ours"]),
                _seconds(row.get("peers")),
                f"{row['ratio']:.3g}x" if row["ratio"] else "",
                f">= {row['target']:g}x" if row["target"] else "",
                {True: "yes", False: "no", None: ""}[row["met"]],
            )
            for row in rows
        ),
    )


def _growth(growths: list[dict[str, Any]]) -> str:
    lengths = [row["length"] for row in growths[0]["rows"]]
    return table(
        ("pattern", "passes", *(f"L {length}" for length in lengths), "slope", "law", "its slope"),
        (
            (
                growth["rows"][0]["pattern"],
                growth["rows"][0]["passes"],
                *(_seconds(row["ours"]) for row in growth["rows"]),
                f"{growth['slope']:.3f}",
                growth["law"],
                f"{growth['law_slope']:.3f}",
            )
            for growth in growths
        ),
    )


def _memory(rows: list[dict[str, Any]]) -> str:
    return table(
        ("pattern", "L", "passes", "MiB over inputs and outputs", "in units of the query"),
        (
            (
                row["pattern"],
                row["length"],
                row["passes"],
                f"{row['excess_bytes'] / 2**20:.2f}",
                f"{row['excess_bytes'] / row['query_bytes']:.2f}x",
            )
            for row in rows
        ),
    )


def tables(results: dict[str, Any]) -> str:
    """The whole as Markdown."""
    parts = [_machine(results["machine"])]
    for name, part in (("ratios", _ratios), ("growth", _growth), ("memory", _memory)):
        if results[name]:
            parts.append(part(results[name]))
    return "\n\n".join(parts)


def plot(results: dict[str, Any], path: Path) -> None:
    """Seconds over L on logarithmic axes, a panel for each kind of pass: our growth, its law, and the peers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    for axis, passes in zip(axes, ("forward", "forward + backward"), strict=True):
        for growth in results["growth"]:
            rows = [row for row in growth["rows"] if row["passes"] == passes]
            if rows:
                lengths, times = zip(*((row["length"], row["ours"]["median"]) for row in rows), strict=True)
                (line,) = axis.plot(lengths, times, "o-", label=f"{rows[0]['pattern']}, slope {growth['slope']:.2f}")
                law = [times[0] * LAWS[growth["law"]](length) / LAWS[growth["law"]](lengths[0]) for length in lengths]
                axis.plot(
                    lengths, law, ":", color=line.get_color(), label=f"{growth['law']}, {growth['law_slope']:.2f}"
                )
        for peer, name in PEERS.items():
            points = {
                row["length"]: row["peers"]["median"]
                for row in results["ratios"]
                if row["peer"] == peer and row["passes"] == passes and row["threads"] == 2 and "peers" in row
            }
            if points:
                axis.plot(*zip(*sorted(points.items()), strict=True), "ks--", label=name)
        axis.set(xscale="log", yscale="log", xlabel="L", title=passes)
        axis.grid(which="both", alpha=0.2)
        axis.legend()
    axes[0].set_ylabel("seconds")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="the JSON (results/bench.json)")
    parser.add_argument("--plot", type=Path, help="where to save the picture (beside the JSON, as PNG)")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    print(tables(results))
    if results["growth"]:
        plot(results, args.plot or args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
