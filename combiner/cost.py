# SPDX-License-Identifier: Apache-2.0
"""What a plan costs, known before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _core
from .arguments import as_integer
from .plan_lists import count_pairs
from .tables import counted, in_bytes

_BOTH = 3  # CMB_SUMMARIZE | CMB_ATTEND


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a pattern at one length: of one head, or of all heads where each has a plan of its own.

    Attributes
    ----------
    length, is_causal, dim : L; whether query i attends positions up to i only; D = Dv, for which bytes are counted.
    plans : the plans that are run: components of a `Mixture`, plans of heads.
    regions : regions that the plans define.
    pairs : direct keys and regions attended, summed over the queries (stage 2).
    summary_pairs : members attended, summed over the regions (stage 1).
    dense_pairs : the pairs of dense attention: L (L + 1) / 2 causal, L^2 bidirectional, for each plan's head.
    plan_bytes : memory of the plans.
    forward_bytes, backward_bytes : memory of a call beside arrays, plans and results: float32, one thread.
    """

    length: int
    is_causal: bool
    dim: int
    plans: int
    regions: int
    pairs: int
    summary_pairs: int
    dense_pairs: int
    plan_bytes: int
    forward_bytes: int
    backward_bytes: int

    @property
    def share(self) -> float:
        """The pairs of both stages, divided by those of dense attention; 1 for no pairs."""
        return (self.pairs + self.summary_pairs) / self.dense_pairs if self.dense_pairs else 1.0

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, forward, 2 (D + Dv) for each pair of both stages."""
        return 4 * self.dim * (self.pairs + self.summary_pairs)

    def __str__(self) -> str:
        kind = "causal" if self.is_causal else "bidirectional"
        return (
            f"L {self.length:,}, {kind}: {counted(self.pairs)} pairs and {counted(self.summary_pairs)} to summarize, "
            f"{self.share:.2%} of dense; a call takes {in_bytes(self.forward_bytes)} forward and "
            f"{in_bytes(self.backward_bytes)} backward (one head, D {self.dim}, float32)"
        )


def cost_of(plans: Any, dim: int = 64) -> Cost:
    """The cost of a plan, of a tuple of plans of heads, or of a mixture of these.

    Parameters
    ----------
    plans : a Plan, a tuple of them, or an object whose `patterns` are such.
    dim : D = Dv, for which bytes are counted.

    Raises
    ------
    TypeError, ValueError : `dim` is not an integer, or is not between 1 and 1024.
    """
    D = as_integer("dim", dim, 1)
    if D > 1024:
        raise ValueError(f"dim must be at most 1024, got {D}")
    components = [_heads(each) for each in getattr(plans, "patterns", [plans])]
    one_of = {id(plan): plan for heads in components for plan in heads}
    if not one_of:
        raise ValueError("pattern must make at least one plan, got none")
    pairs = {key: count_pairs(plan) for key, plan in one_of.items()}
    everything = [id(plan) for heads in components for plan in heads]
    first = next(iter(one_of.values()))
    L, is_causal, heads = first.length, first.is_causal, max(map(len, components))
    x = np.broadcast_to(np.zeros((1, D), np.float32), (L, D))
    forward, backward = (
        max(_core.Problem(_BOTH, x, x, x, plan, is_causal).workspace_bytes(b) for plan in one_of.values())
        for b in (False, True)
    )
    return Cost(
        length=L,
        is_causal=is_causal,
        dim=D,
        plans=len(everything),
        regions=sum(one_of[key].region_count for key in everything),
        pairs=sum(pairs[key][0] for key in everything),
        summary_pairs=sum(pairs[key][1] for key in everything),
        dense_pairs=heads * (L * (L + 1) // 2 if is_causal else L * L),
        plan_bytes=sum(plan.nbytes for plan in one_of.values()),
        forward_bytes=forward,
        backward_bytes=backward,
    )


def _heads(plans: Any) -> tuple[_core.Plan, ...]:
    return plans if isinstance(plans, tuple) else (plans,)
