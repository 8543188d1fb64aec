# SPDX-License-Identifier: Apache-2.0
"""What lies between the public functions and the core: arguments as the core takes them, what a forward call saves for
its backward, and the mean of several calls that a `Mixture` is.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _core
from .patterns import Mixture, Plans, segment_plans
from .plan import Array, as_integer, widened

Saved: TypeAlias = dict[str, Any]
Dropout: TypeAlias = tuple[float, int, Array | None]  # probability, seed, rows of the components before, by segment

SUMMARIZE, ATTEND, BOTH = 1, 2, 3  # stages
_PROBLEM = (
    "query", "key", "value", "plan", "scale", "key_mask", "cu_seqlens", "region_query", "region_key", "dropout",
)  # fmt: skip
_RESULT = ("summary_key", "summary_value", "summary_lse", "out", "lse")


class Inputs(NamedTuple):
    """What every forward function is given, in the order of ``_core.forward``."""

    query: Array
    key: Array
    value: Array
    pattern: Any
    is_causal: bool
    scale: float | None
    key_mask: Array | None
    cu_seqlens: Any
    region_query: Array | None
    region_key: Array | None
    dropout: Dropout | None = None

    def length(self) -> int:
        """L of the query; 0 for what is none, which the core refuses."""
        shape = np.shape(self.query)
        return shape[-2] if len(shape) > 1 else 0

    def segments(self) -> npt.NDArray[np.int64]:
        """`cu_seqlens` once checked, or the bounds of the one sequence."""
        L = self.length()
        if self.cu_seqlens is None:
            return np.array([0, L])
        given = np.asarray(self.cu_seqlens)
        if not np.issubdtype(given.dtype, np.integer):
            raise TypeError(f"cu_seqlens must hold integers, got {given.dtype}")
        if given.ndim != 1 or not given.size:
            raise ValueError(f"cu_seqlens must have shape (N + 1,), got {given.shape}")
        if given[0] != 0 or given[-1] != L or (given[1:] < given[:-1]).any():
            raise ValueError(f"cu_seqlens must run from 0 to the length of query, {L}, and not decrease, got {given}")
        return given.astype(np.int64)


def dropout(dropout_p: float, seed: int | None) -> Dropout | None:
    """The two arguments once checked, with a seed drawn where there is none; None where nothing falls."""
    if seed is not None:
        seed = as_integer("seed", seed, 0, bits=64)
    try:
        p = float(dropout_p)
    except (TypeError, ValueError):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}") from None
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if p == 0:
        return None
    return p, int.from_bytes(os.urandom(8)) if seed is None else seed, None


def forward(
    stages: int,
    inputs: Inputs,
    *,
    region_value: Array | None = None,
    out: Array | None = None,
    function: str | None = None,
) -> tuple[tuple[Any, ...], Saved]:
    """The core's results; and what `backward` needs if `function`, whose name it is to know them by, is given."""
    return _run(stages, single(inputs), region_value, out, function)


def single(inputs: Inputs) -> Inputs:
    """The inputs of one core call; a `Mixture` is refused."""
    if isinstance(inputs.pattern, Mixture):
        raise ValueError("pattern must have one normaliser, got a Mixture, whose components have one each")
    return _in_segments(inputs)


def _in_segments(inputs: Inputs) -> Inputs:
    """With a plan for each sequence of a packed one."""
    if inputs.cu_seqlens is None:
        return inputs
    segments = inputs.segments()
    return inputs._replace(pattern=segment_plans(inputs.pattern, segments, inputs.is_causal), cu_seqlens=segments)


def _run(
    stages: int,
    inputs: Inputs,
    region_value: Array | None,
    out: Array | None,
    function: str | None,
    adds: bool = False,
) -> tuple[tuple[Any, ...], Saved]:
    done = _core.forward(stages, *inputs, region_value, out, adds, function is not None)
    if function is None:
        return done, {}
    out, lse, *summary, plan, scale = done
    known = {**inputs._asdict(), "plan": plan, "scale": scale}
    known.update(zip(_RESULT, (*summary, out, lse), strict=True))
    return done, {"function": function, **{name: known[name] for name in _PROBLEM + _RESULT}}


def workspace_bytes(inputs: Inputs, is_backward: bool) -> int:
    """What the core takes at once, beside results: of a mixture what its largest component does."""
    if not isinstance(inputs.pattern, Mixture):
        return _core.workspace_bytes(*_in_segments(inputs), False, is_backward)
    is_wide = np.asarray(inputs.query).dtype.itemsize > 2
    each = enumerate(components(inputs)[0])
    return max(_core.workspace_bytes(*component, is_wide and n > 0, is_backward) for n, (component, _) in each)


def backward(
    stages: int,
    function: str,
    saved: Saved,
    *gradients: Array | None,
    sums: tuple[Array, Array, Array] | None = None,
) -> tuple[Any, ...]:
    """The core's gradients, from what `forward` saved for the same function: of query, key and value added to `sums`
    if they are given."""
    if not isinstance(saved, dict):
        raise TypeError(f"saved must be the dict that {function} returned, got {type(saved).__name__}")
    if saved.get("function") != function:
        raise ValueError(f"saved must come from {function}, got one from {saved.get('function')}")
    return _core.backward(stages, *(saved[name] for name in _PROBLEM + _RESULT), *(*gradients, sums))


# A mixture is a call for each component, which reads its own part of the region axis. The core adds up what they make,
# but for 16-bit dtypes, whose sums are float32, and for outputs that are saved.


def mean_forward(inputs: Inputs, *, out: Array | None = None, function: str | None = None) -> tuple[Array, Saved]:
    """The mean of the components' outputs; and what `mean_backward` needs if `function` is given."""
    each, region_count = components(inputs)
    saved: Saved = {"function": function, "components": [], "region_count": region_count}
    own: Any = None
    total: Any = None
    for n, (component, regions) in enumerate(each):
        is_last = n + 1 == len(each)
        to = out if is_last else None  # the caller's is written when all else is done
        adds = total is not None and to is None and function is None and total.dtype == own.dtype
        (own, *_), own_saved = _run(BOTH, component, None, total if adds else to, function, adds)
        if adds:
            continue
        is_kept = function is not None and not is_last
        if function is not None:
            saved["components"].append(({**own_saved, "out": own if is_kept else own.copy()}, regions))
        wide = widened(own)
        total = wide if total is None else np.add(total, wide, out=None if is_kept else wide)
    np.divide(total, len(each), out=own, casting="same_kind")
    return own, saved


def mean_backward(function: str, saved: Saved, grad_out: Array) -> list[Array | None]:
    """The means of the components' gradients of query, key, value, region_query and region_key."""
    count = len(saved["components"])
    sums: Any = None
    of_regions: list[Any] = [None, None]
    for component, regions in saved["components"]:
        adds = sums is not None and sums[0].dtype == grad_out.dtype
        own = backward(BOTH, function, component, grad_out, None, None, None, sums=tuple(sums) if adds else None)
        if not adds:
            wide = [widened(x) for x in own[:3]]
            sums = wide if sums is None else [np.add(x, y, out=x) for x, y in zip(sums, wide, strict=True)]
        for n, grad in enumerate(own[3:5]):
            if grad is None:
                continue
            if of_regions[n] is None:
                of_regions[n] = np.empty((*grad.shape[:-2], saved["region_count"], grad.shape[-1]), grad.dtype)
            of_regions[n][..., regions, :] = widened(grad) / count
    return [np.divide(x, count, out=x).astype(grad_out.dtype, copy=False) for x in sums] + of_regions


Regions: TypeAlias = slice | npt.NDArray[np.int64]  # one component's part of the region axis


def components(inputs: Inputs) -> tuple[list[tuple[Inputs, Regions]], int]:
    """Each component's call and regions; and R. Regions lie sequence by sequence, in each component by component; so
    do the rows that dropout numbers."""
    segments = inputs.segments()
    lengths = np.diff(segments)
    packed = inputs.cu_seqlens is not None
    if packed:
        plans = [segment_plans(each, segments, inputs.is_causal) for each in inputs.pattern.patterns]
    else:
        plans = inputs.pattern.plan(inputs.length(), inputs.is_causal)
    counts = np.array([_count_regions(each, len(lengths)) for each in plans], np.int64)
    owner = np.repeat(np.tile(np.arange(len(plans)), len(lengths)), counts.T.ravel())  # each region's component
    rows = np.cumsum(lengths + counts, axis=0) - (lengths + counts)
    calls = []
    for n, plan in enumerate(plans):
        regions = np.flatnonzero(owner == n) if packed else slice(*np.searchsorted(owner, (n, n + 1)))
        component = inputs._replace(
            pattern=plan,
            cu_seqlens=segments if packed else None,
            region_query=_take(inputs.region_query, "region_query", regions, len(owner)),
            region_key=_take(inputs.region_key, "region_key", regions, len(owner)),
            dropout=inputs.dropout and (*inputs.dropout[:2], rows[n]),
        )
        calls.append((component, regions))
    return calls, len(owner)


def _count_regions(plans: Plans, segments: int) -> npt.NDArray[np.int64]:
    """R of each sequence: the largest of its plans'."""
    each = [plan.region_count for plan in (plans if isinstance(plans, tuple) else (plans,))]
    counts: npt.NDArray[np.int64] = np.array(each, np.int64).reshape(segments, len(each) // max(segments, 1))
    return counts.max(axis=1, initial=0)  # type: ignore[no-any-return]


def _take(given: Array | None, name: str, regions: Regions, count: int) -> Array | None:
    if not isinstance(given, np.ndarray) or given.ndim < 2:  # absent, or for the core to refuse
        return given
    if given.shape[-2] != count:
        raise ValueError(f"{name} must have shape (..., {count}, D), got {given.shape}")
    return given[..., regions, :]
