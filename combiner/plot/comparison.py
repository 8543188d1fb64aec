# SPDX-License-Identifier: Apache-2.0
"""Patterns by their time and their distance from dense attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .axes import MARKERS, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..comparison import Comparison


def draw_comparison(comparison: Comparison, *, ax: Axes | None = None) -> Axes:
    """Draws the error of out over the time of a forward call: a mark for each pattern, a line for dense attention.

    Parameters
    ----------
    comparison : the result of `combiner.compare`.
    ax : matplotlib axes to draw in; pyplot's current ones by default.

    Returns
    -------
    ax : the axes.
    """
    ax = axes(ax)
    from matplotlib.ticker import LogLocator

    dense, *lines = comparison
    for n, line in enumerate(lines):
        marker = MARKERS[n % len(MARKERS)]
        ax.plot([1e3 * (line.forward_seconds or 0)], [line.out_error], marker, markersize=8, label=line.name)
    if dense.forward_seconds is not None:
        ax.axvline(1e3 * dense.forward_seconds, color="black", linestyle="--", linewidth=0.8, label="dense, no error")
    ax.set(xscale="log", xlabel="ms of a forward call", ylabel="relative error of out")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize="small")
    return ax
