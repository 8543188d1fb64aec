# SPDX-License-Identifier: Apache-2.0
"""Masks as Transformers describes them, read as causality, sequences and windows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor


class Support(NamedTuple):
    """The keys that a mask lets queries attend.

    sequence: `[B, L]`, the number of the sequence that each key belongs to, -1 for padding; None for one sequence.
    is_packed: whether a row holds several sequences, rather than one and padding.
    window: the size of the `combiner.Window` that a query attends; None for no window.
    chunk: the length of the chunks that divide a sequence; None for one chunk.
    other: the first feature of the mask that this attention does not have; None if there is none.
    """

    is_causal: bool
    sequence: Tensor | None = None
    is_packed: bool = False
    window: int | None = None
    chunk: int | None = None
    other: str | None = None


class LazyMask:
    """A description of a mask, which models get in place of a tensor and hand on to attention.

    A model asks for the masks of all kinds of layers that it might have; only a layer that is given one reads it. Any
    other use of it by a model's code raises NotImplementedError.
    """

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._made: dict[Callable[..., Any], Tensor | None] = {}

    def make(self, maker: Callable[..., Tensor | None]) -> Tensor | None:
        """The mask as a tensor, made by Transformers' `sdpa_mask` or `eager_mask`."""
        if maker not in self._made:
            self._made[maker] = maker(**self._arguments)
        return self._made[maker]

    @property
    def length(self) -> int:
        """The number of positions up to the last key; the first of them may have left the cache."""
        length: int = self._arguments["kv_length"] + self._arguments.get("kv_offset", 0)
        return length

    @functools.cached_property
    def support(self) -> Support:
        """The keys that the mask lets queries attend."""
        parts: dict[str, Any] = dict(_parts(self._arguments["mask_function"]))
        sequence: Tensor | None = parts.get("sequence")
        is_packed, other = sequence is not None, parts.get("other")
        is_token: Tensor | None = self._arguments.get("attention_mask")
        if is_token is not None and is_token.shape[-1] != self.length:
            other = other or f"{is_token.shape[-1]} positions where the cache holds {self.length}"
        elif is_token is not None and not is_token.all():
            sequence = torch.where(is_token, 0, -1)
        return Support("causal" in parts, sequence, is_packed, parts.get("window"), parts.get("chunk"), other)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of protocols, such as copying
            raise AttributeError(name)
        _refuse_to_be_a_tensor(name)

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        _refuse_to_be_a_tensor(getattr(function, "__name__", str(function)))


def _refuse_to_be_a_tensor(name: str) -> NoReturn:
    raise NotImplementedError(
        "attention_mask must reach combiner attention as it was made, but the model's own code asks it for "
        f"{name!r}: attn_implementation must be 'sdpa' or 'eager' for this model"
    )


def _refused(name: str) -> Callable[..., Any]:
    return lambda self, *_: _refuse_to_be_a_tensor(name)


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
for _name in (
    *(f"__{x}__" for x in (*_COMPARISONS, *_ARITHMETIC, "neg", "invert", "abs")),
    *(f"__r{x}__" for x in _ARITHMETIC),
    *(f"__{x}__" for x in ("bool", "float", "int", "len", "iter", "contains", "getitem", "setitem", "array")),
):
    setattr(LazyMask, _name, _refused(_name))


def mask(**arguments: Any) -> LazyMask:
    """The mask function for `AttentionMaskInterface`. attention_mask is bool `[B, L]`, True for tokens, or None.

    Raises
    ------
    NotImplementedError : a mask of another shape; a cache whose length is not that of its tokens.
    """
    attention_mask = arguments.get("attention_mask")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(
            f"attention_mask must be [B, L] or None, got one of shape {list(attention_mask.shape)}"
        )
    is_causal = "causal" in dict(_parts(arguments["mask_function"]))
    keys = arguments["kv_length"] + arguments.get("kv_offset", 0)
    if is_causal and keys != arguments["q_length"] + arguments.get("q_offset", 0):
        raise NotImplementedError(
            f"cache must be a DynamicCache made with the model's config, got masks of {keys} keys, as of a cache of a "
            "fixed length: cache_implementation must be left out"
        )
    return LazyMask(**arguments)


def _parts(mask_function: Any) -> Iterator[tuple[str, Any]]:
    """The parts whose intersection the mask function is, as (kind, value): ("causal", True), ("sequence", numbers of
    the packed sequences), ("window", its size), ("chunk", its length), ("other", Transformers' name for it).
    """
    kind = getattr(mask_function, "__qualname__", type(mask_function).__name__).partition(".")[0]
    held = inspect.getclosurevars(mask_function).nonlocals if inspect.isfunction(mask_function) else {}
    match kind:
        case "bidirectional_mask_function":
            pass
        case "causal_mask_function":
            yield "causal", True
        case "packed_sequence_mask_function":
            yield "sequence", held["packed_sequence_mask"]
        case "sliding_window_overlay":
            yield "window", held["sliding_window"]
        case "sliding_window_bidirectional_overlay":
            yield "window", held["sliding_window"] + 1
        case "chunked_overlay":
            yield "chunk", held["chunk_size"]
        case "remap_positions_for_packed_sequence":
            yield from _parts(held["mask_function"])
        case "and_masks":
            for part in held["mask_functions"]:
                yield from _parts(part)
        case _:
            yield "other", kind
