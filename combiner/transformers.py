# SPDX-License-Identifier: Apache-2.0
"""Combiner attention in Hugging Face's models: training, padded and packed batches, generation with a cache.

    import combiner.transformers

    combiner.transformers.register(combiner.Fixed(64))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="combiner")

and of a model that is there, ``model.set_attn_implementation("combiner")``.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer
from transformers.masking_utils import find_packed_sequence_indices

from .decode import Decoder
from .patterns import AnyPattern
from .plan import Plan
from .torch import attention

PatternOf: TypeAlias = Callable[[torch.nn.Module], AnyPattern]


def register(pattern: AnyPattern | PatternOf, name: str = "combiner") -> None:
    """Make `name` an attention implementation of all models that leave attention to one.

    Every sequence is attended as if alone: tokens that a padding mask hides, wherever they lie, and the other sequences
    of a packed batch (``position_ids`` that restart) change no bit of it and count in no span. Keys and values may have
    fewer heads than queries; dropout and scaling are the model's. Generation with a cache gives what the model gives
    for the whole text, by beams too.

    Parameters
    ----------
    pattern : of all attention layers; or a function of one, called with the module in each forward pass, such as
        ``lambda module: patterns[module.layer_idx]``.
    name : what ``attn_implementation`` calls it. One registered again is replaced.

    Raises
    ------
    TypeError : what is no pattern and no function.
    NotImplementedError : by a model's forward pass, for what this attention does not have: output_attentions (where the
        model hands it on: GPT-2 keeps it, and returns none), softcap, sliding windows and other overlays, 4-D masks,
        biases, sinks, cross-attention, caches other than ``DynamicCache(config=...)``.
    ValueError : by a step of generation, for a pattern that `combiner.Decoder` refuses, such as one whose default span
        depends on the length: generate with ``use_cache=False``.

    Notes
    -----
    Summaries are of queries too. The caches that models make from now on, for any attention, are ready to keep them
    beside keys and values, and do so for this one. torch.compile breaks its graph here and there, and cached steps are
    not for it.
    """
    if isinstance(pattern, type) or not (
        callable(pattern) or isinstance(pattern, Plan | tuple) or hasattr(pattern, "plan")
    ):
        kind = pattern.__name__ if isinstance(pattern, type) else type(pattern).__name__
        raise TypeError(f"pattern must be a pattern such as combiner.Fixed(64) or a function of a module, got {kind}")
    pattern_of: Any = pattern if callable(pattern) else lambda module: pattern

    def forward(module: torch.nn.Module, *tensors: Any, **options: Any) -> tuple[Tensor, None]:
        return _forward(pattern_of(module), module, *tensors, **options), None

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, _mask)
    DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] = CombinerLayer


# ---- masks


class _Support(NamedTuple):
    """What attention is told in place of a mask.

    sequence: `[B, L]`, the number of the sequence that each key is of, -1 for padding; None where all are of one.
    """

    is_causal: bool
    sequence: Tensor | None


def _mask(
    *,
    kv_length: int,
    mask_function: Callable[..., Any],
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **_: Any,  # sizes, dtype and device of what a mask would be
) -> _Support:
    """What `AttentionMaskInterface` asks for; attention_mask is `[B, L]`, True for tokens, or None."""
    parts = list(_parts(mask_function))
    sequences: list[Tensor | None] = [x for _, x in parts if x is not None]
    [sequence] = sequences or [None]
    if attention_mask is not None:
        if kv_offset or attention_mask.shape[-1] != kv_length:
            raise NotImplementedError(
                f"attention_mask must be of all {kv_offset + kv_length} positions that the cache holds, as with a "
                f"DynamicCache, got one of {attention_mask.shape[-1]}"
            )
        if not attention_mask.all():
            sequence = torch.where(attention_mask.bool(), 0 if sequence is None else sequence, -1)
    return _Support(any(kind == "causal_mask_function" for kind, _ in parts), sequence)


def _parts(mask_function: Callable[..., Any]) -> Iterator[tuple[str, Tensor | None]]:
    """What the mask function is the intersection of, Transformers' own by name, with the sequences if it packs them."""
    kind = mask_function.__qualname__.partition(".")[0]
    held = inspect.getclosurevars(mask_function).nonlocals
    match kind:
        case "causal_mask_function" | "bidirectional_mask_function":
            yield kind, None
        case "packed_sequence_mask_function":
            yield kind, held["packed_sequence_mask"]
        case "remap_positions_for_packed_sequence":
            yield from _parts(held["mask_function"])
        case "and_masks":
            for part in held["mask_functions"]:
                yield from _parts(part)
        case _:
            raise NotImplementedError(
                f"a mask must be causal or bidirectional, of padding and of packed sequences, got {kind}"
            )


# ---- caches


class CombinerLayer(DynamicLayer):
    """A layer of a dynamic cache, which keeps what generation with combiner attends.

    The first tokens leave their queries here, in `queries`, beside keys and values. When others follow, a Decoder for
    each batch entry takes all of them over, and the layer keeps no more of them. Attention is given keys and values
    alone: the keys are marked with their layer, and keys that are gone are NaN, should another attention be given them.
    """

    queries: Tensor | None = None
    _decoders: list[Any] | None = None  # Decoder, of tensors
    _length: int  # with decoders: of the tokens so far,
    _new: tuple[Tensor, Tensor]  # and the keys and values of the last ones

    @staticmethod
    def of(keys: Tensor) -> CombinerLayer | None:
        """The layer that keys come from, if they come from one of these."""
        layer = getattr(keys, "cache_layer", None)
        return layer and layer()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys: Any
        if self._decoders is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        else:
            self._length += key_states.shape[-2]
            self._new = key_states, value_states
            nan = key_states.new_tensor(torch.nan)
            keys, values = (nan.expand(*x.shape[:-2], self._length, x.shape[-1]) for x in self._new)
        keys.cache_layer = weakref.ref(self)
        return keys, values

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: AnyPattern, scale: float | None, is_token: Tensor
    ) -> Tensor:
        """The attention `[B, n, Hq, Dv]` of the tokens that came last, which may not be the first.

        Parameters
        ----------
        query : `[B, Hq, n, D]`, theirs.
        key, value : what `update` returned.
        pattern, scale : the same in every step.
        is_token : bool `[B, L]`, of all tokens so far; False for padding.
        """
        past = is_token.shape[1] - query.shape[-2]
        if self._decoders is None:
            self._take_over(past, key, value, [Decoder(pattern, scale=scale) for _ in is_token], is_token)
        decoders: list[Any] = self._decoders or []
        if any(decoder.pattern != pattern for decoder in decoders):
            raise ValueError(f"pattern must be the same for all tokens, got {pattern!r} after {decoders[0]}")
        out = query.new_zeros(len(query), query.shape[-2], query.shape[1], value.shape[-1])
        for b, (decoder, which) in enumerate(zip(decoders, is_token[:, past:], strict=True)):
            tokens = (x[b][:, which].detach() for x in (query, *self._new))
            out[b, which] = decoder.step(*tokens).transpose(0, 1)
        return out

    def _take_over(self, past: int, key: Tensor, value: Tensor, decoders: list[Any], is_token: Tensor) -> None:
        """The decoders are given all tokens but the last ones, which are all that is left."""
        queries = self.queries
        if queries is None or queries.shape[-2] != past:
            raise NotImplementedError(
                "generation must go on from tokens that combiner attended, one sequence in each batch entry"
            )
        for b, decoder in enumerate(decoders):
            decoder.prefill(*(x[b, :, :past][:, is_token[b, :past]].detach() for x in (queries, key, value)))
        self._decoders, self._length = decoders, key.shape[-2]
        self._new = key[..., past:, :].clone(), value[..., past:, :].clone()
        self.queries, self.keys, self.values = None, key.new_empty(0), value.new_empty(0)

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self._decoders is None else self._length

    def reset(self) -> None:
        super().reset()
        self.queries = self._decoders = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self._decoders is not None:
            raise NotImplementedError("tokens of a cache must stay once others have followed with combiner attention")
        super().crop(tokens_to_remove)
        if self.queries is not None:
            self.queries = self.queries[..., : self.get_seq_length(), :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._decoders is not None:
            self._decoders = [copy.deepcopy(self._decoders[b]) for b in indices.tolist()]
            return
        super().batch_select_indices(indices)
        if self.queries is not None:
            self.queries = self.queries[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._decoders is not None:
            self._decoders = [copy.deepcopy(decoder) for decoder in self._decoders for _ in range(repeats)]
            return
        super().batch_repeat_interleave(repeats)
        if self.queries is not None:
            self.queries = self.queries.repeat_interleave(repeats, dim=0)


# ---- attention

_NO_MATTER = {  # to attention, of what models pass on
    "cache_position",
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "shift_labels",
    "use_cache",
}


def _forward(
    pattern: AnyPattern,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """What `AttentionInterface` asks for: query `[B, Hq, n, D]`, key and value `[B, Hk, L, D]`; out `[B, n, Hq, Dv]`.

    The last n of L positions are queried; the first ones are in a cache.
    """
    for name, given in others.items():
        if name not in _NO_MATTER and given is not None and given is not False:
            raise NotImplementedError(f"{name} must be left out with combiner attention, got {given!r:.80}")
    config = getattr(module, "config", None)
    if any(getattr(config, name, False) for name in ("is_encoder_decoder", "add_cross_attention")):
        raise NotImplementedError("combiner attention must be of one sequence, got a model with cross-attention")
    support = attention_mask
    if support is None:  # no mask was asked for: what the module says holds
        support = _Support(getattr(module, "is_causal", True) if is_causal is None else is_causal, None)
    elif not isinstance(support, _Support):
        raise NotImplementedError(f"attention_mask must be [B, L] or None, got one of shape {list(support.shape)}")
    elif is_causal is not None and is_causal != support.is_causal:
        raise ValueError(f"is_causal must be {support.is_causal} like the mask, got {is_causal}")

    layer = CombinerLayer.of(key)
    (B, _, n, _), L = query.shape, key.shape[-2]
    if n != L:
        if layer is None or not support.is_causal or n > L:
            raise NotImplementedError(
                f"query and key must have the same positions, got {n} and {L}; generation takes a DynamicCache made "
                "with the model's config after register()"
            )
        if dropout or (torch.is_grad_enabled() and query.requires_grad):
            raise NotImplementedError("generation with a cache must be without dropout and under torch.no_grad()")
        is_token = torch.ones(B, L, dtype=torch.bool) if support.sequence is None else support.sequence >= 0
        return layer.step(query, key, value, pattern, scaling, is_token)
    sequence = support.sequence
    if sequence is None and position_ids is not None and position_ids.ndim == 2:
        sequence = find_packed_sequence_indices(position_ids)  # masks do not tell where there is a cache
    if layer is not None:
        layer.queries = query if sequence is support.sequence else None
    options: dict[str, Any] = {"is_causal": support.is_causal, "scale": scaling, "dropout_p": dropout}
    if sequence is None:
        out: Tensor = attention(query, key, value, pattern, **options)
        return out.transpose(1, 2).contiguous()
    return _attend_sequences(sequence.expand(B, -1), query, key, value, pattern, **options)


def _attend_sequences(
    sequence: Tensor, query: Tensor, key: Tensor, value: Tensor, pattern: AnyPattern, **options: Any
) -> Tensor:
    """Out `[B, L, Hq, Dv]` of the sequences, numbered `[B, L]`, packed one after the other without the padding."""
    B, L = sequence.shape
    token = (sequence >= 0).flatten().nonzero().squeeze(1)
    number = (sequence + L * torch.arange(B)[:, None]).flatten()[token]
    start = torch.diff(number, prepend=number.new_tensor([-1])).nonzero().squeeze(1)
    bounds = torch.cat([start, start.new_tensor([len(token)])])
    q, k, v = (x.transpose(1, 2).flatten(0, 1)[token].transpose(0, 1) for x in (query, key, value))
    out: Tensor = attention(q, k, v, pattern, cu_seqlens=bounds, **options).transpose(0, 1)
    return out.new_zeros(B * L, *out.shape[1:]).index_copy(0, token, out).view(B, L, *out.shape[1:])
