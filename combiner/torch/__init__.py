# SPDX-License-Identifier: Apache-2.0
"""Combiner for PyTorch on the CPU: functions of tensors that autograd, torch.compile, torch.export and vmap know, and
modules.

`attention`, `attention_weights`, `summarize`, `attend`, `merge`, `workspace_bytes`, `select`, `cluster`,
`fit_centroids`, `assign_clusters` and `update_centroids` are combiner's functions of tensors;
`combiner.torch.functional` says what they have in common. Backward passes are autograd's. `CombinerAttention` takes the
place of ``torch.nn.MultiheadAttention``. Letters as in `combiner.functional`, and E for the width of a model.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("combiner.torch needs PyTorch: pip install 'combiner-attention[torch]'") from error

from .abstraction import ChannelPool, DeepSets, Regions, region_mean
from .clustering import assign_clusters, cluster, fit_centroids, update_centroids
from .functional import Summary, attend, attention, attention_weights, merge, summarize, workspace_bytes
from .nn import CombinerAttention, Decoder, OnlineRouting
from .patterns import Routing, Selected
from .selection import select

__all__ = [
    "ChannelPool",
    "CombinerAttention",
    "Decoder",
    "DeepSets",
    "OnlineRouting",
    "Regions",
    "Routing",
    "Selected",
    "Summary",
    "assign_clusters",
    "attend",
    "attention",
    "attention_weights",
    "cluster",
    "fit_centroids",
    "merge",
    "region_mean",
    "select",
    "summarize",
    "update_centroids",
    "workspace_bytes",
]
