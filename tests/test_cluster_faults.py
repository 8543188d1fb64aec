# SPDX-License-Identifier: Apache-2.0
"""Clusters where something fails: memory that runs out, Ctrl-C; and how much memory they take."""

import itertools
import statistics
import tracemalloc

import numpy as np
import pytest
from cases import content
from fresh import fresh_process
from test_cluster import normal
from test_faults import _testcapi, seconds_to_end

import combiner
from combiner import _core, assign_clusters, cluster, fit_centroids, update_centroids


def operations() -> dict:
    """By name: calls, and what they leave in arrays."""
    x = np.random.default_rng(0).standard_normal((2, 3, 700, 16)).astype(np.float32)
    centroids, clusters = fit_centroids(x, 9), cluster(x, 9)
    return {
        "cluster": lambda: cluster(x, 9),
        "balanced": lambda: cluster(x, 9, balanced=True),
        "fit_centroids": lambda: fit_centroids(x, 9),
        "assign_clusters": lambda: assign_clusters(x, centroids),
        "update_centroids": lambda: update_centroids(centroids, x[..., ::-1, :], clusters),
    }


@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_every_allocation_failing():
    for name, operation in operations().items():
        expected = content(operation())
        held = _core._live_bytes()  # plans of imported tests
        for keeps_failing in (False, True):
            failures = 0
            for k in itertools.count(1):
                _core._fail_allocation(k, keeps_failing)
                try:
                    result = operation()
                except MemoryError as error:
                    _core._fail_allocation(0)
                    assert "no memory for a workspace" in str(error)
                    assert _core._live_bytes() == held, (name, "leaked")
                    assert content(operation()) == expected, (name, "the next call")
                    failures += 1
                else:
                    _core._fail_allocation(0)
                    assert content(result) == expected
                    break
            assert failures == 1, name  # all memory is one block


@pytest.mark.skipif(_testcapi is None, reason="this Python has no _testcapi")
@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_every_allocation_of_python_failing():
    failures = 0
    for name, operation in operations().items():
        expected = content(operation())
        held = _core._live_bytes()
        for lasts in (1, 0):  # one allocation, or all from the k-th on
            for k in itertools.count(1):
                result = None
                try:
                    _testcapi.set_nomemory(k, lasts and k + 1)
                    result = operation()
                except MemoryError:
                    _testcapi.remove_mem_hooks()
                    failures += 1
                    assert _core._live_bytes() == held, (name, k, "leaked")
                _testcapi.remove_mem_hooks()
                if result is not None:
                    assert content(result) == expected, (name, k)
                    break
        assert content(operation()) == expected, (name, "the next call")
    assert failures >= 5


@pytest.mark.parametrize("threads", (1, 4))
@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_memory_is_that_of_the_heads_in_flight(threads):
    """At most half as much again as their rows, and no more for more heads."""
    combiner.set_num_threads(threads)
    rng = np.random.default_rng(0)
    for balanced in (False, True):
        taken = []
        for heads in (4, 8):
            x = rng.standard_normal((heads, 32768, 64)).astype(np.float32)
            held = _core._live_bytes()
            _core._peak_bytes()
            cluster(x, 64, iterations=1, balanced=balanced)
            taken.append(_core._peak_bytes() - held)
            assert _core._live_bytes() == held
        flying = threads * x[0].nbytes  # 8 MB a head
        assert taken[0] <= 1.5 * flying and taken[1] == taken[0], taken


def test_strided_views_are_not_copied(rng):
    x = normal(rng, 2048, 4, 17, dtype=np.float32).swapaxes(0, 1)[..., 1:]
    centroids = fit_centroids(x, 4)
    tracemalloc.start()
    try:
        clusters = cluster(x, 4)
        update_centroids(centroids, x, clusters)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 2 * clusters.nbytes + centroids.nbytes + 2**14  # update_centroids copies the clusters


@pytest.mark.alone
@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("name", ("fit", "many", "balanced", "wide"))
@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_ctrl_c_in_a_long_call(name, threads):
    """KeyboardInterrupt within 0.1 s, nothing leaked, and the next call right."""
    expected = {name: content(operation()) for name, operation in operations().items()}
    combiner.set_num_threads(threads)
    rng = np.random.default_rng(0)
    if name == "many":
        x = np.broadcast_to(rng.standard_normal((256, 64), np.float32), (1 << 17, 256, 64))
    else:
        x = rng.standard_normal((1 << 17, 64), np.float32)
    call = {
        "fit": lambda: fit_centroids(x, 4096, iterations=1000),
        "many": lambda: fit_centroids(x, 16),
        "balanced": lambda: assign_clusters(x, x[: 1 << 16], balanced=True),
        "wide": lambda: fit_centroids(x, 1 << 17, iterations=0),  # k-means++ among all rows
    }[name]
    held = _core._live_bytes()
    delays = []
    for after in (0.02, 0.05, 0.11, 0.17, 0.23, 0.29, 0.31):
        delays.append(seconds_to_end(call, after))
        assert _core._live_bytes() == held, "leaked"
        assert {name: content(operation()) for name, operation in operations().items()} == expected
    assert statistics.median(delays) < 0.1 and max(delays) < 0.25, delays
