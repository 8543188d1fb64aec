# SPDX-License-Identifier: Apache-2.0
"""The attention function that models call: combiner's, or the model's own in layers that are left to it."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ..composed import AnyPattern
from ..patterns import Dense, HeavilyCompressed, Window
from ..torch import Selected, attention
from ..torch import select as select_regions
from .cache import CombinerLayer
from .compressed import attend_entries, attend_entries_of_tokens
from .masks import LazyMask, Support

PatternOf: TypeAlias = Callable[[torch.nn.Module], "AnyPattern | None"]


_IGNORED = {  # arguments that models pass on and attention does not need
    "cache_position",
    "cu_seq_lens_k",
    "labels",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "shift_labels",
    "use_cache",
}
_READ = {"cu_seq_lens_q", "dropout", "is_causal", "position_ids", "scaling", "sliding_window"}
_TERMS = {"s_aux", "softcap"}  # of the logits; PyTorch's attention does not have them
_COMPRESSED = {"compressed_sparse_attention", "heavily_compressed_attention"}  # kinds of layers of DeepSeek-V4


class _Call(NamedTuple):
    """The arguments of one call of attention: query `[B, Hq, n, D]`, key and value `[B, Hk, L, D]`; the result is
    `[B, n, Hq, Dv]`. The last n of L positions are queried; the first ones are in a cache.
    """

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | LazyMask | None
    options: dict[str, Any]  # other arguments, but for those that are absent or ignored

    @property
    def lengths(self) -> tuple[int, int]:
        """n and L."""
        return self.query.shape[-2], self.key.shape[-2]

    @property
    def support(self) -> Support:
        mask, is_causal = self.attention_mask, self.options.get("is_causal")
        if mask is None:  # the model asked for no mask: the module says whether it is causal
            return Support(getattr(self.module, "is_causal", True) if is_causal is None else is_causal)
        if not isinstance(mask, LazyMask):
            raise NotImplementedError(
                "attention_mask must be [B, L] or None, and made into a mask by transformers.masking_utils, got one of "
                f"shape {list(mask.shape)}"
            )
        if is_causal is not None and is_causal != mask.support.is_causal:
            raise ValueError(f"is_causal must be {mask.support.is_causal} like the mask, got {is_causal}")
        return mask.support

    @property
    def window(self) -> int | None:
        """The size of the layer's window; None for no window. The mask has it, or without a mask the layer says it."""
        window: int | None = self.options.get("sliding_window")
        return self.support.window if self.attention_mask is not None else window

    @property
    def local(self) -> str | None:
        """What divides or bounds the keys of a query: a window or chunks; None if all keys are attended."""
        if self.window is not None:
            return f"a window of {self.window} positions"
        return f"chunks of {self.support.chunk} positions" if self.support.chunk is not None else None

    @property
    def term(self) -> str | None:
        """A term of the layer's logits beside scale * query . key; None if there is none."""
        return next((self.said(name) for name in self.options if name in _TERMS), None)

    @property
    def terms(self) -> dict[str, Any]:
        """These terms as keyword arguments of `combiner.torch.attention`."""
        sink: Tensor | None = self.options.get("s_aux")
        if sink is not None:
            sink = sink.to(torch.float64 if self.query.dtype == torch.float64 else torch.float32)
        return {"softcap": self.options.get("softcap"), "sink": sink}

    @property
    def rate(self) -> int | None:
        """How many positions a compressed key of DeepSeek-V4 stands for; such keys follow the others. None without."""
        is_compressed = getattr(self.module, "layer_type", None) in _COMPRESSED
        return self.module.compressor.compress_rate if is_compressed else None

    @property
    def bias(self) -> Tensor | None:
        """What the model adds to the logits of compressed keys, `[B, 1, n, E]`: 0 where a query attends them, else
        -inf. None: it attends all. The model joins it to a mask that is a tensor; else its forward pass alone has it.
        """
        bias: Tensor | None = (_locals_of_forward(self.module) or {}).get("block_bias")
        return bias

    def said(self, name: str) -> str:
        """An argument as errors name it."""
        given = self.options[name]
        return f"{name}={_describe(given)}"

    def missing(self) -> str | None:
        """A feature that the layer asks for and this attention does not have; None if there is none."""
        for name in self.options:
            if name not in _READ | _TERMS:
                return self.said(name)
        L, chunk = self.key.shape[-2], self.support.chunk
        if self.support.other is not None:
            return f"a mask of {self.support.other}"
        if chunk is not None and chunk < L:
            return f"{self.local} in a sequence of {L}"
        return None


class Met(NamedTuple):
    """How a layer's latest call was attended: by a pattern, or by its own attention for this reason."""

    pattern: AnyPattern | None
    reason: str
    select: int | None = None  # how many regions of the pattern each query opens; None: no region is opened


class Attention:
    """The attention function that is registered under a name."""

    layers: weakref.WeakKeyDictionary[torch.nn.Module, Met] | None = None  # the latest call of each, for a report

    def __init__(self, pattern_of: PatternOf, fallback: bool, select: int | None = None) -> None:
        self._pattern_of, self._fallback, self._select = pattern_of, fallback, select

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | LazyMask | None,
        *,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if options.get("output_attentions"):
            raise NotImplementedError("output_attentions must be left out with combiner attention, got True")
        given = {k: x for k, x in options.items() if k not in _IGNORED and x is not None and x is not False}
        if is_causal is not None:
            given["is_causal"] = is_causal
        call = _Call(module, query, key, value, attention_mask, given)
        met = self._choose(call)
        if self.layers is not None:
            self.layers[module] = met
        return _own_attention(call) if met.pattern is None else _attend(call, met.pattern, met.select), None

    def _choose(self, call: _Call) -> Met:
        if _is_cross_attention(call.module):
            return Met(None, "cross-attention")
        pattern = self._pattern_of(call.module)
        if pattern is None:
            return Met(None, "the pattern is None")
        missing, window, rate = call.missing(), call.window, call.rate
        if missing is None and rate is not None and window is not None:
            return Met(HeavilyCompressed(rate, window), "")
        if self._fallback and (given := call.local or call.term):
            return Met(None, given)
        if missing is None:
            return Met(pattern, "", self._select) if window is None else Met(Window(window), "")
        if self._fallback:
            return Met(None, missing)
        raise NotImplementedError(
            f"{type(call.module).__name__} asks for {missing}, which combiner attention does not have: "
            "register(pattern, fallback=True) leaves such layers to the model's own attention"
        )


def _describe(given: Any) -> str:
    return f"a tensor of shape {list(given.shape)}" if isinstance(given, Tensor) else f"{given!r:.80}"


_OTHER_STATES = {
    "context",
    "context_hidden_states",
    "cross_attention_states",
    "encoder_hidden_states",
    "key_value_states",
}


def _is_cross_attention(module: torch.nn.Module) -> bool:
    """Whether keys come from another sequence than queries, which Transformers does not tell an attention function.

    Some modules say so. Of others it depends on what their forward pass was given, which lies on the stack.
    """
    said = getattr(module, "is_cross_attention", None)
    if isinstance(said, bool):
        return said
    forward = inspect.unwrap(type(module).forward)
    names = set(_parameters(forward))
    if "Cross" in type(module).__name__ or {"query", "key"} <= names or {"queries", "keys"} <= names:
        return True
    if not names & _OTHER_STATES:
        return False
    found = _locals_of_forward(module)
    if found is None:
        raise NotImplementedError(
            f"{type(module).__name__} must not be compiled: its self-attention and cross-attention cannot be told apart"
        )
    return any(found.get(name) is not None for name in _OTHER_STATES)


def _locals_of_forward(module: torch.nn.Module) -> dict[str, Any] | None:
    """The variables of the module's forward pass, which lies on the stack; None if it does not."""
    forward, frame = inspect.unwrap(type(module).forward), sys._getframe()
    while frame.f_code is not getattr(forward, "__code__", None):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return frame.f_locals


@functools.lru_cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _attend(call: _Call, pattern: AnyPattern, select: int | None) -> Tensor:
    """Combiner attention of a call: of whole sequences, or of a step of generation."""
    (n, L), options, support = call.lengths, call.options, call.support
    sequence = _sequence(call)
    if call.rate is not None:
        assert isinstance(pattern, HeavilyCompressed)
        return _attend_compressed(call, sequence, pattern)
    scale, dropout = options.get("scaling"), options.get("dropout", 0.0)
    layer = CombinerLayer.of(call.key)
    if layer is not None and CombinerLayer.of(call.value) is not layer:
        layer.remember(None)
        layer = None
    # Whether steps of generation are the model's own.
    is_own = call.window is not None or (call.term is not None and isinstance(pattern, Dense))
    if is_own and layer is not None:
        layer.remember(None)
        layer = None
    if n != L:
        if is_own and call.attention_mask is not None:
            return _own_attention(call)  # with a window, of its keys: the cache has no others
        if layer is None or n > L or not support.is_causal:
            raise NotImplementedError(_cannot_go_on(call))
        if dropout or (torch.is_grad_enabled() and call.query.requires_grad):
            raise NotImplementedError(
                "generation with a cache must be without dropout and without gradients: call model.eval() and use "
                "torch.no_grad()"
            )
        whole = len(call.query), L
        is_token = torch.ones(whole, dtype=torch.bool) if sequence is None else (sequence >= 0).expand(whole)
        asked = {"scale": scale, "select": select, **call.terms}
        return layer.step(call.query, call.key, call.value, pattern, asked, is_token)
    if layer is not None:
        layer.remember(None if "cu_seq_lens_q" in options else call.query)
    tensors = call.query, call.key, call.value
    asked = {"is_causal": support.is_causal, "scale": scale, "dropout_p": dropout, **call.terms}
    if sequence is None:
        out = _attention(*tensors, pattern, select, **asked)
        return out.transpose(1, 2).contiguous()
    is_token = sequence >= 0
    # A window counts the hidden tokens within it. In DeepSeek-V4 compressed keys of later layers hold them, too.
    reads_padding = hasattr(call.module, "compressor") and not support.is_packed
    if call.window is not None and (reads_padding or _has_gaps(is_token)):
        out = attention(*tensors, pattern, key_mask=is_token.expand(len(call.query), -1), **asked).transpose(1, 2)
        return out.contiguous() if reads_padding else torch.where(is_token[..., None, None], out, 0)
    return _attend_sequences(sequence.expand(len(call.query), -1), *tensors, pattern, select, **asked)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Any,
    select: int | None,
    *,
    cu_seqlens: Any = None,
    **options: Any,
) -> Tensor:
    """`combiner.torch.attention`. With `select` each query opens so many regions, as in a step of generation."""
    if select is not None:
        given = {"is_causal": options["is_causal"], "scale": options["scale"], "cu_seqlens": cu_seqlens}
        pattern = Selected(pattern, select_regions(query, key, pattern, select, block=1, **given), block=1)
    return attention(query, key, value, pattern, cu_seqlens=cu_seqlens, **options)


def _attend_compressed(call: _Call, sequence: Tensor | None, pattern: HeavilyCompressed) -> Tensor:
    """Attention of DeepSeek-V4: the keys are those of positions, then an entry for each complete span.

    One token, and several after a past that has padding, have the model's own attention: its cost is that of their
    rows."""
    mask, n, module = call.attention_mask, call.query.shape[-2], call.module
    length = mask.length if isinstance(mask, LazyMask) else n
    if call.support.is_packed or "cu_seq_lens_q" in call.options:
        raise NotImplementedError(f"{type(module).__name__} must have one sequence in each row, got several")
    if n < length and (n == 1 or sequence is not None):
        return _own_attention(call)
    E, seen = length // pattern.rate, None
    if sequence is not None or module.layer_type == "compressed_sparse_attention":
        bias = call.bias
        seen = call.query.new_zeros(len(call.query), n, E, dtype=torch.bool) if bias is None else bias[:, 0] == 0
    options = {"scale": call.options.get("scaling"), "dropout_p": call.options.get("dropout", 0.0), **call.terms}
    if sequence is None or seen is None:
        out = attend_entries(call.query, call.key, length, pattern, seen, **options)
    else:
        is_token = (sequence >= 0).expand(len(call.query), -1)
        out = attend_entries_of_tokens(call.query, call.key, is_token, pattern.window, seen, **options)
    return out.transpose(1, 2).contiguous()


def _has_gaps(is_token: Tensor) -> bool:
    """Whether a row `[L]` has padding between its tokens."""
    begins = is_token.int().diff(prepend=is_token.new_zeros(len(is_token), 1).int()) > 0
    return bool((begins.sum(1) > 1).any())


def _cannot_go_on(call: _Call) -> str:
    n, L = call.lengths
    if call.local is not None:
        return (
            "generation must go without a cache in layers with chunks, or with a window and no mask, got "
            f"{call.local}: use_cache=False, or register(pattern, fallback=True)"
        )
    return (
        f"query and key must have the same positions, got {n} and {L}, or come from a causal model's DynamicCache made "
        "with its config after register(): models that change keys or values after the cache, or have another cache, "
        "generate with use_cache=False"
    )


def _sequence(call: _Call) -> Tensor | None:
    """`[B, L]`, the number of the sequence that each key belongs to, -1 for padding; None for one sequence."""
    support, options = call.support, call.options
    if "cu_seq_lens_q" in options:
        return _number(options["cu_seq_lens_q"], call)
    if "position_ids" in options and not support.is_packed:
        _check_positions(options["position_ids"], support.sequence, call)
    return support.sequence


def _number(bounds: Tensor, call: _Call) -> Tensor:
    """The number of each key's sequence `[1, L]`, from the boundaries of the sequences."""
    (n, L), B, support = call.lengths, len(call.query), call.support
    is_padded = support.sequence is not None and not support.is_packed
    if B != 1 or n != L or is_padded or bounds[0] != 0 or bounds[-1] != L:
        raise ValueError(
            f"cu_seq_lens_q must go from 0 to the length of one row, without padding and without a past, got "
            f"{_describe(bounds)} from {bounds[0]} to {bounds[-1]} for {B} rows of {L} positions, {n} of them queried"
        )
    lengths = bounds.diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]


def _check_positions(position_ids: Tensor, sequence: Tensor | None, call: _Call) -> None:
    """Refuses positions that restart beside a mask or a cache.

    Positions that restart begin a new sequence. Transformers looks for sequences only where there is neither mask nor
    cache, and attends across them elsewhere."""
    n, B = call.query.shape[-2], len(call.query)
    if position_ids.ndim != 2 or position_ids.shape[-1] != n or not (position_ids.diff() < 0).any():
        return
    rows = position_ids.expand(B, -1)
    is_token = torch.ones_like(rows, dtype=torch.bool) if sequence is None else (sequence >= 0).expand(B, -1)[:, -n:]
    for row, keep in zip(rows, is_token, strict=True):
        positions = row[keep]
        if ((positions.diff() < 0) & (positions[1:] == positions[:1])).any():
            raise ValueError(
                "position_ids must not restart beside an attention_mask or a cache, where Transformers attends across "
                "the sequences of a row: attention_mask=None and use_cache=False, or cu_seq_lens_q, keeps them apart"
            )


def _own_attention(call: _Call) -> Tensor:
    """The model's own attention: PyTorch's, or the model's eager one where PyTorch's lacks a feature."""
    layer = CombinerLayer.of(call.key)
    if layer is not None and layer.has_begun and call.lengths[0] != call.lengths[1]:
        raise ValueError("pattern must be the same for all tokens, got None after tokens that combiner attended")
    mask, options = call.attention_mask, call.options
    if "cu_seq_lens_q" in options and not (isinstance(mask, LazyMask) and mask.support.is_packed):
        raise NotImplementedError(
            "cu_seq_lens_q must come with position_ids that restart, attention_mask=None and use_cache=False, where "
            "layers are left to the model's own attention"
        )
    attend: Callable[..., Any] = sdpa_attention_forward
    make: Callable[..., Tensor | None] = sdpa_mask
    if set(options) - _READ - {"position_bias"}:
        attend, make = _eager_attention(call.module), eager_mask
    given = {"scaling": call.query.shape[-1] ** -0.5, "dropout": 0.0} | options
    if isinstance(mask, LazyMask):
        mask = mask.make(make)
        if mask is not None and call.rate is not None:
            bias = call.bias
            entries = mask.new_zeros(*mask.shape[:-1], call.key.shape[-2] - mask.shape[-1]) if bias is None else bias
            mask = torch.cat([mask, entries.to(mask.dtype)], -1)
        if mask is not None and mask.shape[-1] != call.key.shape[-2]:
            raise NotImplementedError(
                f"{type(call.module).__name__} must attend what its mask is of, got {call.key.shape[-2]} keys and a "
                f"mask of {mask.shape[-1]}: attn_implementation must be 'sdpa' or 'eager' for this model"
            )
    out: Tensor = attend(call.module, call.query, call.key, call.value, mask, **given)[0]
    return out


def _eager_attention(module: torch.nn.Module) -> Callable[..., Any]:
    """The eager attention function in the module of the class, which every model file has."""
    for kind in type(module).__mro__:
        found: Callable[..., Any] | None = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise NotImplementedError(f"{type(module).__name__} must have an eager attention of its own, got none beside it")


def _attend_sequences(
    sequence: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AnyPattern,
    select: int | None,
    **options: Any,
) -> Tensor:
    """out `[B, L, Hq, Dv]` of sequences given by their numbers `[B, L]`: packed without padding, attended, unpacked."""
    B, L = sequence.shape
    token = (sequence >= 0).flatten().nonzero().squeeze(1)
    number = (sequence + L * torch.arange(B)[:, None]).flatten()[token]
    start = torch.diff(number, prepend=number.new_tensor([-1])).nonzero().squeeze(1)
    bounds = torch.cat([start, start.new_tensor([len(token)])])
    q, k, v = (x.transpose(1, 2).flatten(0, 1)[token].transpose(0, 1) for x in (query, key, value))
    out = _attention(q, k, v, pattern, select, cu_seqlens=bounds, **options).transpose(0, 1)
    return out.new_zeros(B * L, *out.shape[1:]).index_copy(0, token, out).view(B, L, *out.shape[1:])
