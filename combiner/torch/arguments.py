# SPDX-License-Identifier: Apache-2.0
"""The arguments of attention: tensors and options, checked, and converted for the operators and stages."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..arguments import as_integer
from ..problem import is_turned
from ..signatures import Layout
from .ops import NO_FORWARD_MODE
from .pattern_text import check_is_instance
from .patterns import choices_of
from .tensors import DTYPES, at_least_float32


def check_tensors(layout: Layout, *, has_offset: bool = False, **given: Tensor | None) -> list[Any]:
    """The tensors, checked, cast where autocast asks for it, and with heads before positions. None stays None.

    has_offset : whether query may be shorter than key.
    """
    is_autocast = torch.is_autocast_enabled("cpu")
    found: list[Any] = []
    for name, x in given.items():
        if x is None and name.startswith("region"):
            found.append(x)
            continue
        x = check_is_tensor(name, x)
        if x.is_nested:
            raise ValueError(
                f"{name} must be one tensor, got a nested one: give its values(), its offsets() as cu_seqlens"
            )
        if x.device.type not in ("cpu", "meta"):
            raise ValueError(f"{name} must be on the CPU, got {x.device}: {name}.cpu() is")
        check_is_real(name, x)
        if is_autocast and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype("cpu"))
        if found and x.dtype != found[0].dtype:
            raise TypeError(f"{name} must be {found[0].dtype} like query, got {x.dtype}")
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name} must have no tangent: {NO_FORWARD_MODE}")
        found.append(x)
    if is_turned(layout):
        found = [None if x is None else laid_out(x, layout) for x in found]
    if not torch.compiler.is_compiling() and not has_offset:
        _check_lengths(*found[:3])
    return found


def check_is_tensor(name: str, x: object) -> Tensor:
    """x, which must be a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    return x


def check_is_real(name: str, x: object) -> None:
    """Refuses what is no tensor of a dtype that the library computes with."""
    dtype = check_is_tensor(name, x).dtype
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {dtype}")


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """A view of x, given in this layout, with heads before positions, or the reverse. x itself if it has no heads."""
    return x if layout == "BHLD" or x.ndim < 3 else x.transpose(-3, -2)


def _check_lengths(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuses keys of another length. The core refuses them too, but its message does not mention cross-attention."""
    for name, x in (("key", key), ("value", value)):
        if query.ndim > 1 and x.ndim > 1 and x.shape[-2] != query.shape[-2]:
            raise ValueError(
                f"{name} must have query's length, {query.shape[-2]}, got shape {tuple(x.shape)}: there is no "
                "cross-attention, because a region's summary is of positions that have a query, a key and a value each"
            )


def check_scale(scale: object) -> None:
    """Refuses a tensor: the operators take a number, so a tensor would get no gradient."""
    if isinstance(scale, Tensor):
        raise TypeError(
            "scale must be a number, got a torch.Tensor, which would get no gradient: give query * scale, and scale=1.0"
        )


def as_bounds(cu_seqlens: npt.ArrayLike | Tensor | None) -> Tensor | None:
    """The boundaries of packed sequences as a tensor."""
    return None if cu_seqlens is None else torch.as_tensor(cu_seqlens)


def options_of_stages(
    positions: Tensor, pattern: Any, is_causal: bool, scale: float | None, key_mask: Tensor | None, cu_seqlens: Any
) -> dict[str, Any]:
    """The options of both stages, checked, and the pattern's own tensors. `positions`: a query or key of all."""
    check_scale(scale)
    check_is_instance(pattern)
    return {
        "is_causal": is_causal,
        "scale": scale,
        "key_mask": whole_key_mask(key_mask, positions),
        "cu_seqlens": as_bounds(cu_seqlens),
        **choices_of(pattern)._asdict(),
    }


def whole_key_mask(key_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask, checked, as a view of shape `[..., L]` with all leading axes of query but the heads."""
    if key_mask is None:
        return None
    check_is_tensor("key_mask", key_mask)
    if key_mask.dtype != torch.bool:
        hint = ": of a mask to be added, key_mask == 0" if key_mask.is_floating_point() else ""
        raise TypeError(f"key_mask must be bool, True for keys that take part, got {key_mask.dtype}{hint}")
    expected = query.shape[:-3] + query.shape[-2:-1]
    of_keys = key_mask[..., 0, 0, :] if key_mask.ndim > 2 and key_mask.shape[-3:-1] == (1, 1) else key_mask
    if of_keys.shape == expected:
        return of_keys
    is_broadcast = of_keys.ndim <= len(expected) and all(
        n in (1, of) for n, of in zip(reversed(of_keys.shape[:-1]), reversed(expected[:-1]), strict=False)
    )
    if is_broadcast and of_keys.shape[-1:] == expected[-1:]:
        return of_keys.expand(expected)
    hint = ""
    if key_mask.shape[-2:] == 2 * query.shape[-2:-1]:
        hint = ": what each query sees is the pattern's matter, and is_causal's; Plan.from_parts makes any"
    raise ValueError(f"key_mask must have shape {tuple(expected)}, got {tuple(key_mask.shape)}{hint}")


def check_terms(
    query: Tensor, softcap: float | None, key_bias: Tensor | None, region_bias: Tensor | None, sink: Tensor | None
) -> None:
    """Refuses a softcap that is a tensor, as a scale that is one; and terms that are no tensors of lse's dtype."""
    if isinstance(softcap, Tensor):
        raise TypeError("softcap must be a number or None, got a torch.Tensor, which would get no gradient")
    expected = at_least_float32(query.dtype)
    for name, x in (("key_bias", key_bias), ("region_bias", region_bias), ("sink", sink)):
        if x is None:
            continue
        if check_is_tensor(name, x).dtype != expected:
            raise TypeError(f"{name} must be {expected}, as lse is, got {x.dtype}")
        if x.device.type not in ("cpu", "meta"):
            raise ValueError(f"{name} must be on the CPU, got {x.device}: {name}.cpu() is")
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name} must have no tangent: {NO_FORWARD_MODE}")


def whole_terms(
    query: Tensor, key: Tensor, key_bias: Tensor | None, region_bias: Tensor | None, sink: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The terms as views with all leading axes of query and all heads, so that autograd sums what is broadcast.

    The core refuses terms that do not broadcast to that."""
    lead, heads = query.shape[:-3], query.shape[-3:-2]

    def whole(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        if x is None or x.ndim > len(shape):
            return x
        fits = all(n in (1, of) for n, of in zip(reversed(x.shape), reversed(shape), strict=False))
        return x.expand(shape) if fits else x

    def of_heads(x: Tensor | None) -> tuple[int, ...]:
        own = heads if x is not None and x.ndim > 1 and x.shape[-2:-1] == heads else key.shape[-3:-2]
        return *lead, *own, *(() if x is None else x.shape[-1:])

    return (
        whole(key_bias, of_heads(key_bias)),
        whole(region_bias, of_heads(region_bias)),
        whole(sink, (*lead, *heads)),
    )


def seed_of(dropout_p: float, seed: int | None) -> Tensor | None:
    """The seed as an int64 of the same 64 bits; None draws it from PyTorch's generator. None without dropout."""
    if seed is not None and not torch.compiler.is_compiling():  # a seed of compiled code may be symbolic
        seed = as_integer("seed", seed, 0, bits=64)
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, ())
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
