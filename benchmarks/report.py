# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of the JSON that run.py writes, and the figures of the main README."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from cases import FIRST_FAST
from pages import table, write_between
from peers import PEERS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"  # committed: a JSON for each maker of processors, the README's figures
FIRST_LINE = "<!-- figures of benchmarks/results: python benchmarks/report.py --write README.md -->"
LAST_LINE = "<!-- end of figures -->"
PASSES = ("forward", "forward + backward")

# The patterns in the picture besides those of GROWTH, and the length from which on slopes are fitted.
PLOTTED = ("dense", "logsparse", "rowmajor")
LONG = 2048

QUERY = "the query itself"

SELECTION = "Fixed(128)", "Fixed(128), 4 regions opened, with select"  # without and with `select`

BUSY = 0.5  # a load at the start above which other work disturbs the timings

LEAST_MEBIBYTES = 0.5  # smaller amounts are not resolved by the count of resident pages


# Patterns whose repr does not say what they are.
_TITLES = {
    "routing": "`Routing`, 128 clusters",
    "routing-heads": "`Routing`, 128 clusters for each head",
    "selected": "`Selected(Fixed(span=128))`, 4 regions opened for each 64 queries",
    "select": "`Fixed(span=128)`, 4 regions for each 64 queries",
    "selection": "`Fixed(span=128)`, 4 regions opened for each 64 queries, `select` included",
}

MET = {True: "yes", False: "**no**", None: ""}


def _time(seconds: float) -> str:
    """Three digits with a unit."""
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
        f"{library['version']} ({library['isa']}) at commit {machine['commit'] or 'unknown'}, "
        f"torch {machine['torch'] or 'not installed'}, jax {machine['jax'] or 'not installed'}, "
        f"Python {machine['python']}, {machine['date']}, `{machine['command']}`. Times: median (least).{busy}"
    )


def _what(row: dict[str, Any]) -> str:
    """What is timed: the pattern, and what differs from plain attention."""
    grouped = [f"{row['heads']} heads on {row['key_heads']}"] * (row["key_heads"] is not None)
    pattern = _TITLES.get(row["name"].removeprefix("memory-").removeprefix("plan-"), row["pattern"])
    return ", ".join([f"select for {pattern}" if row["selects"] else pattern, *row["terms"], *grouped])


def _ratios(rows: list[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any]) -> Iterable[tuple[object, ...]]:
        case = (_what(row), row["length"], row["threads"], row["passes"], _times(row["ours"]))
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
    """The shortest length from which on all ratios are at least 1."""
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
    """The ratio to dense attention at every length, and the length from which on the ratio is at least 1."""
    lengths = sorted({row["length"] for row in rows})

    def cells(name: str, passes: str, rows: list[dict[str, Any]]) -> tuple[object, ...]:
        ratios = {row["length"]: row["ratio"] for row in rows}
        first, last = fast_from(rows), rows[-1]
        return (
            _TITLES.get(name, last["pattern"]),
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
                _what(row),
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
        ("one core, float32", "GFLOP/s", "of the loop", "of PyTorch's sgemm", "wanted", "met", "lanes in use"),
        (
            (
                row["what"],
                f"{row['gflops']:.1f}",
                f"{row['share']:.1%}" if row["share"] else "",
                f"{row['share_of_sgemm']:.1%}" if "share_of_sgemm" in row else "",
                f">= {row['target']:.0%}" if row.get("target") else "",
                MET[row["met"]],
                f"{row['useful']:.1%}" if "useful" in row else "",
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
                _what(row),
                _time(row["build"]),
                f"{row['build_share']:.1%}",
                f"{row['nbytes'] / 2**20:.2f}",
                f"{row['nbytes_share']:.1%}",
                f"{row['balance']:.0%}" if row.get("balance") else "",
            )
            for row in rows
        ),
    )


def decode_table(rows: list[dict[str, Any]]) -> str:
    """Prefills and steps of decoders."""
    first = rows[0]
    setting = f"H {first['heads']}, D {first['dim']}, float32, {first['threads']} threads"
    return table(
        (f"decoding, {setting}", "tokens before", "prefill", *(f"step of {int(n):,}" for n in first["steps"]), "MB"),
        (
            (
                row["pattern"],
                f"{row['tokens']:,}",
                _time(row["prefill"]),
                *map(_time, row["steps"].values()),
                f"{row['nbytes'] / 1e6:.1f}" if row["nbytes"] else "",
            )
            for row in rows
        ),
    )


def tables(results: dict[str, Any]) -> str:
    """All tables as Markdown."""
    parts = [_machine(results["machine"])]
    for name, part in (
        ("ratios", _ratios),
        ("lengths", _lengths),
        ("selection", _ratios),
        ("growth", _growth),
        ("memory", _memory),
        ("arithmetic", _arithmetic),
        ("plans", _plans),
        ("decode", decode_table),
    ):
        if results.get(name):
            parts.append(part(results[name]))
    return "\n\n".join(parts)


Lines: TypeAlias = dict[str, dict[str, str]]  # the cells of a line, by its first cell and the column


def _speed(results: dict[str, Any]) -> Lines:
    """The ratio of every pattern at the longest length, and the length from which on the ratio is at least 1."""
    longest = max(row["length"] for row in results["lengths"])
    by_pattern = _by_pattern(results["lengths"])
    lines: Lines = {}
    for (name, passes), rows in by_pattern.items():
        line = lines.setdefault(_TITLES.get(name, f"`{rows[-1]['pattern']}`"), {})
        line[f"{passes}, L {longest}"] = next(f"{row['ratio']:.3g}x" for row in rows if row["length"] == longest)
        if passes == PASSES[-1]:
            first = (str(fast_from(by_pattern[name, each]) or "never") for each in PASSES)
            line["at least as fast from L (forward; with backward)"] = "; ".join(first)
    return lines


def _figures(results: dict[str, Any]) -> Lines:
    """The README's other figures. `tables` has all there are."""
    lines: Lines = {}

    def add(what: str, passes: str, figure: str) -> None:
        lines.setdefault(what, {})[passes] = figure

    for row in results["ratios"]:
        what, ratio = f"`{row['pattern']}`, L {row['length']}", row["ratio"] and f"{row['ratio']:.2g}x"
        if row["name"].endswith("-frameworks"):
            add(f"{what}, beside the fastest of these: {'; '.join(map(_title, row['theirs']))}", row["passes"], ratio)
        elif row["name"] == "bfloat16":
            peer = "our float32" if "float32" in row["theirs"] else "PyTorch's bfloat16 (dense)"
            add(f"{what}, bfloat16 beside {peer}", row["passes"], ratio)
        elif row["name"] == "threads":
            add(f"{what}, {row['threads']} threads beside one", row["passes"], ratio)
        elif row["name"] == "terms":
            add(f"{what}, with {', '.join(row['terms'])}, beside the same without", row["passes"], ratio)
        elif row["name"] == "grouped-heads" and "ungrouped" in row["ratios"]:
            shared = f"{row['heads']} heads on {row['key_heads']} key heads, beside keys repeated for each head"
            add(f"{what}, {shared}", row["passes"], f"{row['ratios']['ungrouped']:.2g}x")
        elif row["name"] == "select":
            add(
                f"`select`, {_TITLES['select']}, L {row['length']}: attention's time divided by its",
                row["passes"],
                ratio,
            )
        elif row["name"] == "tiny":
            add(f"{what}, one head: the time of a call", row["passes"], _time(row["ours"]["median"]))
    for growth in results["growth"]:
        first, last = growth["rows"][0], growth["rows"][-1]
        what = f"`{first['pattern']}`, the time from L {first['length']} to {last['length']} ({growth['law']}: "
        add(what + f"L^{growth['law_slope']:.2f})", first["passes"], f"L^{growth['slope']:.2f}")
    longest = max((row["length"] for row in results["memory"]), default=0)
    for row in results["memory"]:
        if row["length"] == longest and row["name"] in ("memory-fixed", "memory-logsparse"):
            what = f"`{row['pattern']}`, memory beyond inputs and outputs at L {longest}, in units of the query"
            add(what, row["passes"], f"{row['excess_bytes'] / row['query_bytes']:.2g}")
    for row in results["arithmetic"]:
        if row["what"].startswith(("dense,", "fixed,")) and row["share"]:
            what, passes = row["what"].removesuffix(", all included").rsplit(", ", 1)
            add(f"{what}: one core, as a share of a bare multiply-add loop", passes, f"{row['share']:.0%}")
    for row in results["decode"]:
        if row["pattern"].startswith("Fixed(span=256)") and row["tokens"] == results["decode"][-1]["tokens"]:
            what = f"`Decoder({row['pattern']})`, one step after {row['tokens']} tokens"
            add(what, PASSES[0], _time(row["steps"]["1"]))
    return lines


def _side_by_side(first: str, by_maker: dict[str, Lines]) -> str:
    """A table with the columns of every maker; a maker without a line has empty cells there."""
    columns = [(maker, column) for maker, lines in by_maker.items() for column in dict.fromkeys(chain(*lines.values()))]
    names = dict.fromkeys(chain(*by_maker.values()))
    return table(
        (first, *(f"{maker}: {column}" for maker, column in columns)),
        ((name, *(by_maker[maker].get(name, {}).get(column, "") for maker, column in columns)) for name in names),
    )


def _setting(results: dict[str, Any]) -> str:
    """The machine, the code and the arrays of the README's figures."""
    machine, first, row = results["machine"], results["lengths"][0], results["lengths"][-1]
    fewer = [r["length"] for r in results["lengths"] if r["threads"] == row["threads"]]
    below = f" ({first['threads']} below L {min(fewer)})" * (first["threads"] != row["threads"])
    busy = f" The machine was busy: its load was {machine['load']:.1f} at the start." if machine["load"] > BUSY else ""
    return (
        f"**{machine['maker']}**: {machine['cpu']}, {machine['cores']} cores, {machine['combiner']['isa']}; "
        f"{row['threads']} threads{below}, {row['dtype']}, causal, B {row['batch']}, H {row['heads']}, D {row['dim']}; "
        f"PyTorch {machine['torch']}, JAX {machine['jax']}. "
        f"Commit {machine['commit']}, {machine['date'][:10]}, `{machine['command']}`.{busy}"
    )


def readme(all_results: list[dict[str, Any]]) -> str:
    """What stands in the main README between FIRST_LINE and LAST_LINE: the results of each maker side by side."""
    by_maker = {results["machine"]["maker"]: results for results in all_results}
    speed, figures = ({maker: of(each) for maker, each in by_maker.items()} for of in (_speed, _figures))
    files = (f"[{maker}](benchmarks/results/{maker.lower()}.md)" for maker in by_maker)
    return "\n\n".join(
        [
            *map(_setting, all_results),
            _side_by_side("pattern", speed),
            _side_by_side("figure", figures),
            f"All tables: {', '.join(files)}.",
        ]
    )


def write(results: dict[str, Any], path: Path) -> None:
    """Writes the JSON, one measurement on a line and five digits of each time, and all tables beside it."""
    path.with_suffix(".md").write_text(tables(results) + "\n")
    parts = []
    rounded = json.loads(json.dumps(results), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    for name, rows in rounded.items():
        lines = ",\n  ".join(map(json.dumps, rows)) if isinstance(rows, list) else ""
        parts.append(f' "{name}": ' + (f"[\n  {lines}\n ]" if lines else json.dumps(rows)))
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def slope(points: dict[int, float]) -> float:
    """The slope of the line fitted to log(value) over log(length)."""
    return float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])


def _panels(ylabel: str, lines: dict[str, dict[str, dict[int, float]]], path: Path, *, least: float = 0.0) -> None:
    """A panel for each of PASSES, with logarithmic axes: one line for each name, its slope in the legend. Nothing where
    there are no lines.

    A value below `least` is drawn at `least` and left out of the fit.
    """
    if not all(lines.values()):
        return
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
    """Writes time.png, selection.png and memory.png: seconds, and MiB beyond inputs and outputs, over L."""
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

    selection: dict[str, dict[str, dict[int, float]]] = {passes: {} for passes in PASSES}
    for row in results.get("selection", []):
        line = selection[row["passes"]]
        line.setdefault(SELECTION[row["with_select"]], {})[row["length"]] = row["ours"]["median"]
        if "sdpa" in row["theirs"]:
            line.setdefault(PEERS["sdpa"].title, {})[row["length"]] = row["theirs"]["sdpa"]["median"]
    _panels("seconds", selection, directory / "selection.png")

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
    parser.add_argument("results", type=Path, nargs="*", help="JSON of run.py (those of benchmarks/results)")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the pictures of the first there")
    parser.add_argument("--readme", action="store_true", help="print the figures of the main README, no other tables")
    parser.add_argument("--write", type=Path, metavar="README", help="write these figures into the README")
    args = parser.parse_args()
    all_results = [json.loads(path.read_text()) for path in args.results or sorted(RESULTS.glob("*.json"))]
    print(readme(all_results) if args.readme or args.write else "\n\n".join(map(tables, all_results)))
    if args.write:
        write_between(FIRST_LINE, LAST_LINE, readme(all_results), args.write)
    if args.plot:
        plot(all_results[0], args.plot)


if __name__ == "__main__":
    main()
