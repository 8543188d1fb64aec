# SPDX-License-Identifier: Apache-2.0
"""Pictures: what is drawn is what the reference lists, cell by cell; of long sequences, pixel by pixel."""

import re
import warnings

import numpy as np
import pytest
from cases import OF_LENGTH, PATTERNS, below, random_parts
from fresh import ROOT, run_file, run_python
from test_plan import decode

import combiner
from combiner import Axial, AxialMixture, Dense, Fixed, LogSparse, Mixture, Plan, Routing, Tree, Window, reference
from combiner.plan_lists import attended

pytest.importorskip("matplotlib")
import matplotlib
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import combiner.plot


def on_new_axes(draw):
    """The function, with axes of a figure of its own where none are given."""

    def drawing(*args, ax=None, **options):
        return draw(*args, ax=Figure().subplots() if ax is None else ax, **options)

    return drawing


draw_pattern, draw_weights = map(on_new_axes, (combiner.plot.draw_pattern, combiner.plot.draw_weights))
draw_beside_dense, draw_row = map(on_new_axes, (combiner.plot.draw_beside_dense, combiner.plot.draw_row))
draw_region_weights, draw_cost = map(on_new_axes, (combiner.plot.draw_region_weights, combiner.plot.draw_cost))
draw_heads = on_new_axes(combiner.plot.draw_heads)


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
        (lambda: draw_pattern(Fixed(2)), TypeError, "length must be given with a pattern, which has none of its own"),
        (lambda: draw_pattern(Fixed(2), -1), ValueError, "length must be at least 0"),
        (lambda: draw_pattern(Fixed(2), 4, 1), TypeError, "is_causal must be a bool, got int"),
        (lambda: draw_pattern("fixed", 4), TypeError, "pattern must be a pattern or a Plan, got str"),
        (lambda: draw_pattern(Fixed(2).plan(4), 5), ValueError, "length must be 4, the plan's, got 5"),
        (lambda: draw_pattern(Fixed(2).plan(4), 4, True), ValueError, "is_causal must be False with a bidirectional"),
        (lambda: draw_pattern(Fixed, 4), TypeError, "pattern must be a pattern or a Plan, got type"),
        (lambda: draw_pattern(((Fixed(2)), 3), 4), TypeError, "pattern must make a Plan, got Fixed"),
        (lambda: draw_pattern((), 4), ValueError, "pattern must make at least one plan, got none"),
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
        (lambda: draw_weights(X, X, Two().plan(4)), ValueError, "pattern must make one plan, got 2"),
        (lambda: draw_weights(X, X, Mixture(Fixed(2))), ValueError, "pattern must make one plan, got a Mixture of 1"),
        (
            lambda: draw_heads(X[None], X, Fixed(2)),
            ValueError,
            r"\[Hq, L, D\] and \[Hk, L, D\], or \[L, D\], got \(1, 4, 2\)",
        ),
        (lambda: draw_heads(X, X.tolist(), Fixed(2)), TypeError, "key"),
        (lambda: draw_heads(X[None], np.ones((2, 4, 2)), Fixed(2)), ValueError, "a multiple of key's 2 heads, got 1"),
        (lambda: draw_heads(X[None], X[None], Two()), ValueError, "a plan for each of 1 key heads, got 2"),
        (lambda: draw_heads(X[None], X[None], Fixed(2), least=2), ValueError, "least must be between 0 and 1, got 2"),
        (lambda: draw_row(X, X, Fixed(2), 4), ValueError, "index must be below 4, the length, got 4"),
        (lambda: draw_row(X, X, Fixed(2), -5), ValueError, "index must be at least -4"),
        (lambda: draw_region_weights(X, X, Dense()), ValueError, r"pattern must have regions, got Dense\(\)"),
        (lambda: draw_cost(Fixed(2), what="time"), ValueError, "what must be one of 'pairs', 'bytes', 'seconds'"),
        (lambda: draw_cost([], [8]), ValueError, "patterns must be at least one"),
        (lambda: draw_cost({"dense": Fixed(2)}, [8]), ValueError, "other names than 'dense'"),
        (lambda: draw_weights(X, X, Fixed(2), key_mask=np.ones(3, bool)), ValueError, "key_mask"),
        (lambda: draw_row(X, X, Fixed(2), 1, key_mask=np.ones(3, bool)), ValueError, "key_mask"),
        (lambda: draw_row(X, X, Fixed(2), 1, key_mask=[1, 0, 1, 1]), TypeError, "key_mask"),
        (lambda: draw_cost(Fixed(2), [0]), ValueError, "lengths must be at least 1"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_drawing_leaves_matplotlib_as_it_was():
    """It is imported when something is drawn, pyplot where no axes are given, and its settings stay."""
    code = """
import sys, numpy, combiner
assert "combiner.plot" not in sys.modules
import combiner.plot
assert not any(name.startswith("matplotlib") for name in sys.modules)
import matplotlib
from matplotlib.figure import Figure
before = matplotlib.rcParams.copy()
left, right = Figure().subplots(1, 2)
combiner.plot.draw_pattern(combiner.Fixed(2), 4, ax=left).figure.draw_without_rendering()
combiner.plot.draw_weights(*numpy.ones((2, 4, 2)), combiner.Fixed(2), ax=right).figure.draw_without_rendering()
assert "matplotlib.pyplot" not in sys.modules
assert before == matplotlib.rcParams
"""
    done = run_python(code, MPLBACKEND="agg")  # rcParams would import pyplot to find one
    assert done.returncode == 0, done.stderr


def test_gallery(tmp_path):
    """The command draws what docs/patterns.md and docs/looking.md show, in all less than a page should weigh."""
    run_file("docs/gallery.py", tmp_path)
    for document in ("patterns", "looking"):
        names = {path.name for path in (tmp_path / document).iterdir()}
        shown = re.findall(rf"!\[[^\]]+\]\({document}/([\w.]+)\)", (ROOT / "docs" / f"{document}.md").read_text())
        assert len(shown) == len(names) and set(shown) == names
        assert {path.name for path in (ROOT / "docs" / document).iterdir()} == names
        for folder in (tmp_path / document, ROOT / "docs" / document):
            assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
            assert sum(path.stat().st_size for path in folder.iterdir()) < 600_000


def test_weights_of_tensors(rng):
    """They emitted DeprecationWarnings, which are errors here."""
    torch = pytest.importorskip("torch")
    q, k = rng.standard_normal((2, 12, 4), np.float32)
    expected = combiner.plot.draw_weights(q, k, Fixed(4), key_mask=np.arange(12) < 9)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = torch.tensor(q, dtype=dtype), torch.tensor(k, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ax = combiner.plot.draw_weights(*tensors, Fixed(4), key_mask=torch.arange(12) < 9)
        for a, b in zip(ax.images, expected.images, strict=True):
            tolerance = 1e-6 if dtype is torch.float32 else 0.05
            np.testing.assert_allclose(a.get_array(), b.get_array(), rtol=tolerance)


def test_without_matplotlib_the_extra_is_named():
    code = """
import sys
sys.modules["matplotlib"] = None
import combiner
try:
    combiner.plot.draw_pattern(combiner.Fixed(2), 4)
except ImportError as error:
    assert str(error) == "combiner.plot needs matplotlib: pip install 'combiner-attention[plot]'", error
else:
    raise AssertionError
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def no_figures():
    """pyplot keeps the figures that a test leaves."""
    yield
    plt.close("all")


def test_pyplots_current_axes():
    """As a script or a notebook has them: nothing was shown, because the figure was not pyplot's."""
    q, k = np.random.default_rng(0).standard_normal((2, 12, 4))
    for draw in (
        lambda: combiner.plot.draw_pattern(Fixed(4), 12),
        lambda: combiner.plot.draw_pattern(Mixture(Fixed(4), LogSparse()), 12),
        lambda: combiner.plot.draw_weights(q, k, Fixed(4)),
        lambda: combiner.plot.draw_beside_dense(q, k, Fixed(4)),
        lambda: combiner.plot.draw_row(q, k, Fixed(4), 5),
        lambda: combiner.plot.draw_region_weights(q, k, Fixed(4)),
        lambda: combiner.plot.draw_cost(Fixed(4), [8, 16]),
    ):
        plt.close("all")
        _, (left, right) = plt.subplots(1, 2)
        before = matplotlib.rcParams.copy()
        assert plt.gca() is right and draw() is right
        assert matplotlib.rcParams == before and not left.has_data()
        right.figure.draw_without_rendering()
        plt.close("all")
        assert draw() is plt.gca()


def test_several_plans_are_drawn_side_by_side():
    """Of a mixture, of heads, and of a mixture of heads: each as it is drawn alone."""
    heads = Routing(np.random.default_rng(0).integers(0, 4, (3, 16)))
    many = Routing(np.random.default_rng(0).integers(0, 4, (12, 16)))
    for pattern, plans, titles in (
        (Mixture(Fixed(4), LogSparse()), [Fixed(4).plan(16), LogSparse().plan(16)], ["component 0", "component 1"]),
        (heads, heads.plan(16), ["head 0", "head 1", "head 2"]),
        (
            Mixture(heads, Fixed(4)),
            [*heads.plan(16), Fixed(4).plan(16)],
            [*(f"component 0, head {n}" for n in range(3)), "component 1"],
        ),
        (many, many.plan(16)[:9], [f"head {n}" for n in range(9)]),
    ):
        ax = draw_pattern(pattern, 16)
        assert [panel.get_title() for panel in ax.child_axes] == titles
        for panel, plan in zip(ax.child_axes, plans, strict=True):
            assert drawn(panel, 16) == drawn(draw_pattern(plan), 16)
    assert ax.get_title() == "the first 9 of 12 plans"


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize(
    "name", ["fixed16", "logsparse", "vertical", "mixture6", "heavy16 window40", "window7", "sparse tree"]
)
def test_long_sequences(name, is_causal):
    """A pixel is b keys of the last query of b, and has the rarest kind of part among them."""
    L, b = 1200, 5
    pattern = PATTERNS[name]()
    parts = reference.parts(pattern, L, is_causal)
    positions = below(parts, L)
    ax = draw_pattern(pattern, L, is_causal)
    colours = drawn(ax, 240)
    assert ax.get_xlabel() == "key, 5 to a pixel" and ax.get_ylabel() == "query, every 5th"
    assert ax.get_xlim() == (-0.5, L - 0.5) and ax.images[0].get_extent() == [-0.5, L - 0.5, L - 0.5, -0.5]
    of = combiner.plot
    for y in range(0, 240, 7):
        i = b * y + b - 1
        count, direct = np.zeros(L, int), np.zeros(L, bool)
        direct[parts.direct[i]] = True
        np.add.at(count, parts.direct[i], 1)
        for r in parts.regions[i]:
            count[sorted(set(positions[r]))] += 1
        for x in range(240):
            n, is_direct = count[b * x : b * x + b], direct[b * x : b * x + b]
            if (is_direct & (n > 1)).any():
                expected = (of.DIRECT_TOO,)
            elif is_direct.any():
                expected = (of.DIRECT,)
            elif (n > 1).any():
                expected = of.SEVERAL
            elif n.any():
                expected = of.REGION
            else:
                expected = (of.OUTSIDE,) if is_causal and x > y else (of.NOTHING,)
            assert colours[y][x] in expected, (y, x)


@pytest.mark.parametrize(
    "pattern",
    [
        Dense(),
        Fixed(),
        LogSparse(hierarchical=True),
        Tree(16),
        Window(100),
        Axial(),
        AxialMixture(),
        Routing(np.arange(65536) % 2),
    ],
    ids=lambda pattern: type(pattern).__name__,
)
def test_the_longest_sequences(pattern):
    """The diagonal is direct at 65,536 positions, where a direct key is 1/256 of a pixel; nothing lies beyond it."""
    colours = np.array(drawn(draw_pattern(pattern, 65536, True), 256))
    assert colours.shape == (256, 256)
    assert (np.diagonal(colours) == combiner.plot.DIRECT).all()
    assert (colours[np.triu_indices(256, 1)] == combiner.plot.OUTSIDE).all()
    seen = colours[np.tril_indices(256, -1)] != combiner.plot.NOTHING
    assert seen.mean() < 0.01 if isinstance(pattern, Window) else seen.all()


def test_colours_differ_in_grey():
    """Direct keys are darker than every summary, by an eighth of the range; so is what is attended than what is not."""
    lightness = {hue: np.array(to_rgb(hue)) @ [0.2126, 0.7152, 0.0722] for hue in combiner.display.PALETTE}
    of = combiner.plot
    summaries = [lightness[hue] for hue in (*of.REGION, *of.SEVERAL)]
    assert lightness[of.DIRECT_TOO] + 0.125 < lightness[of.DIRECT] < min(summaries) - 0.125
    assert max(summaries) < lightness[of.NOTHING] - 0.08
    assert max(lightness[hue] for hue in of.SEVERAL) < max(lightness[hue] for hue in of.REGION)


def test_legends_name_what_occurs():
    def names(ax):
        return [text.get_text() for text in ax.get_legend().get_texts()]

    assert names(draw_pattern(Fixed(4), 16)) == ["direct", "summary"]
    assert names(draw_pattern(Window(4), 16, True)) == ["direct", "not seen", "future"]
    assert draw_pattern(Fixed(4), 16, legend=False).get_legend() is None


@pytest.mark.parametrize("name", ["dense", "fixed16", "mixture6", "window7"])
def test_weights_of_long_sequences(rng, name):
    """A pixel has the weight of its keys together, in the hue of the pattern's picture."""
    L, b = 1100, 5
    q, k = rng.standard_normal((2, L, 4))
    pattern = PATTERNS[name]()
    rows = np.minimum(np.arange(b, L + b, b), L) - 1
    whole = combiner.attention_weights(q, k, pattern, is_causal=True)[rows]
    expected = np.maximum(np.add.reduceat(whole, np.arange(0, L, b), axis=1), 1e-4)
    colours = np.array(drawn(draw_pattern(pattern, L, True), len(rows)))
    ax = draw_weights(q, k, pattern, True)
    of = combiner.plot
    for image in ax.images[1:]:
        cells = ~np.ma.getmaskarray(image.get_array())
        np.testing.assert_allclose(image.get_array()[cells], expected[cells], rtol=1e-10)
        kinds = set(colours[cells])
        assert any(kinds <= set(hues) for hues in ([of.DIRECT], of.REGION, (*of.SEVERAL, of.DIRECT_TOO))), kinds


def weights_in(ax, n: int):
    """The weights that an axes shows, 0 where it shows none, and the name of each cell's hue."""
    weights, hues = np.zeros((n, n)), np.full((n, n), "none", object)
    for image in ax.images[1:]:
        cells = ~np.ma.getmaskarray(image.get_array())
        weights[cells] = image.get_array()[cells]
        # Oranges have less blue than red, Blues have more; Purples have less green than either.
        red, green, blue, _ = image.cmap(0.7)
        hues[cells] = "violet" if green < min(red, blue) else "blue" if blue > red else "orange"
    return weights, hues


@pytest.mark.parametrize("L", (16, 1100))
def test_weights_of_heads_with_plans_of_their_own(rng, L):
    """Each key head has its plan, and its group of query heads has pictures as `draw_weights` draws them."""
    q, k = rng.standard_normal((4, L, 4)), rng.standard_normal((2, L, 4))
    ax = draw_heads(q, k, Two(), True)
    n = 16 if L == 16 else 220
    for h, panel in enumerate(ax.child_axes[:4]):
        assert panel.get_title() == f"head {h}"
        alone = draw_weights(q[h], k[h // 2], Two().plan(L, True)[h // 2])
        for a, b in zip(weights_in(panel, n), weights_in(alone, n), strict=True):
            np.testing.assert_array_equal(a, b)
    many = draw_heads(np.ones((12, 8, 2)), np.ones((1, 8, 2)), Fixed(2))
    assert many.get_title() == "the first 9 of 12" and many.child_axes[8].get_title() == "head 8"


@pytest.mark.parametrize("L, b", [(24, 1), (1100, 5)])
def test_weights_of_a_mixture(rng, L, b):
    """The mean's weights are the effective attention's; a cell is violet unless all that attend it do so in one way."""
    q, k = rng.standard_normal((2, L, 4))
    mixture = Mixture(Fixed(8), Window(4), LogSparse().sparse())
    rows = np.minimum(np.arange(b, L + b, b), L) - 1
    ax = draw_heads(q, k, mixture, True, least=1e-12)
    panels = ax.child_axes[:4]
    assert [panel.get_title() for panel in panels] == ["component 0", "component 1", "component 2", "mean"]
    whole = combiner.attention_weights(q, k, mixture, is_causal=True)[rows]
    (weights, hues), *parts = (weights_in(panel, len(rows)) for panel in (panels[3], *panels[:3]))
    expected = np.add.reduceat(whole, np.arange(0, L, b), axis=1)
    np.testing.assert_allclose(weights, np.where(expected > 0, np.maximum(expected, 1e-12), 0), rtol=1e-9)
    assert {"orange", "blue", "violet"} <= set(hues.ravel())
    for cell, seen in zip(hues.ravel(), zip(*(part.ravel() for _, part in parts), strict=True), strict=True):
        kinds = [each for each in seen if each != "none"]
        assert cell == ("none" if not kinds else kinds[0] if set(kinds) <= {"orange"} or len(kinds) == 1 else "violet")
    two_heads = draw_heads(np.stack([q, k]), np.stack([k, q]), mixture, True, least=1e-12)
    np.testing.assert_allclose(weights_in(two_heads.child_axes[0], len(rows))[0], weights, rtol=1e-12)


def test_beside_dense(rng):
    """The same scale, and dense attention's softmax on the right."""
    for L in (20, 1100):
        q, k = rng.standard_normal((2, L, 4))
        left, right = draw_beside_dense(q, k, Fixed(8), True).child_axes[:2]
        logits = np.where(np.tril(np.ones((L, L), bool)), q @ k.T / 2, -np.inf)
        exact = np.exp(logits - logits.max(axis=1, keepdims=True))
        exact /= exact.sum(axis=1, keepdims=True)
        b = 1 if L == 20 else 5
        rows = np.minimum(np.arange(b, L + b, b), L) - 1
        exact = np.maximum(np.add.reduceat(exact[rows], np.arange(0, L, b), axis=1), 1e-4)
        (_, image) = right.images
        cells = ~np.ma.getmaskarray(image.get_array())
        assert (cells == np.tril(np.ones_like(cells))).all()
        np.testing.assert_allclose(image.get_array()[cells], exact[cells], rtol=1e-10)
        assert {image.norm.vmin, *(each.norm.vmin for each in left.images[1:])} == {1e-4}
        assert right.get_title() == "dense" and left.get_title() == "Fixed(span=8)"


@pytest.mark.parametrize("L", (30, 1300))
def test_row(rng, L):
    """Bars are the row of the effective attention, by kind; the line is dense attention's."""
    q, k = rng.standard_normal((2, L, 4))
    b, i, span = 1 if L == 30 else 6, L - 7, 16
    ax = draw_row(q, k, Fixed(span), i - L, True)
    weights = combiner.attention_weights(q, k, Fixed(span), is_causal=True)[i]
    starts = np.arange(0, L, b)
    expected = np.add.reduceat(weights, starts)
    found = np.zeros(len(starts))
    for bars, name in zip(ax.containers, ["direct", "summary"], strict=True):
        assert bars.get_label() == name
        for bar in bars:
            n = round((bar.get_x() + 0.5) / b)
            found[n] = bar.get_height()
            holds = (starts[n] + np.arange(b))[: L - starts[n]] // span == i // span
            assert holds.any() == (name == "direct")
    np.testing.assert_allclose(found, np.where(starts > i, 0, expected), rtol=1e-10, atol=1e-15)
    p = np.exp(q[i] @ k[: i + 1].T / 2)
    values, _, _ = ax.patches[-1].get_data()
    np.testing.assert_allclose(
        values, np.add.reduceat(np.append(p / p.sum(), np.zeros(L - 1 - i)), starts), rtol=1e-10, atol=1e-15
    )
    assert ax.get_title() == f"query {i}"


@pytest.mark.parametrize("L, span, every, block", [(40, 8, 1, 1), (1300, 16, 6, 1), (1400, 2, 6, 3)])
def test_region_weights(rng, L, span, every, block):
    """The weights of a span's keys add up to that of its region; the strip has the direct keys'."""
    q, k = rng.standard_normal((2, L, 4))
    R = -(-L // span)
    ax = draw_region_weights(q, k, Fixed(span), least=1e-6)
    rows = np.minimum(np.arange(every, L + every, every), L) - 1
    weights = combiner.attention_weights(q, k, Fixed(span))[rows]
    by_span = np.add.reduceat(weights, np.arange(0, L, span), axis=1)
    own = rows // span
    direct = by_span[np.arange(len(rows)), own]
    by_span[np.arange(len(rows)), own] = 0
    image = ax.images[0].get_array()
    found = np.where(np.ma.getmaskarray(image), 0, image.data)
    expected = np.add.reduceat(by_span, np.arange(0, R, block), axis=1)
    np.testing.assert_allclose(found, np.where(expected > 0, np.maximum(expected, 1e-6), 0), rtol=1e-10)
    np.testing.assert_allclose(ax.child_axes[0].images[0].get_array()[:, 0], np.maximum(direct, 1e-6), rtol=1e-10)


def test_cost_over_the_length():
    ax = draw_cost([Fixed(16), LogSparse()], [64, 256, 1024], True)
    dense, *lines = ax.lines
    assert dense.get_ydata().tolist() == [L * (L + 1) // 2 for L in (64, 256, 1024)]
    for line, pattern in zip(lines, (Fixed(16), LogSparse()), strict=True):
        costs = [pattern.cost(L, is_causal=True) for L in (64, 256, 1024)]
        assert line.get_ydata().tolist() == [cost.pairs + cost.summary_pairs for cost in costs]
        assert line.get_label() == repr(pattern)
    assert len({line.get_marker() for line in ax.lines}) == 3  # told apart in grey
    ax = draw_cost({"mine": Fixed(16)}, [64, 256], what="bytes")
    assert ax.lines[1].get_ydata().tolist() == [Fixed(16).cost(L).forward_bytes for L in (64, 256)]
    assert ax.lines[1].get_label() == "mine" and "bytes" in ax.get_ylabel()
    ax = draw_cost({"plan": Fixed(16).plan(64), "heads": (Fixed(16).plan(64), Dense().plan(64))}, [64])
    assert ax.lines[1].get_ydata()[0] < ax.lines[2].get_ydata()[0]
    ax = draw_cost(Fixed(16), [64], what="seconds")
    assert 0 < ax.lines[1].get_ydata()[0] < 60
