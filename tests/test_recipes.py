# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING's recipes are complete: what each step names exists, for every pattern, instruction set and dtype.

A step is a numbered item. Every file in its backquotes exists; and where it says "`a` and `b` in `x.c`, `y.c` and
`z.c`", each of these files has each of these words. `NAME`, `Name` and the like stand for every name there is, so that
a pattern that a file of the recipe does not know fails here.
"""

import re

import pytest
from fresh import ROOT

import combiner
from combiner.patterns import Factorization

# What a recipe's placeholders stand for.
CLASSES = [name for name in combiner.__all__ if issubclass(type(each := getattr(combiner, name)), type)]
PATTERNS = [name for name in CLASSES if issubclass(getattr(combiner, name), Factorization)]
BUILDERS = {"AxialMixture": "axial_mixture", "HeavilyCompressed": "heavily_compressed", "LogSparse": "logsparse"}
NAMES = {
    "A pattern": {"Name": PATTERNS, "NAME": [BUILDERS.get(name, name.lower()) for name in PATTERNS]},
    "An instruction set": {"NAME": ["avx2", "avx512", "avx512_bf16", "amx", "neon"]},
    "A dtype": {
        "NAME16": ["bf16", "f16"],
        "NAME": ["f32", "f64", "bf16", "f16"],
        "DTYPE": ["float32", "float64", "bfloat16", "float16"],
    },
}
FILE = re.compile(r"[\w./-]+\.(?:py|pyi|c|h|md)")
LIST = r"`[^`]+`(?:(?:, | and )`[^`]+`)*"


def steps() -> list[tuple[str, str]]:
    """(recipe, step) of the last section of CONTRIBUTING.md."""
    _, section = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Recipes\n")
    found = []
    for recipe in section.split("\n### ")[1:]:
        title, text = recipe.split("\n", 1)
        found += [(title, " ".join(step.split())) for step in re.split(r"\n\d+\. ", text)[1:]]
    return found


def spelled_out(recipe: str, word: str) -> list[str]:
    """The word with each name in place of its placeholder."""
    for placeholder, names in NAMES.get(recipe, {}).items():
        if placeholder in word:
            return [word.replace(placeholder, name) for name in names]
    return [word]


def test_every_recipe_is_read():
    assert {recipe for recipe, _ in steps()} == {*NAMES, "A kernel", "A term of the logit"}
    assert len(PATTERNS) == 9


@pytest.mark.parametrize("recipe, step", steps())
def test_what_a_step_names_exists(recipe, step):
    files = [name for name in re.findall(r"`([^`]+)`", step) if FILE.fullmatch(name)]
    assert files
    for name in files:
        for path in spelled_out(recipe, name):
            assert (ROOT / path).exists(), path
    for words, places in re.findall(rf"({LIST}) in ({LIST})", step):
        for word in (each for given in re.findall(r"`([^`]+)`", words) for each in spelled_out(recipe, given)):
            for place in re.findall(r"`([^`]+)`", places):
                has = re.search(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])", (ROOT / place).read_text())
                assert has, f"{place} has no {word}"
