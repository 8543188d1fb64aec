# SPDX-License-Identifier: Apache-2.0
"""Several calls in one: packed sequences, each as if alone, and the components of a mixture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..arguments import Array
from ..composed import Mixture
from .heads import flat
from .parts import Pattern, of_sequences, region_count

Saved: TypeAlias = dict[str, Any]
Rows: TypeAlias = dict[str, Array | None]  # arrays of regions and of biases, by the name of the argument
AXES = {"key_bias": -1, "region_bias": -1}  # of the rows in these; in all others it is -2


def packed_forward(
    forward: Callable[..., Any],
    arrays: tuple[Array, ...],
    pattern: Pattern,
    cu_seqlens: Sequence[int],
    key_mask: Array | None,
    rows: Rows,
    options: dict[str, Any],
) -> tuple[list[Any], Saved]:
    """The results of `forward` for each sequence alone, and what the backward pass needs. Region axes are concatenated
    in the order of the sequences. A sink, one of the options, is that of every sequence."""
    B, Hk = flat(arrays[1]).shape[:2]
    results: list[Any] = []
    saved: Saved = {"sequences": [], "positions": [], "regions": []}
    first = 0
    for (start, end), own in zip(itertools.pairwise(cu_seqlens), of_sequences(pattern, cu_seqlens), strict=True):
        here = slice(start, end)
        there = slice(first, first + region_count(own, B, Hk, end - start, options["is_causal"]))
        first = there.stop
        mask = None if key_mask is None else np.asarray(key_mask)[..., here]
        given = {name: cut(x, here if name == "key_bias" else there, AXES.get(name, -2)) for name, x in rows.items()}
        result, kept = forward(*(cut(x, here) for x in arrays), pattern=own, key_mask=mask, **given, **options)
        results.append(result)
        for name, x in zip(saved, (kept, here, there), strict=True):
            saved[name].append(x)
    return results, saved


def packed_out(results: list[Any], saved: Saved) -> tuple[Array, Saved]:
    """out of all sequences, and what is saved with out and lse; a mixture has no lse."""
    out, each = join(results), [kept.get("lse") for kept in saved["sequences"]]
    assert out is not None
    return out, saved | {"out": out, "lse": None if each[0] is None else np.concatenate(each, axis=-1)}


def packed_backward(
    backward: Callable[..., Any], grad_out: Array, saved: Saved, grad_lse: Array | None
) -> dict[str, Any]:
    """The gradients of all sequences, by the names of the arguments."""
    each = [
        backward(cut(grad_out, here), own, grad_lse=None if grad_lse is None else np.asarray(grad_lse)[..., here])
        for own, here in zip(saved["sequences"], saved["positions"], strict=True)
    ]
    return join_gradients(each)


def join_gradients(each: Sequence[Any]) -> dict[str, Any]:
    """The gradients of sequences, one sequence after the other; of a sink, which they share, the sum."""
    parts = {name: [getattr(own, name) for own in each] for name in each[0]._fields}
    joined: dict[str, Any] = {name: join(x, axis=AXES.get(name, -2)) for name, x in parts.items() if name != "sink"}
    return joined | {"sink": None if parts["sink"][0] is None else sum(parts["sink"])}


def mixture_forward(
    forward: Callable[..., Any],
    arrays: tuple[Array, ...],
    mixture: Mixture,
    key_mask: Array | None,
    rows: Rows,
    options: dict[str, Any],
) -> tuple[Array, Saved]:
    """The mean of the components' outs. Region axes, and the rows that dropout numbers, are concatenated in the order
    of the components."""
    (B, Hk, L, _), is_causal = flat(arrays[1]).shape, options["is_causal"]
    outs: list[Array] = []
    components: list[Saved] = []
    first = row = 0
    for pattern in mixture.patterns:
        own: Any = pattern
        there = slice(first, first + region_count(own, B, Hk, L, is_causal))
        given = {name: x if name == "key_bias" else cut(x, there, AXES.get(name, -2)) for name, x in rows.items()}
        out, saved = forward(*arrays, pattern=own, key_mask=key_mask, dropout_row=row, **given, **options)
        outs.append(out)
        components.append(saved)
        first, row = there.stop, row + L + there.stop - there.start
    mean: Array = sum(outs[1:], outs[0]) / len(outs)
    return mean, {"components": components, "out": mean}


def mean_of_gradients(each: list[Any]) -> dict[str, Any]:
    """The mean of the components' gradients; those of arrays of regions, concatenated, and divided alike."""
    parts = {name: [getattr(own, name) for own in each] for name in each[0]._fields}
    means: dict[str, Any] = {}
    for name, x in parts.items():
        if name.startswith("region"):
            means[name] = join(x, 1 / len(each), AXES.get(name, -2))
        else:
            means[name] = None if x[0] is None else sum(x[1:], x[0]) / len(each)
    return means


def cut(x: Array | None, rows: slice, axis: int = -2) -> Array | None:
    """Some of the rows of `[..., rows, features]`, or with axis=-1 of `[..., rows]`; None for None."""
    if x is None:
        return None
    return np.asarray(x)[..., rows] if axis == -1 else np.asarray(x)[..., rows, :]


def join(parts: Sequence[Array | None], factor: float = 1.0, axis: int = -2) -> Array | None:
    """The rows of all parts, one part after the other, times a factor; None where a part is None."""
    rows = [x for x in parts if x is not None]
    return factor * np.concatenate(rows, axis=axis) if len(rows) == len(parts) else None
