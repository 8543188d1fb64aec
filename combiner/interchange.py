# SPDX-License-Identifier: Apache-2.0
"""Arrays of other libraries, read in their own memory by DLPack; results are arrays of the same library.

No library is imported.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

from .arguments import Array
from .foreign_names import refuse_foreign_names

P = ParamSpec("P")
T = TypeVar("T")

_CPU = 1  # kDLCPU
_ALSO_NUMPY = ("cu_seqlens", "lengths", "out")  # these may be NumPy arrays where the others are another library's


def any_library(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function of NumPy arrays one of the arrays of any library on the CPU.

    Arrays with ``__dlpack__`` are read, and `out` is written, in their own memory. Results are arrays of their library,
    over the memory of NumPy's results where the library allows that; `saved` of a forward function holds NumPy arrays.
    Where the first argument is a NumPy array, all arguments pass unchanged, and the core refuses arrays of another
    library. The error for a keyword of another library names the one to use.

    Raises
    ------
    TypeError : arrays of several libraries; one that cannot be shared, such as one that requires gradients.
    ValueError : an array on another device.
    """
    signature = inspect.signature(function)
    numpy_array = np.ndarray  # a local name is found faster

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            if args and type(args[0]) is numpy_array:
                return function(*args, **kwargs)
            if not any(map(_is_foreign, args)) and not any(map(_is_foreign, kwargs.values())):
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
        except TypeError:
            refuse_foreign_names(function, kwargs)
            raise
        library = _Library(given.arguments)
        given.arguments.update({name: library.take(name, x) for name, x in given.arguments.items()})
        return library.give(function(*given.args, **given.kwargs))  # type: ignore[no-any-return]

    return call


def to_numpy(name: str, x: Any) -> Any:
    """An array of another library on the CPU as NumPy's, over the same memory; anything else as it is.

    Raises
    ------
    TypeError, ValueError : as `any_library`.
    """
    return _Library({name: x}).take(name, x) if _is_foreign(x) else x


def _is_foreign(x: object) -> bool:
    return hasattr(x, "__dlpack__") and not isinstance(x, np.ndarray)


class _Library:
    """The one library of a call's arguments."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._like, first = next((name, x) for name, x in arguments.items() if _is_foreign(x))
        self._namespace = _namespace(self._like, first)
        self._taken: dict[int, tuple[Array, Any]] = {}  # by id: results among them are the caller's

    def take(self, name: str, x: Any) -> Any:
        """The argument as the function takes it."""
        is_foreign = _is_foreign(x)
        if (is_foreign and _namespace(name, x) is not self._namespace) or (
            isinstance(x, np.ndarray) and name not in _ALSO_NUMPY
        ):
            raise TypeError(f"{name} must be an array of {self._namespace.__name__} like {self._like}, got {_kind(x)}")
        if is_foreign or isinstance(x, np.ndarray):
            array = self._import(name, x) if is_foreign else x
            self._taken[id(array)] = array, x
            return array
        return x

    def give(self, result: Any) -> Any:
        """The function's result as the caller gets it."""
        if isinstance(result, np.ndarray):
            _, given = self._taken.get(id(result), (None, None))
            return self._export(result) if given is None else given
        if isinstance(result, tuple):
            return getattr(result, "_make", tuple)(map(self.give, result))
        return result

    # NumPy's DLPack has no bfloat16: such an array passes as int16 with the same bits.

    def _import(self, name: str, x: Any) -> Array:
        try:
            if x.__dlpack_device__()[0] == _CPU:
                if str(x.dtype).endswith("bfloat16"):
                    import ml_dtypes

                    return np.from_dlpack(x.view(self._namespace.int16)).view(ml_dtypes.bfloat16)
                return np.from_dlpack(x)
        except MemoryError:
            raise
        except Exception as error:  # what an object's own methods raise
            raise TypeError(
                f"{name} must be an array that DLPack can share (combiner.torch and combiner.jax differentiate and "
                f"trace), got {_kind(x)}: {error}"
            ) from error
        raise ValueError(f"{name} must be on the CPU, got {_kind(x)} on {getattr(x, 'device', 'another device')}")

    def _export(self, x: Array) -> Any:
        if x.dtype.name == "bfloat16":
            return self._namespace.from_dlpack(x.view(np.int16)).view(self._namespace.bfloat16)
        return self._namespace.from_dlpack(x)


def _namespace(name: str, x: Any) -> Any:
    """The module that makes arrays like x, by the array API, or the one that defines x's class."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    for kind in type(x).__mro__:
        module = sys.modules.get(kind.__module__.partition(".")[0])
        if hasattr(module, "from_dlpack"):
            return module
    raise TypeError(f"{name} must be an array of NumPy or of a library with a function from_dlpack, got {_kind(x)}")


def _kind(x: object) -> str:
    return f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"
