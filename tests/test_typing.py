# SPDX-License-Identifier: Apache-2.0
"""The type hints: right for those who use the package, and those of the binding true to it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [["mypy"], ["mypy.stubtest", "--mypy-config-file=pyproject.toml", "combiner._core"]],
    ids=lambda command: command[0],
)
def test_types(command):
    pytest.importorskip("mypy")
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
