# SPDX-License-Identifier: Apache-2.0
"""PyTorch's masks, in which True or -inf leaves a key out, read as causality and as a mask of keys that take part."""

from __future__ import annotations

import torch
from torch import Tensor


def says_causal(attn_mask: Tensor, length: int, is_hinted: bool) -> bool:
    """Whether PyTorch's mask is causal; False for a mask that hides nothing.

    Compiled code cannot branch on the values of a mask. It takes the mask for causal: with the hint without a look, as
    PyTorch does, and else with a check at run time.

    Raises
    ------
    TypeError, ValueError : a mask that is no tensor, has another shape, or is neither causal nor hides nothing.
    """
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(attn_mask).__name__}")
    if attn_mask.ndim not in (2, 3) or attn_mask.shape[-2:] != (length, length):
        raise ValueError(f"attn_mask must have shape {(length, length)}, got {tuple(attn_mask.shape)}")
    is_compiled = torch.compiler.is_compiling()
    if is_compiled and is_hinted:
        return True
    hidden = _hidden("attn_mask", attn_mask)
    is_causal = (hidden == torch.ones_like(hidden).triu(1)).all()
    if is_compiled:
        torch._assert_async(is_causal, f"attn_mask must be causal in compiled code: {_NO_MASKS}")
        return True
    if is_causal:
        return True
    if hidden.any():
        raise ValueError(f"attn_mask must be causal or hide nothing: {_NO_MASKS}")
    return False


_NO_MASKS = "what else a query sees is the pattern's matter, as combiner.Plan.from_parts makes any"


def key_mask_of(key_padding_mask: Tensor | None) -> Tensor | None:
    """PyTorch's mask, True for keys to leave out, as a mask that is True for keys that take part."""
    if key_padding_mask is None:
        return None
    if not isinstance(key_padding_mask, Tensor):
        raise TypeError(f"key_padding_mask must be a torch.Tensor, got {type(key_padding_mask).__name__}")
    return ~_hidden("key_padding_mask", key_padding_mask)


def _hidden(name: str, mask: Tensor) -> Tensor:
    """True where a mask of PyTorch, bool or added to logits, leaves a key out."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be bool, True for keys to leave out, got {mask.dtype}")
    hidden = mask.isneginf()
    holds_no_bias = (hidden | (mask == 0)).all()
    message = f"{name} must hold 0 and -inf alone where it is floating-point: there are no biases of logits"
    if torch.compiler.is_compiling():
        torch._assert_async(holds_no_bias, message)
    elif not holds_no_bias:
        raise ValueError(message)
    return hidden
