# SPDX-License-Identifier: Apache-2.0
"""The commands info, compare and plot."""

from __future__ import annotations

import platform
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile

from .. import comparison
from ..arguments import Array
from ..process import info

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PACKAGES = ("numpy", "torch", "jax", "transformers", "matplotlib")


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values, as lines of text."""

    facts: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self.facts

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        return "\n".join(f"{name:{width}}  {_words(value)}" for name, value in self.facts.items())


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else "none" if value is None else str(value)


def run_info(args: Namespace) -> Facts:
    """The command `info`."""
    build = dict(info())
    build["numpy at build"] = build.pop("numpy")
    packages = {name: _version(name) for name in PACKAGES}
    system = {"python": platform.python_version(), "system": platform.platform(), "processor": _processor()}
    return Facts({**build, **system, **packages})


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _read_arrays(path: str, *names: str) -> list[Array]:
    """Arrays of an archive."""
    with open(path, "rb") as file:
        try:
            archive = np.load(file)
        except (EOFError, BadZipFile, ValueError):
            archive = None
        if not isinstance(archive, NpzFile):
            raise ValueError(f"--npz must be an archive as numpy.savez writes it, got {path}")
        if any(name not in archive for name in names):
            raise ValueError(f"{path} must have arrays {', '.join(names)}, has {', '.join(archive)}")
        return [archive[name] for name in names]


def run_compare(args: Namespace) -> comparison.Comparison:
    """The command `compare`."""
    if args.npz:
        arrays = _read_arrays(args.npz, "query", "key", "value")
    else:
        arrays = list(np.random.default_rng(0).standard_normal((3, args.heads, args.length, args.dim), np.float32))
    query, key, value = arrays
    with _picture(args.out) if args.out else nullcontext() as ax:
        found = comparison.compare(query, key, value, args.patterns, is_causal=args.causal, sample=args.sample)
        if ax is not None:
            found.plot(ax=ax)
    return found


def run_plot(args: Namespace) -> Facts:
    """The command `plot`."""
    from ..plot import draw_cost, draw_pattern

    if args.what == "pattern" and len(args.patterns) > 1:
        raise ValueError(
            f"a picture has one pattern, or with --what pairs, bytes or seconds several, got {len(args.patterns)}"
        )
    with _picture(args.out) as ax:
        if args.what == "pattern":
            (pattern,) = args.patterns
            draw_pattern(pattern, args.length, args.causal, ax=ax)
            ax.set_title(f"{pattern!r}, L {args.length:,}, {'causal' if args.causal else 'bidirectional'}")
        else:
            draw_cost(args.patterns, is_causal=args.causal, what=args.what, ax=ax)
    return Facts({"picture": args.out})


@contextmanager
def _picture(path: str) -> Iterator[Axes]:
    """Axes of a figure, which is saved in the end. A file that cannot be written is refused at once."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("needs matplotlib: pip install 'combiner-attention[plot]'") from error
    figure = Figure(figsize=(7.5, 5), dpi=120)
    formats = sorted(figure.canvas.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in formats:
        raise ValueError(f"--out must be a picture, its name ending in one of {', '.join(formats)}, got {path}")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--out must be in a folder that exists, got {path}")
    yield figure.subplots()
    figure.savefig(path, bbox_inches="tight")
