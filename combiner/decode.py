# SPDX-License-Identifier: Apache-2.0
"""Causal attention of a sequence that grows (csrc/decode/decoder.h says how)."""

from __future__ import annotations

import copy
import math
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from . import _core
from .arguments import REAL_ARRAY, Array, as_integer, as_integers, as_number, as_softcap, choice_number
from .composed import AnyPattern
from .foreign_names import explains_foreign_names
from .interchange import any_library, to_numpy
from .patterns import (
    ORDERS,
    Axial,
    AxialMixture,
    Dense,
    Factorization,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Sparse,
    Tree,
    Window,
    makes_plans,
    no_pattern,
)
from .plan import POOLINGS, Plan
from .problem import is_turned, turn
from .signatures import Layout

__all__ = ["Decoder"]

_LONGEST = 1 << 30  # positions of a sequence at most, as in combiner.h

# kind, size, window, levels, is_hierarchical, is_sparse, size_bias, pooling, order, is_weighted: cmb_pattern of
# csrc/combiner.h
_Pattern = tuple[int, int, int, int, bool, bool, bool, int, int, bool]


def _as_core(pattern: object) -> _Pattern:
    """The pattern as the C library takes it.

    Raises
    ------
    ValueError : a pattern whose sizes depend on the length, or that cannot be continued.
    TypeError : an object that is no pattern.
    """
    is_sparse = isinstance(pattern, Sparse)
    whole = pattern.pattern if isinstance(pattern, Sparse) else pattern
    kind, size, window, levels, is_hierarchical, order, is_weighted = 0, 0, 0, 0, False, 0, False
    match whole:
        case Dense():
            pass
        case Fixed(span=None):
            raise ValueError(f"pattern must have a span, the default depends on the length, got {pattern!r}")
        case Axial(width=None):
            raise ValueError(f"pattern must have a width, the default depends on the length, got {pattern!r}")
        case Fixed(span=int(size), window=window):
            kind = 1
        case LogSparse(hierarchical=is_hierarchical):
            kind = 2
        case Tree(branching=size, levels=given):
            kind, levels = 3, given or 0
        case Window(size=size):
            kind = 4
        case HeavilyCompressed(rate=size, window=window):
            kind = 5
        case Axial(width=int(size), order=name, row_key=row_key):
            kind, order, is_weighted = 6, ORDERS.index(name), row_key == "weighted"
        case AxialMixture(width=int(size)) if is_sparse:
            kind = 6
        case Plan() | tuple():
            raise ValueError(f"pattern must be of any length, got a {type(pattern).__name__}")
        case _ if makes_plans(pattern):
            raise ValueError(
                f"pattern must be Dense, Fixed, LogSparse, Tree, Axial or Window, or HeavilyCompressed, got {pattern!r}"
            )
        case _:
            raise no_pattern(pattern, "a pattern such as combiner.Fixed(64)")
    size, window, levels = (min(n, _LONGEST) for n in (size, window, levels))
    pooling = choice_number("pooling", whole.pooling, POOLINGS[:3])
    return kind, size, window, levels, is_hierarchical, is_sparse, whole.size_bias, pooling, order, is_weighted


_SELECTABLE = (Fixed, HeavilyCompressed, LogSparse, Tree)


class Decoder:
    """Causal attention of a growing sequence, any number of tokens at a time. Ours.

    A row of the result has the bits of ``attention(query, key, value, pattern, is_causal=True)`` of the whole sequence,
    however the tokens are divided between calls. Inputs are copied. With `select` these are the bits for the pattern
    ``Selected(pattern, select(query, key, pattern, k, block=1, is_causal=True, scale=scale), block=1)``.

    Parameters
    ----------
    pattern : `Dense`, `Fixed`, `LogSparse`, `Tree`, `Axial`, `Window` or `HeavilyCompressed`, or the sparse baseline of
        one or of `AxialMixture`, with its span or width given.
    scale : factor of the logits, finite; 1 / sqrt(D) by default.
    layout : "BHLD", arrays with heads before tokens, or "BLHD", `[..., n, heads, features]`, as in `attention`.
    rollback : how many of the last tokens `rollback` may forget, at most.
    softcap : as in `attention`.
    sink : as in `attention`; copied. Its shape and dtype are checked with the first tokens.
    select : how many regions each query opens, as `combiner.select` chooses them with ``block=1`` and `Selected` opens
        them; None for none. The choice looks at no bias, softcap or sink. With `Fixed`, `HeavilyCompressed`,
        `LogSparse` or `Tree`.

    Raises
    ------
    TypeError : a `pattern` that is no pattern, a scale that is no number, a `rollback` or `select` that is no integer.
    ValueError : a default span or width, which depends on the length; a Plan or Routing, which are of one length;
        AxialMixture and Mixture; a scale that is not finite; an unknown layout; a `rollback`, a softcap or a `select`
        out of range; `select` with a pattern whose queries share no regions.

    Notes
    -----
    A decoder pools the queries, keys and biases of regions from the tokens. It takes no `region_query`, `region_key` or
    `region_bias`, because the regions of these arrays belong to a complete sequence.

    n tokens at length L cost what attention of the whole sequence takes for their rows: O(Hq rows (D + Dv)) for the
    rows that each query attends, and as much for the members of the regions that they are the first to attend. Memory
    holds the rows that later queries attend:

    - `Dense`: L rows; memory O(L).
    - `Fixed`: up to span + window + L / span rows, each span summarized once; memory O(span + window + L / span).
    - `LogSparse`: log2(L) rows, each position summarized log2(L) times; memory O(L).
    - `LogSparse(hierarchical=True)`, `Tree`: branching * log(L) rows, each summarized once in its node; memory
      O(branching log L), plus one row per top-level node when `levels` is given.
    - `Axial`: width + L / width rows. In the horizontal and the row-major order the last token of a row summarizes it
      `width` times, once for each column; in the vertical order each token summarizes its column. Memory O(L): L keys
      and values or, in the row-major order, L summaries; both in the horizontal order.
    - `Window`: size rows; memory O(size).
    - `HeavilyCompressed`: window + L / rate rows, each span summarized once; memory O(window + rate + L / rate).
    - Sparse baselines: the rows that they attend; memory the same, O(L) for `Axial`.

    With `select` the keys and values of all positions are kept, besides the regions: memory O(L). A step adds O(Hq
    rows (D + Dv)) for the rows below the regions that it opens, and O(Hq D) for each region that a query attends. Where
    regions have many sizes, the largest score highest, and opening them costs what `Dense` does (docs/selection.md).

    `rollback` adds as many positions, and the regions that end in them. While a call runs, its own tokens are kept too.
    Caches grow by half of their size. ``copy.deepcopy`` makes another decoder of the same sequence. A decoder cannot be
    pickled. One thread at a time may use a decoder. A call that fails, by a MemoryError or a Ctrl-C, leaves the decoder
    as it was.
    """

    @explains_foreign_names
    def __init__(
        self,
        pattern: AnyPattern,
        *,
        scale: float | None = None,
        layout: Layout = "BHLD",
        rollback: int = 0,
        softcap: float | None = None,
        sink: Array | None = None,
        select: int | None = None,
    ) -> None:
        self._as_core = _as_core(pattern)
        self._pattern: Factorization | Sparse = pattern  # type: ignore[assignment]
        if scale is not None:
            scale = as_number("scale", scale, "a number or None")
            if not math.isfinite(scale):
                raise ValueError(f"scale must be finite, got {scale}")
        self._scale = scale
        self._is_turned = is_turned(layout)
        self._rollback = min(as_integer("rollback", rollback, 0), _LONGEST)
        self._softcap = as_softcap(softcap)
        self._select = 0 if select is None else as_integer("select", select, 0, bits=31)
        if select is not None and not isinstance(pattern, _SELECTABLE):
            names = ", ".join(each.__name__ for each in _SELECTABLE)
            raise ValueError(
                f"pattern must have regions that queries share ({names}) where select is given, got {pattern!r}"
            )
        self._sink = None if sink is None else _array("sink", to_numpy("sink", sink)).copy()
        self.reset()

    def reset(self) -> None:
        """Forgets the sequence, its dtype and its shapes."""
        self._taken = 0  # tokens, of all calls
        self._shapes: tuple[tuple[int, ...], ...] = ()  # without the number of tokens
        self._dtype: np.dtype[Any] | None = None
        self._checked: tuple[list[Any], list[Any]] | None = None  # shapes and dtypes of the last call
        self._core: _core.Decoder | None = None

    @property
    def length(self) -> int:
        """Tokens so far; of the longest sequence where `lengths` were given."""
        lengths = self.lengths
        return int(lengths.max()) if lengths.size else self._taken

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence so far, int64, shaped as the axes before the heads."""
        if not self._core:
            return np.zeros((), np.int64)
        return self._core.lengths.reshape(self._shapes[0][:-2])

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return self._core.nbytes if self._core else 0

    @property
    def pattern(self) -> Factorization | Sparse:
        """The pattern given to the constructor."""
        return self._pattern

    @any_library
    def step(
        self, query: Array, key: Array, value: Array, *, lengths: Any = None, key_bias: Array | None = None
    ) -> Array:
        """The next tokens: each query attends the sequence up to its own position; keys and values join the sequence.

        Parameters
        ----------
        query : `[..., Hq, n, D]` or `[n, D]`, of a dtype that `attention` takes; n >= 0.
        key : `[..., Hk, n, D]` or `[n, D]`, the same dtype.
        value : `[..., Hk, n, Dv]` or `[n, Dv]`, the same dtype.
        lengths : integers, shaped as the axes before the heads: the tokens of each sequence, its first ones of the n;
            the others are ignored. All n by default.
        key_bias : `[..., Hk, n]` or `[..., Hq, n]`, as in `attention`: the biases of these tokens' keys. Given in every
            call, for as many heads as in the first, or in none.

        Returns
        -------
        out : `[..., Hq, n, Dv]` or `[n, Dv]`; 0 for tokens that are ignored.

        Raises
        ------
        TypeError, ValueError : as `attention`; another dtype or shape than that of the tokens before; `lengths` of
            another shape, or out of range; `key_bias` in some calls only.
        RuntimeError : another thread is in a call of this decoder.
        """
        is_first = self._core is None
        try:
            given = self._check(query, key, value, key_bias)
            counts = None if lengths is None else self._read_counts("lengths", lengths, given[0])
            assert self._core
            out = self._core.step(*given, counts, key_bias)
        except BaseException:
            if is_first:  # a call that fails decides neither dtype nor shapes
                self.reset()
            raise
        self._taken += given[0].shape[-2]
        return self._laid(out)

    @any_library
    def prefill(
        self, query: Array, key: Array, value: Array, *, lengths: Any = None, key_bias: Array | None = None
    ) -> Array:
        """The same as `step`, which takes any number of tokens at any time."""
        return self.step(query, key, value, lengths=lengths, key_bias=key_bias)

    def rollback(self, n: int | npt.ArrayLike) -> None:
        """Forgets the last n tokens, such as a draft's that were not accepted. What follows has the same bits as if
        they had not been.

        Parameters
        ----------
        n : an integer, or one for each sequence, shaped as the axes before the heads.

        Raises
        ------
        TypeError : n is no integer.
        ValueError : n is negative, more than a sequence has, or reaches further back than the constructor's `rollback`
            before the sequence's longest length.
        """
        counts = as_integers("n", n)
        if not self._core:
            if counts.any():
                raise ValueError(f"n must be 0 where the constructor's rollback is 0 or there are no tokens, got {n!r}")
            return
        self._core.rollback(counts.ravel() if counts.ndim == 0 else self._read_counts("n", counts, None))

    def take(self, sequences: npt.ArrayLike) -> Decoder:
        """Another decoder, of some of the sequences: beams that go on, or entries of a batch that are not finished.

        Parameters
        ----------
        sequences : integers `[N]`, where sequence n of the new decoder is a copy of this one's number ``sequences[n]``;
            any order, and repeats. The new decoder's arrays are those of N batch entries.

        Raises
        ------
        TypeError : sequences are no integers.
        ValueError : sequences out of range, or with other than one axis; a decoder without tokens, or of arrays with
            other than one axis before the heads.

        Notes
        -----
        Time and memory are those of the rows that these sequences keep.
        """
        if not self._core or len(self._shapes[0]) != 3:
            got = max(len(self._shapes[0]) - 2, 0) if self._core else "no tokens"
            raise ValueError(f"tokens must have one axis before the heads, got {got}")
        chosen = as_integers("sequences", sequences)
        if chosen.ndim != 1:
            raise ValueError(f"sequences must have shape (N,), got {chosen.shape}")
        B = self._shapes[0][0]
        if ((chosen < 0) | (chosen >= B)).any():
            raise ValueError(f"sequences must be between 0 and {B - 1}, got {chosen}")
        taken = object.__new__(type(self))
        vars(taken).update(vars(self))
        taken._core = self._core.take(chosen.astype(np.int64))
        taken._checked = None
        taken._shapes = tuple((len(chosen), *shape[1:]) for shape in self._shapes)
        if self._sink is not None and self._sink.ndim == 2 and len(self._sink) == B:
            taken._sink = self._sink[chosen]
        return taken

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __copy__(self) -> Decoder:
        raise TypeError("a Decoder cannot be copied without its sequence: copy.deepcopy(decoder) makes another one")

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Decoder cannot be pickled: pickle its pattern and the tokens, and prefill a new Decoder with them"
        )

    def __repr__(self) -> str:
        scale = "" if self._scale is None else f", scale={self._scale}"
        return f"<Decoder({self._pattern!r}{scale}) of length {self.length}>"

    # ---- arguments

    def _check(self, query: Array, key: Array, value: Array, key_bias: Array | None) -> tuple[Array, Array, Array]:
        """The arguments as arrays with heads before tokens, checked. The first call's decide dtype and sizes."""
        given = (
            self._laid(_array("query", query)),
            self._laid(_array("key", key)),
            self._laid(_array("value", value)),
        )
        if not self._core:
            self._core = _core.Decoder(
                self._as_core, *given, self._scale, self._softcap, self._rollback, self._select, key_bias, self._sink
            )
            self._shapes = tuple((*x.shape[:-2], x.shape[-1]) for x in given)
            self._dtype = given[0].dtype
            return given
        now = [x.shape for x in given], [x.dtype for x in given]
        if now == self._checked:
            return given
        n = given[0].shape[-2] if given[0].ndim > 1 else 0
        for name, x, shape in zip(("query", "key", "value"), given, self._shapes, strict=True):
            if x.dtype != self._dtype:
                raise TypeError(f"{name} must be {self._dtype} like the tokens before, got {x.dtype}")
            if x.shape == shape:
                one = (*shape[:-1], 1, shape[-1])
                raise ValueError(f"{name} must have an axis of tokens, {one} for one of them, got {x.shape}")
            if x.shape != (expected := (*shape[:-1], n, shape[-1])):
                raise ValueError(f"{name} must have shape {expected} like the tokens before, got {x.shape}")
        self._checked = now
        return given

    def _read_counts(self, name: str, counts: Any, query: Array | None) -> npt.NDArray[np.int64]:
        """A number of tokens for each sequence; at most those of the query."""
        given = as_integers(name, counts)
        if given.shape != (expected := self._shapes[0][:-2]):
            raise ValueError(f"{name} must have shape {expected}, got {given.shape}")
        if query is not None and ((given < 0) | (given > query.shape[-2])).any():
            raise ValueError(f"{name} must be between 0 and {query.shape[-2]}, got {given}")
        return given.astype(np.int64).ravel()

    def _laid(self, x: Array) -> Array:
        """A view with heads and tokens exchanged where the layout has tokens before heads."""
        return turn(x) if self._is_turned else x


def _array(name: str, x: Array) -> Array:
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ma.MaskedArray) or not hasattr(x, "__array__"):
        raise TypeError(f"{name} must be {REAL_ARRAY}, got {type(x).__name__}")
    return np.asarray(x)
