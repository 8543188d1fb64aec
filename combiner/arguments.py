# SPDX-License-Identifier: Apache-2.0
"""What an argument may be: each function here checks one kind of argument and returns it as the library needs it.

Every error names the argument, says what was expected and what it got: TypeError for a wrong kind, ValueError for a
wrong value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

REAL_ARRAY = "a float32, float64, bfloat16 or float16 NumPy array"


def is_real(x: object) -> TypeGuard[Array]:
    """Whether x is a NumPy array of a dtype that the library computes with."""
    return isinstance(x, np.ndarray) and (x.dtype in (np.float32, np.float64, np.float16) or x.dtype.name == "bfloat16")


def widened(x: Array) -> Array:
    """x as float32 where its dtype has 16 bits; other arrays as they are."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


def as_integer(name: str, value: object, least: int, *, bits: int = 63) -> int:
    """`value` as an int, at least `least` and below 2^bits. A bool is no integer here."""
    number = value if type(value) is int else _index(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if number >= 1 << bits:
        raise ValueError(f"{name} must be below 2^{bits}, got {number}")
    return number


def _index(name: str, value: Any) -> int:
    if isinstance(value, bool | np.bool_ | type) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    try:
        return operator.index(value)
    except TypeError as error:  # an array of several, or an __index__ that returns something else
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}: {error}") from None


def as_number(name: str, value: Any, expected: str = "a number") -> float:
    """`value` as a float. A str, which float() would accept, is no number here."""
    if isinstance(value, str | bytes | bytearray):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}") from None
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an int beyond float64") from None


def as_softcap(value: Any) -> float | None:
    """`value` as a bound of logits: a positive number, or None for no bound."""
    if value is None:
        return None
    softcap = as_number("softcap", value, "a number or None")
    if not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    return softcap


def as_array(name: str, given: npt.ArrayLike, expected: str) -> Array:
    """An array-like argument as a NumPy array."""
    try:
        return np.asarray(given)
    except (TypeError, ValueError) as error:  # lists of several lengths; an __array__ that returns none
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be {expected}, got {type(given).__name__}: {error}") from None


def as_integers(name: str, given: npt.ArrayLike) -> Array:
    """An array-like argument of integers as an array of any integer dtype. An empty argument may have any dtype."""
    array = as_array(name, given, "an array of integers")
    if not array.size:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":  # np.integer has timedelta64 in it
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    return array


def check_bool(name: str, value: object) -> None:
    """Refuses what is no bool, Python's or NumPy's."""
    if value is not True and value is not False and not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def choice_number(name: str, value: object, choices: Sequence[str]) -> int:
    """The index of a choice, which is its number in combiner.h."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return choices.index(value)


def check_merged(lse_dtype: object, **given: Any) -> None:
    """Checks dtypes and shapes of the arguments of `merge`: four arrays of one library, the first of them out_a.

    Parameters
    ----------
    lse_dtype : the dtype that an lse has where out has out_a's: float32 at least.
    """
    out = given["out_a"]
    for name, x in given.items():
        dtype, shape = (out.dtype, out.shape) if name.startswith("out") else (lse_dtype, out.shape[:-1])
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} like out_a, got {x.dtype}")
        if x.shape != shape or not out.ndim:
            raise ValueError(
                f"{name} must have shape {tuple(shape) if out.ndim else '(..., Dv)'}, got {tuple(x.shape)}"
            )
