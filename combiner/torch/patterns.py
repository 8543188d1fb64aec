# SPDX-License-Identifier: Apache-2.0
"""Patterns that are made of tensors of integers, which may differ in each call of a compiled function."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import composed, patterns
from ..patterns import Factorization, Plans, Sparse
from ..plan import Pooling
from .tensors import as_array


@dataclass(frozen=True, eq=False)
class Routing:
    """`combiner.Routing` of a tensor: functions that torch.compile made take other clusters in each call.

    Parameters
    ----------
    clusters : integers `[L]`, or `[..., Hk, L]` with a set for each batch entry and key head; not copied.
    pooling, size_bias : as in `combiner.Routing`.
    is_sparse : whether this is the sparse baseline, which `sparse` returns.

    Raises
    ------
    TypeError : when it is used, for clusters that are no tensor of integers.
    """

    clusters: Tensor
    pooling: Pooling = "max"
    size_bias: bool = False
    is_sparse: bool = field(default=False, kw_only=True)

    def sparse(self) -> Routing:
        """The sparse baseline: each query attends its own cluster."""
        return replace(self, is_sparse=True)

    def plan(self, length: int, is_causal: bool = False) -> Plans:
        """The plan of the clusters as they are now, or a tuple of plans, one for each batch entry and key head."""
        return self.as_numpy().plan(length, is_causal)

    def as_numpy(self) -> patterns.Routing | Sparse:
        """The pattern of `combiner`, with a copy of the clusters as they are now."""
        routing = patterns.Routing(as_array(self.clusters), pooling=self.pooling, size_bias=self.size_bias)
        return Sparse(routing) if self.is_sparse else routing


@dataclass(frozen=True, eq=False)
class Selected:
    """`combiner.Selected` of a tensor: functions that torch.compile made open other regions in each call.

    No gradient flows through the choice of regions; given the choice, gradients are exact.

    Parameters
    ----------
    pattern : `Fixed`, `HeavilyCompressed`, `LogSparse`, `Tree`, or a bidirectional `Routing` of a tensor.
    regions : integers `[k]`, `[T, k]` or `[..., Hk, T, k]`, as `select` returns them, of packed sequences too; not
        copied.
    block, open, rest : as in `combiner.Selected`.

    Raises
    ------
    TypeError, ValueError : when it is used, for regions that are no tensor of integers, and as `combiner.Selected`.
    """

    pattern: Factorization | Routing
    regions: Tensor
    block: int = field(default=64, kw_only=True)
    open: bool = field(default=True, kw_only=True)
    rest: bool = field(default=True, kw_only=True)

    def sparse(self) -> Selected:
        """The same without the regions that are not listed."""
        return replace(self, rest=False)

    def plan(self, length: int, is_causal: bool = False) -> Plans:
        """The plan of the regions as they are now, or a tuple of plans, one for each batch entry and key head."""
        return self.as_numpy().plan(length, is_causal)

    def as_numpy(self) -> composed.Selected:
        """The pattern of `combiner`, with a copy of the regions as they are now."""
        pattern = self.pattern.as_numpy() if isinstance(self.pattern, Routing) else self.pattern
        options = {"block": self.block, "open": self.open, "rest": self.rest}
        return composed.Selected(pattern, as_array(self.regions), **options)  # type: ignore[arg-type]


class Choices(NamedTuple):
    """The tensors of a pattern, which operators take beside its text: None where it has none."""

    clusters: Tensor | None
    regions: Tensor | None


def choices_of(pattern: object) -> Choices:
    """The tensors of a pattern, checked."""
    match pattern:
        case Routing():
            return Choices(_integers("clusters", pattern.clusters), None)
        case Selected():
            return choices_of(pattern.pattern)._replace(regions=_integers("regions", pattern.regions))
    return Choices(None, None)


def with_choices(pattern: Any, choices: Choices) -> Any:
    """The pattern with other tensors; itself if it has none."""
    match pattern:
        case Routing():
            return replace(pattern, clusters=choices.clusters)
        case Selected():
            return replace(pattern, pattern=with_choices(pattern.pattern, choices), regions=choices.regions)
    return pattern


def _integers(name: str, x: object) -> Tensor:
    """x, which must be a tensor of integers."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a torch.Tensor of integers, got {got}")
    return x
