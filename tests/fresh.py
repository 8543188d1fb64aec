# SPDX-License-Identifier: Apache-2.0
"""Tests that may crash or hang, or need a process that nothing has touched, run in an interpreter of their own."""

import functools
import os
import subprocess
import sys

HERE = os.path.dirname(__file__)


def run_python(code: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the code in a new interpreter; raises TimeoutExpired when it, or a child that it left, takes longer."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([HERE, os.path.dirname(HERE), *sys.path]), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def fresh_process(timeout: float = 60, **environment: str):
    """Runs a test in a new interpreter. Its arguments must print as they are written in its module."""

    def decorate(test):
        @functools.wraps(test)
        def run(**arguments):
            code = f"from {test.__module__} import *; {test.__name__}.__wrapped__(**{arguments!r})"
            done = run_python(code, timeout, **environment)
            assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"

        return run

    return decorate
