# SPDX-License-Identifier: Apache-2.0
"""The axes of a picture of queries by keys: colours, ticks, outlines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..arguments import Array
from ..display import PALETTE
from ..raster import Raster

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS_WIDTH = 0.86  # of axes that several pictures share; the rest is for their legend
MOST_PANELS = 9  # of plans of heads, of a mixture's components, or of heads' weights
MARKERS = "osD^v<>phX*P"  # a line is told from the others in grey by its marker
COLOURS = np.array([[int(name[at : at + 2], 16) for at in (1, 3, 5)] for name in PALETTE], np.uint8)  # [n, 3]


def axes(ax: Axes | None) -> Axes:
    """The axes given, or pyplot's current ones."""
    try:
        from matplotlib.axes import Axes
    except ModuleNotFoundError as error:
        raise ImportError("combiner.plot needs matplotlib: pip install 'combiner-attention[plot]'") from error
    if ax is None:
        import matplotlib.pyplot as plt

        current: Axes = plt.gca()
        return current
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be matplotlib axes, got {type(ax).__name__}")
    return ax


def extent(picture: Raster) -> tuple[float, float, float, float]:
    """Where an image of the pixels lies, so that position 0 is at the top left, and its cell is centred at 0."""
    end = picture.block * len(picture.queries) - 0.5
    return -0.5, end, end, -0.5


def show(ax: Axes, picture: Raster, colour: Array) -> None:
    """Shows pixels `[n, n, 3]`, with ticks at multiples of a power of two."""
    L, n = picture.length, len(colour)
    if L:
        # Cells of many queries are smaller than a point on the screen: then neighbours are averaged, so that none is
        # lost.
        ax.imshow(colour, interpolation="nearest" if n <= 128 else None, extent=extent(picture))
        ax.set(xlim=(-0.5, L - 0.5), ylim=(L - 0.5, -0.5))
    ticks = np.arange(0, L, 1 << max(0, L.bit_length() - 3))
    every = f", {picture.block} to a pixel" if picture.block > 1 else ""
    ax.set(xticks=ticks, yticks=ticks, xlabel=f"key{every}")
    ax.set_ylabel(f"query, every {picture.block}th" if picture.block > 1 else "query")


def outline(ax: Axes, part: Array, colour: str = "white") -> None:
    """Lines between cells of different parts. Many cells have thinner lines, too many have none."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    n = len(part)
    if not 0 < n <= 128:
        return
    lines = [np.zeros((0, 2, 2))]  # the two ends of each line
    for cells, across in ((part, False), (part.T, True)):
        i, j = np.nonzero(cells[:, 1:] != cells[:, :-1])
        ends = np.stack([np.stack([j + 0.5, i - 0.5], -1), np.stack([j + 0.5, i + 0.5], -1)], 1)
        lines.append(ends[..., ::-1] if across else ends)
    points = np.concatenate(lines).reshape(-1, 2)
    path = Path(points, np.resize([Path.MOVETO, Path.LINETO], len(points)))
    ax.add_artist(PathPatch(path, fill=False, edgecolor=colour, linewidth=min(1.0, 32 / n)))


def panels(ax: Axes, count: int) -> list[Axes]:
    """Axes side by side within others, which show nothing of their own any more but their title."""
    across = int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    ax.set_axis_off()
    width, height = PANELS_WIDTH / across, 1 / down
    places = [(n % across, down - 1 - n // across) for n in range(count)]
    return [ax.inset_axes((x * width, y * height, 0.8 * width, 0.8 * height)) for x, y in places]
