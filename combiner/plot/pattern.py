# SPDX-License-Identifier: Apache-2.0
"""The keys that each query of a pattern attends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .._core import Plan
from ..composed import AnyPattern
from ..display import DIRECT, DIRECT_TOO, NOTHING, OUTSIDE, PALETTE, REGION, SEVERAL, colour_numbers, flat
from ..pattern_arguments import plans_of
from ..raster import raster
from .axes import COLOURS, MOST_PANELS, PANELS_WIDTH, axes, outline, panels, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    DIRECT: "direct",
    REGION: "summary",
    SEVERAL: "summaries",
    DIRECT_TOO: "twice",
    NOTHING: "not seen",
    OUTSIDE: "future",
}


def draw_pattern(
    pattern: AnyPattern,
    length: int | None = None,
    is_causal: bool = False,
    *,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws the keys that each query attends: a row for a query, a column for a key (figures 1 and 2).

    Direct keys are dark orange. Regions are blue, and those of one row have different shades. There are eight shades; a
    row with more regions repeats them, not for regions that touch, as far as possible. Cells of several regions are
    violet. Direct keys that are attended a second time are dark red. Keys that are not attended are white, keys in the
    future grey. Plans of several heads, and the components of a `Mixture`, are drawn side by side within the axes, at
    most nine of them.

    From more than 512 positions on, a row of pixels is one query of b, the last, and a pixel has b of its keys. Its
    colour is that of the rarest kind among them: a direct key is not lost. Pixels of several regions have one shade.

    Parameters
    ----------
    pattern : a pattern, a Plan, a tuple of plans, or a `Mixture`.
    length : L; not needed with a Plan.
    is_causal : whether query i attends positions up to i only. A Plan carries its own causality.
    legend : whether to write beside the picture what its colours mean.
    ax : matplotlib axes to draw in; pyplot's current ones by default.

    Returns
    -------
    ax : the axes; ``ax.images[0].get_array()`` holds the colours of the pixels, `[n, n, 3]` uint8; n is L up to 512.
        Where several plans are drawn, each has its own axes in ``ax.child_axes``.

    Raises
    ------
    TypeError, ValueError : an argument is of the wrong kind or value.

    Notes
    -----
    Time and memory O(n L + P), with P the pairs of the n queries that are drawn.
    """
    plans = flat(plans_of(pattern, length, is_causal))
    ax = axes(ax)
    if len(plans) == 1:
        used = _draw(ax, plans[0][1])
    else:
        shown = plans[:MOST_PANELS]
        used = set()
        for panel, (name, plan) in zip(panels(ax, len(shown)), shown, strict=True):
            used |= _draw(panel, plan)
            panel.set_title(name.removeprefix(", "), fontsize="small")
            panel.set(xlabel="", ylabel="")
            panel.tick_params(labelsize="x-small")
        if len(plans) > len(shown):
            ax.set_title(f"the first {len(shown)} of {len(plans)} plans")
    if legend and used:
        _explain(ax, used, 1.02 if len(plans) == 1 else PANELS_WIDTH)
    return ax


def _draw(ax: Axes, plan: Plan) -> set[int]:
    """Draws one plan; returns the colours that it has, as places in PALETTE."""
    picture = raster(plan)
    numbers = colour_numbers(picture)
    show(ax, picture, COLOURS[numbers])
    if picture.block == 1:
        is_future = np.triu(np.ones(numbers.shape, bool), 1) & plan.is_causal
        outline(ax, np.where(is_future, -1, picture.parts))
    return set(np.unique(numbers).tolist())


def _explain(ax: Axes, used: set[int], left: float) -> None:
    """A legend of the colours that occur, beside what is drawn."""
    from matplotlib.patches import Patch

    hues = {PALETTE[number] for number in used}
    keys = [
        Patch(facecolor=hue[3] if isinstance(hue, tuple) else hue, edgecolor="#888888", linewidth=0.5, label=name)
        for hue, name in NAMES.items()
        if hues & set(hue if isinstance(hue, tuple) else (hue,))
    ]
    ax.legend(handles=keys, loc="upper left", bbox_to_anchor=(left, 1), frameon=False, fontsize="small")
