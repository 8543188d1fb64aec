# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and the README's figures are those of the committed results."""

import json

import pytest
from fresh import ROOT, run_file


def figures(text: str) -> str:
    """What a README holds between the two lines of benchmarks/report.py."""
    return text.partition("<!-- figures of benchmarks/results")[2].partition("-->")[2].partition("<!--")[0]


def test_a_quick_run(tmp_path):
    """Some cases of every kind, their JSON, and a README with its figures. `.ci/run` has every case."""
    pytest.importorskip("torch")
    out, readme = tmp_path / "bench.json", tmp_path / "README.md"
    run_file("benchmarks/run.py", "--quick", "--only", "fixed", "--out", out)
    results = json.loads(out.read_text())
    machine = {"date", "commit", "command", "maker", "cpu", "cores", "load", "torch", "combiner"}
    assert machine <= set(results["machine"])
    assert all(results[kind] for kind in ("ratios", "lengths", "growth", "memory", "arithmetic", "plans"))
    assert out.with_suffix(".md").read_text().count("| --- |") >= 6

    readme.write_text((ROOT / "README.md").read_text())
    said = run_file("benchmarks/report.py", out, "--write", readme)
    assert figures(readme.read_text()).strip() == said.strip() and "| `Fixed(span=128)` |" in said


def test_a_picture_of_some_cases(tmp_path):
    """Only what was measured is drawn."""
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    out = tmp_path / "bench.json"
    run_file("benchmarks/run.py", "--quick", "--only", "selection", "--out", out)
    run_file("benchmarks/report.py", out, "--plot", tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["selection.png"]


def test_a_quick_table_of_decoding():
    """A row for each pattern after each number of tokens, and one for PyTorch where there is PyTorch."""
    lines = run_file("benchmarks/decode.py", "--quick").splitlines()
    names = "Dense()", "Fixed(span=256)", "Window(size=256)", "Tree(branching=16)", "HeavilyCompressed()"
    for name in (*names, "Axial(width=256)"):
        assert sum(line.startswith(f"| {name} |") for line in lines) == 2, name


def test_the_readme_has_the_figures_of_the_results():
    text = figures((ROOT / "README.md").read_text()).strip()
    assert text == run_file("benchmarks/report.py", "--readme").strip()


def test_a_layer_of_deepseek_v4():
    """Ours and the model's eager attention agree: float32, sums of some 60 products."""
    pytest.importorskip("transformers")
    said = run_file("benchmarks/deepseek_v4.py", "--length", "300", "--rate", "20", "--window", "50")
    assert float(said.split("at most ")[1].split()[0]) < 1e-5


def test_two_builds_in_one_process():
    """A checkout beside itself takes the same time, more or less; both passes of each pattern have a row."""
    said = run_file(
        "benchmarks/compare_builds.py", ROOT, ROOT, "Fixed(16)", "Tree(4)", "--length", "256", "--seconds", "0.2"
    )
    rows = [line.split("|") for line in said.splitlines()[2:]]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [
        (pattern, passes) for pattern in ("Fixed(16)", "Tree(4)") for passes in ("forward", "backward")
    ]
    assert all(0.5 < float(row[5]) < 2 for row in rows)
