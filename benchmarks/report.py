# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of what run.py wrote."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from cases import FIRST_FAST
from peers import PEERS

RESULTS = Path(__file__).parent / "results" / "bench.json"
PASSES = ("forward", "forward + backward")

# Our patterns in the picture beside those of the growth, and the length from which on slopes are fitted.
PLOTTED = ("dense", "logsparse", "rowmajor")
LONG = 2048

QUERY = "the query itself"

BUSY = 0.5  # a load at the start above which other work disturbs

LEAST_MEBIBYTES = 0.5  # below it, pages are not counted one by one


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(map(str, cells)) for cells in (header, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


MET = {True: "yes", False: "**no**", None: ""}


def _time(seconds: float) -> str:
    """Three digits, in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _times(times: dict[str, Any]) -> str:
    return f"{_time(times['median'])} ({_time(times['min'])})"


def _title(peer: str) -> str:
    return PEERS[peer].title if peer in PEERS else f"ours, {peer}"


def _wanted(row: dict[str, Any]) -> str:
    least = [f">= {row['target']:g}x"] if row["target"] else []
    return ", ".join(least + ([f"<= {_time(row['limit'])}"] if row["limit"] else []))


def _machine(machine: dict[str, Any]) -> str:
    library = machine["combiner"]
    busy = " **The machine was busy: peers whose threads spin suffer most.**" if machine["load"] > BUSY else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']:.2f} at the start; combiner "
        f"{library['version']} ({library['isa']}), torch {machine['torch'] or 'not installed'}, "
        f"jax {machine['jax'] or 'not installed'}, Python {machine['python']}, {machine['date']}. "
        f"Times: median (least).{busy}"
    )


def _ratios(rows: list[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any]) -> Iterable[tuple[object, ...]]:
        case = (row["pattern"], row["length"], row["threads"], row["passes"], _times(row["ours"]))
        several = len(row["theirs"]) > 1
        for name, times in row["theirs"].items():
            met = ("", "") if several else (_wanted(row), MET[row["met"]])
            yield (*case, _title(name), _times(times), f"{row['ratios'][name]:.3g}x", *met)
        if several or not row["theirs"]:
            ratio = f"{row['ratio']:.3g}x" if several else ""
            yield (*case, "the best of these" if several else "", "", ratio, _wanted(row), MET[row["met"]])

    header = ("pattern", "L", "threads", "passes", "ours", "peer", "peer's", "ratio", "wanted", "met")
    return table(header, (line for row in rows for line in cells(row)))


def fast_from(rows: Iterable[dict[str, Any]]) -> int | None:
    """The least length from which on all ratios are at least 1."""
    fast = None
    for row in sorted(rows, key=lambda row: row["length"], reverse=True):
        if row["ratio"] is None or row["ratio"] < 1:
            break
        fast = row["length"]
    return fast


def _by_pattern(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["name"], row["passes"]), []).append(row)
    return found


def _lengths(rows: list[dict[str, Any]]) -> str:
    """The ratio to dense attention at every length, and the length from which on it is at least 1."""
    lengths = sorted({row["length"] for row in rows})

    def cells(name: str, passes: str, rows: list[dict[str, Any]]) -> tuple[object, ...]:
        ratios = {row["length"]: row["ratio"] for row in rows}
        first, last = fast_from(rows), rows[-1]
        return (
            last["pattern"] if "clusters" not in last["pattern"] else name,
            passes,
            *(f"{ratios[length]:.3g}x" if ratios.get(length) else "" for length in lengths),
            first or "none",
            MET[None if last["ratio"] is None else first is not None and first <= FIRST_FAST],
            _wanted(last),
            MET[last["met"]],
        )

    header = ("pattern", "passes", *(f"L {length}" for length in lengths), "1x from L", f"<= {FIRST_FAST}")
    return table(
        (*header, f"wanted at {lengths[-1]}", "met"),
        (cells(name, passes, rows) for (name, passes), rows in _by_pattern(rows).items()),
    )


def _growth(growths: list[dict[str, Any]]) -> str:
    lengths = [row["length"] for row in growths[0]["rows"]]
    header = ("pattern", "passes", *(f"L {length}" for length in lengths), "slope", "law", "its slope")
    return table(
        (*header, f"{lengths[-1] // 4} -> {lengths[-1]}", "wanted", "met"),
        (
            (
                growth["rows"][0]["pattern"],
                growth["rows"][0]["passes"],
                *(_times(row["ours"]) for row in growth["rows"]),
                f"{growth['slope']:.3f}",
                growth["law"],
                f"{growth['law_slope']:.3f}",
                f"{growth['ratio']:.2f}x",
                f"<= {growth['limit']:g}x" if growth["limit"] else "",
                MET[growth["met"]],
            )
            for growth in growths
        ),
    )


def _memory(rows: list[dict[str, Any]]) -> str:
    return table(
        ("pattern", "L", "passes", "MiB over inputs and outputs", "in units of the query", "wanted", "met"),
        (
            (
                row["pattern"],
                row["length"],
                row["passes"],
                f"{row['excess_bytes'] / 2**20:.2f}",
                f"{row['excess_bytes'] / row['query_bytes']:.2f}x",
                f"<= {row['limit']:g}x" if row["limit"] else "",
                MET[row["met"]],
            )
            for row in rows
        ),
    )


def _arithmetic(rows: list[dict[str, Any]]) -> str:
    return table(
        ("one core, float32", "GFLOP/s", "of the loop", "of the lanes in use", "wanted", "met"),
        (
            (
                row["what"],
                f"{row['gflops']:.1f}",
                f"{row['share']:.1%}" if row["share"] else "",
                f"{row['useful']:.1%}" if "useful" in row else "",
                f">= {row['target']:.0%}" if row["target"] else "",
                MET[row["met"]],
            )
            for row in rows
        ),
    )


def _plans(rows: list[dict[str, Any]]) -> str:
    lengths = rows[0]["length"], rows[0]["long_length"]
    return table(
        (
            "plan",
            f"made at L {lengths[0]}",
            "of a forward",
            f"MiB at L {lengths[1]}",
            "of query, key, value and out",
            "16 threads busy",
        ),
        (
            (
                row["pattern"],
                _time(row["build"]),
                f"{row['build_share']:.1%}",
                f"{row['nbytes'] / 2**20:.2f}",
                f"{row['nbytes_share']:.1%}",
                f"{row['balance']:.0%}" if row.get("balance") else "",
            )
            for row in rows
        ),
    )


def tables(results: dict[str, Any]) -> str:
    """The whole as Markdown."""
    parts = [_machine(results["machine"])]
    for name, part in (
        ("ratios", _ratios),
        ("lengths", _lengths),
        ("growth", _growth),
        ("memory", _memory),
        ("arithmetic", _arithmetic),
        ("plans", _plans),
    ):
        if results[name]:
            parts.append(part(results[name]))
    return "\n\n".join(parts)


def readme_table(results: dict[str, Any]) -> str:
    """Ratios at the longest length and where they pass 1, as the README has them."""
    longest = max(row["length"] for row in results["lengths"])
    by_pattern = _by_pattern(results["lengths"])

    def ratio(name: str, passes: str) -> str:
        return next(f"{row['ratio']:.3g}x" for row in by_pattern[name, passes] if row["length"] == longest)

    return table(
        ("pattern", *PASSES, "at least as fast from L"),
        (
            (
                f"`{rows[-1]['pattern']}`" if "clusters" not in rows[-1]["pattern"] else name,
                *(ratio(name, passes) for passes in PASSES),
                ", ".join(str(fast_from(by_pattern[name, passes]) or "-") for passes in PASSES),
            )
            for (name, passes), rows in by_pattern.items()
            if passes == PASSES[0]
        ),
    )


def slope(points: dict[int, float]) -> float:
    """The slope of the line fitted to log(value) over log(length)."""
    return float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])


def _panels(ylabel: str, lines: dict[str, dict[str, dict[int, float]]], path: Path, *, least: float = 0.0) -> None:
    """A panel for each kind of pass, logarithmic both ways: lines by passes and name, their slopes in the legend.

    Values below `least` are drawn there and not fitted.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    references = PEERS["sdpa"].title, QUERY
    names = list(dict.fromkeys(name for passes in PASSES for name in lines[passes] if name not in references))
    for axis, passes in zip(axes, PASSES, strict=True):
        for name, points in sorted(lines[passes].items(), key=lambda line: -line[1][max(line[1])]):
            color = "k" if name in references else f"C{names.index(name)}"
            style = "s--" if name in references else "o-"
            long = {length: value for length, value in points.items() if length >= LONG and value > least}
            label = f"{name}: slope {slope(long):.2f}" if len(long) > 2 else name
            lengths = sorted(points)
            values = [max(points[length], least) for length in lengths]
            axis.plot(lengths, values, style, color=color, markersize=4, label=label)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:.0f}"))
        axis.set(yscale="log", xlabel="L", title=passes)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(which="major", alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel(ylabel)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot(results: dict[str, Any], directory: Path) -> None:
    """time.png and memory.png in the directory: seconds, and MiB over inputs and outputs, over L."""
    times: dict[str, dict[str, dict[int, float]]] = {passes: {} for passes in PASSES}
    for growth in results["growth"]:
        for row in growth["rows"]:
            times[row["passes"]].setdefault(row["pattern"], {})[row["length"]] = row["ours"]["median"]
    for row in results["lengths"]:
        line = times[row["passes"]]
        if row["name"] in PLOTTED:
            line.setdefault(row["pattern"], {})[row["length"]] = row["ours"]["median"]
        if "sdpa" in row["theirs"]:
            line.setdefault(PEERS["sdpa"].title, {})[row["length"]] = row["theirs"]["sdpa"]["median"]
    _panels("seconds", times, directory / "time.png")

    memory: dict[str, dict[str, dict[int, float]]] = {passes: {} for passes in PASSES}
    several = {row["name"] for row in results["memory"] if row["length"] != results["memory"][-1]["length"]}
    for row in results["memory"]:
        if row["name"] in several:
            line = memory[row["passes"]]
            line.setdefault(row["pattern"], {})[row["length"]] = row["excess_bytes"] / 2**20
            line.setdefault(QUERY, {})[row["length"]] = row["query_bytes"] / 2**20
    _panels("MiB over inputs and outputs", memory, directory / "memory.png", least=LEAST_MEBIBYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="the JSON (results/bench.json)")
    parser.add_argument("--plot", type=Path, help="the folder for time.png and memory.png (that of the JSON)")
    parser.add_argument("--readme", action="store_true", help="of the tables the README's alone; pictures with --plot")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    print(readme_table(results) if args.readme else tables(results))
    if args.plot or not args.readme:
        plot(results, args.plot or args.results.parent)


if __name__ == "__main__":
    main()
