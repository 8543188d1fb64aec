# SPDX-License-Identifier: Apache-2.0
"""Tables and a picture of what run.py wrote."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "bench.json"
PEER_NAMES = {"sdpa": "PyTorch SDPA (dense)"}


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(map(str, cells)) for cells in (header, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _passes(row: dict[str, Any]) -> str:
    return "forward + backward" if row["backward"] else "forward"


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
                _passes(row),
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
                _passes(growth["rows"][0]),
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
                _passes(row),
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
    """Seconds over L on logarithmic axes, one panel for each kind of pass: growth, its law, and the peers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from cases import LAWS

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    for axis, backward in zip(axes, (False, True), strict=True):
        for growth in (growth for growth in results["growth"] if growth["rows"][0]["backward"] == backward):
            lengths = [row["length"] for row in growth["rows"]]
            times = [row["ours"]["median"] for row in growth["rows"]]
            law = LAWS[growth["law"]]
            label = f"{growth['rows'][0]['pattern']}, slope {growth['slope']:.2f}"
            (line,) = axis.plot(lengths, times, "o-", label=label)
            scaled = [times[0] * law(length) / law(lengths[0]) for length in lengths]
            axis.plot(lengths, scaled, ":", color=line.get_color(), label=f"{growth['law']}, {growth['law_slope']:.2f}")
        for peer in sorted({row["peer"] for row in results["ratios"] if "peers" in row}):
            points = {
                row["length"]: row["peers"]["median"]
                for row in results["ratios"]
                if row["peer"] == peer and row["backward"] == backward and "peers" in row
            }
            axis.plot(*zip(*sorted(points.items()), strict=True), "ks--", label=PEER_NAMES[peer])
        axis.set(xscale="log", yscale="log", xlabel="L", title="forward + backward" if backward else "forward")
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
    plot(results, args.plot or args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
