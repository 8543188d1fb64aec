# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of docs/patterns.md: each pattern causal, bidirectional and beside its sparse baseline.

The pictures of docs/looking.md are drawn by running the code that stands above each of them.

python docs/gallery.py            # into docs/patterns and docs/looking
python docs/gallery.py FOLDER     # into FOLDER/patterns and FOLDER/looking
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

import combiner.plot
from combiner import (
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Plan,
    Routing,
    Selected,
    Tree,
    Window,
)
from combiner.plan_lists import attended
from combiner.plot import DIRECT, DIRECT_TOO, NOTHING, OUTSIDE, REGION, SEVERAL

DOCS = Path(__file__).parent
L, WIDTH = 64, 8
PANEL, SMALL = 448, 192  # pixels: whole multiples of the cells, so that all of these look alike
LEFT, GAP, TOP, MIDDLE, BOTTOM, RIGHT = 84, 68, 46, 64, 118, 24

PATTERNS = {
    "dense": Dense(),
    "fixed": Fixed(8),
    "fixed_window": Fixed(8, window=8),
    "logsparse": LogSparse(),
    "hierarchical": LogSparse(hierarchical=True),
    "vertical": Axial(WIDTH),
    "horizontal": Axial(WIDTH, "horizontal"),
    "rowmajor": Axial(WIDTH, "rowmajor"),
    "mixture": AxialMixture(WIDTH),
    "tree": Tree(4),
    "routing": Routing(np.random.default_rng(7).integers(0, 4, 16).repeat(4)),  # stretches of four, like topics
    "window": Window(12),
    "selected": Selected(Fixed(8), [[0, 0], [0, 1], [1, 3], [0, 4]], block=16),
    "heavily_compressed": HeavilyCompressed(8, 12),
}
QUERY = 35  # whose view of the rows of 8 is drawn

Panel = tuple[str, Callable[[Axes], object]]  # its title, and what draws it


def example() -> Plan:
    """The plan that the first code in guides/own_patterns.md makes."""
    path = DOCS / "guides" / "own_patterns.md"
    code, *_ = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, path, "exec"), names)
    return names["plan"]


def matrix(plan: Plan, name: str) -> Panel:
    """All queries by all keys."""
    return f"{name}: {plan.pairs:,} pairs", lambda ax: combiner.plot.draw_pattern(plan, legend=False, ax=ax)


def view(plan: Plan, query: int, name: str) -> Panel:
    """One query's row, folded into the rows of an image: direct keys one by one, regions whole, a dot on the query."""
    queries, rows = attended(plan)
    part = np.zeros(L)  # a sum of random numbers stands for a set of parts
    for row, number in zip(rows[queries == query], np.random.default_rng(0).random(L), strict=False):
        part[row if row < L else plan.regions[row - L]] += number
    part = part.reshape(-1, WIDTH)

    def draw(ax: Axes) -> None:
        colour = combiner.plot.draw_pattern(plan, ax=Figure().subplots()).images[0].get_array()[query]
        ax.imshow(colour.reshape(*part.shape, 3), interpolation="nearest")
        for y, x in np.argwhere(part[:, 1:] != part[:, :-1]):
            ax.plot([x + 0.5, x + 0.5], [y - 0.5, y + 0.5], color="white", linewidth=1.2)
        for y, x in np.argwhere(part[1:] != part[:-1]):
            ax.plot([x - 0.5, x + 0.5], [y + 0.5, y + 0.5], color="white", linewidth=1.2)
        ax.plot(query % WIDTH, query // WIDTH, "o", color="black", markersize=5)
        ax.set(xticks=[], yticks=[])

    return name, draw


def first_stage(plan: Plan, name: str) -> Panel:
    """What each region reads: positions, or other regions' summaries."""
    queries, rows = attended(plan)
    regions, rows = queries[queries >= L] - L, rows[queries >= L]

    def draw(ax: Axes) -> None:
        kind = np.zeros((plan.region_count, L + plan.region_count))
        kind[regions, rows] = np.where(rows < L, 1, 2)
        hues = ListedColormap([NOTHING, DIRECT, REGION[4]])
        ax.imshow(kind, cmap=hues, vmin=0, vmax=2, interpolation="nearest", aspect="auto")
        ax.axvline(L - 0.5, color="black", linewidth=0.8)
        ax.set(yticks=[], xticks=[L / 2, L + plan.region_count / 2], xticklabels=["positions", "regions"])
        ax.set_ylabel("region")
        ax.tick_params(length=0)

    return f"{name}: {len(rows):,} pairs", draw


def picture(large: list[Panel], small: list[Panel], hues: dict[str, str], across: int = SMALL) -> Figure:
    """Panels side by side, small ones under one another on the right, and a key below."""
    width, height = LEFT + len(large) * (PANEL + GAP) - GAP + RIGHT, TOP + PANEL + BOTTOM
    if small:
        width += GAP + across
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)

    def add(panel: Panel, x: int, y: int, w: int, h: int) -> Axes:
        ax = figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))
        name, draw = panel
        draw(ax)
        ax.set_title(name)
        return ax

    for n, panel in enumerate(large):
        ax = add(panel, LEFT + n * (PANEL + GAP), TOP, PANEL, PANEL)
        if n:
            ax.set_ylabel("")
    for n, panel in enumerate(small):
        add(panel, LEFT + len(large) * (PANEL + GAP), TOP + n * (SMALL + MIDDLE), across, SMALL)
    keys = [Patch(facecolor=hue, edgecolor="#888888", linewidth=0.5, label=name) for name, hue in hues.items()]
    figure.legend(handles=keys, loc="lower center", ncols=len(keys), frameon=False, handlelength=1.2, handleheight=1.2)
    return figure


def draw(name: str) -> Figure:
    """The picture of one pattern."""
    hues = {"direct": DIRECT, "regions, neighbours in different shades": REGION[3]}
    if name == "image":
        plan = example()
        views = [view(plan, y * WIDTH + x, f"what pixel ({y}, {x}) sees") for y, x in ((1, 1), (4, 5))]
        return picture([matrix(plan, "bidirectional"), *views], [], hues)
    pattern = PATTERNS[name]
    causal, bidirectional = pattern.plan(L, True), pattern.plan(L, False)
    panels, small = [matrix(causal, "causal"), matrix(bidirectional, "bidirectional")], []
    if name == "hierarchical":
        small.append(first_stage(LogSparse().plan(L), "stage 1, flat"))
        small.append(first_stage(bidirectional, "stage 1, hierarchical"))
        return picture(panels, small, {**hues, "the future": OUTSIDE}, PANEL)
    panels.append(matrix(pattern.sparse().plan(L, True), "sparse, causal"))
    if name == "mixture":
        hues = {"direct": DIRECT, "two regions, in the first one's shade": SEVERAL[3]}
    if name == "heavily_compressed":
        hues = {"direct": DIRECT, "direct and in a region": DIRECT_TOO, "regions": REGION[3]}
    if isinstance(pattern, Axial | AxialMixture):
        small.append(view(causal, QUERY, f"query {QUERY}, causal"))
        small.append(view(bidirectional, QUERY, "bidirectional"))
    return picture(panels, small, {**hues, "not attended": NOTHING, "the future": OUTSIDE})


def from_code(document: Path) -> dict[str, Figure]:
    """The pictures of a document whose code draws them: the current figure at the end of the code above a picture."""
    figures = {}
    text = document.read_text()
    for code, path in re.findall(r"```python\n((?:(?!```).)*)```\n\n!\[[^\]]+\]\(([\w/.]+)\)", text, re.DOTALL):
        exec(compile(code, document.name, "exec"), {})
        figures[path] = plt.gcf()
        plt.figure()
    return figures


def save(figure: Figure, path: Path) -> None:
    """As a PNG with a palette: a third of the size."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    with matplotlib.rc_context({"font.size": 15, "axes.titlesize": 17}):
        for name in [*PATTERNS, "image"]:
            save(draw(name), folder / "patterns" / f"{name}.png")
    for path, figure in from_code(DOCS / "looking.md").items():
        save(figure, folder / path)


if __name__ == "__main__":
    main()
