# SPDX-License-Identifier: Apache-2.0
"""Tests that may crash or hang, or need a process that nothing has touched, run in an interpreter of their own."""

import functools
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
# For what hangs: several times the seconds that the longest of these tests takes on a busy machine.
TIMEOUT = 300


def run_python(code: str, timeout: float = TIMEOUT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the code in a new interpreter; raises TimeoutExpired when it, or a child that it left, takes longer."""
    return _run(["-X", "faulthandler", "-c", code], timeout, environment)


def run_file(name: str, *arguments: str | Path) -> str:
    """Runs a file of the repository in a new interpreter, and returns what it printed."""
    done = _run([ROOT / name, *arguments], TIMEOUT, {})
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _run(arguments: list, timeout: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(HERE), str(ROOT), *sys.path])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def fresh_process(timeout: float = TIMEOUT, **environment: str):
    """Runs a test in a new interpreter. Its arguments must print as they are written in its module."""

    def decorate(test):
        @functools.wraps(test)
        def run(**arguments):
            code = f"from {test.__module__} import *; {test.__name__}.__wrapped__(**{arguments!r})"
            done = run_python(code, timeout, **environment)
            assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"

        return run

    return decorate
