# SPDX-License-Identifier: Apache-2.0
"""Pictures: what is drawn is what the reference lists, cell by cell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import OF_LENGTH, PATTERNS, below, random_parts
from fresh import run_python
from test_plan import decode

import combiner
from combiner import Fixed, LogSparse, Plan, Routing, reference
from combiner.plan import attended

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

import combiner.plot
from combiner.plot import draw_pattern, draw_weights

ROOT = Path(__file__).parent.parent


def drawn(ax, L: int) -> list[list[str]]:
    """The colours of the cells, as plot.py writes them."""
    if L == 0:
        assert not ax.images
        return []
    (image,) = ax.images
    return [["#" + bytes(cell).hex() for cell in row] for row in image.get_array()]


def check(ax, parts, L: int, is_causal: bool, tell_apart: bool = True) -> None:
    """Each cell's colour against the parts that hold it; neighbours in a row have one shade if they are one region."""
    colours, positions = drawn(ax, L), below(parts, L)
    for i in range(L):
        holding = [[-1] * parts.direct[i].count(j) for j in range(L)]
        for r in parts.regions[i]:
            for j in set(positions[r]):
                holding[j].append(r)
        for j, regions in enumerate(holding):
            colour = colours[i][j]
            if is_causal and j > i:
                assert not regions and colour == combiner.plot.OUTSIDE
            elif not regions:
                assert colour == combiner.plot.NOTHING
            elif -1 in regions:
                assert colour == (combiner.plot.DIRECT if len(regions) == 1 else combiner.plot.DIRECT_TOO)
            else:
                assert colour in (combiner.plot.REGION if len(regions) == 1 else combiner.plot.SEVERAL)
                before = holding[j - 1] if j else []
                if len(regions) == len(before) == 1 and before != [-1] and tell_apart:
                    assert (colours[i][j - 1] == colour) == (before == regions), (i, j)


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("name", [*PATTERNS, *OF_LENGTH])
def test_patterns_are_drawn_as_the_reference_lists_them(name, is_causal):
    for L in (1, 2, 3, 16, 17, 31, 64):
        pattern = OF_LENGTH[name](L) if name in OF_LENGTH else PATTERNS[name]()
        parts = reference.parts(pattern, L, is_causal)
        check(draw_pattern(pattern, L, is_causal), parts, L, is_causal)


@pytest.mark.parametrize("seed", range(30))
def test_plans_without_rhyme(seed):
    """Parts that overlap, nest and repeat; there neighbours may be more than there are shades."""
    rng = np.random.default_rng(seed)
    L, R, is_causal = int(rng.integers(0, 40)), int(rng.integers(0, 20)), bool(seed % 2)
    parts = random_parts(rng, L, R, is_causal)
    plan = Plan.from_parts(parts.direct, parts.regions, parts.members, is_causal=is_causal)
    check(draw_pattern(plan), parts, L, is_causal, tell_apart=False)


@pytest.mark.parametrize("seed", range(30))
def test_what_is_attended(seed):
    """Both stages, in order, as brute force reads them from the arrays."""
    rng = np.random.default_rng(seed)
    L, R, is_causal = int(rng.integers(0, 90)), int(rng.integers(0, 30)), bool(seed % 2)
    parts = random_parts(rng, L, R, is_causal)
    plan = Plan.from_parts(parts.direct, parts.regions, parts.members, is_causal=is_causal)
    direct, regions, members, _ = decode(plan)
    rows = [[*keys, *(L + r for r in attended)] for keys, attended in zip(direct, regions, strict=True)] + members
    assert [x.tolist() for x in attended(plan)] == [
        [i for i, row in enumerate(rows) for _ in row],
        [t for row in rows for t in row],
    ]


def test_axes():
    """Those given are drawn in, with nothing else in their figure touched; ticks are positions at any length."""
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert draw_pattern(Fixed(4), 14, ax=right) is right
    assert right.images and not left.images and figure.axes == [left, right]
    for L, ticks in ((1, [0]), (2, [0, 1]), (5, [0, 1, 2, 3, 4]), (14, [0, 2, 4, 6, 8, 10, 12]), (64, [0, 16, 32, 48])):
        ax = draw_pattern(LogSparse(), L)
        assert ax.get_xticks().tolist() == ax.get_yticks().tolist() == ticks
        assert ax.get_xlim() == (-0.5, L - 0.5) and ax.get_ylim() == (L - 0.5, -0.5)
        ax.figure.draw_without_rendering()


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("name", ["dense", "fixed7", "hierarchical", "sparse fixed", "rowmajor", "mixture6"])
def test_weights(name, is_causal):
    """Each hue has the weights of the cells that the pattern's picture has in that hue."""
    for L in (1, 2, 20):
        rng = np.random.default_rng(L)
        query, key = rng.standard_normal((2, L, 8))
        key_mask = rng.random(L) < 0.8
        pattern = PATTERNS[name]()
        weights = combiner.attention_weights(query, key, pattern, is_causal=is_causal, key_mask=key_mask)
        colours = np.array(drawn(draw_pattern(pattern, L, is_causal), L))
        ax = draw_weights(query, key, pattern, is_causal, key_mask=key_mask, least=1e-3)
        ground, *images = ax.images
        assert (ground.get_array().any(axis=-1)).all()
        kinds = [[combiner.plot.DIRECT], combiner.plot.REGION, combiner.plot.SEVERAL]
        expected = [cells for kind in kinds if (cells := np.isin(colours, kind) & key_mask).any()]
        assert len(images) == len(expected) == len(ax.child_axes)
        for image, cells in zip(images, expected, strict=True):
            shown = image.get_array()
            np.testing.assert_array_equal(~np.ma.getmaskarray(shown), cells)
            np.testing.assert_array_equal(shown[cells], np.maximum(weights[cells], 1e-3))
    assert not draw_weights(query, key, pattern, is_causal, colorbar=False).child_axes
    plan = pattern.plan(L, is_causal)
    assert len(draw_weights(query, key, plan).images) == len(draw_weights(query, key, pattern, is_causal).images)


class Two:
    def plan(self, length, is_causal=False, /):
        return Fixed(2).plan(length, is_causal), Fixed(3).plan(length, is_causal)


X = np.ones((4, 2))


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: draw_pattern(Fixed(2)), TypeError, "length must be an integer, got NoneType"),
        (lambda: draw_pattern(Fixed(2), -1), ValueError, "length must be at least 0"),
        (lambda: draw_pattern(Fixed(2), 4, 1), TypeError, "is_causal must be a bool, got int"),
        (lambda: draw_pattern("fixed", 4), TypeError, "pattern must be a pattern or a Plan, got str"),
        (lambda: draw_pattern(Fixed(2).plan(4), 5), ValueError, "length must be 4, the plan's, got 5"),
        (lambda: draw_pattern(Fixed(2).plan(4), 4, True), ValueError, "is_causal must be False with a bidirectional"),
        (lambda: draw_pattern(Two(), 4), ValueError, "pattern must make one plan, got 2"),
        (lambda: draw_pattern(Two().plan(4), 4), ValueError, "pattern must make one plan, got 2"),
        (lambda: draw_pattern(Routing(np.zeros((3, 4), int)), 4), ValueError, "pattern must make one plan, got 3"),
        (lambda: draw_pattern(Fixed(2), 4, ax=Figure()), TypeError, "ax must be matplotlib axes, got Figure"),
        (lambda: draw_weights(X[None], X, Fixed(2)), ValueError, r"query must have shape \[L, D\]"),
        (lambda: draw_weights(X, X[0], Fixed(2)), ValueError, r"key must have shape \[L, D\]"),
        (lambda: draw_weights(X, X[:3], Fixed(2)), ValueError, "key"),
        (lambda: draw_weights(X.tolist(), X, Fixed(2)), TypeError, "query"),
        (lambda: draw_weights(X, X, Fixed(2).plan(5)), ValueError, "length"),
        (lambda: draw_weights(X, X, Fixed(2).plan(4), True), ValueError, "is_causal"),
        (lambda: draw_weights(X, X, Two()), ValueError, "pattern must make one plan, got 2"),
        (lambda: draw_weights(X, X, Fixed(2), least=0), ValueError, "least must be between 0 and 1, got 0"),
        (lambda: draw_weights(X, X, Fixed(2), least="1e-4"), TypeError, "least must be a number, got str"),
        (lambda: draw_weights(X, X, Fixed(2), ax=0), TypeError, "ax must be matplotlib axes, got int"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_drawing_leaves_matplotlib_as_it_was():
    """It is imported when something is drawn, pyplot is not, and its settings stay."""
    code = """
import sys, numpy, combiner
assert "combiner.plot" not in sys.modules
import combiner.plot
assert not any(name.startswith("matplotlib") for name in sys.modules)
import matplotlib
before = matplotlib.rcParams.copy()
combiner.plot.draw_pattern(combiner.Fixed(2), 4).figure.draw_without_rendering()
combiner.plot.draw_weights(*numpy.ones((2, 4, 2)), combiner.Fixed(2)).figure.draw_without_rendering()
assert "matplotlib.pyplot" not in sys.modules
assert before == matplotlib.rcParams
"""
    done = run_python(code, MPLBACKEND="agg")  # rcParams would import pyplot to find one
    assert done.returncode == 0, done.stderr


def test_gallery(tmp_path):
    """The command draws what docs/patterns.md shows, in all less than a page should weigh."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "gallery.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    shown = re.findall(r"!\[[^\]]+\]\(patterns/([\w.]+)\)", (ROOT / "docs" / "patterns.md").read_text())
    assert len(shown) == len(names) and set(shown) == names
    assert {path.name for path in (ROOT / "docs" / "patterns").iterdir()} == names
    for folder in (tmp_path, ROOT / "docs" / "patterns"):
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
        assert sum(path.stat().st_size for path in folder.iterdir()) < 600_000
