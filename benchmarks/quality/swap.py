# SPDX-License-Identifier: Apache-2.0
"""What takes the place of dense attention in a trained model: a pattern, and a choice of regions that it opens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from torch import Tensor

import combiner.torch as ct
from combiner import Dense
from combiner.patterns import Factorization, Sparse
from combiner.plan import Pooling

DENSE = Dense()
Score: TypeAlias = Literal["max", "mean", "first"]
SCORES: tuple[Score, ...] = ("max", "mean", "first")


@dataclass(frozen=True)
class Selection:
    """The arguments of `combiner.torch.select` and of `combiner.torch.Selected`.

    Parameters
    ----------
    k, block : regions that each block of queries opens, and its queries.
    score : "max" or "mean" of the block's logits, or "first": the block's first query alone.
    pooling : pooling of the keys by which regions are chosen; None: the pattern's own.
    rest : whether the regions that are not opened are attended too.
    """

    k: int
    block: int = 1
    score: Score = "first"
    pooling: Pooling | None = None
    rest: bool = True


@dataclass(frozen=True)
class Swap:
    """Attention by a pattern, an `Attention` of model.py.

    Parameters
    ----------
    pattern : the pattern.
    selection : how regions are chosen that a block of queries opens. The choice has no gradient.
    tuned : steps for which the model, trained with dense attention, is trained with the pattern in place.
    fresh : whether the model is trained with the pattern from its first weights on, and never with dense attention.
    """

    pattern: Factorization | Sparse
    selection: Selection | None = None
    tuned: int = 0
    fresh: bool = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pattern = self.pattern if self.selection is None else self.selected(query, key)
        return ct.attention(query, key, value, pattern, is_causal=True)

    def selected(self, query: Tensor, key: Tensor) -> ct.Selected:
        """The pattern with the regions that it opens for these queries."""
        chosen = self.selection
        assert chosen is not None and isinstance(self.pattern, Factorization)
        by = self.pattern if chosen.pooling is None else replace(self.pattern, pooling=chosen.pooling)
        regions = ct.select(
            query,
            key,
            by,
            chosen.k,
            block=chosen.block,
            is_causal=True,
            score="mean" if chosen.score == "mean" else "max",
            causal_score=chosen.score == "first",
        )
        return ct.Selected(self.pattern, regions, block=chosen.block, rest=chosen.rest)


@dataclass
class Counted:
    """A swap that counts its pairs, and those of dense attention beside them."""

    swap: Swap
    pairs: int = 0
    dense_pairs: int = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        B, H, L, _ = query.shape
        swap = self.swap
        made = (swap.pattern if swap.selection is None else swap.selected(query, key)).plan(L, True)
        self.pairs += sum(plan.pairs for plan in made) if isinstance(made, tuple) else B * H * made.pairs
        self.dense_pairs += B * H * L * (L + 1) // 2
        return swap(query, key, value)
