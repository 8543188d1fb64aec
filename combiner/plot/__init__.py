# SPDX-License-Identifier: Apache-2.0
"""Pictures of patterns and of effective attention, like the paper's figures 1 and 2. docs/patterns.md is a gallery::

    import combiner, matplotlib.pyplot as plt
    combiner.plot.draw_pattern(combiner.Fixed(8), 64, is_causal=True)
    plt.show()

- `draw_pattern`: the keys that each query attends
- `draw_weights`: the effective attention of one head
- `draw_heads`: that of several heads, or of a `Mixture` and its components, side by side
- `draw_beside_dense`: that of one head, beside dense attention
- `draw_row`: the weights of one query, and those of dense attention
- `draw_region_weights`: the weight that each query gives each region
- `draw_cost`: pairs, memory or time over L
- `draw_comparison`: what `combiner.compare` found, errors over times

Each draws on the axes `ax`, by default pyplot's current ones, and returns them. More than 512 positions are drawn in at
most 256 pixels a row: a row of pixels is the last of b queries, a pixel b keys. Direct keys are darker than regions, so
that the pictures can be read in grey.

Needs matplotlib (``pip install "combiner-attention[plot]"``), which is imported at the first drawing; pyplot only where
no axes are given. Styles are left alone. Axes that are given keep all that they hold.
"""

from ..display import DIRECT, DIRECT_TOO, NOTHING, OUTSIDE, REGION, SEVERAL
from .comparison import draw_comparison
from .cost import draw_cost
from .pattern import draw_pattern
from .weights import draw_beside_dense, draw_heads, draw_region_weights, draw_row, draw_weights

__all__ = [
    "DIRECT",
    "DIRECT_TOO",
    "NOTHING",
    "OUTSIDE",
    "REGION",
    "SEVERAL",
    "draw_beside_dense",
    "draw_comparison",
    "draw_cost",
    "draw_heads",
    "draw_pattern",
    "draw_region_weights",
    "draw_row",
    "draw_weights",
]
