# SPDX-License-Identifier: Apache-2.0
"""What README, docs/patterns.md and the example say runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/patterns.md", "docs/frameworks.md")
BLOCKS = [
    (name, block)
    for name in DOCUMENTS
    for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
]


@pytest.mark.parametrize("name, block", BLOCKS, ids=range(len(BLOCKS)))
def test_block(name, block):
    for library in re.findall(r"^(?:import|from) (torch|jax|transformers)\b", block, re.MULTILINE):
        pytest.importorskip(library)
    exec(compile(block, name, "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_files_that_exist(document):
    text = (ROOT / document).read_text()
    paths = [(ROOT / document).parent / name for name in re.findall(r"\]\(([\w./-]+)\)", text)]
    paths += [ROOT / "tests" / name for name in re.findall(r"`(?:tests/)?(test_\w+\.py)`", text)]
    assert paths
    assert [path for path in paths if not path.exists()] == []


def test_example(tmp_path):
    """All parts of the main job, at a size at which nothing is learned."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "attention.png"
    command = [sys.executable, ROOT / "examples" / "train_bytes.py", "--quick", "--out", picture]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    assert done.returncode == 0, done.stderr
    error = float(re.search(r"attention ([\d.e+-]+)", done.stdout)[1])
    assert error < 1e-6  # central differences in float64: rounding / step is about 1e-8, step^2 far less
    for line in ("unigram", "bigram", "Combiner-Fixed", "sparse Fixed", "dense", "sample"):
        assert line in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
