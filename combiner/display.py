# SPDX-License-Identifier: Apache-2.0
"""How patterns and plans show themselves: text in a terminal, pictures and tables in a notebook.

    Shown               the methods that patterns and plans have: cost, describe, _repr_html_
      |
    raster, cost_of     a plan as pixels, and in numbers
      |
    svg                 pixels as a picture that needs no matplotlib

The colours are those of `combiner.plot`. Direct keys are darker than every region, so that the two differ in grey too.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import Any

import numpy as np

from ._core import Plan
from .arguments import Array, as_integer, check_bool
from .cost import Cost, cost_of
from .raster import REGION as REGION_KIND
from .raster import SEVERAL as SEVERAL_KIND
from .raster import SHADES, Raster, raster
from .tables import counted, html_table, in_bytes, text_table

NOTHING = "#ffffff"  # in the support, but not attended
OUTSIDE = "#ececec"  # not in the support: the future
REGION = ("#dcebf7", "#bcd9ee", "#a0cbe6", "#8abcdd", "#cfe3f3", "#aed2ea", "#94c4e2", "#7fb3d8")
SEVERAL = ("#d3cbe6", "#b9addb", "#a796cf", "#9681c2", "#c6bce1", "#b0a2d5", "#9f8cc9", "#8c75ba")  # regions overlap
DIRECT = "#b34700"
DIRECT_TOO = "#5c1010"  # attended directly, and once more: directly or in a region
PALETTE = (NOTHING, OUTSIDE, *REGION, *SEVERAL, DIRECT, DIRECT_TOO)
LEGEND = {
    "direct": DIRECT,
    "summary": REGION[3],
    "summaries": SEVERAL[3],
    "twice": DIRECT_TOO,
}

PIXELS = 64  # in a row of a notebook's picture
SIZE = 192  # its width and height on the screen
LENGTHS = (1024, 4096, 16384)  # in the table of costs
SHOWN_PLANS = 4  # pictures, of a mixture's components or of heads


class Shown:
    """What a pattern or a plan says of itself."""

    __slots__ = ()

    def cost(self, length: int | None = None, *, is_causal: bool = False, dim: int = 64) -> Cost:
        """Pairs, operations and memory at one length, of one head. No attention is computed.

        Parameters
        ----------
        length : L; needed unless the pattern fits one length only.
        is_causal : whether query i attends positions up to i only. A Plan has a causality of its own.
        dim : D = Dv, for which operations and bytes are counted; at most 1024.

        Raises
        ------
        TypeError, ValueError : an argument of the wrong kind or value.

        Notes
        -----
        Time O(bytes of the plan), and that to make the plan, which is then kept for later calls.
        """
        check_bool("is_causal", is_causal)
        if length is None:
            length = self._only_length()
        if length is None:
            raise TypeError("length must be given with a pattern, which has none of its own, got None")
        return cost_of(self._plans(as_integer("length", length, 0), bool(is_causal)), dim)

    def describe(self) -> str:
        """The pattern and its cost at a few lengths, as text for a terminal; of a Plan at its own length."""
        lines = [repr(self)]
        for title, costs in self._costs():
            lines += ["", f"{title}, one head of {costs[0].dim} features in float32:"]
            lines.append(text_table(_COLUMNS, map(_cells, costs)))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same with pictures, which Jupyter shows in place of the repr."""
        pictures, tables = [], []
        for title, costs in self._costs():
            plans = flat(self._plans(self._telling_length(costs[0].is_causal), costs[0].is_causal))
            pictures += [_figure(plan, title + name) for name, plan in plans[:SHOWN_PLANS]]
            tables.append(f"<div>{title}{html_table(_COLUMNS, map(_cells, costs))}</div>")
        keys = "".join(f'<span style="color:{hue}">&#9632;</span> {name} ' for name, hue in LEGEND.items())
        row = '<div style="display:flex;flex-wrap:wrap;gap:16px">'
        return (
            f"<div><code>{escape(repr(self))}</code>{row}{''.join(pictures)}</div><small>{keys}</small>"
            f"{row}{''.join(tables)}</div></div>"
        )

    def _plans(self, length: int, is_causal: bool) -> Any:
        """A Plan, a tuple of them, or an object with `patterns` that are such."""
        pattern: Any = self
        return pattern.plan(length, is_causal)

    def _only_length(self) -> int | None:
        """The length that the pattern fits; None where it fits any."""
        return None

    def _causalities(self) -> tuple[bool, ...]:
        return True, False

    def _costs(self) -> Iterator[tuple[str, list[Cost]]]:
        """What kind of attention, and its costs at a few lengths."""
        only = self._only_length()
        for is_causal in self._causalities():
            try:
                costs = [self.cost(n, is_causal=is_causal) for n in (LENGTHS if only is None else (only,))]
            except ValueError:  # the pattern has no plan of this kind, as a causal Selected of a Routing
                continue
            yield "causal" if is_causal else "bidirectional", costs

    def _telling_length(self, is_causal: bool) -> int:
        """The length of the picture: the shortest at which the pattern has a third of dense attention's pairs, or the
        longest at which it has fewer."""
        only = self._only_length()
        if only is not None:
            return only
        for length in (PIXELS, *LENGTHS):
            cost = self.cost(length, is_causal=is_causal)
            if 3 * cost.pairs <= cost.dense_pairs:
                return length
        return length if cost.pairs < cost.dense_pairs else PIXELS


def flat(plans: Any) -> list[tuple[str, Plan]]:
    """Plans one by one, with what tells each from the others: "", ", head 3" or ", component 2, head 3"."""
    if hasattr(plans, "patterns"):
        components = enumerate(plans.patterns)
        return [(f", component {n}{name}", plan) for n, each in components for name, plan in flat(each)]
    if isinstance(plans, tuple):
        return [(f", head {n}", plan) for n, plan in enumerate(plans)]
    return [("", plans)]


def colour_numbers(picture: Raster) -> Array:
    """The place in PALETTE of each pixel's colour: `[n, n]`."""
    first = np.array([0, 1, 2, 2 + SHADES, 2 + 2 * SHADES, 3 + 2 * SHADES])  # of NOTHING .. DIRECT_TOO
    has_shade = (picture.kind == REGION_KIND) | (picture.kind == SEVERAL_KIND)
    numbers: Array = first[picture.kind] + picture.shade * has_shade
    return numbers


def svg(plan: Plan, pixels: int = PIXELS) -> str:
    """The picture of a plan as an SVG element: a path for each colour, a rectangle for each run of a row."""
    picture = raster(plan, pixels)
    runs: dict[int, list[str]] = {}
    for y, row in enumerate(colour_numbers(picture).tolist()):
        x = 0
        for number, same in groupby(row):
            width = len(list(same))
            runs.setdefault(number, []).append(f"M{x} {y}h{width}v1h-{width}z")
            x += width
    paths = [f'<path fill="{PALETTE[number]}" d="{"".join(of)}"/>' for number, of in sorted(runs.items())]
    n = max(1, len(picture.queries))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIZE}" height="{SIZE}" viewBox="0 0 {n} {n}" '
        f'shape-rendering="crispEdges" style="border:1px solid #999999">{"".join(paths)}</svg>'
    )


_COLUMNS = ("L", "regions", "pairs", "to summarize", "of dense", "forward", "with backward")


def _cells(cost: Cost) -> tuple[str, ...]:
    return (
        f"{cost.length:,}",
        counted(cost.regions),
        counted(cost.pairs),
        counted(cost.summary_pairs),
        f"{cost.share:.2%}",
        in_bytes(cost.forward_bytes),
        in_bytes(cost.backward_bytes),
    )


def _figure(plan: Plan, title: str) -> str:
    return f"<div>{svg(plan)}<br/><small>{escape(title)}, L {plan.length:,}</small></div>"
