# SPDX-License-Identifier: Apache-2.0
"""Patterns beside dense attention, on one's own queries, keys and values.

compare
  |  a sample of queries S: all of them up to 2,048
dense_rows              dense attention of S alone: O(|S| L)
  |
error of out, gradients     the same sum of outputs of S, through the pattern and densely
KL, weight not seen         rows of the effective attention, head by head
seconds, bytes, pairs       whole calls
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import Array, as_integer, check_bool
from .composed import AnyPattern
from .cost import cost_of
from .display import flat
from .effective import dense_rows, weight_rows
from .functional import attention, attention_backward, attention_forward, workspace_bytes
from .interchange import any_library
from .pattern_arguments import DENSE, Several, by_name, plan_of_head, plans_of
from .patterns import Dense
from .problem import is_turned, turn
from .process import get_num_threads
from .signatures import Layout
from .stopwatch import fastest
from .tables import counted, html_table, in_bytes, in_seconds, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLED_WEIGHTS = 1 << 22  # of a head, dense ones: 4 million numbers
LONGEST_DENSE = 16384  # dense attention of whole sequences is timed up to this length
ROWS = 512  # of the effective attention at a time
_TINY = 1e-300


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One line of a `Comparison`. Errors are ``|x - dense| / |dense|``, with the norm over all that is compared.

    Attributes
    ----------
    name : of the pattern.
    out_error : of the outputs of the queries in the sample.
    query_error, key_error, value_error : of the gradients of ``sum(out * grad_out)`` over these queries.
    kl : mean over the queries of ``sum_j W_ij log(W_ij / P_ij)``, in nats: W the effective attention, P the dense one.
        It is finite: dense attention leaves no key out.
    unseen : mean over the queries of the dense weight of keys that W gives nothing.
    forward_seconds, both_seconds : of `attention`, and of forward and backward together; the fastest of some calls.
        None for dense attention of long sequences.
    forward_bytes, backward_bytes : memory of a call beside arrays, plans and results (`workspace_bytes`).
    pairs : of both stages, summed over heads and batch entries.
    share : `pairs` divided by those of dense attention.
    """

    name: str
    out_error: float
    query_error: float
    key_error: float
    value_error: float
    kl: float
    unseen: float
    forward_seconds: float | None
    both_seconds: float | None
    forward_bytes: int
    backward_bytes: int
    pairs: int
    share: float


_COLUMNS = (
    "pattern", "out", "d query", "d key", "d value", "KL", "unseen", "forward", "with backward", "memory", "pairs",
    "of dense",
)  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """The result of `compare`: it prints as a table, shows one in a notebook, and plots.

    Attributes
    ----------
    lines : a `Compared` for dense attention and for each pattern, in the order given.
    shape : of the query, heads before positions.
    is_causal, dtype, threads : what was computed, and with how many threads.
    sample : the number of queries on which errors, KL and unseen weights are taken; all of them up to 2,048.
    """

    lines: tuple[Compared, ...]
    shape: tuple[int, ...]
    is_causal: bool
    dtype: str
    threads: int
    sample: int

    def __iter__(self) -> Iterator[Compared]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, name: str | int) -> Compared:
        """A line by its pattern's name, or by its place; "dense" is the first."""
        if isinstance(name, str):
            for line in self.lines:
                if line.name == name:
                    return line
            raise KeyError(name)
        return self.lines[name]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{text_table(_COLUMNS, map(_cells, self.lines))}\n{self._note()}"

    def _repr_html_(self) -> str:
        return f"<div>{html_table(_COLUMNS, map(_cells, self.lines))}<small>{self._note()}</small></div>"

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts, tuples and dicts, for ``json.dumps``."""
        return asdict(self)

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draws the error of out over the time of a forward call, a mark for each pattern; needs matplotlib.

        Parameters
        ----------
        ax : matplotlib axes to draw in; pyplot's current ones by default.
        """
        from .plot.comparison import draw_comparison

        return draw_comparison(self, ax=ax)

    def _note(self) -> str:
        kind = "causal" if self.is_causal else "bidirectional"
        threads = "one thread" if self.threads == 1 else f"{self.threads} threads"
        L = self.shape[-2]
        queries = "all queries" if self.sample == L else f"{self.sample:,} of {L:,} queries, evenly spaced"
        late = f" Dense attention is not timed beyond L {LONGEST_DENSE:,}." if L > LONGEST_DENSE else ""
        return (
            f"query {list(self.shape)}, {self.dtype}, {kind}, {threads}. Relative errors of out and of "
            f"gradients, and KL, against dense attention: {queries}.{late}"
        )


def _cells(line: Compared) -> tuple[str, ...]:
    errors = line.out_error, line.query_error, line.key_error, line.value_error, line.kl
    times = line.forward_seconds, line.both_seconds
    return (
        line.name,
        *(f"{x:.3g}" for x in errors),
        f"{line.unseen:.1%}",
        *("" if x is None else in_seconds(x) for x in times),
        in_bytes(max(line.forward_bytes, line.backward_bytes)),
        counted(line.pairs),
        f"{line.share:.2%}",
    )


@any_library
def compare(
    query: Array,
    key: Array,
    value: Array,
    patterns: Several,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    layout: Layout = "BHLD",
    grad_out: Array | None = None,
    sample: int | None = None,
    repeats: int = 3,
) -> Comparison:
    """What patterns compute beside dense attention, and what they cost, on one's own query, key and value.

    Parameters
    ----------
    query, key, value, is_causal, scale, key_mask, layout : as in `attention`.
    patterns : a pattern, several of them, or a dict of them by name. A name is what the pattern prints by default.
    grad_out : of the shape of out; drawn from N(0, 1), the same in every call, by default.
    sample : how many queries, evenly spaced, are compared with dense attention; by default all of up to 2,048, and
        2^22 / L of more. Times, memory and pairs are those of whole calls.
    repeats : calls that are timed, after one that is not; the fastest counts.

    Returns
    -------
    Comparison : a line for dense attention, then one for each pattern.

    Raises
    ------
    TypeError, ValueError : an argument is of the wrong kind or value, as in `attention`; `sample` or `repeats` below 1.

    Notes
    -----
    Time of repeats + 2 forward and backward calls and repeats + 1 forward calls more of each pattern, and of S / Dv
    backward calls more, for S queries; of dense attention as many up to L = 16,384, and S L pairs beyond. Memory O(L S)
    beside that of the calls: with the default sample no array has L^2 numbers unless L is at most 2,048.
    """
    check_bool("is_causal", is_causal)
    repeats = as_integer("repeats", repeats, 1)
    if is_turned(layout):
        query, key, value, grad_out = turn(query), turn(key), turn(value), turn(grad_out)
    options: dict[str, Any] = {"is_causal": bool(is_causal), "scale": scale, "key_mask": key_mask}
    workspace_bytes(query, key, value, Dense(), **options)  # checks the arrays
    L, shape = query.shape[-2], (*query.shape[:-1], value.shape[-1])
    if not query.size:
        raise ValueError(f"query must have at least one position, head and batch entry, got shape {query.shape}")
    if grad_out is None:
        grad_out = np.random.default_rng(0).standard_normal(shape, np.float32).astype(query.dtype)
    elif np.shape(grad_out) != shape:
        raise ValueError(f"grad_out must have shape {shape}, as out has, got {np.shape(grad_out)}")
    queries = _sample(L, sample)
    of_sample = np.zeros_like(grad_out)
    of_sample[..., queries, :] = grad_out[..., queries, :]
    named = by_name(patterns)
    plans = {name: plans_of(pattern, L, is_causal) for name, pattern in named.items()}
    for name, made in plans.items():
        if any(plan.is_causal != bool(is_causal) for _, plan in flat(made)):
            raise ValueError(f"is_causal must be True with a causal plan, as {name!r} has, got False")

    def results(plan: AnyPattern) -> list[Array]:
        """Out of the sample, and the gradients of a sum over it."""
        out, saved = attention_forward(query, key, value, plan, **options)
        return [x.astype(np.float64) for x in (out[..., queries, :], *attention_backward(of_sample, saved)[:3])]

    def line(name: str, pattern: AnyPattern, plan: Any, errors: Sequence[float], kl: float, unseen: float) -> Compared:
        forward = both = None
        if name != DENSE or L <= LONGEST_DENSE:
            forward = fastest(lambda: attention(query, key, value, pattern, **options), repeats)
            both = fastest(
                lambda: attention_backward(grad_out, attention_forward(query, key, value, pattern, **options)[1]),
                repeats,
            )
        cost = cost_of(plan)
        return Compared(
            name=name,
            out_error=errors[0],
            query_error=errors[1],
            key_error=errors[2],
            value_error=errors[3],
            kl=kl,
            unseen=unseen,
            forward_seconds=forward,
            both_seconds=both,
            forward_bytes=workspace_bytes(query, key, value, plan, **options),
            backward_bytes=workspace_bytes(query, key, value, plan, **options, backward=True),
            pairs=round(cost.share * math.prod(shape[:-2]) * cost_of(whole).dense_pairs),
            share=cost.share,
        )

    whole = Dense().plan(L, bool(is_causal))
    exact = results(whole if len(queries) == L else dense_rows(L, queries, bool(is_causal)))
    errors = {name: [_error(a, b) for a, b in zip(results(plan), exact, strict=True)] for name, plan in plans.items()}
    divergence = _divergence(query, key, plans, queries, options)
    lines = [line(DENSE, Dense(), whole, [0.0] * 4, 0.0, 0.0)]
    lines += [line(name, named[name], plan, errors[name], *divergence[name]) for name, plan in plans.items()]
    return Comparison(tuple(lines), query.shape, bool(is_causal), query.dtype.name, get_num_threads(), len(queries))


def _sample(length: int, sample: int | None) -> list[int]:
    """Evenly spaced queries, the last among them."""
    if sample is None:
        count = length if length * length <= SAMPLED_WEIGHTS else max(1, SAMPLED_WEIGHTS // length)
    else:
        count = min(as_integer("sample", sample, 1), length)
    return [(n + 1) * length // count - 1 for n in range(count)]


def _error(x: Array, exact: Array) -> float:
    """``|x - exact| / |exact|``; 0 where both are 0."""
    distance, size = float(np.linalg.norm(x - exact)), float(np.linalg.norm(exact))
    return distance / size if size else distance and math.inf


def _divergence(
    query: Array, key: Array, plans: Mapping[str, Any], queries: list[int], options: Mapping[str, Any]
) -> dict[str, tuple[float, float]]:
    """The mean KL of each pattern from dense attention, and the mean dense weight of keys that it gives nothing."""
    L, D = query.shape[-2:]
    of_heads = query.reshape(-1, L, D)
    keys = key.reshape(-1, L, D)
    group = len(of_heads) // len(keys)
    mask = options["key_mask"]
    masks = None if mask is None else np.broadcast_to(mask, (*key.shape[:-3], L)).reshape(-1, L)
    totals = {name: np.zeros(2) for name in plans}
    for first in range(0, len(queries), ROWS):
        some = queries[first : first + ROWS]
        dense = dense_rows(L, some, bool(options["is_causal"]))
        for h, one in enumerate(of_heads):
            own = {**options, "key_mask": None if masks is None else masks[h * len(masks) // len(of_heads)]}
            given = one, keys[h // group]
            exact = weight_rows(*given, dense, some, **own).astype(np.float64)
            for name, plan in plans.items():
                weights = weight_rows(*given, plan_of_head(plan, h // group), some, **own).astype(np.float64)
                seen = weights > 0
                ratio = np.divide(weights, np.maximum(exact, _TINY), out=np.ones_like(exact), where=seen)
                totals[name] += np.sum(weights * np.log(ratio)), np.sum(exact, where=~seen)
    count = len(of_heads) * len(queries)
    return {name: (float(kl) / count, float(unseen) / count) for name, (kl, unseen) in totals.items()}
