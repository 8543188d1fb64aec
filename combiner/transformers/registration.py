# SPDX-License-Identifier: Apache-2.0
"""Registers attention with Transformers: `register` for all models, `swap` for one."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from ..arguments import as_integer
from ..composed import AnyPattern, Selected
from ..patterns import Dense, makes_plans, no_pattern
from ..plan import Plan
from .attention import Attention, Met, PatternOf
from .cache import CombinerLayer
from .masks import mask

_DENSE = Dense()


def register(
    pattern: AnyPattern | PatternOf = _DENSE,
    name: str = "combiner",
    *,
    fallback: bool = False,
    select: int | None = None,
) -> None:
    """Make `name` an attention implementation for all models that call transformers.AttentionInterface.

    Every sequence is attended as if alone. Tokens that a padding mask hides, and the other sequences of a packed batch,
    change no bit of it and take no place in a span. A layer with a sliding window runs `combiner.Window`; the pattern
    is that of the other layers. A batch is packed where Transformers says so (``position_ids`` that do not go up by
    one, without a mask and without a cache) or where ``cu_seq_lens_q`` does. Grouped heads, dropout and scaling are the
    model's. Generation with a cache gives what the model gives for the whole text, with beams too. Cross-attention is
    left to the model's own attention.

    For a model trained with dense attention, ``pooling="mean", size_bias=True`` is closest to what it learned with:
    ``register(Fixed(64, pooling="mean", size_bias=True))``. The default, the maximum, is the paper's, for training from
    the start.

    Parameters
    ----------
    pattern : the pattern of all self-attention layers without a window, by default ``Dense()``; or a function of a
        layer's module, called in each forward pass, such as ``lambda module: patterns[module.layer_idx]``. Where it
        returns None, the layer keeps the model's own attention.
    name : the name for ``attn_implementation``. Registering it again replaces it.
    fallback : for layers with chunks or biases, which this attention does not have. True leaves them, and layers with a
        sliding window, a softcap or sinks, to the model's own attention, but not DeepSeek-V4's with compressed keys;
        False raises NotImplementedError. With False, a layer with chunks is taken while its chunks are as long as the
        sequence.
    select : how many regions each query opens in the layers that take the pattern: those of `combiner.select` with
        ``block=1``, whose positions it attends one by one (`combiner.Selected`). Steps of generation open them too;
        then all keys and values are kept. None: no region is opened.

    Raises
    ------
    TypeError : an object that is neither a pattern nor a function; a `select` that is no integer.
    NotImplementedError : when a model is made that does not call AttentionInterface. In a forward pass:
        output_attentions (where the model hands it on; GPT-2 drops it and returns none), 4-D masks, masks that a
        model's own code changes, caches other than ``DynamicCache(config=...)``, keys and values changed after the
        cache, and, where `fallback` is False, the layers above.
    ValueError : in a forward pass, ``position_ids`` that restart beside a mask or a cache, where Transformers would
        attend across sequences. In a step of generation, a pattern that `combiner.Decoder` refuses, such as one whose
        default span depends on the length: generate with ``use_cache=False``. `select` below 0, or with a pattern that
        `combiner.Selected` does not take; of a function's patterns that is known in a forward pass.

    Notes
    -----
    The layers of DeepSeek-V4 with compressed keys run `combiner.HeavilyCompressed`, whose regions these keys are; those
    that select keys run a `combiner.Selected` of it. Packed batches raise NotImplementedError there.

    The model's own attention is PyTorch's `scaled_dot_product_attention`, or the model's eager one where that lacks a
    feature (softcap, sinks). The cost is that of `combiner.attention`, and of the model's own attention in layers that
    are left to it. In steps of generation layers with a window are left to it too, over the window's keys alone, and
    layers with a softcap or sinks whose pattern is ``Dense()``.

    `register` replaces the cache layer class of Transformers process-wide, because summaries need the queries of the
    prompt, too. Other attention implementations are unaffected. torch.compile breaks its graph in this attention and
    does not support steps of generation with a cache.
    """
    _install(Attention(_pattern_of(pattern), fallback, _checked(select, pattern)), name)


def swap(
    model: PreTrainedModel,
    pattern: AnyPattern | PatternOf = _DENSE,
    *,
    fallback: bool = False,
    select: int | None = None,
) -> Swapped:
    """Give the self-attention layers of one model a pattern, or `combiner.Window`, and report which layers took one.

    The same as `register` with a new name and ``model.set_attn_implementation(name)``: other models keep their
    attention.

    Parameters
    ----------
    model : a PreTrainedModel of Transformers; changed in place.
    pattern, fallback, select : as in `register`.

    Returns
    -------
    report : filled in by the first forward pass: which layers took the pattern, and why others did not.

    Raises
    ------
    TypeError, ValueError : an object that is no model; a pattern or `select` that `register` refuses.
    NotImplementedError : a model that does not call AttentionInterface. In its first forward pass: no layer took the
        pattern.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel of transformers, got {type(model).__name__}")
    attention = Attention(_pattern_of(pattern), fallback, _checked(select, pattern))
    attention.layers = weakref.WeakKeyDictionary()
    _check_model(model)
    name = f"combiner-{next(_swaps)}"
    _install(attention, name)
    model.set_attn_implementation(name)
    return Swapped(model, name, attention)


_swaps = itertools.count(1)


class Swapped:
    """The report of a `swap`, filled in by the model's first forward pass.

    Attributes
    ----------
    name : the name of the attention implementation.
    taken : the pattern of each layer that took one, by the layer's name; ``Window(size)`` in layers with a window.
    left : the reason why a layer is left to the model's own attention, by the layer's name.
    """

    def __init__(self, model: PreTrainedModel, name: str, attention: Attention) -> None:
        self.name = name
        self._model, self._attention = model, attention
        self._hook = model.register_forward_hook(self._check)

    @property
    def taken(self) -> dict[str, AnyPattern]:
        return {name: met.pattern for name, met in self._met() if met.pattern is not None}

    @property
    def left(self) -> dict[str, str]:
        return {name: met.reason for name, met in self._met() if met.pattern is None}

    def _met(self) -> Iterator[tuple[str, Met]]:
        layers: Any = self._attention.layers
        for name, module in self._model.named_modules():
            if module in layers:
                yield name, layers[module]

    def __deepcopy__(self, _: Any) -> Swapped:  # a copy of the model copies its hook, which holds this report
        return self

    def _check(self, model: torch.nn.Module, *_: Any) -> None:
        """A hook, called after the first forward pass of this model, or of a copy of it."""
        self._hook.remove()
        if model is self._model and not self.taken:
            raise NotImplementedError(f"model must have a layer that takes the pattern, got {self!r}")

    def __repr__(self) -> str:
        kind, taken, left = type(self._model).__name__, self.taken, self.left
        if not taken and not left:
            return f"{kind} with attention {self.name!r}: no layer has called it"
        lines = [f"{kind} with attention {self.name!r}: {len(taken)} layers took the pattern, {len(left)} are left"]
        lines += [f"  {name}: {pattern!r}" for name, pattern in taken.items()]
        lines += [f"  {name}: left, {reason}" for name, reason in left.items()]
        return "\n".join(lines)


def _pattern_of(pattern: Any) -> PatternOf:
    if callable(pattern) and not isinstance(pattern, type):
        function: PatternOf = pattern
        return function
    if isinstance(pattern, Plan | tuple) or makes_plans(pattern):
        return lambda module: pattern
    raise no_pattern(pattern, "a pattern such as combiner.Fixed(64) or a function of a module")


def _checked(select: int | None, pattern: Any) -> int | None:
    """The argument `select`, beside a pattern or a function that returns patterns."""
    if select is None:
        return None
    count = as_integer("select", select, 0, bits=31)
    if not callable(pattern):
        Selected(pattern, np.zeros(0, int))  # refuses a pattern that it does not take
    return count


def _install(attention: Attention, name: str) -> None:
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] = CombinerLayer
    _check_new_models()


@functools.cache  # once
def _check_new_models() -> None:
    """Makes models that do not call AttentionInterface refuse the names registered here.

    Transformers accepts any registered name for any model. A model that never looks the name up would keep its own
    attention without a word, or raise KeyError."""
    choose = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(choose)
    def checked(self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if isinstance(AttentionInterface().get(requested_attention), Attention):
            _check_model(self)
        return choose(self, requested_attention, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = checked


def _check_model(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation():
        raise NotImplementedError(
            "a model must leave attention to transformers.AttentionInterface for combiner attention, "
            f"got {type(model).__name__}, which has its own"
        )
