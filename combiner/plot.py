# SPDX-License-Identifier: Apache-2.0
"""Pictures of patterns and of effective attention, as in the paper's figures 1 and 2; docs/patterns.md is a gallery.

    import combiner.plot
    combiner.plot.draw_pattern(combiner.Fixed(8), 64, is_causal=True).figure.savefig("fixed.png")

Needs matplotlib (``pip install "combiner-attention[plot]"``), which is imported when something is drawn. No style, no
state of pyplot and no given axes but what is drawn in them are touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from .functional import attention_weights
from .patterns import AnyPattern
from .plan import Array, Plan, as_integer, attended

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What a cell of a pattern's picture may be; the two sets of shades tell neighbours apart.
NOTHING = "#ffffff"  # in the support and not attended
OUTSIDE = "#ececec"  # not in the support: the future
DIRECT = "#f28e2b"
REGION = ("#d6e6f4", "#bad6eb", "#98c6e1", "#71b1d7", "#4f9bcb", "#3282be", "#1b69af", "#084f99")
SEVERAL = ("#e4e3f0", "#cfcfe5", "#b8b8d9", "#a19eca", "#8a84bd", "#7765ac", "#66469c", "#54278f")  # regions overlap
DIRECT_TOO = "#a8321a"  # attended directly more than once, or within a region as well


def draw_pattern(
    pattern: AnyPattern, length: int | None = None, is_causal: bool = False, *, ax: Axes | None = None
) -> Axes:
    """Draws what each query attends: L x L cells, a row for a query, a column for a key (figures 1 and 2).

    Direct keys are orange. Regions are blue, each of a row in its own shade; where eight are too few, those that touch
    still differ, as far as that is possible. Violet is where regions overlap, red where a direct key is attended a
    second time. What is not attended is white, the future grey.

    Parameters
    ----------
    pattern : a pattern or a Plan. One that makes several plans is drawn plan by plan.
    length : L; a Plan has its own.
    is_causal : whether query i sees positions up to i only. A Plan carries its own causality.
    ax : matplotlib axes to draw in; those of a new figure by default.

    Returns
    -------
    ax : the axes; ``ax.images[0].get_array()`` are the colours of the cells, `[L, L, 3]` uint8.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong kind or value, named; several plans.

    Notes
    -----
    Time and memory O(L^2), and the square of the number of regions attended.
    """
    plan = _one_plan(pattern, length, is_causal)
    ax = _axes(ax)
    L = plan.length
    query, key, row = _cells(plan)
    count, direct = _count(L, query, key, row)
    shade = np.zeros((L, L), np.int64)
    shade[query[::-1], key[::-1]] = _shades(plan, query, key, row)[row[::-1]]  # where regions overlap, the first's
    is_future = np.triu(np.ones((L, L), bool), 1) & plan.is_causal
    colour = _colours([NOTHING, OUTSIDE])[is_future.astype(np.int64)]
    for cells, colours in (
        (count == 1, _colours(REGION)[shade]),
        (count > 1, _colours(SEVERAL)[shade]),
        (direct > 0, _colours([DIRECT])[0]),
        ((direct > 0) & (count > 1), _colours([DIRECT_TOO])[0]),
    ):
        colour = np.where(cells[..., None], colours, colour)
    _show(ax, colour)
    # A sum of random numbers stands for a set of parts; direct keys are one part, and so is what is not attended.
    part = np.random.default_rng(0).random(L + plan.region_count)
    part[:L] = 2
    parts = np.bincount(query * L + key, part[row], L * L).reshape(L, L)
    _outline(ax, np.where(is_future, -1, parts))
    return ax


def draw_weights(
    query: Array,
    key: Array,
    pattern: AnyPattern,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    key_mask: Array | None = None,
    region_query: Array | None = None,
    region_key: Array | None = None,
    least: float = 1e-4,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws the effective attention of one head on a log colour scale (eq 8), as `attention_weights` computes it.

    Weight on direct keys is orange, weight through a summary blue, through several at once, or both ways, violet.
    What is not attended, or masked, is white, the future grey.

    Parameters
    ----------
    query, key : `[L, D]`: one head.
    pattern, is_causal, scale, key_mask, region_query, region_key : as in `attention`; the last two `[R, D]`.
    least : the weight that has the palest colour, as has everything below it; between 0 and 1.
    colorbar : whether to add a colour bar for each hue.
    ax : matplotlib axes to draw in; those of a new figure by default.

    Returns
    -------
    ax : the axes, with an image for each hue.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong kind or value, named.

    Notes
    -----
    Costs what `attention_weights` costs, and O(L^2).
    """
    for name, x in (("query", query), ("key", key)):
        if np.ndim(x) != 2:
            raise ValueError(f"{name} must have shape [L, D], one head's, got {np.shape(x)}")
    if not isinstance(least, Real):
        raise TypeError(f"least must be a number, got {type(least).__name__}")
    if not 0 < least < 1:
        raise ValueError(f"least must be between 0 and 1, got {least}")
    plan = _one_plan(pattern, None if isinstance(pattern, Plan) else len(query), is_causal)
    weights = attention_weights(
        query, key, plan, scale=scale, key_mask=key_mask, region_query=region_query, region_key=region_key
    )
    ax = _axes(ax)
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    L = plan.length
    count, direct = _count(L, *_cells(plan))
    if key_mask is not None:
        count[:, ~key_mask] = 0
    is_future = np.triu(np.ones((L, L), bool), 1) & plan.is_causal
    _show(ax, _colours([NOTHING, OUTSIDE])[is_future.astype(np.int64)])
    bars = 0
    for cells, hue, name in (
        ((count == 1) & (direct == 1), "Oranges", "direct"),
        ((count == 1) & (direct == 0), "Blues", "summary"),
        (count > 1, "Purples", "several"),
    ):
        if not cells.any():
            continue
        colours = ListedColormap(colormaps[hue](np.linspace(0.06, 1, 256)))  # its palest is not yet white
        image = np.ma.masked_where(~cells, np.maximum(weights, least))
        shown = ax.imshow(image, cmap=colours, norm=LogNorm(least, 1), interpolation="nearest")
        if colorbar:
            bar = ax.figure.colorbar(shown, cax=ax.inset_axes((1.03 + 0.06 * bars, 0, 0.05, 1)))
            bar.ax.text(0.5, 0.02, name, rotation=90, ha="center", va="bottom", transform=bar.ax.transAxes)
            bar.ax.tick_params(which="both", right=False, labelright=False)
            bars += 1
    if bars:
        bar.ax.tick_params(which="both", right=True, labelright=True)
        bar.set_label("weight")
    return ax


def _one_plan(pattern: AnyPattern, length: int | None, is_causal: bool) -> Plan:
    """The plan of a pattern, or the Plan given, where it fits the other arguments."""
    if not isinstance(is_causal, bool | np.bool_):
        raise TypeError(f"is_causal must be a bool, got {type(is_causal).__name__}")
    plan: object = pattern
    if isinstance(pattern, Plan):
        if length is not None and as_integer("length", length, 0) != pattern.length:
            raise ValueError(f"length must be {pattern.length}, the plan's, got {length}")
        if is_causal and not pattern.is_causal:
            raise ValueError("is_causal must be False with a bidirectional plan as pattern, got True")
    elif not isinstance(pattern, tuple):
        if not hasattr(pattern, "plan"):
            raise TypeError(f"pattern must be a pattern or a Plan, got {type(pattern).__name__}")
        plan = pattern.plan(as_integer("length", length, 0), bool(is_causal))
    if isinstance(plan, tuple):
        raise ValueError(f"pattern must make one plan, got {len(plan)}: draw each of them")
    if not isinstance(plan, Plan):
        raise TypeError(f"pattern must make a Plan, got {type(plan).__name__}")
    return plan


def _axes(ax: Axes | None) -> Axes:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    if ax is None:
        return Figure(layout="constrained").subplots()
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be matplotlib axes, got {type(ax).__name__}")
    return ax


def _cells(plan: Plan) -> tuple[Array, Array, Array]:
    """Every cell that a part covers: int64 arrays (query, key, row of the table)."""
    query, row = attended(plan)
    is_position = query < plan.length
    query, row = query[is_position], row[is_position]
    positions = [*np.arange(plan.length)[:, None], *plan.regions]
    size = np.array([len(below) for below in positions], np.int64)[row]
    keys = [np.zeros(0, np.int64), *(positions[t] for t in row.tolist())]
    return np.repeat(query, size), np.concatenate(keys), np.repeat(row, size)


def _count(length: int, query: Array, key: Array, row: Array) -> tuple[Array, Array]:
    """How many parts cover each cell, and how many of these are direct keys: `[L, L]` each."""
    L, at = length, query * length + key
    return (
        np.bincount(at, minlength=L * L).reshape(L, L),
        np.bincount(at[row < L], minlength=L * L).reshape(L, L),
    )


def _shades(plan: Plan, query: Array, key: Array, row: Array) -> Array:
    """A shade, `0 .. len(REGION) - 1`, for each row of the table that is a region attended; 0 for the others.

    Region by region: none that a touching one has, where that can be; then the one that the fewest regions of the
    same queries have; then that of a region which starts where this one does; then the first.
    """
    L, K = plan.length, len(REGION)
    is_region = row >= L
    query, key, row = query[is_region], key[is_region], row[is_region]
    regions, number = np.unique(row, return_inverse=True)
    R = len(regions)
    sees = np.zeros((L, R), np.float32)
    sees[query, number] = 1
    together = sees.T @ sees > 0
    cells = np.full((L, L), -1)
    cells[query, key] = number
    left, right = cells[:, :-1], cells[:, 1:]
    both = (left >= 0) & (right >= 0)
    touching = np.zeros((R, R), bool)
    touching[left[both], right[both]] = touching[right[both], left[both]] = True

    shade = np.zeros(R, np.int64)
    starting: dict[int, int] = {}  # the last shade of a region by its first position
    for r in range(R):
        start = int(plan.regions[regions[r] - L][0])
        cost = 2 * np.bincount(shade[:r][together[r, :r]], minlength=K)
        cost += 4 * R * np.bincount(shade[:r][touching[r, :r]], minlength=K)
        if start in starting:
            cost[starting[start]] -= 1
        starting[start] = shade[r] = int(cost.argmin())
    of_row = np.zeros(L + plan.region_count, np.int64)
    of_row[regions] = shade
    return of_row


def _colours(names: Sequence[str]) -> Array:
    """`[n, 3]` uint8."""
    return np.array([[int(name[at : at + 2], 16) for at in (1, 3, 5)] for name in names], np.uint8)


def _show(ax: Axes, colour: Array) -> None:
    """The cells, with position 0 on top and on the left, and ticks at multiples of a power of two."""
    L = len(colour)
    if L:
        ax.imshow(colour, interpolation="nearest")
    ticks = np.arange(0, L, 1 << max(0, L.bit_length() - 3))
    ax.set(xticks=ticks, yticks=ticks, xlabel="key", ylabel="query")


def _outline(ax: Axes, part: Array) -> None:
    """White lines between the cells of different parts, thinner as there are more cells; none where they would hide
    the cells."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    L = len(part)
    if not 0 < L <= 128:
        return
    lines = [np.zeros((0, 2, 2))]  # from and to
    for cells, across in ((part, False), (part.T, True)):
        i, j = np.nonzero(cells[:, 1:] != cells[:, :-1])
        ends = np.stack([np.stack([j + 0.5, i - 0.5], -1), np.stack([j + 0.5, i + 0.5], -1)], 1)
        lines.append(ends[..., ::-1] if across else ends)
    points = np.concatenate(lines).reshape(-1, 2)
    path = Path(points, np.resize([Path.MOVETO, Path.LINETO], len(points)))
    ax.add_artist(PathPatch(path, fill=False, edgecolor="white", linewidth=min(1.0, 32 / L)))
