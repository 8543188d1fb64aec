# SPDX-License-Identifier: Apache-2.0
"""The cache of one layer for generation with combiner attention."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..composed import AnyPattern
from ..decode import Decoder


class CombinerLayer(DynamicLayer):
    """A layer of a dynamic cache that serves generation with combiner attention, and any other attention.

    The first tokens leave their queries here, in `queries`, beside keys and values. When others follow, a `Past` takes
    all of them over, and the layer keeps no more of them. Attention is given keys and values alone: both are marked
    with their layer. Rows that the layer no longer keeps are NaN, so that another attention would show it.
    """

    queries: Tensor | None = None
    is_attended = True  # whether attention was called since the last update
    past: Past | None = None
    _new: tuple[Tensor, Tensor]  # with a past: keys and values of the latest tokens

    @staticmethod
    def of(states: Tensor) -> CombinerLayer | None:
        """The layer whose `update` returned these keys or values; None if none did."""
        layer = getattr(states, "cache_layer", None)
        return layer and layer()

    @property
    def has_begun(self) -> bool:
        """Whether combiner attention has attended the tokens so far."""
        return self.queries is not None or self.past is not None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys: Any
        values: Any
        if self.past is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        else:
            self.past.positions += key_states.shape[-2]
            self._new = key_states, value_states
            nan = key_states.new_tensor(torch.nan)
            keys, values = (nan.expand(*x.shape[:-2], self.past.positions, x.shape[-1]) for x in self._new)
        keys.cache_layer = values.cache_layer = weakref.ref(self)
        self.is_attended = False
        return keys, values

    def remember(self, query: Tensor | None) -> None:
        """Keeps the queries of the first tokens, if this is the only call of attention since the last update."""
        self.queries = None if self.is_attended else query
        self.is_attended = True

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: AnyPattern,
        options: dict[str, Any],
        is_token: Tensor,
    ) -> Tensor:
        """The attention `[B, n, Hq, Dv]` of the latest n tokens, after earlier ones.

        Parameters
        ----------
        query : `[B, Hq, n, D]`, of the latest tokens.
        key, value : as `update` returned them.
        pattern : the same in every step.
        options : the keywords of a `Decoder`, the same in every step.
        is_token : bool `[B, L]`, for all positions so far; False for padding.
        """
        if self.is_attended:
            raise NotImplementedError(
                "a layer's attention must come once for each update of the cache, got two: generate with "
                "use_cache=False"
            )
        self.is_attended = True
        earlier = is_token.shape[1] - query.shape[-2]
        if self.past is None:
            given = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items() if x is not None}
            self.past = self._hand_over(earlier, key, value, Past(pattern, len(query), given), is_token)
        if self.past.pattern != pattern:
            raise ValueError(f"pattern must be the same for all tokens, got {pattern!r} after {self.past.pattern!r}")
        return self.past.step(query, *self._new, is_token[:, earlier:]).transpose(1, 2)

    def _hand_over(self, earlier: int, key: Tensor, value: Tensor, past: Past, is_token: Tensor) -> Past:
        """Moves all tokens but the latest from this layer into a past without tokens."""
        queries = self.queries
        if queries is None or queries.shape[-2] != earlier:
            raise NotImplementedError(
                "generation must go on from tokens that combiner attended, once in each layer, with keys and values as "
                "the cache returned them, and one sequence in each batch entry: generate with use_cache=False"
            )
        past.step(queries, key[..., :earlier, :], value[..., :earlier, :], is_token[:, :earlier])
        past.positions = key.shape[-2]
        self._new = key[..., earlier:, :].clone(), value[..., earlier:, :].clone()
        self.queries, self.keys, self.values = None, key.new_empty(0), value.new_empty(0)
        return past

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.past is None else self.past.positions

    def reset(self) -> None:
        super().reset()
        self.queries = self.past = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.past is not None:
            raise NotImplementedError("tokens of a cache must stay once others have followed with combiner attention")
        super().crop(tokens_to_remove)
        if self.queries is not None:
            self.queries = self.queries[..., : self.get_seq_length(), :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.past is not None:
            self.past.choose(indices)
            return
        super().batch_select_indices(indices)
        if self.queries is not None:
            self.queries = self.queries[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.past is not None:
            self.past.choose(torch.arange(self.past.entries).repeat_interleave(repeats))
            return
        super().batch_repeat_interleave(repeats)
        if self.queries is not None:
            self.queries = self.queries.repeat_interleave(repeats, dim=0)


class Past:
    """The tokens of a batch, in one `Decoder`."""

    def __init__(self, pattern: AnyPattern, entries: int, options: dict[str, Any]) -> None:
        self._decoder: Any = Decoder(pattern, **options)
        self.pattern, self.entries = pattern, entries
        self.positions = 0  # of the cache, padding among them

    def step(self, query: Tensor, key: Tensor, value: Tensor, is_token: Tensor) -> Tensor:
        """out `[B, Hq, n, Dv]` of the next n positions, 0 for padding, which joins no sequence.

        Parameters
        ----------
        query, key, value : `[B, heads, n, features]`.
        is_token : bool `[B, n]`, False for padding.
        """
        tokens = [x.detach() for x in (query, key, value)]
        if is_token.all():
            return self._decoder.step(*tokens)
        order = is_token.int().argsort(dim=1, descending=True, stable=True)  # tokens before padding
        out = self._decoder.step(*(_reordered(x, order) for x in tokens), lengths=is_token.sum(1))
        return _reordered(out, order.argsort(1))

    def choose(self, entries: Tensor) -> None:
        """Keeps the batch entries of these numbers, in this order; a number may repeat."""
        self.entries = len(entries)
        self._decoder = self._decoder.take(entries.numpy())


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """Positions of `[B, heads, n, features]` in the order `[B, n]`."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
