# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism between the processes of a torch.distributed group.

The public name of what `combiner.sharding` has for it: `attention` (of `sharding.processes`), and the bytes that it
sends (of `sharding.traffic`).
"""

try:
    import torch.distributed  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("combiner.distributed needs PyTorch: pip install 'combiner-attention[torch]'") from error

from .sharding.processes import attention
from .sharding.traffic import Traffic, ring_traffic, traffic

__all__ = ["Traffic", "attention", "ring_traffic", "traffic"]
