# SPDX-License-Identifier: Apache-2.0
"""Keeps the latest plans, so that the next call with the same pattern and length need not make its plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar, TypeVarTuple
from weakref import ref

from .plan import Plan

Key = TypeVarTuple("Key")
Made = TypeVar("Made")


class PlanCache(Generic[*Key, Made]):
    """The latest results of `make` by its arguments: a plan each, or a tuple that holds plans.

    It keeps two generations, each of up to 4,096 results whose plans have up to 32 MiB. The young one takes what is
    made, and what is asked for of the old one. When the young one is full it becomes the old one, and the plans of the
    old one are forgotten. A result larger than a generation is a generation by itself.

    Threads need no lock: each step is one operation on a dict. When two threads do one at once, a plan may be made
    twice, or a generation may be counted as one plan more or less.
    """

    COUNT = 4096  # results of a generation
    BYTES = 32 << 20
    _all: ClassVar[list[Any]] = []

    def __init__(self, make: Callable[[*Key], Made]) -> None:
        self.make = make
        self._young: dict[tuple[Any, ...], tuple[Made, int]] = {}
        self._old: dict[tuple[Any, ...], tuple[Made, int]] = {}
        self._young_bytes = 0
        self._all.append(self)

    def get(self, *key: *Key) -> Made:
        """The result of `make` for these arguments."""
        try:
            return self._young[key][0]
        except KeyError:
            kept = self._old.get(key)
        if kept is None:
            made = self.make(*key)
            kept = made, _bytes(made)
        self._keep(key, kept)
        return kept[0]

    def _keep(self, key: tuple[Any, ...], kept: tuple[Made, int]) -> None:
        is_full = len(self._young) >= self.COUNT or self._young_bytes + kept[1] > self.BYTES
        if is_full and self._young:
            self._old, self._young, self._young_bytes = self._young, {}, 0
        self._young[key] = kept
        self._young_bytes += kept[1]

    def clear(self) -> None:
        """Forgets every plan."""
        self._old, self._young, self._young_bytes = {}, {}, 0

    def forget(self, gone: ref[Any]) -> None:
        """The callback of a weak reference: forgets the plans whose key begins with the reference."""
        for key in [key for key in list(self._old) if key[0] is gone]:
            self._old.pop(key, None)
        for key in [key for key in list(self._young) if key[0] is gone]:
            _, size = self._young.pop(key, (None, 0))
            self._young_bytes -= size

    @classmethod
    def clear_all(cls) -> None:
        """Forgets every plan of every cache."""
        for cache in cls._all:
            cache.clear()


def _bytes(made: object) -> int:
    """Bytes of the plans in a result."""
    return sum([x.nbytes for x in (made if isinstance(made, tuple) else (made,)) if isinstance(x, Plan)])
