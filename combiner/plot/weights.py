# SPDX-License-Identifier: Apache-2.0
"""The effective attention of a head: whole, beside dense attention, one row of it, by region; and of several heads.

value          out of attention
one-hot        [L, n]: the weight of each key             (L at most 512)
block-hot      [L, n]: the weight of each b keys together
one-hot of regions, through `attend`: the weight of each region
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import Array, as_integer, widened
from ..composed import AnyPattern, Mixture
from ..display import DIRECT
from ..display import DIRECT_TOO as TWICE
from ..effective import dense_rows, weight_rows
from ..functional import attend, attention, summarize, workspace_bytes
from ..interchange import any_library
from ..pattern_arguments import one_plan, plan_of_head, plans_of
from ..plan import Plan
from ..problem import broadcast_mask
from ..raster import DIRECT as DIRECT_KIND
from ..raster import DIRECT_TOO, FUTURE, NOTHING, Raster, block_of, last_queries, raster, together
from ..raster import REGION as REGION_KIND
from ..raster import SEVERAL as SEVERAL_KIND
from ..weights import attention_weights
from .axes import COLOURS, MOST_PANELS, PANELS_WIDTH, axes, extent, outline, panels, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HUES = (  # what a pixel shows, its colours, its name
    ((DIRECT_KIND,), "Oranges", "direct"),
    ((REGION_KIND,), "Blues", "summary"),
    ((SEVERAL_KIND, DIRECT_TOO), "Purples", "several"),
)

BARS = {  # a row's bars; regions that touch have different shades, and mostly different bars
    DIRECT_KIND: (DIRECT,),
    REGION_KIND: ("#8abcdd", "#4c92c3"),
    SEVERAL_KIND: ("#a796cf", "#7a63b0"),
    DIRECT_TOO: (TWICE,),
}


@any_library
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

    Weight on direct keys is orange, and weight through a summary is blue. Weight through several summaries, or through
    a summary and directly, is violet. Cells that are masked or not attended are white, cells in the future grey. Up to
    128 positions, a line divides cells of different kinds.

    From more than 512 positions on, a row of pixels is one query of b, the last, and a pixel has the sum of the weights
    of its b keys; its hue is that of the rarest kind among them.

    Parameters
    ----------
    query, key : `[L, D]`: one head.
    pattern, is_causal, scale, key_mask, region_query, region_key : as in `attention`; the last two `[R, D]`.
    least : the weight with the palest colour, between 0 and 1. Smaller weights have the same colour.
    colorbar : whether to add a colour bar for each hue.
    ax : matplotlib axes to draw in; pyplot's current ones by default.

    Returns
    -------
    ax : the axes, with an image for each hue.

    Raises
    ------
    TypeError, ValueError : an argument is of the wrong kind or value, or the pattern makes several plans.

    Notes
    -----
    Time of `attention` with Dv = n, and memory O(L n), with n pixels in a row.
    """
    _check_head(query, key, least)
    plan = one_plan(pattern, None if isinstance(pattern, Plan) else len(query), is_causal)
    options = {"scale": scale, "key_mask": key_mask, "region_query": region_query, "region_key": region_key}
    picture = _picture(query, key, plan, options)
    ax = axes(ax)
    images = _draw(ax, *picture, least)
    if colorbar:
        _colour_bars(ax, images)
    return ax


@any_library
def draw_heads(
    query: Array,
    key: Array,
    pattern: AnyPattern,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    key_mask: Array | None = None,
    least: float = 1e-4,
    ax: Axes | None = None,
) -> Axes:
    """Draws the effective attention of several heads side by side, each as `draw_weights` does.

    The effective attention of a `Mixture` is the mean of its components'. Of one head `[L, D]` and a `Mixture` it draws
    the components, and the mean last. A cell of the mean is violet where several components attend it, unless all of
    them attend it directly.

    Parameters
    ----------
    query, key : `[Hq, L, D]` and `[Hk, L, D]`, or `[L, D]`: one head.
    pattern : with one plan for all heads, with one for each key head, or a `Mixture`.
    is_causal, scale, key_mask, least : as in `draw_weights`.
    ax : matplotlib axes to divide; pyplot's current ones by default.

    Returns
    -------
    ax : the axes, with those of the pictures, at most nine of them, first in ``ax.child_axes``.

    Raises
    ------
    TypeError, ValueError : as `draw_weights`; query, key and pattern do not have the same heads.

    Notes
    -----
    As `draw_weights`, for each picture.
    """
    if not 2 <= np.ndim(query) == np.ndim(key) <= 3:
        shapes = f"{np.shape(query)} and {np.shape(key)}"
        raise ValueError(f"query and key must have shapes [Hq, L, D] and [Hk, L, D], or [L, D], got {shapes}")
    queries, keys = ([x] if np.ndim(x) == 2 else list(x) for x in (query, key))
    if not queries or not keys or len(queries) % len(keys):
        raise ValueError(f"query must have a multiple of key's {len(keys)} heads, got {len(queries)}")
    _check_head(queries[0], keys[0], least)
    plans = plans_of(pattern, None if isinstance(pattern, Plan | tuple) else len(queries[0]), is_causal)
    components = plans.patterns if isinstance(plans, Mixture) else (plans,)
    for each in components:
        if isinstance(each, tuple) and len(each) != len(keys):
            raise ValueError(f"pattern must have a plan for each of {len(keys)} key heads, got {len(each)}")
    group = len(queries) // len(keys)
    of_heads = [(f"head {h}", h, plan_of_head(plans, h // group)) for h in range(len(queries))]
    if np.ndim(query) == 2 and isinstance(plans, Mixture):
        each_plan = [plan_of_head(each, 0) for each in components]
        of_heads = [
            *((f"component {n}", 0, plan) for n, plan in enumerate(each_plan)),
            ("mean", 0, Mixture(*each_plan)),
        ]
    shown = of_heads[:MOST_PANELS]
    options = {"scale": scale, "key_mask": key_mask}
    pictures = [_picture(queries[h], keys[h // group], plan, options) for _, h, plan in shown]
    ax = axes(ax)
    images: dict[str, Any] = {}
    for panel, (name, *_), picture in zip(panels(ax, len(shown)), shown, pictures, strict=True):
        images |= _draw(panel, *picture, least)
        panel.set_title(name, fontsize="small")
        panel.set(xlabel="", ylabel="")
        panel.tick_params(labelsize="x-small")
    if len(of_heads) > len(shown):
        ax.set_title(f"the first {len(shown)} of {len(of_heads)}")
    _colour_bars(ax, images, PANELS_WIDTH, 0.03)
    return ax


@any_library
def draw_beside_dense(
    query: Array,
    key: Array,
    pattern: AnyPattern,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    key_mask: Array | None = None,
    least: float = 1e-4,
    ax: Axes | None = None,
) -> Axes:
    """Draws the effective attention of one head, and beside it dense attention of the same queries and keys.

    Parameters
    ----------
    query, key, pattern, is_causal, scale, key_mask, least : as in `draw_weights`.
    ax : matplotlib axes to divide in two; pyplot's current ones by default.

    Returns
    -------
    ax : the axes, with those of the two pictures in ``ax.child_axes``.

    Raises
    ------
    TypeError, ValueError : as `draw_weights`.

    Notes
    -----
    As `draw_weights`, and the time of dense attention of at most 512 queries.
    """
    _check_head(query, key, least)
    plan = one_plan(pattern, None if isinstance(pattern, Plan) else len(query), is_causal)
    options: Any = {"scale": scale, "key_mask": key_mask}
    ax = axes(ax)
    ax.set_axis_off()
    left, right = (ax.inset_axes((x, 0, 0.4, 1)) for x in (0, 0.6))
    _colour_bars(left, _draw(left, *_picture(query, key, plan, options), least))
    left.set_title(repr(pattern) if len(repr(pattern)) < 30 else type(pattern).__name__, fontsize="medium")
    dense = dense_rows(plan.length, last_queries(plan.length).tolist(), plan.is_causal)
    _draw(right, *_picture(query, key, dense, options), least)
    right.set_title("dense", fontsize="medium")
    right.set(ylabel="", yticklabels=[])
    return ax


@any_library
def draw_row(
    query: Array,
    key: Array,
    pattern: AnyPattern,
    index: int,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    key_mask: Array | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws one query's weights over the keys as bars, and those of dense attention as a line.

    Bars of direct keys are dark orange; bars of keys that are attended through a summary are blue, in two shades. From
    more than 512 positions on, a bar has the sum of the weights of b keys.

    Parameters
    ----------
    query, key, pattern, is_causal, scale, key_mask : as in `draw_weights`.
    index : the query's position; negative from the end.
    ax : matplotlib axes to draw in; pyplot's current ones by default.

    Returns
    -------
    ax : the axes.

    Raises
    ------
    TypeError, ValueError : as `draw_weights`; `index` is no position.

    Notes
    -----
    Time of `attention`, forward and backward, with Dv = 1.
    """
    _check_head(query, key)
    plan = one_plan(pattern, None if isinstance(pattern, Plan) else len(query), is_causal)
    L = plan.length
    i = as_integer("index", index, -L)
    if i >= L:
        raise ValueError(f"index must be below {L}, the length, got {i}")
    i %= L
    options: Any = {"scale": scale, "key_mask": key_mask}
    workspace_bytes(query, key, query, plan, is_causal=plan.is_causal, **options)  # checks the arrays
    picture = raster(plan, queries=[i], keep=broadcast_mask(key_mask, query))
    starts = np.arange(0, L, picture.block)
    ours, dense = (
        np.add.reduceat(weight_rows(query, key, each, [i], **options)[0], starts)
        for each in (plan, dense_rows(L, [i], plan.is_causal))
    )
    ax = axes(ax)
    named = {DIRECT_KIND: "direct", REGION_KIND: "summary", SEVERAL_KIND: "summaries", DIRECT_TOO: "twice"}
    for kind, name in named.items():
        at = np.flatnonzero(picture.kind[0] == kind)
        if at.size:
            hues = [BARS[kind][s % len(BARS[kind])] for s in picture.shade[0, at].tolist()]
            ax.bar(starts[at] - 0.5, ours[at], picture.block, align="edge", color=hues, label=name)
    edges = np.append(starts, L) - 0.5
    ax.stairs(dense, edges, color="black", linewidth=0.8, label="dense")
    each = f", {picture.block} together" if picture.block > 1 else ""
    ax.set(xlim=(-0.5, L - 0.5), xlabel=f"key{each}", ylabel="weight", title=f"query {i}")
    ax.legend(frameon=False, fontsize="small")
    return ax


@any_library
def draw_region_weights(
    query: Array,
    key: Array,
    pattern: AnyPattern,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    key_mask: Array | None = None,
    least: float = 1e-4,
    ax: Axes | None = None,
) -> Axes:
    """Draws the weight that each query gives each region as a whole, and, on the right, its direct keys together.

    A row of pixels is a query, and adds up to 1. From more than 512 queries or regions on, a row is the last query of
    several, and a pixel has the sum over several regions.

    Parameters
    ----------
    query, key, pattern, is_causal, scale, key_mask, least : as in `draw_weights`.
    ax : matplotlib axes to draw in; pyplot's current ones by default.

    Returns
    -------
    ax : the axes, with an image of queries by regions; the direct keys' weights are in the first of ``ax.child_axes``.

    Raises
    ------
    TypeError, ValueError : as `draw_weights`; the plan has no regions.

    Notes
    -----
    Time of `attention` with Dv = n, with n pixels in a row.
    """
    _check_head(query, key, least)
    plan = one_plan(pattern, None if isinstance(pattern, Plan) else len(query), is_causal)
    L, R = plan.length, plan.region_count
    if not R:
        raise ValueError(f"pattern must have regions, got {pattern!r}")
    query, key = widened(query), widened(key)
    options: Any = {"scale": scale, "key_mask": key_mask}
    block, every = block_of(R), block_of(L)
    columns = -(-R // block)
    is_direct = np.zeros((L, 1 + columns), query.dtype)
    is_direct[:, 0] = 1
    is_region = np.zeros((R, 1 + columns), query.dtype)
    is_region[np.arange(R), 1 + np.arange(R) // block] = 1
    region_key = summarize(query, key, key, plan, **options).key
    shares = attend(query, key, is_direct, region_key, is_region, plan, **options)
    shares = shares[np.minimum(np.arange(every, L + every, every), L) - 1]
    ax = axes(ax)
    from matplotlib.colors import LogNorm

    norm = LogNorm(least, 1)
    size = every * len(shares) - 0.5
    image: Any = {"norm": norm, "interpolation": "nearest", "aspect": "auto"}
    regions = np.ma.masked_equal(shares[:, 1:], 0)
    shown = ax.imshow(
        np.ma.maximum(regions, least), cmap="Blues", extent=(-0.5, block * columns - 0.5, size, -0.5), **image
    )
    each = f", {block} together" if block > 1 else ""
    ax.set(xlabel=f"region{each}", ylabel=f"query, every {every}th" if every > 1 else "query")
    strip = ax.inset_axes((1.02, 0, 0.04, 1))
    strip.imshow(np.maximum(shares[:, :1], least), cmap="Oranges", extent=(0, 1, size, -0.5), **image)
    strip.set(xticks=[], yticks=[], xlabel="direct")
    ax.figure.colorbar(shown, ax=ax, pad=0.1, label="weight")
    return ax


def _check_head(query: Array, key: Array, least: object = 0.5) -> None:
    for name, x in (("query", query), ("key", key)):
        if np.ndim(x) != 2:
            raise ValueError(f"{name} must have shape [L, D], one head's, got {np.shape(x)}")
    if not isinstance(least, int | float | np.number):
        raise TypeError(f"least must be a number, got {type(least).__name__}")
    if not 0 < least < 1:
        raise ValueError(f"least must be between 0 and 1, got {least}")


def _picture(query: Array, key: Array, plan: Plan | Mixture, options: Any) -> tuple[Raster, Array]:
    """The pixels of one head's plan, or of a mixture of plans, and the weights of their keys: `[n, n]`."""
    workspace_bytes(query, key, query, plan, **options)  # checks the arrays
    keep = broadcast_mask(options["key_mask"], query)
    plans: Any = plan.patterns if isinstance(plan, Mixture) else (plan,)
    picture = together([raster(each, keep=keep) for each in plans])
    if picture.block == 1:
        return picture, widened(attention_weights(query, key, plan, **options))
    query, key = widened(query), widened(key)
    columns = np.arange(picture.kind.shape[1])
    in_column = (np.arange(picture.length)[:, None] // picture.block == columns).astype(query.dtype)
    return picture, attention(query, key, in_column, plan, **options)[picture.queries]


def _draw(ax: Axes, picture: Raster, weights: Array, least: float) -> dict[str, Any]:
    """Draws weights `[n, n]`, with a hue for each kind of pixel; returns the images by the names of the hues."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    show(ax, picture, COLOURS[(picture.kind == FUTURE).astype(np.int64)])
    images: dict[str, Any] = {}
    for kinds, hue, name in HUES:
        cells = np.isin(picture.kind, kinds)
        if not cells.any():
            continue
        colours = ListedColormap(colormaps[hue](np.linspace(0.06, 1, 256)))  # without the map's white end
        image: Any = np.ma.masked_where(~cells, np.maximum(weights, least))
        images[name] = ax.imshow(
            image, cmap=colours, norm=LogNorm(least, 1), interpolation="nearest", extent=extent(picture)
        )
    if picture.block == 1:
        outline(ax, np.where(np.isin(picture.kind, (NOTHING, FUTURE)), 0, picture.kind), "#444444")
    ax.set(xlim=(-0.5, picture.length - 0.5), ylim=(picture.length - 0.5, -0.5))
    return images


def _colour_bars(ax: Axes, images: dict[str, Any], left: float = 1.03, width: float = 0.05) -> None:
    """A bar for each hue beside the axes, from `left` on; the last one has the ticks."""
    for n, (name, image) in enumerate(images.items()):
        bar = ax.figure.colorbar(image, cax=ax.inset_axes((left + (width + 0.01) * n, 0, width, 1)))
        bar.ax.text(0.5, 0.02, name, rotation=90, ha="center", va="bottom", transform=bar.ax.transAxes)
        is_last = n == len(images) - 1
        bar.ax.tick_params(which="both", right=is_last, labelright=is_last)
        if is_last:
            bar.set_label("weight")
