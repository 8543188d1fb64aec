# SPDX-License-Identifier: Apache-2.0
"""Combiner: full attention at sub-quadratic cost, for the CPU (Ren et al., NeurIPS 2021, arXiv 2107.05768)."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

try:
    from . import _core
except ImportError:
    if importlib.util.find_spec(f"{__name__}._core"):
        raise
    raise ImportError(
        f"{__path__[0]} has combiner's sources without its extension, which is not built: run Python in another "
        "folder to import the package that is installed, or `pip install -e .` in this one"
    ) from None

from .alibi import alibi_bias, alibi_slopes
from .clustering import assign_clusters, cluster, fit_centroids, update_centroids
from .comparison import Comparison, compare
from .composed import Mixture, Selected
from .cost import Cost
from .decode import Decoder
from .functional import (
    attend,
    attend_backward,
    attend_forward,
    attention,
    attention_backward,
    attention_forward,
    merge,
    summarize,
    summarize_backward,
    summarize_forward,
    workspace_bytes,
)
from .patterns import Axial, AxialMixture, Dense, Fixed, HeavilyCompressed, LogSparse, Routing, Tree, Window
from .plan import Plan
from .process import get_num_threads, info, num_threads, release_memory, set_isa, set_num_threads
from .selection import select
from .signatures import AttendGradients, Gradients, Summary
from .weights import attention_weights

if "threadpoolctl" in sys.modules:
    from . import threadpoolctl as threadpoolctl

# Imported at their first use: most need a package that may not be installed, or take seconds to import.
_ON_REQUEST = ("distributed", "jax", "plot", "reference", "shard_map", "sharding", "torch", "transformers")

if TYPE_CHECKING:
    from . import distributed as distributed
    from . import jax as jax
    from . import plot as plot
    from . import reference as reference
    from . import shard_map as shard_map
    from . import sharding as sharding
    from . import torch as torch
    from . import transformers as transformers
else:

    def __getattr__(name: str) -> ModuleType:
        if name in _ON_REQUEST:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_REQUEST})


__version__ = _core.VERSION

__all__ = [
    "AttendGradients",
    "Axial",
    "AxialMixture",
    "Comparison",
    "Cost",
    "Decoder",
    "Dense",
    "Fixed",
    "Gradients",
    "HeavilyCompressed",
    "LogSparse",
    "Mixture",
    "Plan",
    "Routing",
    "Selected",
    "Summary",
    "Tree",
    "Window",
    "alibi_bias",
    "alibi_slopes",
    "assign_clusters",
    "attend",
    "attend_backward",
    "attend_forward",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_weights",
    "cluster",
    "compare",
    "fit_centroids",
    "get_num_threads",
    "info",
    "merge",
    "num_threads",
    "release_memory",
    "select",
    "set_isa",
    "set_num_threads",
    "summarize",
    "summarize_backward",
    "summarize_forward",
    "update_centroids",
    "workspace_bytes",
]
