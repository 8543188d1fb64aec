# SPDX-License-Identifier: Apache-2.0
"""Combiner in plain float64 NumPy, from the equations of Ren et al., NeurIPS 2021 (arXiv 2107.05768).

This is the definition of what the library computes, which the tests judge by: functions with the same names as in
`combiner`, one query at a time, without regard to speed. Equation numbers are the paper's.

- `passes`: the three passes and their derivatives, to be read beside the paper.
- `parts`: every factorization as lists of positions and regions.
- `heads`: leading axes and grouped heads. `composed`: packed sequences and mixtures. `dropout`, `clusters`.
- `functional`: the functions, from all of these.

Letters: L positions, D features of query and key, Dv of value, R regions, Hq query heads, Hk key / value heads.
"""

from ..signatures import AttendGradients, Gradients, Summary
from .clusters import assign_clusters, cluster, directions, fit_centroids, update_centroids
from .dropout import philox
from .functional import (
    attend,
    attend_backward,
    attend_forward,
    attention,
    attention_backward,
    attention_forward,
    attention_weights,
    merge,
    summarize,
    summarize_backward,
    summarize_forward,
)
from .parts import Parts, parts
from .selection import select

__all__ = [
    "AttendGradients",
    "Gradients",
    "Parts",
    "Summary",
    "assign_clusters",
    "attend",
    "attend_backward",
    "attend_forward",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_weights",
    "cluster",
    "directions",
    "fit_centroids",
    "merge",
    "parts",
    "philox",
    "select",
    "summarize",
    "summarize_backward",
    "summarize_forward",
    "update_centroids",
]
