# SPDX-License-Identifier: Apache-2.0
"""Plans that are kept: found again, bounded in number and bytes, and gone when they should be."""

import concurrent.futures
import gc
import weakref

import numpy as np
import pytest

import combiner
from combiner import Axial, AxialMixture, Dense, Fixed, LogSparse, Mixture, Routing
from combiner.patterns import made_plan
from combiner.plan_cache import PlanCache


@pytest.fixture(autouse=True)
def _no_plans():
    PlanCache.clear_all()
    yield
    PlanCache.clear_all()


@pytest.fixture
def made(monkeypatch) -> list[tuple]:
    """The arguments by which plans were made, as they were not found."""
    made = []
    make = made_plan.make
    monkeypatch.setattr(made_plan, "make", lambda *key: made.append(key) or make(*key))
    return made


def kept() -> list:
    return [plan for generation in (made_plan._young, made_plan._old) for plan, _ in generation.values()]


def kept_bytes() -> int:
    return sum(plan.nbytes for made in kept() for plan in (made if isinstance(made, tuple) else (made,)))


def test_packed_batches_of_hundreds_of_lengths_find_their_plans(made):
    lengths = np.random.default_rng(0).permutation(np.arange(1, 701))
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    x = np.zeros((1, cu_seqlens[-1], 1), np.float32)
    for _ in range(3):
        combiner.attention(x, x, x, Fixed(16), is_causal=True, cu_seqlens=cu_seqlens)
    assert len(made) == 700
    combiner.attention(x, x, x, Mixture(Fixed(16), Fixed(32)), is_causal=True, cu_seqlens=cu_seqlens)
    combiner.attention(x, x, x, Mixture(Fixed(16), Fixed(32)), is_causal=True, cu_seqlens=cu_seqlens)
    assert len(made) == 1400


@pytest.fixture
def few(monkeypatch) -> None:
    monkeypatch.setattr(PlanCache, "COUNT", 64)


def test_the_number_of_plans_is_bounded(few):
    for length in range(3 * PlanCache.COUNT):
        Dense().plan(length)
        assert len(kept()) <= 2 * PlanCache.COUNT
    assert len(kept()) > PlanCache.COUNT


def test_the_bytes_of_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(PlanCache, "BYTES", 1 << 20)
    largest = 0
    for length in range(1000, 1400):
        largest = max(largest, AxialMixture().plan(length).nbytes)
        assert kept_bytes() <= 2 * (PlanCache.BYTES + largest)
    assert len(kept()) > 2


def test_a_plan_larger_than_all_others_may_be_is_still_found(monkeypatch, made):
    monkeypatch.setattr(PlanCache, "BYTES", 1)
    for _ in range(3):
        assert Fixed(4).plan(100) is Fixed(4).plan(100)
        assert LogSparse().plan(100) is LogSparse().plan(100)
    assert len(made) == 2 and len(kept()) == 2


def test_what_is_used_stays(made, few):
    """Beside any number of other plans, one that every call asks for is made once."""
    wanted = Fixed(7).plan(50)
    for length in range(3 * PlanCache.COUNT):
        Dense().plan(length)
        assert Fixed(7).plan(50) is wanted
    assert sum(key[0] == Fixed(7) for key in made) == 1


@pytest.mark.parametrize("is_causal", [False, True])
def test_plans_of_clusters_are_gone_with_the_pattern(is_causal):
    """A pattern compared by identity can never be asked for again."""
    pattern = Routing(np.arange(64) % 4)
    assert pattern.plan(64, is_causal) is pattern.plan(64, is_causal)
    assert pattern.sparse().plan(64, is_causal) is pattern.sparse().plan(64, is_causal)
    assert len(kept()) == 2
    gone = weakref.ref(pattern)
    del pattern
    gc.collect()
    assert gone() is None and not kept()


def test_clusters_made_anew_each_step_take_no_memory():
    clusters = np.random.default_rng(0).integers(0, 32, (4, 2048))
    for _ in range(5):
        Routing(clusters).plan(2048, True)
        gc.collect()
        assert kept_bytes() == 0


def test_release_memory_forgets_plans():
    q = np.ones((2, 9, 4))
    combiner.attention(q, q, q, Fixed(4))
    combiner.attention(q, q, q, Axial(3), is_causal=True)
    assert len(kept()) == 2
    combiner.release_memory()
    assert not kept() and not any(cache._young or cache._old for cache in PlanCache._all)


def test_threads_share_the_plans(few):
    """Many threads, over more plans than are kept: each gets the plan that it asked for."""
    lengths = np.random.default_rng(0).integers(1, 4 * PlanCache.COUNT, 6000).tolist()

    def ask(length: int) -> bool:
        if length % 500 == 0:
            PlanCache.clear_all()
        return Fixed(4).plan(length).length == length

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, lengths))
    assert len(kept()) <= 2 * (PlanCache.COUNT + 8)


def test_a_failure_is_not_kept():
    for _ in range(2):
        with pytest.raises(ValueError, match="clusters are of 3 positions"):
            Routing([0, 1, 2]).plan(4)
    assert not kept()
