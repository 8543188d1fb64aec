# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are each test's own; long sweeps (`pytest -m slow`) stay out unless they are asked for."""

import gc
import os
import zlib

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its idle threads spin on processors that tests want

import hypothesis
import numpy as np
import pytest

# The same examples in every run: a failure is the change's, not the day's.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("same")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    config.addinivalue_line("markers", "alone: judges seconds: no other test runs beside it")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_collection_finish():
    gc.freeze()  # what was imported stays: collections need not look at it again and again


@pytest.fixture
def rng(request) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def one_thread():
    """The models of the tests are too small for several threads."""
    import torch

    import combiner

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with combiner.num_threads(1):
        yield
    torch.set_num_threads(before)
