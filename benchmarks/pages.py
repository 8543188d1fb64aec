# SPDX-License-Identifier: Apache-2.0
"""Markdown: a table, and the part of a page that a program writes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(map(str, cells)) for cells in (header, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_between(first_line: str, last_line: str, text: str, path: Path) -> None:
    """Replaces what stands between two lines of a page."""
    before, _, rest = path.read_text().partition(first_line)
    _, last, after = rest.partition(last_line)
    if not last:
        raise ValueError(f"{path} must have the lines {first_line} and {last_line}")
    path.write_text(f"{before}{first_line}\n\n{text}\n\n{last_line}{after}")
