# SPDX-License-Identifier: Apache-2.0
"""From the arguments of the public functions to problems of the core, and from their results to what a user gets.

functional.py, torch/, jax/
    |  query, key, value, pattern, is_causal, scale, ...
make_problem        plans made, masks broadcast, heads before positions
    |
_core.Problem       checked, immutable; of a `Mixture` with the plans of each component
    |  forward, backward, workspace_bytes
Results, gradients
    |
Saved               a problem and its results, for the backward function
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ._core import Problem, Results
from .arguments import Array, as_integer, as_integers, as_number, choice_number
from .composed import Mixture, segment_plans
from .plan import Plan
from .signatures import Layout, Terms

SUMMARIZE, ATTEND, BOTH = 1, 2, 3  # stages
KEEP_NOTHING, KEEP_SOFTMAX, KEEP_ALL = 0, 1, 2  # what Problem.forward returns beside out, lse and summaries
Dropout: TypeAlias = tuple[float, int]  # probability, seed
# of query, key, value, region_query, region_key, region_value, key_bias, region_bias, sink
Gradients: TypeAlias = tuple[Any, ...]
NO_TERMS: Terms[Array] = Terms()


def make_problem(
    stages: int,
    query: Array,
    key: Array,
    value: Array,
    pattern: Any,
    is_causal: bool,
    scale: float | None,
    key_mask: Array | None,
    cu_seqlens: Any,
    layout: Layout = "BHLD",
    region_query: Array | None = None,
    region_key: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    region_value: Array | None = None,
    terms: Terms[Array] = NO_TERMS,
    offset: int | None = None,
) -> Problem:
    """The problem of these arguments, which are those of `attention`, with heads before positions in any layout.

    Parameters
    ----------
    stages : SUMMARIZE, ATTEND (then region_key is k_R) or BOTH.
    region_value : h_R `[..., Hq, R, Dv]`, for ATTEND alone.
    terms : of the logit; for ATTEND region_bias is b_R.
    offset : for ATTEND alone, the position of the first query.

    Raises
    ------
    TypeError, ValueError, OverflowError : as `attention`.
    """
    if is_turned(layout):
        with turned_shapes():
            query, key, value = turn(query), turn(key), turn(value)
            region_query, region_key, region_value = turn(region_query), turn(region_key), turn(region_value)
            return make_problem(
                stages, query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens, "BHLD",
                region_query, region_key, dropout_p, seed, region_value, terms, offset,
            )  # fmt: skip
    dropout = read_dropout(dropout_p, seed)
    if offset is not None:
        offset = as_integer("offset", offset, 0)
    positions = query if offset is None else key  # an array of all positions
    if key_mask is not None:
        key_mask = broadcast_mask(key_mask, positions)
    segments = None if cu_seqlens is None else _read_segments(cu_seqlens, _length(positions) or 0)
    is_mixture = isinstance(pattern, Mixture)
    if is_mixture and stages != BOTH:
        raise ValueError("pattern must have one normaliser, got a Mixture, whose components have one each")
    plan = plan_of(pattern, positions, segments, is_causal)
    return Problem(
        stages, query, key, value, plan, is_causal, scale, key_mask, segments,
        region_query, region_key, region_value, dropout, *terms, is_mixture, offset,
    )  # fmt: skip


def read_dropout(dropout_p: float, seed: int | None) -> Dropout | None:
    """The two arguments once checked, with a seed drawn where there is none; None where no weight is dropped."""
    if seed is not None:
        seed = as_integer("seed", seed, 0, bits=64)
    p = as_number("dropout_p", dropout_p)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if p == 0:
        return None
    return p, int.from_bytes(os.urandom(8)) if seed is None else seed


def _length(x: Any) -> int | None:
    """L of a query or key; None for one that the core refuses."""
    if not isinstance(x, np.ndarray):
        if not hasattr(x, "__array__"):
            return None
        try:
            x = np.asarray(x)
        except (TypeError, ValueError):
            return None
    return x.shape[-2] if x.ndim > 1 else None


def plan_of(pattern: Any, positions: Any, segments: npt.NDArray[np.int64] | None, is_causal: bool) -> Any:
    """The plan, or plans for each head, that a pattern makes for an array of all positions, or for each sequence; of a
    mixture a tuple of those of its components."""
    if isinstance(pattern, Mixture):
        return tuple(plan_of(each, positions, segments, is_causal) for each in pattern.patterns)
    if segments is not None:
        return segment_plans(pattern, segments, is_causal)
    if isinstance(pattern, Plan | tuple):
        return pattern
    make = None if isinstance(pattern, type) else getattr(pattern, "plan", None)
    if make is None:
        expected = "a pattern such as combiner.Fixed(), a combiner.Plan or a tuple of plans"
        raise TypeError(f"pattern must be {expected}, got {type(pattern).__name__}")
    if not callable(make):
        raise TypeError(f"the plan of pattern must be a method, got {type(make).__name__}")
    length = _length(positions)
    return None if length is None else make(length, is_causal)  # the core reads the query before the plan


def _read_segments(cu_seqlens: Any, length: int) -> npt.NDArray[np.int64]:
    """`cu_seqlens` once checked: where sequences begin and end."""
    given = as_integers("cu_seqlens", cu_seqlens)
    if given.ndim != 1 or not given.size:
        raise ValueError(f"cu_seqlens must have shape (N + 1,), got {given.shape}")
    if given[0] != 0 or given[-1] != length or (given[1:] < given[:-1]).any():
        raise ValueError(f"cu_seqlens must run from 0 to the length of query, {length}, and not decrease, got {given}")
    return given.astype(np.int64)


def broadcast_mask(mask: Any, positions: Any) -> Any:
    """`key_mask` as the core takes it, a row of L for each batch entry. The core refuses a mask that does not broadcast
    to that."""
    shape = np.shape(positions) if isinstance(positions, np.ndarray) else ()
    if type(mask) is not np.ndarray or len(shape) < 2 or mask.shape[-1:] != shape[-2:-1]:
        return mask
    whole = (*shape[:-3], shape[-2])
    if mask.shape == whole:
        return mask
    if mask.ndim > len(whole) and mask.shape[-3:-1] == (1, 1):  # axes of heads and queries
        mask = mask[..., 0, 0, :]
    try:
        return np.broadcast_to(mask, whole)
    except ValueError:
        return mask


# ---- layouts


def is_turned(layout: Layout) -> bool:
    """Whether arrays of this layout have positions before heads."""
    return layout != "BHLD" and choice_number("layout", layout, ("BHLD", "BLHD")) == 1


def turn(x: Any) -> Any:
    """A view of an array with heads and positions exchanged; x itself if it has no heads or is no array."""
    if hasattr(x, "__array__") and not isinstance(x, np.ndarray) and not hasattr(x, "__dlpack__"):
        x = np.asarray(x)
    return x.swapaxes(-3, -2) if isinstance(x, np.ndarray) and x.ndim > 2 else x


@contextmanager
def turned_shapes() -> Iterator[None]:
    """Within it, the core's errors about shapes add that heads come before positions."""
    try:
        yield
    except ValueError as error:
        if "must have shape" not in str(error):
            raise
        raise ValueError(f"{error}, with heads before positions, as layout='BHLD' has them") from None


# ---- calls


def run_attention(problem: Problem, layout: Layout, out: Array | None, return_lse: bool) -> Array | tuple[Array, Array]:
    """Forward, with nothing saved: out, or (out, lse)."""
    if return_lse and problem.is_mixture:
        raise ValueError("return_lse must be False with a Mixture, whose components have a normaliser each")
    done: Any
    if not is_turned(layout):
        done = problem.forward(out, return_lse)
        own: Any = done[:2] if return_lse else done[0]  # takes no memory for `out`, which is written by now
        return own  # type: ignore[no-any-return]
    with turned_shapes():
        done = problem.forward(turn(out) if isinstance(out, np.ndarray) else out, return_lse)
    own = turn(done[0]) if out is None else out
    return (own, done[1]) if return_lse else own


def run_forward(problem: Problem, function: str, layout: Layout, out: Array | None = None) -> tuple[Any, Saved]:
    """Forward: the results in the given layout, and what `run_backward` needs for the same function."""
    if not is_turned(layout):
        results = problem.forward(out, True, KEEP_ALL)
        return results, Saved(function, layout, problem, results)
    with turned_shapes():
        results = problem.forward(turn(out) if isinstance(out, np.ndarray) else out, True, KEEP_ALL)
    turned = (turn(results[0]) if out is None else out, *results[1:3], *map(turn, results[3:5]), *results[5:])
    return turned, Saved(function, layout, problem, results)


def run_backward(
    function: str,
    saved: Saved,
    grad_out: Any = None,
    grad_lse: Array | None = None,
    grad_summary_key: Array | None = None,
    grad_summary_value: Array | None = None,
    grad_summary_bias: Array | None = None,
) -> Gradients:
    """The gradients of what `run_forward` of the same function was given, in its layout."""
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be what {function} returned, got {type(saved).__name__}")
    if saved.function != function:
        raise ValueError(f"saved must come from {function}, got one from {saved.function}")
    problem, results = saved.problem, saved.results
    if grad_lse is not None and problem.is_mixture:
        raise ValueError("grad_lse must be None with a Mixture, whose components have a normaliser each")
    if saved.layout == "BHLD":
        given = grad_out, grad_lse, grad_summary_key, grad_summary_value, grad_summary_bias
        gradients = problem.backward(results, *given)
    else:
        with turned_shapes():
            given = turn(grad_out), grad_lse, turn(grad_summary_key), turn(grad_summary_value), grad_summary_bias
            gradients = problem.backward(results, *given)
        gradients = *map(turn, gradients[:6]), *gradients[6:]
    if gradients[6] is gradients[7] is gradients[8] is None:
        return tuple(gradients)
    return *gradients[:6], *summed_terms(problem, *gradients[6:])


def summed_terms(
    problem: Problem, key_bias: Array | None, region_bias: Array | None, sink: Array | None
) -> tuple[Array | None, Array | None, Array | None]:
    """The gradients of key_bias, region_bias and sink in the shapes of these, summed over what these broadcast to."""
    given: Any = problem
    return (
        None if key_bias is None else _summed(key_bias, np.shape(given.key_bias)),
        None if region_bias is None else _summed(region_bias, np.shape(given.region_bias)),
        None if sink is None else _summed(sink[..., 0], np.shape(given.sink)),
    )


def _summed(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum of x over the axes along which an array of this shape broadcasts to that of x."""
    whole = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(a for a, (n, own) in enumerate(zip(x.shape, whole, strict=False)) if own == 1 != n)
    total: Array = x.sum(axis=axes) if axes else x
    return total.reshape(shape)


class Saved:
    """What a forward function saves for its backward function: its arguments, not copied, and results.

    ``saved[name]`` is one of them: "query", "key", "value", "plan", "scale", "key_mask", "cu_seqlens", "region_query",
    "region_key", "region_value", "dropout" (None, or probability and seed), "softcap", "key_bias", "region_bias",
    "sink", "offset", "out" `[..., Hq, L, Dv]`, "lse" `[..., Hq, L]`, "softmax" `[..., Hq, L, 2]` (the largest logit m
    of each query and the sum of its e^(logit - m)), "summary_key" `[..., Hq or Hk, R, D]`, "summary_value"
    `[..., Hq, R, Dv]`, "summary_lse" `[..., Hq, R]`, "summary_bias" `[..., Hq or Hk, R]` or "summary_softmax"
    `[..., Hq, R, 2]`, each None where it is absent, all with heads before positions. With an offset out, lse and
    softmax have the rows of the queries given. A `Mixture` of n components has their plans in a tuple,
    "softmax" `[..., Hq, L, 2 n]`, "component_out" `[..., Hq, L, n Dv]`, no lse, and summaries of the regions of all
    components. It can be copied and pickled.
    """

    __slots__ = ("function", "layout", "problem", "results")

    def __init__(self, function: str, layout: Layout, problem: Problem, results: Results) -> None:
        if not isinstance(function, str):
            raise TypeError(f"function must be a str, got {type(function).__name__}")
        is_turned(layout)
        if not isinstance(problem, Problem):
            raise TypeError(f"problem must be a Problem, got {type(problem).__name__}")
        if not isinstance(results, Results):
            raise TypeError(f"results must be Results, got {type(results).__name__}")
        self.function = function
        self.layout = layout
        self.problem = problem
        self.results = results

    def __getitem__(self, name: str) -> Any:
        """The argument or result of this name; a KeyError where there is none."""
        for part in (self.results, self.problem):
            if not name.startswith("_") and hasattr(part, name):
                return getattr(part, name)
        raise KeyError(name)

    def with_results(self, **results: Array | None) -> Saved:
        """The same with other arrays for some of the results."""
        made = dict(zip(Results.__match_args__, self.results, strict=True)) | results
        return Saved(self.function, self.layout, self.problem, Results(made.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Saved, (self.function, self.layout, self.problem, self.results)

    def __repr__(self) -> str:
        return f"<saved by {self.function}: {_describe(self.problem)}, layout {self.layout}>"


def _describe(problem: Problem) -> str:
    """A problem in a line."""
    arrays = {name: np.shape(getattr(problem, name)) for name in ("query", "key", "value")}
    shapes = ", ".join(f"{name} {shape}" for name, shape in arrays.items())
    components = problem.plan if problem.is_mixture else (problem.plan,)
    each = "; ".join(f"{len(plan)} plans" if isinstance(plan, tuple) else str(plan) for plan in components)
    return f"{'Mixture of ' if problem.is_mixture else ''}{each}, {shapes}, {np.asarray(problem.query).dtype}"
