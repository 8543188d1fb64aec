# SPDX-License-Identifier: Apache-2.0
"""Combiner: full attention at sub-quadratic cost, for the CPU (Ren et al., NeurIPS 2021, arXiv 2107.05768)."""

import sys

from . import _core
from .clustering import assign_clusters, cluster, fit_centroids, update_centroids
from .decode import Decoder
from .functional import (
    AttendGradients,
    Gradients,
    Summary,
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
    workspace_bytes,
)
from .patterns import Axial, AxialMixture, Dense, Fixed, LogSparse, Mixture, Routing, Tree
from .plan import Plan
from .process import get_num_threads, info, num_threads, release_memory, set_isa, set_num_threads

if "threadpoolctl" in sys.modules:
    from . import threadpoolctl as threadpoolctl

__version__ = _core.VERSION

__all__ = [
    "AttendGradients",
    "Axial",
    "AxialMixture",
    "Decoder",
    "Dense",
    "Fixed",
    "Gradients",
    "LogSparse",
    "Mixture",
    "Plan",
    "Routing",
    "Summary",
    "Tree",
    "assign_clusters",
    "attend",
    "attend_backward",
    "attend_forward",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_weights",
    "cluster",
    "fit_centroids",
    "get_num_threads",
    "info",
    "merge",
    "num_threads",
    "release_memory",
    "set_isa",
    "set_num_threads",
    "summarize",
    "summarize_backward",
    "summarize_forward",
    "update_centroids",
    "workspace_bytes",
]
