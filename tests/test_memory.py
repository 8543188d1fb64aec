# SPDX-License-Identifier: Apache-2.0
"""Memory: none is lost over many calls, none is touched beyond an array's ends, and calls take O(L) of it."""

import ctypes
import gc
import itertools
import mmap
import signal
import tracemalloc
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import Clustered, each_isa
from fresh import fresh_process, run_python

import combiner
from combiner import Axial, AxialMixture, Dense, Fixed, LogSparse, Mixture, Plan, Tree, _core

PATTERNS = [
    Dense(),
    Fixed(),
    LogSparse(),
    LogSparse(hierarchical=True),
    LogSparse().sparse(),
    Axial(),
    Axial(5, "horizontal"),
    Axial(None, "rowmajor"),
    Axial(5, "rowmajor", "weighted"),
    AxialMixture(),
    Tree(3),
    Clustered(5),
]


def draw(L, Hq=2, Hk=1, D=5, Dv=3, dtype=np.float32) -> list[np.ndarray]:
    """query, key, value, and the cotangents of out and lse."""
    rng = np.random.default_rng(L)
    return [rng.standard_normal(x).astype(dtype) for x in ((Hq, L, D), (Hk, L, D), (Hk, L, Dv), (Hq, L, Dv), (Hq, L))]


# ---- nothing is lost


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_100000_small_calls():
    """Of every kind, those that raise and plans of ever other lengths among them: at most 1 MiB more than at first."""
    plans = itertools.cycle(pattern.plan(17, True) for pattern in PATTERNS)
    q, k, v, grad_out, grad_lse = draw(17)
    summary = combiner.summarize(q, k, v, Fixed())
    expected = combiner.attention(q, k, v, Fixed(), is_causal=True).tobytes()

    def four_calls(turn: int) -> None:
        _, saved = combiner.attention_forward(q, k, v, next(plans))
        combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)
        combiner.attend(q, k, v, summary.key, summary.value, Fixed())
        if turn % 4 == 0:
            combiner.attention(q[:, : turn % 13], k[:, : turn % 13], v[:, : turn % 13], Fixed(turn % 97 + 1))
        elif turn % 4 == 1:
            Plan.from_parts([[0], [1]], [[], [0]], [[0]], is_causal=True)
        elif turn % 4 == 2:
            try:
                combiner.attention(q, k[:, 1:], v, Fixed())
            except ValueError:
                pass
        else:
            try:
                Plan.from_parts([[0], [2]], is_causal=True)
            except ValueError:
                pass

    turns = 4 * 13 * 97  # after which the plans asked for are the same ones again
    for turn in range(turns):
        four_calls(turn)
    gc.collect()
    before, held = resident_bytes(), _core._live_bytes()
    for turn in range(turns, 25_000):
        four_calls(turn)
    gc.collect()
    growth = resident_bytes() - before
    assert growth <= 2**20, f"{growth / 2**10:.0f} KiB more"
    assert _core._live_bytes() == held
    assert combiner.attention(q, k, v, Fixed(), is_causal=True).tobytes() == expected


@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_what_was_made_goes():
    """Plans and what calls save, once nothing refers to them."""
    q, k, v, grad_out, _ = draw(100)
    inputs = [weakref.ref(x) for x in (q, k, v)]
    plan = Plan.from_parts([[i] for i in range(100)], [[0]] * 100, [range(50)])
    assert plan.is_full is False and len(plan.regions[0]) == 50
    out, saved = combiner.attention_forward(q, k, v, plan)
    gradients = combiner.attention_backward(grad_out, saved)
    assert _core._live_bytes() >= plan.nbytes // 2 > 0
    del q, k, v, plan, out, saved, gradients
    assert [x() for x in inputs] == [None] * 3
    assert _core._live_bytes() == 0


@fresh_process()
def test_large_results_are_kept_and_given_back():
    """The memory of results that are gone serves the next ones, and the system gets it back when asked."""
    q, k, v, grad_out, _ = draw(20_000, 4, 4, 32, 32)

    def step() -> np.ndarray:
        out, saved = combiner.attention_forward(q, k, v, Fixed(), is_causal=True)
        combiner.attention_backward(grad_out, saved)
        return out

    expected = step().tobytes()
    for _ in range(4):
        step()
    held = resident_bytes()
    for _ in range(20):
        step()
    assert resident_bytes() - held <= 2**20
    combiner.release_memory()
    assert held - resident_bytes() >= 4 * q.nbytes
    assert step().tobytes() == expected


def test_results_are_their_own():
    """Not views of something: they own their data, may be resized, and count in tracemalloc."""
    q, k, v, *_ = draw(20_000, 4, 4, 8, 8)
    tracemalloc.start()
    try:
        out = combiner.attention(q, k, v, Fixed())
        assert tracemalloc.get_traced_memory()[0] >= out.nbytes >= 2**18
    finally:
        tracemalloc.stop()
    assert out.flags.owndata and out.flags.writeable and out.base is None
    first = out.ravel()[:1000].copy()
    out.resize(2 * out.size, refcheck=False)
    np.testing.assert_array_equal(out[:1000], first)
    out.resize(10, refcheck=False)
    np.testing.assert_array_equal(out, first[:10])
    del out
    assert np.isfinite(combiner.attention(q, k, v, Fixed())).all()


# ---- nothing is touched that is not the arrays'


class Guarded:
    """Copies of arrays between two pages that may not be touched, against the one after or the one before."""

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.maps = []

    def put(self, x: np.ndarray, at_end: bool) -> np.ndarray:
        page = mmap.PAGESIZE
        inside = -(-max(x.nbytes, 1) // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        first = page + (inside - x.nbytes if at_end else 0)
        copy = np.frombuffer(memory, x.dtype, x.size, first).reshape(x.shape)
        copy[...] = x
        for border in (start, start + page + inside):
            assert self.libc.mprotect(ctypes.c_void_p(border), ctypes.c_size_t(page), 0) == 0  # PROT_NONE
        self.maps.append(memory)
        return copy


@pytest.mark.parametrize("where", ("before", "after"))
def test_guard_pages_guard(where):
    code = f"from test_memory import *; x = Guarded().put(np.zeros(99), {where == 'after'}); print(x[[0, -1]])"
    beyond = "ctypes.string_at(x.ctypes.data " + ("+ x.nbytes, 1)" if where == "after" else "- 1, 1)")
    assert run_python(code).stdout == "[0. 0.]\n"
    assert run_python(f"{code}; {beyond}").returncode == -signal.SIGSEGV


@pytest.mark.parametrize("dtype", ("float32", "float64"))
@fresh_process()
def test_arrays_between_pages_that_may_not_be_touched(dtype):
    """Inputs, `out`, a key mask and what the forward saved: no byte before or after them is read or written."""
    sizes = itertools.cycle([*range(1, 36), 63, 65, 111])
    for L in (1, 2, 7, 15, 17, 33, 63, 65, 129):
        for pattern, is_causal, at_end in itertools.product(PATTERNS, (True, False), (True, False)):
            D, Dv = next(sizes), next(sizes)
            arrays = draw(L, 2, 1, D, Dv, dtype)
            masks = {"key_mask": np.random.default_rng(L).random(L) < 0.8}
            R = pattern.plan(L, is_causal).region_count
            given = {"region_query": np.ones((2, R, D), dtype), "region_key": np.ones((1, R, D), dtype)}
            for options in ({}, masks, given):
                results = []
                for put in (Guarded().put, lambda x, at_end: x.copy()):
                    q, k, v, grad_out, grad_lse = (put(x, at_end) for x in arrays)
                    inputs = {name: put(x, at_end) for name, x in options.items()}
                    out = put(np.zeros_like(grad_out), at_end)
                    _, saved = combiner.attention_forward(q, k, v, pattern, is_causal=is_causal, out=out, **inputs)
                    kept = ("softmax", "summary_value", "summary_softmax")
                    saved = saved.with_results(**{name: put(saved[name], at_end) for name in kept})
                    gradients = combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)
                    summary = combiner.summarize(q, k, v, pattern, is_causal=is_causal, **inputs)
                    results.append([x.tobytes() for x in (out, *gradients, *summary) if x is not None])
                assert results[0] == results[1], (L, pattern, is_causal, D, Dv)


@fresh_process()
def test_every_number_of_features_between_guard_pages():
    """Each tail of a vector on each instruction set, with rows apart from one another too."""
    plan = LogSparse(hierarchical=True).plan(19)
    for _ in each_isa():
        for D in range(1, 68):
            for dtype in (np.float32, np.float64):
                arrays = [Guarded().put(x, True) for x in draw(19, 1, 1, D, D, dtype)]
                q, k, v, grad_out, grad_lse = arrays
                out, saved = combiner.attention_forward(q, k, v, plan)
                gradients = combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)
                assert all(np.isfinite(x).all() for x in (out, *gradients[:3]))
                apart = [np.full((1, 19, D + 3), np.nan, dtype) for _ in range(5)]
                views = [x[..., 3:] for x in apart]
                for view, x in zip(views, (q, k, v, grad_out), strict=False):
                    view[...] = x
                _, saved = combiner.attention_forward(*views[:3], plan, out=views[4])
                again = combiner.attention_backward(views[3], saved, grad_lse=grad_lse)
                assert views[4].tobytes() == out.tobytes()
                assert [x.tobytes() for x in again[:3]] == [x.tobytes() for x in gradients[:3]]
                assert np.isnan(apart[4][..., :3]).all(), "written between rows"


@pytest.mark.parametrize("mode", ("r", "c", "r+"))
def test_memory_maps(tmp_path, mode):
    """Inputs in a file, odd offsets included, read-only or not: the same bits, and the file's bytes stay."""
    arrays = draw(83, D=21, Dv=13)
    path = tmp_path / "arrays"
    path.write_bytes(b"." * 12 + b"".join(x.tobytes() for x in arrays))
    before = path.read_bytes()
    views, offset = [], 12
    for x in arrays:
        views.append(np.memmap(path, x.dtype, mode, offset, x.shape))
        offset += x.nbytes
    for pattern in PATTERNS:
        (out, saved), (again, saved_again) = (combiner.attention_forward(*x[:3], pattern) for x in (arrays, views))
        assert type(again) is np.ndarray and again.tobytes() == out.tobytes()
        gradients = combiner.attention_backward(arrays[3], saved, grad_lse=arrays[4])
        gradients_again = combiner.attention_backward(views[3], saved_again, grad_lse=views[4])
        assert [x.tobytes() for x in gradients[:3]] == [x.tobytes() for x in gradients_again[:3]]
    assert path.read_bytes() == before


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_inputs_keep_their_bytes(pattern):
    arrays = draw(150, 4, 2, 11, 9)
    for x in arrays:
        x[..., 3] = np.nan  # not even these are tidied
        x.flags.writeable = False
    before = [x.tobytes() for x in arrays]
    q, k, v, grad_out, grad_lse = arrays
    _, saved = combiner.attention_forward(q, k, v, pattern, is_causal=True)
    kept = [x if x is None else x.tobytes() for x in saved.results]
    combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)
    summary = combiner.summarize(q, k, v, pattern)
    combiner.attend(q, k, v, summary.key, summary.value, pattern)
    combiner.attention_weights(q, k, pattern)
    assert [x.tobytes() for x in arrays] == before
    assert [x if x is None else x.tobytes() for x in saved.results] == kept


# ---- how much is taken


@pytest.mark.parametrize("threads", (1, 4))
@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_memory_grows_with_the_length(threads):
    """What a call takes, its plan included, at most doubles with L and is less than its arrays.

    R / L times as much where there are more regions than positions: each has a row in tables like the inputs'.
    """
    combiner.set_num_threads(threads)
    for pattern in (*PATTERNS, Fixed(64), Tree(16), Clustered(64)):
        taken = {}
        for L in (2048, 4096, 8192):
            q, k, v, grad_out, _ = draw(L, 4, 4, 32, 32)
            plan = pattern.plan(L, True)
            _, saved = combiner.attention_forward(q, k, v, plan)
            for name, arrays, call in (
                ("forward", 4, lambda: combiner.attention(q, k, v, plan)),  # noqa: B023
                ("backward", 8, lambda: combiner.attention_backward(grad_out, saved)),  # noqa: B023
            ):
                _core._peak_bytes()
                before = _core._live_bytes()
                call()
                taken[name, L] = _core._peak_bytes() - before + plan.nbytes
                assert _core._live_bytes() == before
                told = combiner.workspace_bytes(q, k, v, plan, backward=name == "backward")
                assert taken[name, L] - plan.nbytes == told, (pattern, name, L)
                most = arrays * max(1, plan.region_count / L) * q.nbytes
                assert taken[name, L] <= most, (pattern, name, L, taken)
                assert L == 2048 or taken[name, L] <= 2.1 * taken[name, L // 2], (pattern, name, L, taken)


@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_workspace_is_told_in_advance():
    """To the byte: of packed sequences, mixtures, masks, dropout and every dtype, what is given and what is not."""
    L, rng = 300, np.random.default_rng(0)
    bounds = [0, 50, 51, 300]
    for dtype in (np.float32, np.float64, ml_dtypes.bfloat16, np.float16):
        q, g = rng.standard_normal((2, 2, 4, L, 12)).astype(dtype)
        k, v = rng.standard_normal((2, 2, 2, L, 12)).astype(dtype)
        for pattern in (*PATTERNS, Mixture(Fixed(8), LogSparse())):
            for options in ({}, {"cu_seqlens": bounds}, {"dropout_p": 0.5}, {"key_mask": rng.random((2, L)) < 0.5}):
                before = _core._live_bytes()
                _, saved = combiner.attention_forward(q, k, v, pattern, **options)
                plans = _core._live_bytes() - before  # as large again where the call below makes them anew
                _core._peak_bytes()
                before = _core._live_bytes()
                combiner.attention(q, k, v, pattern, **options)
                taken, told = _core._peak_bytes() - before, combiner.workspace_bytes(q, k, v, pattern, **options)
                assert told <= taken <= told + plans, (pattern, options)
                _core._peak_bytes()
                combiner.attention_backward(g, saved)
                taken = _core._peak_bytes() - before
                assert taken == combiner.workspace_bytes(q, k, v, pattern, backward=True, **options), (pattern, options)


@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_workspace_of_attend_is_told_in_advance():
    """To the byte: of all queries and of some, in one sequence and in several."""
    rng = np.random.default_rng(0)
    for dtype, pattern in itertools.product((np.float64, np.float16), PATTERNS):
        q, g = rng.standard_normal((2, 2, 4, 300, 12)).astype(dtype)
        k, v = rng.standard_normal((2, 2, 2, 300, 12)).astype(dtype)
        for packed, offset in itertools.product((None, [0, 50, 51, 300]), (None, 40)):
            options = {"is_causal": True, "cu_seqlens": packed}
            summary = combiner.summarize(q, k, v, pattern, **options)
            rows = slice(None) if offset is None else slice(offset, offset + 30)
            given = q[..., rows, :], k, v
            options |= {"region_key": summary.key, "region_value": summary.value, "offset": offset, "pattern": pattern}
            out, saved = combiner.attend_forward(*given, **options)
            _core._peak_bytes()
            before = _core._live_bytes()
            combiner.attend_backward(g[..., rows, :], saved)
            taken = _core._peak_bytes() - before
            assert taken == combiner.workspace_bytes(*given, backward=True, **options), options
            if offset is None and packed is None:  # else the call makes plans, too
                combiner.attend(*given, out=out, **options)
                _core._peak_bytes()
                before = _core._live_bytes()
                combiner.attend(*given, out=out, **options)
                assert _core._peak_bytes() - before == combiner.workspace_bytes(*given, **options), options


def least_peak(call):
    """Bytes that a call takes of Python's and NumPy's memory at its peak: the least of five calls, since the memory of
    other threads (pytest-xdist's) counts too."""
    peaks = []
    tracemalloc.start()
    try:
        for _ in range(5):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            call()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return min(peaks)


def test_a_mixture_adds_up_in_place():
    """One output and one set of gradients, whatever the number of its components."""
    q, k, v, grad_out = np.random.default_rng(0).standard_normal((4, 4, 2048, 16)).astype(np.float32)
    pattern = Mixture(Fixed(), LogSparse(), Axial(order="rowmajor"))
    assert q.nbytes <= least_peak(lambda: combiner.attention(q, k, v, pattern)) <= q.nbytes + 2**16
    _, saved = combiner.attention_forward(q, k, v, pattern)
    assert 3 * q.nbytes <= least_peak(lambda: combiner.attention_backward(grad_out, saved)) <= 3 * q.nbytes + 2**16


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_strided_views_are_not_copied(pattern):
    """NumPy's memory peaks at the results, of [L, H, D] layouts and padded rows too."""
    L, H, D = 2048, 4, 16
    rng = np.random.default_rng(0)
    q, k, v, grad_out = rng.standard_normal((4, L, H, D + 1)).astype(np.float32).swapaxes(1, 2)[..., 1:]
    combiner.attention(q, k, v, pattern)
    results = q.size * 4
    tracemalloc.start()
    try:
        _, saved = combiner.attention_forward(q, k, v, pattern)
        forward = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        gradients = combiner.attention_backward(grad_out, saved)
        backward = tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    plan = saved["plan"]
    kept = 2 + D + D * plan.weighted  # of each region: softmax, value and, where it is no pool, the key
    assert forward <= results + 4 * H * (3 * L + plan.region_count * kept) + 2**16
    assert backward <= 2**16, "more than the gradients"
    assert len(gradients) == 8
