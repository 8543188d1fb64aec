# SPDX-License-Identifier: Apache-2.0
"""The documents: their examples run, their reference is complete, and the files, sections and equations that they and
the code name exist."""

import fnmatch
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from fresh import ROOT, run_file

import combiner

GLOBS = ("*.md", "benchmarks/*.md", "docs/**/*.md", "tests/*.md")
DOCUMENTS = [str(path.relative_to(ROOT)) for pattern in GLOBS for path in sorted(ROOT.glob(pattern))]
BLOCKS = [
    (name, block)
    for name in DOCUMENTS
    for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
]
SOURCES = sorted(
    path
    for pattern in (
        "combiner/**/*.py",
        "combiner/**/*.[ch]",
        "csrc/**/*.[ch]",
        "examples/*",
        "benchmarks/**/*.py",
        "docs/*.py",
    )
    for path in ROOT.glob(pattern)
)
FILE = r"[\w./-]+\.(?:py|pyi|c|h|md|png|toml)"


def names_a_file(name: str, near: Path) -> bool:
    """Whether a path exists from the checkout, the document's folder, csrc/ or tests/; a bare name, anywhere."""
    if any((folder / name).exists() for folder in (ROOT, near, ROOT / "csrc", ROOT / "tests")):
        return True
    return "/" not in name and any(
        next((ROOT / top).rglob(name), None) for top in ("csrc", "combiner", "tests", "docs")
    )


@pytest.mark.parametrize("name, block", BLOCKS, ids=range(len(BLOCKS)))
def test_block(name, block):
    for library in re.findall(r"^(?:import|from) (torch|jax|flax|transformers)\b", block, re.MULTILINE):
        pytest.importorskip(library)
    if "combiner.plot" in block or ".plot(" in block:
        pytest.importorskip("matplotlib.pyplot").close("all")  # pictures are drawn on the current axes
    exec(compile(block, name, "exec"), {"__name__": "block"})


def test_all_code_is_run():
    """Every fence is of a known kind, and code that stands indented, which is not run, is of the shell or of C."""
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        fences = re.findall(r"^ *```(.*)$", text, re.MULTILINE)
        assert set(fences[::2]) <= {"python", "bibtex", "{toctree}", "{eval-rst}", "{include} ../README.md"}, name
        assert set(fences[1::2]) <= {""}, name
        prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
        assert re.findall(r"^    (?:import |from \w+ import |combiner\.)", prose, re.MULTILINE) == [], name


PUBLIC = ("combiner", *(f"combiner.{name}" for name in ("torch", "jax", "transformers", "distributed", "shard_map")))


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_is_complete(module):
    """Each public name is documented in docs/reference, with its signature, and is used in a block that runs."""
    try:
        names = set(importlib.import_module(module).__all__)
    except ImportError as error:
        pytest.skip(str(error))
    here, documented = "", set()
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for kind, name in re.findall(
            r"^\.\. (currentmodule|autofunction|autoclass):: (\S+)$", page.read_text(), re.MULTILINE
        ):
            if kind == "currentmodule":
                here = name
            elif here == module and "." not in name:
                documented.add(name)
    assert documented == names
    used = {word for _, block in BLOCKS if module in block for word in re.findall(r"\w+", block)}
    assert names - used == set()


def test_choosing_has_the_figures_of_plans_decoders_and_benchmarks():
    """The table of docs/choosing.md: counted anew, and the README's ratios of time."""
    L = 16384
    dense = combiner.Dense().plan(L, True)
    ratios = dict(
        re.findall(r"^\| (`[^|]*`) \| [\d.]+x \| ([\d.]+x) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    )
    rows = re.findall(
        r"^\| (`.*`) \| ([\d,]+) \| (.*)% \| (.*) \| (.*) \| .*\|$",
        (ROOT / "docs" / "choosing.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 11
    for name, pairs, work, kept, time in rows:
        pattern = eval(name.strip("`"), vars(combiner).copy())
        plan = pattern.plan(L, True)
        assert (f"{plan.pairs:,}", f"{100 * plan.flops(64) / dense.flops(64):.2f}") == (pairs, work), name
        assert time == ratios[name], "docs/choosing.md has the README's ratios"
        if kept == "-":
            continue
        decoder = combiner.Decoder(pattern)
        decoder.step(*np.zeros((3, L, 64), np.float32))
        assert f"{decoder.nbytes / 1024:,.0f} KiB" == kept, name


def test_every_page_is_in_the_table_of_contents():
    docs = ROOT / "docs"
    trees = re.findall(r"```{toctree}\n(.*?)```", (docs / "index.md").read_text(), re.DOTALL)
    entries = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    pages = {
        str(path.relative_to(docs).with_suffix("")) for kind in ("md", "ipynb") for path in docs.rglob(f"*.{kind}")
    }
    assert sorted(page for page in pages - {"index"} if not any(fnmatch.fnmatch(page, each) for each in entries)) == []
    assert sorted(each for each in entries if "*" not in each and each not in pages) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_files_that_exist(document):
    """Relative links with their anchors, and paths in backquotes."""
    path = ROOT / document
    text = path.read_text()
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = path.parent / link if link else path
        assert target.exists(), f"{document} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{document} links to {link}#{anchor}"
    named = re.findall(rf"`({FILE})`", text)
    assert [name for name in named if "NAME" not in name and not names_a_file(name, path.parent)] == []


def test_sources_name_files_that_exist():
    """In comments and docstrings: what lies in docs/, tests/, examples/ or csrc/."""
    for path in SOURCES:
        for name in re.findall(rf"\b((?:docs|tests|examples|csrc)/{FILE})\b", path.read_text()):
            assert (ROOT / name).exists(), f"{path} names {name}"


def numbers(text: str) -> set[str]:
    """The sections and equations that a text cites, of the paper or of docs/mathematics.md: "section 3.2", "eq 7"."""
    cited = re.findall(r"\b([Ss]ection|eq)s? ((?:\d+(?:\.\d)?(?:, | and )?)+)", text)
    return {f"{kind.lower()} {each}" for kind, some in cited for each in re.findall(r"\d+(?:\.\d)?", some)}


def test_sources_cite_what_the_mathematics_explains():
    """docs/mathematics.md was written beside the paper: a number that it does not have is wrong."""
    text = (ROOT / "docs" / "mathematics.md").read_text()
    explained = numbers(text) | {f"section {n}" for n in re.findall(r"^## (\d)\.", text, re.MULTILINE)}
    assert {"section 3.2", "section 4.4", "section 5", "eq 7", "eq 9"} <= explained
    for path in SOURCES:
        assert numbers(path.read_text()) <= explained, path
        assert not re.search(r"\bspec:|\bthe spec\b", path.read_text()), path


def test_every_test_is_in_the_table():
    """tests/README.md says of every file of tests which property it tests."""
    tests = ROOT / "tests"
    named = set(re.findall(r"`((?:c/)?\w+\.(?:py|c))`", (tests / "README.md").read_text()))
    files = {*tests.glob("test_*.py"), *tests.glob("c/test_*.c"), *tests.glob("*.py")} - {tests / "conftest.py"}
    assert sorted(str(path.relative_to(tests)) for path in files if str(path.relative_to(tests)) not in named) == []


def test_example(tmp_path):
    """All parts of the main job, at a size at which nothing is learned."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "attention.png"
    said = run_file("examples/train_bytes.py", "--quick", "--out", picture)
    error = float(re.search(r"attention ([\d.e+-]+)", said)[1])
    assert error < 1e-6  # central differences in float64: rounding / step is about 1e-8, step^2 far less
    for line in ("guessing", "unigram", "bigram", "Combiner-Fixed", "sparse Fixed", "dense", "sample"):
        assert line in said
    assert picture.read_bytes().startswith(b"\x89PNG")
