# SPDX-License-Identifier: Apache-2.0
"""Patterns as text: operators of PyTorch take tensors, numbers and strings alone.

A pattern that is defined by its parameters is spelled out, ``Fixed(span=64, ...)``: the text is valid in any process.
Any other pattern, such as a Plan, is a number, under which this process finds the object as long as it lives.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache, partial
from typing import Any

import torch

from .. import composed, patterns
from ..composed import Mixture
from ..pattern_arguments import read_expression
from ..patterns import Axial, AxialMixture, Dense, Fixed, HeavilyCompressed, LogSparse, Sparse, Tree, Window, no_pattern
from .patterns import Routing, Selected

# The patterns that are defined by their parameters, and the names of the parameters.
_VALUES: dict[type, list[str]] = {
    cls: [each.name for each in fields(cls)]
    for cls in (Axial, AxialMixture, Dense, Fixed, HeavilyCompressed, LogSparse, Tree, Window)
}
_VALUE_NAMES: dict[str, Callable[..., Any]] = {cls.__name__: cls for cls in _VALUES}
_others: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # the other patterns, by number
_numbers: dict[int, int] = {}  # the numbers, by id of the pattern
_next_number = itertools.count().__next__


def text_of(pattern: object) -> str:
    """The text of a pattern, which `pattern_of` reads.

    Raises
    ------
    TypeError : an object that is no pattern, or a `Mixture` of a pattern of tensors.
    ValueError : a `Selected` of a pattern that is no value.
    """
    match pattern:
        case Routing():
            sparse = ".sparse()" if pattern.is_sparse else ""
            return f"Routing(pooling={pattern.pooling!r}, size_bias={pattern.size_bias!r}){sparse}"
        case Selected():
            options = [f"{name}={_constant(getattr(pattern, name))!r}" for name in ("block", "open", "rest")]
            return f"Selected({_text_of_base(pattern.pattern)}, {', '.join(options)})"
        case Sparse() if _is_value(pattern):
            return f"{text_of(pattern.pattern)}.sparse()"
        case Mixture() if _is_value(pattern):
            return f"Mixture({', '.join([text_of(each) for each in pattern.patterns])})"
        case tuple():
            return f"({' '.join([_number(each) for each in pattern])})"
    if not _is_value(pattern):
        check_is_instance(pattern)
        if isinstance(pattern, Mixture):
            for each in pattern.patterns:
                if isinstance(each, Routing | Selected):
                    raise TypeError(
                        "pattern must be a Mixture of combiner's patterns, got one of a "
                        f"combiner.torch.{type(each).__name__}: give as_numpy()"
                    )
        return _number(pattern)
    values = [f"{name}={_constant(getattr(pattern, name))!r}" for name in _VALUES[type(pattern)]]
    return f"{type(pattern).__name__}({', '.join(values)})"


def _text_of_base(pattern: object) -> str:
    """The text of the pattern that a `Selected` of a tensor selects from."""
    if type(pattern) in _VALUES or isinstance(pattern, Routing):
        return text_of(pattern)
    check_is_instance(pattern)
    raise ValueError(
        f"pattern must be Fixed, HeavilyCompressed, LogSparse, Tree or a Routing of a tensor, got {pattern!r}"
    )


_EXPECTED = "a pattern such as combiner.Fixed() or a Plan"


def check_is_instance(pattern: object) -> None:
    """Refuses a pattern's class in place of a pattern."""
    if isinstance(pattern, type):
        raise no_pattern(pattern, _EXPECTED)


def _is_value(pattern: object) -> bool:
    if isinstance(pattern, Mixture):
        return all([_is_value(each) for each in pattern.patterns])
    return _is_value(pattern.pattern) if isinstance(pattern, Sparse) else type(pattern) in _VALUES


def _constant(x: object) -> object:
    """x as a constant: torch.compile may have made a symbol of an integer."""
    return operator.index(x) if isinstance(x, int) and not isinstance(x, bool) else x


@torch.compiler.assume_constant_result  # compiled code is specialized on the object and compiled again for another
def _number(pattern: object) -> str:
    """The number of an object, under which the object is found as long as it lives."""
    if id(pattern) not in _numbers:
        number = _next_number()
        try:
            _others[number] = pattern
        except TypeError:
            raise no_pattern(pattern, _EXPECTED) from None
        _numbers[id(pattern)] = number
        weakref.finalize(pattern, _numbers.pop, id(pattern), None).atexit = False
    return str(_numbers[id(pattern)])


def pattern_of(text: str, clusters: Any = None, regions: Any = None) -> Any:
    """The pattern of a text, with the clusters of a `Routing` and the regions of a `Selected`, which are arrays."""
    if clusters is not None or regions is not None:
        routing = partial(patterns.Routing, clusters)
        return read_expression(text, Routing=routing, Selected=partial(_selected, regions), **_VALUE_NAMES)
    if text[:1].isalpha():
        return _value(text)
    found = [_others.get(int(number)) for number in text.strip("()").split()]
    if any(each is None for each in found):
        raise RuntimeError(f"pattern must be alive and of this process, got a text of another: {text}")
    return tuple(found) if text.startswith("(") else found[0]


def _selected(regions: Any, pattern: Any, **options: Any) -> composed.Selected:
    return composed.Selected(pattern, regions, **options)


@lru_cache(maxsize=64)
def _value(text: str) -> Any:
    return read_expression(text, Mixture=Mixture, **_VALUE_NAMES)
