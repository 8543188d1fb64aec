# SPDX-License-Identifier: Apache-2.0
"""What patterns cost over the length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..arguments import as_integer, check_bool, choice_number
from ..composed import AnyPattern
from ..cost import cost_of
from ..functional import attention
from ..pattern_arguments import DENSE, Several, by_name, plans_of
from ..patterns import Dense
from ..stopwatch import fastest
from .axes import MARKERS, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WHATS = ("pairs", "bytes", "seconds")
LENGTHS = tuple(1 << k for k in range(8, 15))


def draw_cost(
    patterns: Several,
    lengths: Sequence[int] = LENGTHS,
    is_causal: bool = False,
    *,
    what: Literal["pairs", "bytes", "seconds"] = "pairs",
    dim: int = 64,
    ax: Axes | None = None,
) -> Axes:
    """Draws what one head of patterns costs over L, on logarithmic axes, with dense attention as a dashed line.

    Parameters
    ----------
    patterns : a pattern, several, or several by name; each has to fit every length.
    lengths : the values of L; 256 to 16,384 by default.
    is_causal : whether query i attends positions up to i only.
    what : "pairs" of both stages; "bytes" that a forward call takes beside its arrays and the plan; "seconds" of a
        forward call in float32, measured on this machine: the fastest of three, after one that is not counted.
    dim : D = Dv.
    ax : matplotlib axes to draw in; pyplot's current ones by default.

    Returns
    -------
    ax : the axes, with a line for dense attention and one for each pattern.

    Raises
    ------
    TypeError, ValueError : an argument is of the wrong kind or value.

    Notes
    -----
    The time to make the plans; with "seconds", four calls of each, of dense attention too.
    """
    check_bool("is_causal", is_causal)
    choice_number("what", what, WHATS)
    lengths = [as_integer("lengths", length, 1) for length in lengths]
    D = as_integer("dim", dim, 1)
    named: dict[str, AnyPattern] = {DENSE: Dense(), **by_name(patterns)}
    ax = axes(ax)
    for n, (name, pattern) in enumerate(named.items()):
        style: Any = {"color": "black", "linestyle": "--"} if not n else {"marker": MARKERS[(n - 1) % len(MARKERS)]}
        values = [_measure(pattern, length, bool(is_causal), D, what) for length in lengths]
        ax.plot(lengths, values, label=name, markersize=5, **style)
    ax.set_xscale("log", base=2)
    ax.set(yscale="log", xlabel="L", ylabel={"pairs": what}.get(what, f"{what} of a forward call"))
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize="x-small")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize="small")
    return ax


def _measure(pattern: Any, length: int, is_causal: bool, dim: int, what: str) -> float:
    if what == "seconds":
        q, k, v = np.random.default_rng(0).standard_normal((3, length, dim), np.float32)
        return fastest(lambda: attention(q, k, v, pattern, is_causal=is_causal))
    cost = cost_of(plans_of(pattern, length, is_causal), dim)
    return cost.pairs + cost.summary_pairs if what == "pairs" else cost.forward_bytes
