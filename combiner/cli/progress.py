# SPDX-License-Identifier: Apache-2.0
"""Progress bars, where tqdm is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any


class Plain:
    """In place of tqdm's bar: the items, and no bar."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Shows nothing."""


def progress(items: Iterable[Any], what: str, unit: str) -> Any:
    """The items behind a bar on standard error: a line every five seconds where that is no terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return Plain(items)
    on_terminal = sys.stderr.isatty()
    return tqdm(items, what, unit=unit, ascii=not on_terminal, mininterval=0.1 if on_terminal else 5)
