# SPDX-License-Identifier: Apache-2.0
"""benchmarks/quality: the programs run, their attention is its definition, and docs/quality.md has their figures."""

import importlib
import json

import numpy as np
import pytest
from fresh import ROOT, run_file

import combiner

RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
PAGE = ROOT / "docs" / "quality.md"


def test_a_quick_run(tmp_path):
    """Every case at a small size; what is measured is not measured again; all tables and the picture."""
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    out, page = tmp_path / "quality.jsonl", tmp_path / "quality.md"
    run_file("benchmarks/quality/measure.py", "--quick", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["model"].partition("-")[0] for row in rows} == {"recall", "needle", "bytes", "listops", "pixels"}
    assert all(0 <= row["recall"] <= 1 and row["bits"] > 0 and 0 < row["pairs"] < 2 for row in rows)
    assert run_file("benchmarks/quality/measure.py", "--quick", "--out", out) == ""

    page.write_text(PAGE.read_text())
    said = run_file("benchmarks/quality/show.py", out, "--write", page, "--plot", tmp_path)
    assert tables(page.read_text()) == said.strip() and said.count("| --- |") > 8
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_a_quick_run_over_time(tmp_path):
    """Models that take turns: every curve has its points; a row of the table for each, and the picture."""
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    out = tmp_path / "over_time.jsonl"
    run_file("benchmarks/quality/over_time.py", "--quick", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["attention"] for row in rows}) == len(rows) == 4
    for row in rows:
        assert row["steps"][0] == 0 and row["steps"] == sorted(set(row["steps"]))
        assert len(row["bits"]) == len(row["steps"]) > 1 and row["step_seconds"] > 0
    said = run_file("benchmarks/quality/show.py", tmp_path / "none", "--over-time", out, "--plot", tmp_path)
    assert all(f"\n| {row['attention']} |" in said for row in rows)
    assert (tmp_path / "loss_over_time.png").read_bytes().startswith(b"\x89PNG")


def test_the_value_of_an_expression(rng, monkeypatch):
    """Answers of ListOps beside those of a parser with a stack; the score counts the last bracket alone."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "quality"))
    tasks = importlib.import_module("tasks")
    task = tasks.ListOps()
    tokens, answers = (x.numpy() for x in task.batch(rng, 20, 64))
    asked = task.held_out(20, 64).answers.numpy() != tasks.IGNORED
    assert (asked.sum(axis=1) == 1).all()
    for row, wanted in zip(tokens.tolist(), answers.tolist(), strict=True):
        stack: list[list[int]] = [[]]
        for token, answer in zip(row, wanted, strict=True):
            if token < 10:
                stack[-1].append(token)
            elif token < tasks.CLOSE:
                stack.append([token - 10])
            elif token == tasks.CLOSE:
                operator, *digits = stack.pop()
                value = (min(digits), max(digits), int(np.median(digits)), sum(digits) % 10)[operator]
                assert answer == value and len(digits) >= 2
                stack[-1].append(value)
            elif token == tasks.PADDING:
                assert answer == stack[0][0]
            assert token in (tasks.CLOSE, tasks.PADDING) or answer == tasks.IGNORED
        assert row[0] == tasks.START and row.count(tasks.START) == 1
        assert len(stack) == 1 and len(stack[0]) == 1


def test_held_out_pixels_are_not_trained_on(monkeypatch):
    """The patches of many batches hold no row of the picture that a held-out patch has."""
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "quality"))
    tasks = importlib.import_module("tasks")
    rows = np.arange(600)[:, None].repeat(40, axis=1)  # a picture whose shades are the numbers of its rows
    monkeypatch.setattr(tasks, "_photograph", lambda: rows)
    task = tasks.Pixels(vocabulary=256)
    trained = set(task.batch(np.random.default_rng(0), 500, 256).tokens.unique().tolist())
    held_out = set(task.held_out(500, 256).tokens.unique().tolist())
    assert held_out == {row for row in range(576) if row // 32 % 4 == 3} and not trained & held_out


def tables(text: str) -> str:
    """What a page holds between the two lines of benchmarks/quality/show.py."""
    return text.partition("--write docs/quality.md -->")[2].partition("<!--")[0].strip()


def test_the_page_has_the_figures_of_the_results():
    pytest.importorskip("torch")
    assert tables(PAGE.read_text()) == run_file("benchmarks/quality/show.py").strip()


@pytest.mark.parametrize("options", ({}, {"pooling": "mean"}, {"pooling": "mean", "size_bias": True}), ids=str)
@pytest.mark.parametrize("rest", (True, False))
def test_a_selection_for_each_query(rng, monkeypatch, options, rest):
    """Fixed with k opened regions, query by query: the softmax over the own span, the members of the k best spans, and
    the summaries of the others.
    """
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "quality"))
    swap = importlib.import_module("swap")
    length, span, dim, k = 61, 7, 6, 2
    q, key, v = rng.standard_normal((3, 1, 2, length, dim))
    made = swap.Swap(combiner.Fixed(span, **options), swap.Selection(k, rest=rest))
    out = made(*map(torch.from_numpy, (q, key, v))).numpy()
    for h, i in np.ndindex(2, length):
        exact = attended(q[0, h], key[0, h], v[0, h], i, span, k, rest, **options)
        np.testing.assert_allclose(out[0, h, i], exact, atol=1e-12)  # float64, some 30 terms of size 1


def attended(q, key, v, i, span, k, rest, pooling="max", size_bias=False):
    """Row i of the output of one head, causal, by the definition of docs/mathematics.md."""
    scale = q.shape[1] ** -0.5
    pool = {"max": np.max, "mean": np.mean}[pooling]
    spans = [slice(first, first + span) for first in range(0, i // span * span, span)]
    logits = np.array([scale * q[i] @ pool(key[s], axis=0) + size_bias * np.log(span) for s in spans])
    opened = set(np.argsort(-logits, kind="stable")[:k].tolist())
    parts = [(scale * q[i] @ key[j], v[j]) for j in range(i // span * span, i + 1)]
    for n, s in enumerate(spans):
        if n in opened:
            parts += [(scale * q[i] @ key[j], v[j]) for j in range(s.start, s.stop)]
        elif rest:
            parts.append((logits[n], softmax(scale * key[s] @ pool(q[s], axis=0)) @ v[s]))
    weights, values = zip(*parts, strict=True)
    return softmax(np.array(weights)) @ np.array(values)


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()
