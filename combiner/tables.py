# SPDX-License-Identifier: Apache-2.0
"""Small tables as text and as HTML, and numbers in three digits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines of columns: the first one left-aligned, all others right-aligned."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (f"{cell:{'>' if n else '<'}{widths[n]}}" for n, cell in enumerate(cells))
        return "  ".join([first, *others]).rstrip()

    return "\n".join(map(line, lines))


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A `<table>` of these cells."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def counted(n: float) -> str:
    """A count: 981, 12.3k, 4.56M, 1.02G."""
    return _scaled(n, 1000, ("", "k", "M", "G"))


def in_bytes(n: float) -> str:
    """A size: 812 B, 24.1 KiB, 3.05 MiB."""
    return _scaled(n, 1024, (" B", " KiB", " MiB", " GiB"))


def in_seconds(seconds: float) -> str:
    """A time: 12.3 us, 4.56 ms, 1.02 s."""
    return _scaled(seconds * 1e6, 1000, (" us", " ms", " s"), whole=False)


def _scaled(n: float, base: float, units: Sequence[str], whole: bool = True) -> str:
    """n in the smallest unit in which it has at most three digits before the point."""
    for unit in units:
        if n < 999.5 or unit == units[-1]:
            break
        n /= base
    digits = 0 if n >= 99.95 or (whole and unit == units[0]) else 1 if n >= 9.995 else 2
    return f"{n:.{digits}f}{unit}"
