# SPDX-License-Identifier: Apache-2.0
"""The type hints of the binding are true to it; `make lint` checks all others, and those of typing_examples.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_stubs_of_the_binding():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy.stubtest", "--mypy-config-file=pyproject.toml", "combiner._core"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
