# SPDX-License-Identifier: Apache-2.0
"""Learned abstractions: a network makes a region's query and key from those of its positions."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..plan import Plan
from .tensors import as_tensor


class Regions(NamedTuple):
    """The positions below each region of a plan: region r holds ``members[offsets[r]:offsets[r + 1]]``."""

    members: Tensor
    offsets: Tensor


_regions_of_plan: weakref.WeakKeyDictionary[Plan, Regions] = weakref.WeakKeyDictionary()


@torch.compiler.disable
def regions_of(pattern: Any, length: int, is_causal: bool) -> Regions:
    plan = pattern if isinstance(pattern, Plan | tuple) else pattern.plan(length, is_causal)
    if not isinstance(plan, Plan):
        raise ValueError(f"pattern must make one plan for all heads where the abstraction is learned, got {pattern!r}")
    if plan not in _regions_of_plan:
        members = np.concatenate([np.zeros(0, np.int64), *plan.regions])
        offsets = np.cumsum([0, *map(len, plan.regions)], dtype=np.int64)
        _regions_of_plan[plan] = Regions(as_tensor(members), as_tensor(offsets))
    return _regions_of_plan[plan]


def region_mean(x: Tensor, regions: Regions, key_mask: Tensor | None = None) -> Tensor:
    """The mean of x over the unmasked positions below each region; 0 for a region without any.

    Parameters
    ----------
    x : `[..., H, L, F]`
    key_mask : bool `[..., L]`, True for positions that take part.

    Returns
    -------
    means : `[..., H, R, F]`

    Notes
    -----
    Time O(total number of members), memory O(R).
    """

    def total(rows: Tensor) -> Tensor:
        """`[R, n]` of `[L, n]`"""
        return functional.embedding_bag(regions.members, rows, regions.offsets, mode="sum", include_last_offset=True)

    if key_mask is None:
        count = regions.offsets.diff().to(x.dtype).unsqueeze(-1)
    else:
        x = x.masked_fill(~key_mask[..., None, :, None], 0)
        L = key_mask.shape[-1]
        count = total(key_mask.reshape(-1, L).T.to(x.dtype)).T.reshape(*key_mask.shape[:-1], 1, -1, 1)
    rows = x.movedim(-2, 0)
    return total(rows.flatten(1)).unflatten(1, rows.shape[1:]).movedim(0, -2) / count.clamp(min=1)


class DeepSets(nn.Module):
    """Learned abstractions (section 3.2; Zaheer et al., "Deep Sets", NeurIPS 2017): rho(mean of phi(x) over a region).

    q_R comes from the region's queries and k_R from its keys. Each has its own phi, linear with GELU, and its own
    linear rho; all heads share them.

    Parameters
    ----------
    dim : D.
    hidden_dim : features of phi(x); `dim` by default.
    device, dtype : of the parameters.
    """

    def __init__(
        self, dim: int, hidden_dim: int | None = None, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        hidden = dim if hidden_dim is None else hidden_dim
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_phi, self.query_rho = nn.Linear(dim, hidden, **options), nn.Linear(hidden, dim, **options)
        self.key_phi, self.key_rho = nn.Linear(dim, hidden, **options), nn.Linear(hidden, dim, **options)

    def forward(
        self, query: Tensor, key: Tensor, regions: Regions, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """region_query `[..., Hq, R, D]` and region_key `[..., Hk, R, D]`, for query `[..., Hq, L, D]` and key
        `[..., Hk, L, D]`."""
        region_query = self.query_rho(region_mean(functional.gelu(self.query_phi(query)), regions, key_mask))
        region_key = self.key_rho(region_mean(functional.gelu(self.key_phi(key)), regions, key_mask))
        return region_query, region_key


class ChannelPool(nn.Module):
    """Learned abstractions: in each feature a softmax-weighted mean over a region, as DeepSeek-V4 compresses keys.

    With x_j the region's queries (or keys), j = 0 .. n - 1 in the order of its members::

        weight[j, c] = softmax over j of (gate(x_j) + bias[j])[c]      x_R[c] = sum over j of weight[j, c] x_j[c]

    Queries and keys have a gate and a bias each, which all heads share. The biases start at 0. A masked position has
    no weight; a region without any other is 0.

    Parameters
    ----------
    dim : D.
    rate : the most positions of a region; that of `Fixed` or `HeavilyCompressed`.
    device, dtype : of the parameters.
    """

    def __init__(self, dim: int, rate: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_gate, self.key_gate = (nn.Linear(dim, dim, bias=False, **options) for _ in range(2))
        self.query_bias, self.key_bias = (nn.Parameter(torch.zeros(rate, dim, **options)) for _ in range(2))

    def forward(
        self, query: Tensor, key: Tensor, regions: Regions, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """region_query `[..., Hq, R, D]` and region_key `[..., Hk, R, D]`, for query `[..., Hq, L, D]` and key
        `[..., Hk, L, D]`. Time and memory are O(R rate).

        Raises
        ------
        ValueError : a region of more than `rate` positions.
        """
        rate, lengths = len(self.query_bias), regions.offsets.diff()
        if (lengths > rate).any():
            raise ValueError(f"regions must have at most rate = {rate} positions, got one of {int(lengths.max())}")
        place = torch.arange(rate, device=lengths.device)
        is_member = place < lengths[:, None]
        at = (regions.offsets[:-1, None] + place).clamp(max=max(len(regions.members) - 1, 0))
        members = torch.where(is_member, regions.members[at], 0) if len(regions.members) else at
        is_live = is_member if key_mask is None else is_member & key_mask[..., None, members]  # [..., 1, R, rate]
        is_live = is_live[..., None]

        def pooled(x: Tensor, gate: nn.Linear, bias: Tensor) -> Tensor:
            x = x[..., members, :].masked_fill(~is_live, 0)  # [..., H, R, rate, D]
            score = (gate(x) + bias).masked_fill(~is_live, -torch.inf)
            weight = torch.where(is_live.any(-2, keepdim=True), score, 0).softmax(-2)
            return (weight * x).sum(-2)

        return pooled(query, self.query_gate, self.query_bias), pooled(key, self.key_gate, self.key_bias)
