# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of the results that measure.py writes.

python benchmarks/quality/show.py                                          # the tables
python benchmarks/quality/show.py --write docs/quality.md --plot docs      # into the page, with its pictures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np
from curves import Curves
from model import STARTS
from results import OVER_TIME, RESULTS, ROOT, Results
from swap import DENSE, SCORES, Selection, Swap
from sweeps import (
    BLOCKS,
    MODELS,
    OPENED,
    SPANS,
    TUNED,
    Model,
    ablation,
    compared,
    poolings,
    remembered,
    tuned,
)
from tasks import ListOps

from combiner import Fixed, Window
from combiner.patterns import Factorization
from combiner.plan import Pooling

sys.path.append(str(ROOT / "benchmarks"))
from pages import table, write_between

FIRST_LINE = (
    "<!-- tables of benchmarks/results/quality.jsonl: python benchmarks/quality/show.py --write docs/quality.md -->"
)
LAST_LINE = "<!-- end of tables -->"
POOLINGS = ("max", "mean", "mean, size_bias")


def spread(values: np.ndarray, digits: int) -> str:
    """The mean of the values, one for each seed, and how far the farthest is from it."""
    if not len(values):
        return ""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {abs(values - values.mean()).max():.{digits}f}"


class Page:
    """The tables of the results of one model."""

    def __init__(self, results: Results, model: Model) -> None:
        self.results, self.model = results, model
        self.heading = model.task.measure.split()[0]
        self.figure, self.digits = ("bits", 3) if self.heading == "bits" else ("recall", 2)

    def has(self, swap: Swap) -> bool:
        return bool(len(self.results.values(self.model.name, swap, self.figure)))

    def cell(self, swap: Swap) -> str:
        """The mean over the seeds, and how far the farthest seed is from it."""
        return spread(self.results.values(self.model.name, swap, self.figure), self.digits)

    def pairs(self, swap: Swap) -> str:
        values = self.results.values(self.model.name, swap, "pairs")
        return f"{values.mean():.0%}" if len(values) else ""

    def title(self) -> str:
        seeds = len(self.results.values(self.model.name, Swap(DENSE), self.figure))
        what = f"{self.model.task.measure}; L {self.model.length}; seeds: {seeds}; dense: {self.cell(Swap(DENSE))}"
        return f"**{self.model.name}** ({what})"

    def opened(self) -> str:
        """Over the number of regions that each query opens."""
        if not self.has(Swap(Fixed(self.model.span), Selection(1))):
            return ""
        rows = []
        for span in (self.model.span, *(span for span in SPANS if span != self.model.span)):
            base = Fixed(span)
            if not self.has(Swap(base)):
                continue
            last = self.cell(Swap(base.sparse()))
            for name, pattern in zip(POOLINGS, poolings(base), strict=True):
                cells = [self.cell(Swap(pattern, Selection(k) if k else None)) for k in (0, *OPENED)]
                if any(cells):
                    rows.append((f"`Fixed({span})`, {name}", *cells, last))
                last = ""
            shares = [self.pairs(Swap(base, Selection(k) if k else None)) for k in (0, *OPENED)]
            rows.append(("pairs, of dense's", *shares, self.pairs(Swap(base.sparse()))))
        header = ("opened by each query", *(f"k = {k}" for k in (0, *OPENED)), "sparse")
        return table(header, rows)

    def blocks(self) -> str:
        """Over the queries of a block, and how a block's regions are scored."""
        rows = []
        for name, pattern in zip(POOLINGS, poolings(Fixed(self.model.span)), strict=True):
            for k in (2, 4):
                if not self.has(Swap(pattern, Selection(k, 16, "max"))):
                    continue
                each = [self.cell(Swap(pattern, Selection(k, block, score))) for block in BLOCKS for score in SCORES]
                rows.append((f"{name}, k = {k}", self.cell(Swap(pattern, Selection(k))), *each))
        scores = [f"{block}, {score}" for block, score in product(BLOCKS, SCORES)]
        return table((f"`Fixed({self.model.span})`; block, score", "1", *scores), rows) if rows else ""

    def parts(self) -> str:
        """What the regions that are not opened, and the pooling by which regions are chosen, are worth."""
        rows = []
        base = Fixed(self.model.span)
        for k in (2, 4):
            if not self.has(Swap(base, Selection(k, rest=False))):
                continue
            for name, pattern in zip(POOLINGS, poolings(base), strict=True):
                other: Pooling | None = {"max": "mean", "mean": "max"}.get(name)  # type: ignore[assignment]
                crossed = Swap(pattern, Selection(k, pooling=other)) if other else None
                rows.append(
                    (
                        f"{name}, k = {k}",
                        self.cell(Swap(pattern, Selection(k))),
                        self.cell(Swap(pattern, Selection(k, rest=False))),
                        self.cell(crossed) if crossed else "",
                    )
                )
        header = (f"`Fixed({self.model.span})`", "as it is", "`rest=False`", "chosen by the other of max and mean")
        return table(header, rows) if rows else ""

    def patterns(self, tuned: int = 0) -> str:
        """Every pattern, with each pooling."""

        def row(pattern: Factorization) -> Iterable[str]:
            cells = [self.cell(Swap(each, tuned=tuned)) for each in poolings(pattern)]
            last = Swap(pattern.sparse(), tuned=tuned)
            cells += [""] * (len(POOLINGS) - len(cells))
            return (f"`{pattern!r}`", self.pairs(Swap(pattern)), *cells, self.cell(last))

        shown = [p for p in compared(self.model) if self.has(Swap(p, tuned=tuned))]
        return table(("pattern", "pairs", *POOLINGS, "sparse"), map(row, shown)) if len(shown) > 1 else ""

    def windows(self) -> str:
        """Fixed with a window, over the number of regions that each query opens."""
        rows = []
        for window in (1, self.model.span):
            base = Fixed(self.model.span, window=window)
            if not self.has(Swap(base, Selection(1))) or self.figure != "bits":
                continue
            for name, pattern in zip(POOLINGS, poolings(base), strict=True):
                cells = [self.cell(Swap(pattern, Selection(k) if k else None)) for k in (0, *OPENED)]
                rows.append((f"`{base!r}`, {name}", *cells))
            rows.append(("pairs", *(self.pairs(Swap(base, Selection(k) if k else None)) for k in (0, *OPENED))))
        return table(("opened by each query", *(f"k = {k}" for k in (0, *OPENED))), rows) if rows else ""

    def complete(self, swaps: Iterable[Swap]) -> Page | None:
        """The page of the seeds for which all of these swaps were measured; None if there are none."""
        common = self.results.of_common_seeds(self.model.name, swaps)
        return Page(common, self.model) if common.seeds else None

    def seeds(self, swaps: Iterable[Swap]) -> int:
        """The number of seeds for which all of these swaps were measured."""
        return len(self.results.of_common_seeds(self.model.name, swaps).seeds)

    def remembered(self) -> str:
        """Patterns trained for some more steps, by what they keep of the past."""
        swaps = list(remembered(self.model))
        if not (page := self.complete(swaps)):
            return ""
        rows = [(f"`{swap.pattern!r}`", self.kept(swap), page.cell(swap)) for swap in sorted(swaps, key=self.kept)]
        return table(("pattern", "kept", self.heading), rows)

    def kept(self, swap: Swap) -> int:
        """Keys and summaries that the last query attends: those that the next ones need, where nothing is opened."""
        whole, before = (swap.pattern.plan(length, True) for length in (self.model.length, self.model.length - 1))
        return whole.pairs - before.pairs  # a causal plan begins with the plan of each prefix

    def ablation(self) -> str:
        """Models trained with a pattern; for text, their loss by position too."""
        swaps = list(ablation(self.model))
        if not (page := self.complete(swaps)):
            return ""
        rows = []
        for swap in swaps:
            name = f"`{swap.pattern!r}`" + (f", k = {swap.selection.k}" if swap.selection else "")
            cells = [name, page.pairs(swap), page.cell(swap)]
            if self.heading == "accuracy":
                cells.append(spread(page.results.values(self.model.name, swap, "bits"), 2))
            if self.figure == "bits":
                by_position = page.results.values(self.model.name, swap, "by_position").astype(float)
                cells += ["" if np.isnan(x) else f"{x:.{self.digits}f}" for x in by_position.mean(axis=0)]
            rows.append(cells)
        if isinstance(task := self.model.task, ListOps):
            guessed = task.guessed(self.model.held_out, self.model.length)
            rows.append(["knowing the outermost operator alone", "", f"{guessed:.{self.digits}f}", ""])
        ends = (*STARTS[1:], self.model.length)
        parts = [f"{a} to {b - 1}" for a, b in zip(STARTS, ends, strict=True)] if self.figure == "bits" else []
        parts += ["bits of the value"] * (self.heading == "accuracy")
        return table(("trained with", "pairs", self.heading, *parts), rows)


def tables(results: Results) -> str:
    """All tables as Markdown, model by model. Tables without a measured row are left out."""
    parts = []
    for model in MODELS:
        page = Page(results, model)
        if not page.has(Swap(DENSE)):
            continue
        parts.append(page.title())
        made = [page.windows() or page.opened(), page.patterns(), page.blocks(), page.parts()]
        parts += filter(None, made)
        after = f"After {TUNED} steps of training with the pattern in place"
        if kept := page.remembered():
            parts += [f"{after} (seeds: {page.seeds(remembered(model))}):", kept]
        elif trained_on := page.patterns(TUNED):
            parts += [f"{after} (seeds: {page.seeds(tuned(model))}):", trained_on]
        if made_with := page.ablation():
            parts += [
                f"Trained with the pattern from the first step on (seeds: {page.seeds(ablation(model))}):",
                made_with,
            ]
    return "\n\n".join(parts)


def plot(results: Results, path: Path) -> None:
    """Recall over the number of regions that each query opens: the mean of the seeds, and their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [m for m in MODELS if m.weights == "recall" and Page(results, m).has(Swap(Fixed(m.span).sparse()))]
    if not shown:
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4.2), sharey=True, layout="constrained")
    for axis, model in zip(np.atleast_1d(axes), shown, strict=True):
        base, ks = Fixed(model.span), (0, *OPENED)

        def values(swap: Swap, name: str = "recall", model: Model = model) -> np.ndarray:
            return results.values(model.name, swap, name)

        for n, (name, pattern) in enumerate(zip(POOLINGS, poolings(base), strict=True)):
            found = [values(Swap(pattern, Selection(k) if k else None)) for k in ks]
            axis.plot([x.mean() for x in found], f"{'osd'[n]}-", color=f"C{n}", label=name)
            least, most = [x.min() for x in found], [x.max() for x in found]
            axis.fill_between(range(len(ks)), least, most, color=f"C{n}", alpha=0.2)
        for name, swap, style in (("dense", Swap(DENSE), "k--"), ("sparse", Swap(base.sparse()), "k:")):
            axis.plot([0, len(ks) - 1], [values(swap).mean()] * 2, style, label=name)
        shares = [values(Swap(base, Selection(k) if k else None), "pairs").mean() for k in ks]
        axis.set_xticks(range(len(ks)), [f"{k}\n{share:.0%}" for k, share in zip(ks, shares, strict=True)])
        seeds = len(values(Swap(DENSE)))
        title = f"{model.name}, Fixed({model.span}), {seeds} seed{'s' if seeds > 1 else ''}"
        axis.set(title=title, ylim=(0, 1.03), xlabel="regions that each query opens\nand pairs, of dense attention's")
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("recall of 12 far pairs")
    handles = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(POOLINGS) + 2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_remembered(results: Results, path: Path) -> None:
    """Recall over what patterns keep of the past, after some steps of training: the mean and the range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pages = (Page(results, model).complete(remembered(model)) for model in MODELS)
    page = next(filter(None, pages), None)
    if page is None:
        return
    lines: dict[str, list[Swap]] = {}
    for swap in remembered(page.model):
        line = type(swap.pattern).__name__ if isinstance(swap.pattern, Fixed | Window) else repr(swap.pattern)
        lines.setdefault(line, []).append(swap)
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for n, (name, swaps) in enumerate(lines.items()):
        found = [page.results.values(page.model.name, swap, page.figure) for swap in swaps]
        kept = [page.kept(swap) for swap in swaps]
        middle, least, most = ([f(x) for x in found] for f in (np.mean, np.min, np.max))
        spread = np.subtract(middle, least), np.subtract(most, middle)
        axis.errorbar(kept, middle, spread, fmt=f"{'*osd^'[n % 5]}-", color=f"C{n}", label=name, capsize=3)
        for x, y, swap in zip(kept, middle, swaps, strict=True):
            if len(swaps) > 1:
                size = swap.pattern.span if isinstance(swap.pattern, Fixed) else x
                axis.annotate(f" {size}", (x, y), color=f"C{n}", va="top")
    axis.set_xscale("log", base=2)
    axis.set(ylim=(0, 1.03), xlabel="keys and summaries that the last query attends", ylabel=page.figure)
    axis.set_title(f"{page.model.name}, after {TUNED} steps of training with the pattern")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="the results (results/quality.jsonl)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables into the page")
    parser.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="draw recall.png, recall_memory.png, loss_over_time.png"
    )
    parser.add_argument("--over-time", type=Path, default=OVER_TIME, help="results of over_time.py (results/...json)")
    args = parser.parse_args()
    results = Results(args.results)
    curves = Curves(args.over_time) if args.over_time.exists() else None
    text = tables(results)
    if curves:
        text += f"\n\n{curves.title()}\n\n{table(*curves.rows())}"
    print(text)
    if args.write:
        write_between(FIRST_LINE, LAST_LINE, text, args.write)
    if args.plot:
        if curves:
            curves.plot(args.plot / "loss_over_time.png")
        plot(results, args.plot / "recall.png")
        plot_remembered(results, args.plot / "recall_memory.png")


if __name__ == "__main__":
    main()
