# SPDX-License-Identifier: Apache-2.0
"""How patterns and plans show themselves, and what they say that they cost."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from cases import NAMES, OF_LENGTH, PATTERNS, random_parts

import combiner
from combiner import Dense, Fixed, LogSparse, Mixture, Plan, Routing, Selected, Window
from combiner.cost import cost_of
from combiner.display import PALETTE, colour_numbers, svg
from combiner.plan_lists import attended, count_pairs, positions_below, rows_of
from combiner.raster import raster
from combiner.tables import counted, in_bytes, in_seconds, text_table


def made(name, L, is_causal):
    return (OF_LENGTH[name](L) if name in OF_LENGTH else PATTERNS[name]()).plan(L, is_causal)


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_those_that_the_library_counts(name, is_causal):
    for L in (1, 17, 130):
        plan = made(name, L, is_causal)
        query, _ = attended(plan)
        assert count_pairs(plan) == (plan.pairs, int((query >= L).sum()))


@pytest.mark.parametrize("seed", range(20))
def test_lists_of_some_queries_are_those_of_all(seed):
    """On parts that overlap, nest and repeat."""
    rng = np.random.default_rng(seed)
    L, R, is_causal = int(rng.integers(1, 90)), int(rng.integers(0, 30)), bool(seed % 2)
    parts = random_parts(rng, L, R, is_causal)
    plan = Plan.from_parts(parts.direct, parts.regions, parts.members, is_causal=is_causal)
    query, row = attended(plan)
    queries = rng.permutation(L)[: L // 2 + 1].tolist()
    for i, rows in zip(queries, rows_of(plan, queries), strict=True):
        assert rows.tolist() == row[query == i].tolist()
    some = rng.permutation(R)[: R // 2].tolist()
    assert {r: below.tolist() for r, below in positions_below(plan, some).items()} == {
        r: plan.regions[r].tolist() for r in some
    }
    assert count_pairs(plan) == (plan.pairs, int((query >= L).sum()))


def test_cost():
    """By hand: spans of 4 in 16 positions, causal."""
    cost = Fixed(4).cost(16, is_causal=True)
    assert cost.pairs == 4 * (1 + 2 + 3 + 4) + 4 * (0 + 1 + 2 + 3) and cost.summary_pairs == 3 * 4
    assert cost.dense_pairs == 16 * 17 // 2 and cost.share == (cost.pairs + 12) / cost.dense_pairs
    assert cost.flops == Fixed(4).plan(16, True).flops(64)
    assert (cost.length, cost.is_causal, cost.dim, cost.plans) == (16, True, 64, 1)
    assert cost == Fixed(4).plan(16, True).cost()
    x = np.zeros((4096, 32), np.float32)
    cost = LogSparse().cost(4096, dim=32)
    with combiner.num_threads(combiner.get_num_threads()):
        assert cost.forward_bytes == combiner.workspace_bytes(x, x, x, LogSparse())
        assert cost.backward_bytes == combiner.workspace_bytes(x, x, x, LogSparse(), backward=True)
    assert "4,096" in str(cost) and "of dense" in str(cost)


def test_cost_of_several_plans():
    heads = Routing(np.arange(24).reshape(3, 8) % 4)
    each = [plan.pairs for plan in heads.plan(8)]
    cost = heads.cost()
    assert (cost.plans, cost.pairs, cost.dense_pairs) == (3, sum(each), 3 * 64)
    mixture = Mixture(Fixed(4), LogSparse()).cost(64)
    parts = [pattern.cost(64) for pattern in (Fixed(4), LogSparse())]
    assert mixture.pairs == sum(part.pairs for part in parts) and mixture.dense_pairs == 64 * 64
    assert cost_of((Fixed(4).plan(8),)).pairs == Fixed(4).cost(8).pairs


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: Fixed(4).cost(), TypeError, "length must be given with a pattern"),
        (lambda: Fixed(4).cost(-1), ValueError, "length must be at least 0"),
        (lambda: Fixed(4).cost(8, is_causal=1), TypeError, "is_causal must be a bool"),
        (lambda: Fixed(4).cost(8, dim=0), ValueError, "dim must be at least 1"),
        (lambda: Fixed(4).cost(8, dim=2000), ValueError, "dim must be at most 1024, got 2000"),
        (lambda: Fixed(4).plan(8).cost(9), ValueError, "length must be 8, the plan's, got 9"),
        (lambda: Fixed(4).plan(8).cost(is_causal=True), ValueError, "is_causal must be False with a bidirectional"),
        (lambda: cost_of(()), ValueError, "pattern must make at least one plan"),
    ],
)
def test_bad_arguments_of_cost(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("name", ["dense", "fixed7", "vertical7", "mixture6", "heavy4 window6", "opened tree3"])
def test_svg(name, is_causal):
    """Its rectangles, painted, are the pixels."""
    for L in (1, 20, 64, 150):
        plan = made(name, L, is_causal)
        root = ElementTree.fromstring(svg(plan))
        expected = colour_numbers(raster(plan, 64))
        n = len(expected)
        assert root.get("viewBox") == f"0 0 {n} {n}" and n <= 64
        painted = np.full((n, n), -1)
        for path in root:
            for x, y, w, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path.get("d")):
                assert w == back and (painted[int(y), int(x) : int(x) + int(w)] == -1).all()
                painted[int(y), int(x) : int(x) + int(w)] = PALETTE.index(path.get("fill"))
        np.testing.assert_array_equal(painted, expected)


SHOWN = [
    Dense(),
    Fixed(128),
    Fixed(8).sparse(),
    Window(4096),
    Mixture(Fixed(16), LogSparse()),
    Routing(np.arange(100) % 7),
    Routing(np.arange(600).reshape(6, 100) % 7),
    Selected(Fixed(8), [[0], [1]], block=32),
    Fixed(8).plan(30, True),
    Plan.from_mask(np.eye(5, dtype=bool)),
]


@pytest.mark.parametrize("shown", SHOWN, ids=lambda x: type(x).__name__)
def test_notebooks_and_terminals(shown):
    """The repr is a short line; `describe` and the HTML begin with it and have a line for each length."""
    text, html = shown.describe(), shown._repr_html_()
    assert text.startswith(repr(shown)) and len(repr(shown)) < 120 and "\n" not in repr(shown)
    root = ElementTree.fromstring(html)
    assert root.find("code").text == repr(shown)
    pictures = root.findall(".//{http://www.w3.org/2000/svg}svg")
    lines = root.findall(".//tbody/tr")
    kinds = 1 if isinstance(shown, Plan) else 2
    assert 1 <= len(pictures) <= 8 and len(html) < 200_000
    fits_one = isinstance(shown, Plan | Routing | Selected)
    assert len(lines) == kinds * (1 if fits_one else 3)
    for line in lines:
        cells = [cell.text for cell in line]
        assert re.search(r"\s+".join(map(re.escape, cells)), text)


def test_a_selection_of_clusters_shows_what_it_has():
    """It has no causal plan."""
    shown = Selected(Routing(np.arange(64) % 4), [0])
    assert "bidirectional" in shown.describe() and "\ncausal" not in shown.describe()


def test_numbers_in_three_digits():
    assert [counted(n) for n in (0, 999, 1000, 12345, 4.56e6, 1.02e9, 5e12)] == [
        "0", "999", "1.00k", "12.3k", "4.56M", "1.02G", "5000G",
    ]  # fmt: skip
    assert [in_bytes(n) for n in (812, 1024, 3_200_000)] == ["812 B", "1.00 KiB", "3.05 MiB"]
    assert [in_seconds(s) for s in (1.23e-5, 4.56e-3, 1.0249, 200)] == ["12.3 us", "4.56 ms", "1.02 s", "200 s"]
    assert text_table(("a", "b"), [("x", 1), ("long", 22)]) == "a      b\nx      1\nlong  22"
