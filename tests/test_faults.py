# SPDX-License-Identifier: Apache-2.0
"""What fails leaves nothing behind: memory that runs out, threads that cannot start, Ctrl-C, wrong arguments.

After each of them nothing is leaked, `out` is untouched where memory was short, and the next call is right.
"""

import itertools
import os
import resource
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cases import Clustered, Opened, content, rebuilt
from fresh import fresh_process, run_python

import combiner
from combiner import (
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Mixture,
    Plan,
    Routing,
    Tree,
    Window,
    _core,
)
from combiner.patterns import Sparse, made_plan

try:
    import _testcapi
except ImportError:  # a CPython without its tests
    _testcapi = None

PATTERNS = [
    Dense(),
    Fixed(8),
    Fixed(8, pooling="mean", size_bias=True),
    LogSparse(),
    LogSparse(hierarchical=True),
    Fixed(8).sparse(),
    LogSparse().sparse(),
    Axial(8),
    Axial(8, "horizontal", pooling="sum"),
    Axial(8, "rowmajor"),
    Axial(8, "rowmajor", "weighted", size_bias=True),
    AxialMixture(8),
    Tree(3),
    Clustered(9),
    Axial(8).sparse(),
    Clustered(9).sparse(),
    Window(9),
    Fixed(8, window=12),
    Opened(Fixed(8), 16),
    Opened(Tree(3), 1).sparse(),
    HeavilyCompressed(8, 12),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def operations(pattern, L=70) -> tuple[dict, np.ndarray]:
    """By name: functions that build a plan or run it, and return what `content` takes; and the `out` of one of them."""
    rng = np.random.default_rng(0)
    q, k, v, grad_out = (rng.standard_normal((2, heads, L, 5)).astype(np.float32) for heads in (4, 2, 2, 4))
    plan = pattern.plan(L, True)
    arrays = plan.arrays
    _, saved = combiner.attention_forward(q, k, v, plan)
    summary, summary_saved = combiner.summarize_forward(q, k, v, plan)
    _, attend_saved = combiner.attend_forward(q, k, v, summary.key, summary.value, plan)
    bias, regions, sink = rng.standard_normal(L), rng.standard_normal(plan.region_count), rng.standard_normal(())
    terms = {"softcap": 2.0, "key_bias": bias, "region_bias": regions, "sink": sink}
    terms = {name: x if name == "softcap" else x.astype(q.dtype) for name, x in terms.items()}
    _, of_terms = combiner.attention_forward(q, k, v, plan, **terms)
    out = np.empty_like(q)

    def build(is_causal: bool) -> Plan:
        is_sparse = isinstance(pattern, Sparse)
        return (pattern.pattern if is_sparse else pattern)._build(L, is_causal, is_sparse)

    def from_parts() -> Plan:
        """Each query sees itself, and the region of all pairs of positions before its own pair."""
        pairs = L // 2
        members = [[2 * n, 2 * n + 1] for n in range(pairs)]
        members += [[L + pairs + n - 1, L + n] if n else [L] for n in range(pairs)]
        regions = [[pairs + i // 2 - 1] if i > 1 else [] for i in range(L)]
        direct = [[i - 1, i] if i % 2 else [i] for i in range(L)]
        return Plan.from_parts(direct, regions, members, is_causal=True, size_bias=plan.size_bias, cover="full")

    def from_arrays() -> Plan:
        return Plan.from_arrays(
            **arrays,
            length=L,
            regions=plan.region_count,
            scratch=plan.scratch_count,
            is_causal=True,
            pooling=plan.pooling,
            size_bias=plan.size_bias,
            weighted=plan.weighted,
        )

    def attend_some() -> np.ndarray:
        try:
            return combiner.attend(q[..., 20:40, :], k, v, summary.key, summary.value, plan, offset=20)
        except MemoryError as error:
            raise error.with_traceback(None) from None  # its frames hold the problem, and with it a slice of the plan

    return {
        "plan": lambda: build(True),
        "bidirectional plan": lambda: build(False),
        "from_parts": from_parts,
        "from_arrays": from_arrays,
        "measure": lambda: np.array(plan._measure()),
        "attention": lambda: combiner.attention(q, k, v, plan, return_lse=True),
        "attention into out": lambda: combiner.attention(q, k, v, plan, out=out),
        "attention_forward": lambda: combiner.attention_forward(q, k, v, plan)[1]["summary_value"],
        "attention_backward": lambda: combiner.attention_backward(grad_out, saved),
        "summarize": lambda: combiner.summarize(q, k, v, plan),
        "summarize_backward": lambda: combiner.summarize_backward(None, summary.value, summary_saved),
        "attend": lambda: combiner.attend(q, k, v, summary.key, summary.value, plan),
        "attend_backward": lambda: combiner.attend_backward(grad_out, attend_saved),
        "attend with an offset": attend_some,
        "attention_weights": lambda: combiner.attention_weights(q, k, plan),
        "terms": lambda: combiner.attention(q, k, v, plan, out=out, **terms),
        "backward of terms": lambda: combiner.attention_backward(grad_out, of_terms),
        "packed": lambda: combiner.attention(q, k, v, pattern, cu_seqlens=(0, 30, L), dropout_p=0.5, seed=1, out=out),
        "mixture": lambda: combiner.attention(q, k, v, Mixture(plan, Dense()), is_causal=True, out=out),
    }, out


# ---- memory that runs out


@every_pattern
@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_every_allocation_of_the_library_failing(pattern):
    """The k-th fails for every k, once and from then on; the library then holds what it held before."""
    everything, out = operations(pattern)
    for name, operation in everything.items():
        expected = content(operation())
        held = _core._live_bytes()
        failures = {False: 0, True: 0}
        for keeps_failing in failures:
            for k in itertools.count(1):
                out.fill(7)
                _core._fail_allocation(k, keeps_failing)
                try:
                    result = operation()
                except MemoryError as error:
                    _core._fail_allocation(0)
                    assert _core._live_bytes() == held, (name, k, "leaked")
                    assert str(error), (name, k, "no message")
                    assert (out == 7).all(), (name, k, "out was written")
                    assert content(operation()) == expected, (name, k, "the next call")
                    failures[keeps_failing] += 1
                else:
                    _core._fail_allocation(0)
                    assert content(result) == expected, (name, k)
                    del result
                    break
        needs_none = name == "summarize" and not any(expected)  # there are no regions
        assert failures[False] == failures[True], (name, failures)  # else some failure went unnoticed
        assert (failures[True] == 0) == needs_none, (name, failures)
        assert _core._live_bytes() == held, (name, "leaked")
    del everything, operation
    made_plan.clear()
    assert _core._live_bytes() == 0


@pytest.fixture(scope="session")
def python_out_of_memory():
    """Skips where Python itself does not survive it: 3.12 and 3.13, without memory to make a function, release its code
    once too often. A free-threaded Python needs some rounds to crash."""
    code = """
import _testcapi
def make(given):
    return list(x for x in given)
for n in range(50):
    for k in range(1, 20):
        try:
            _testcapi.set_nomemory(k, 0)
            make([1, 2, 3])
        except MemoryError:
            pass
        _testcapi.remove_mem_hooks()
    kept = [[make([1]), (n, str(n)), [n] * 2, {n: n}] for _ in range(50)]
for _ in range(1000):
    make([1])
"""
    if _testcapi is None or run_python(code, PYTHONMALLOC="debug").returncode != 0:
        pytest.skip("this Python has no _testcapi, or crashes by itself where memory is out")


@pytest.mark.usefixtures("python_out_of_memory")
@every_pattern
@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_every_allocation_of_python_failing(pattern):
    everything, out = operations(pattern)
    for name in (
        "attention_weights",
        "packed",
        "mixture",
        "backward of terms",
    ):  # in which NumPy's functions then raise SystemError
        del everything[name]
    for name, operation in everything.items():
        expected = content(operation())
        held = _core._live_bytes()
        for lasts in (1, 0):  # one allocation, or all from the k-th on
            failures = 0
            for k in itertools.count(1):
                result = None
                out.fill(7)
                try:
                    _testcapi.set_nomemory(k, lasts and k + 1)
                    result = operation()
                except MemoryError:
                    _testcapi.remove_mem_hooks()
                    failures += 1
                    assert _core._live_bytes() == held, (name, k, "leaked")
                    assert (out == 7).all(), (name, k, "out was written")
                _testcapi.remove_mem_hooks()
                if result is not None:
                    assert content(result) == expected, (name, k)
                    del result
                    break
            assert failures >= 1, name
        assert content(operation()) == expected, (name, "the next call")
        assert _core._live_bytes() == held, (name, "leaked")


@fresh_process(MALLOC_MMAP_THRESHOLD_="65536", OPENBLAS_NUM_THREADS="1")
def test_address_space_running_out():
    """Under ever higher limits calls raise MemoryError, then succeed with fewer threads than they would like."""
    rng = np.random.default_rng(0)
    q, k, v, grad_out = (rng.standard_normal((1, 4, 2048, 32)).astype(np.float32) for _ in range(4))
    combiner.set_num_threads(4)
    for pattern in (Dense(), Fixed(64), LogSparse(hierarchical=True)):
        expected, saved = combiner.attention_forward(q, k, v, pattern)
        expected = content(expected)
        gradients = content(combiner.attention_backward(grad_out, saved))
        _core.stop_threads()
        outcomes = set()
        for megabytes in range(0, 20):
            combiner.release_memory()
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 2**20, resource.RLIM_INFINITY))
            try:
                out = content(combiner.attention(q, k, v, pattern))
                actual = content(combiner.attention_backward(grad_out, saved))
            except MemoryError:
                outcomes.add("MemoryError")
            else:
                outcomes.add("success")
                assert out == expected and actual == gradients
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                _core.stop_threads()
        assert outcomes == {"MemoryError", "success"}, outcomes


# ---- threads that cannot start


def threads_of_this_process() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_NPROC counts threads on Linux")
@pytest.mark.parametrize("startable", (0, 1, 3) if os.geteuid() == 0 else (0,))
@fresh_process(OPENBLAS_NUM_THREADS="1")
def test_threads_that_cannot_start(startable):
    """The same bits with those that could, and with more of them once they can."""
    rng = np.random.default_rng(0)
    q, k, v, grad_out = (rng.standard_normal((2, 8, 600, 16)).astype(np.float32) for _ in range(4))

    def run() -> list[bytes]:
        out, saved = combiner.attention_forward(q, k, v, Fixed(32), is_causal=True)
        return [out.tobytes(), *content(combiner.attention_backward(grad_out, saved))]

    combiner.set_num_threads(1)
    expected = run()
    before = threads_of_this_process()
    limit = 1  # of a user's threads, this one among them
    if startable:
        os.setuid(1_000_000 + os.getpid())  # whose threads are all here
        limit = before + startable
    elif os.geteuid() == 0:
        os.setuid(1_000_000)  # root has no limit
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
    combiner.set_num_threads(8)
    for _ in range(5):
        assert run() == expected
    assert threads_of_this_process() - before == startable


# ---- signals


L = 196608  # dense attention over this length takes 10 s and more


def long_call(name: str):
    """A function that takes at least 10 s when nobody interrupts it, and one that does a 256th of its work."""
    rng = np.random.default_rng(0)

    def make(length: int):
        x = rng.standard_normal((4, length, 64), np.float32)
        plan = Dense().plan(length)
        if name == "forward":
            return lambda: combiner.attention(*x[:3], plan)
        if name == "backward":
            saved = combiner.attention_forward(*x[:3], Fixed(64).sparse())[1]
            dense = rebuilt(saved, plan=plan)
            return lambda: combiner.attention_backward(x[3], dense)
        plan = Dense().plan(length // 64)  # many heads
        few = np.broadcast_to(x[0, : length // 64], (16384, length // 64, 64))
        return lambda: combiner.attention(few, few, few[..., :1], plan)

    return make(L), make(L // 16)


def seconds_to_end(call, after: float) -> float:
    """From SIGINT, sent some seconds into the call, to KeyboardInterrupt: on the clock or, where that is less, of this
    process's processor time. On a busy machine the clock goes on while other processes run."""
    sent = []

    def now() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    def send() -> None:
        time.sleep(after)
        sent.append(now())
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    sender = threading.Thread(target=send)
    began = time.perf_counter()
    try:
        sender.start()
        call()
    except KeyboardInterrupt:
        return (now() - sent[0]).min()
    finally:
        sender.join()
    raise AssertionError(f"the call ended after {time.perf_counter() - began:.2f} s, before the signal")


@pytest.mark.alone
@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("name", ("forward", "backward", "many heads"))
@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_ctrl_c_in_a_long_call(name, threads):
    """KeyboardInterrupt within 0.1 s, nothing leaked, and the next call right."""
    everything, _ = operations(Fixed(8))
    expected = {name: content(operation()) for name, operation in everything.items()}
    combiner.set_num_threads(threads)
    call, part = long_call(name)
    start = time.perf_counter()
    part()
    whole = 256 * (time.perf_counter() - start)
    assert whole >= 10, f"the call takes only {whole:.1f} s"
    held = _core._live_bytes()
    delays = []
    for after in (0.02, 0.05, 0.11, 0.17, 0.23, 0.29, 0.31):
        delays.append(seconds_to_end(call, after))
        assert _core._live_bytes() == held, "leaked"
        assert {name: content(operation()) for name, operation in everything.items()} == expected
    assert statistics.median(delays) < 0.1 and max(delays) < 0.25, delays


def long_plan(name: str):
    """A function that makes or measures a plan for half a second and more."""
    if name == "from_arrays":
        plan = LogSparse().plan(2**22)
        arrays = plan.arrays
        return lambda: Plan.from_arrays(**arrays, length=2**22, regions=plan.region_count)
    if name == "from_parts":
        lists = np.arange(2**22 + 1) * 8, np.arange(2**25) % 2**22
        return lambda: Plan.from_parts(lists)
    if name == "is_full":
        plan = Dense().plan(2**21)
        return lambda: plan.is_full
    if name == "Routing":
        pattern = Routing(np.arange(2**21) ** 2 % 2000)
        return lambda: pattern.plan(2**21, True)
    if name == "Selected":
        base = LogSparse().plan(2**21)
        regions = np.arange(2**17) % 2**20
        return lambda: Plan._selected(base, regions, 4, 64, True, True)
    patterns = {
        "Dense": (Dense(), 2**29),
        "Fixed": (Fixed(2**13), 2**28),
        "LogSparse": (LogSparse(), 2**23),
        "hierarchical": (LogSparse(hierarchical=True), 2**24),
        "Tree": (Tree(4), 2**24),
        "AxialMixture": (AxialMixture(), 2**22),
        "Window": (Window(100), 2**28),
        "HeavilyCompressed": (HeavilyCompressed(), 2**26),
    }
    pattern, length = patterns[name]
    return lambda: pattern.plan(length, True)


@pytest.mark.parametrize(
    "name",
    (
        "Dense", "Fixed", "LogSparse", "hierarchical", "Tree", "AxialMixture", "Routing", "Window", "Selected",
        "HeavilyCompressed", "from_arrays", "from_parts", "is_full",
    ),
)  # fmt: skip
@fresh_process()
def test_ctrl_c_while_a_plan_is_made_or_measured(name):
    """KeyboardInterrupt within 0.1 s, at least once of some times: other work may hold the processors."""
    call, delays = long_plan(name), []
    for after in (0.2, 0.1, 0.3, 0.15, 0.25, 0.12, 0.22):
        delays.append(seconds_to_end(call, after))
        if delays[-1] < 0.1:
            return
    raise AssertionError(delays)


@fresh_process()
def test_signals_that_do_not_raise_change_nothing():
    """A thousand a second for as long as calls run: Python's handler is called, and the bits are the same."""
    x = np.random.default_rng(0).standard_normal((2, 4096, 64), np.float32)
    plan = Dense().plan(x.shape[-2], True)

    def run() -> list[bytes]:
        out, saved = combiner.attention_forward(x, x, x, plan)
        return [out.tobytes(), *content(combiner.attention_backward(x, saved))]

    expected = run()
    handled = []
    signal.signal(signal.SIGALRM, lambda number, frame: handled.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end or len(handled) < 3:
            assert run() == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.alone
@pytest.mark.parametrize("threads", (1, 2))
@fresh_process()
def test_what_a_signal_handler_raises_ends_the_call(threads):
    def handler(number, frame):
        raise LookupError("from the handler")

    combiner.set_num_threads(threads)
    call, _ = long_call("forward")
    signal.signal(signal.SIGALRM, handler)
    for _ in range(3):
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        start = time.process_time()
        with pytest.raises(LookupError, match="from the handler"):
            call()
        assert time.process_time() - start < 0.35 * threads


@pytest.mark.alone
@fresh_process()
def test_ctrl_c_is_for_the_main_thread():
    """It ends the main thread's call, and lets that of another thread go on to its end."""
    x = np.random.default_rng(0).standard_normal((8192, 64), np.float32)
    plan = Dense().plan(len(x))
    expected = combiner.attention(x, x, x, plan).tobytes()
    results = []
    other = threading.Thread(target=lambda: results.extend(combiner.attention(x, x, x, plan) for _ in range(4)))
    call, _ = long_call("forward")
    other.start()
    assert seconds_to_end(call, 0.1) < 0.5  # three threads of Python on the processors there are
    other.join()
    assert [out.tobytes() for out in results] == [expected] * 4


# ---- references


def wrong_calls() -> dict:
    """By name: changes to the arguments of a right call, and what they raise."""
    x = np.zeros((2, 30, 4), np.float32)
    return {
        "no array": ({"key": [1.0]}, TypeError),
        "dtype": ({"value": x.astype(np.float64)}, TypeError),
        "integers": ({"query": x.astype(np.int32)}, TypeError),
        "byte order": ({"key": x.astype(x.dtype.newbyteorder())}, TypeError),
        "axes": ({"query": x[0, 0]}, ValueError),
        "shape": ({"key": x[:, :29]}, ValueError),
        "heads": ({"key": x[[0, 1, 0]]}, ValueError),
        "features": ({"value": x[..., :0]}, ValueError),
        "pattern": ({"pattern": "fixed"}, TypeError),
        "class for a pattern": ({"pattern": Fixed}, TypeError),
        "tuple of plans": ({"pattern": (Fixed(8).plan(30),)}, ValueError),
        "another length": ({"pattern": Fixed(8).plan(31)}, ValueError),
        "bidirectional": ({"pattern": Fixed(8).plan(30), "is_causal": True}, ValueError),
        "causal": ({"is_causal": 1}, TypeError),
        "scale": ({"scale": float("nan")}, ValueError),
        "scale of text": ({"scale": "1"}, TypeError),
        "mask": ({"key_mask": np.ones(30, np.int8)}, TypeError),
        "shape of mask": ({"key_mask": np.ones((2, 30), bool)}, ValueError),
        "region_query": ({"region_query": x}, ValueError),
        "region_key": ({"region_key": x.astype(np.float64)}, TypeError),
        "read-only out": ({"out": np.broadcast_to(x[0], x.shape)}, ValueError),
        "shape of out": ({"out": x[:, 1:]}, ValueError),
        "out no array": ({"out": x.tolist()}, TypeError),
    }


@pytest.mark.parametrize("name", [None, "out is an input", *wrong_calls()])
def test_references_and_bytes_of_arguments(rng, name):
    """Neither changes, in a call that succeeds and in one that raises."""
    q, k, v, grad_out = (rng.standard_normal((2, 30, 4)).astype(np.float32) for _ in range(4))
    arguments = {
        "query": q,
        "key": np.repeat(k, 2, axis=-1)[..., ::2],  # is copied inside
        "value": v,
        "pattern": Fixed(8),
        "scale": 0.123,
        "key_mask": rng.random(30) < 0.8,
        "region_query": rng.standard_normal((2, 4, 4)).astype(np.float32),
        "region_key": rng.standard_normal((2, 4, 4)).astype(np.float32),
        "out": np.empty_like(q),
    }
    change, error = wrong_calls().get(name, ({}, None))
    if name == "out is an input":
        change, error = {"out": v[::-1]}, ValueError
    arguments.update(change)
    objects = [*arguments.values(), grad_out]
    arrays = [x for x in objects if isinstance(x, np.ndarray) and (error or x is not arguments["out"])]

    def state() -> list:
        return [sys.getrefcount(x) for x in objects] + [x.tobytes() for x in arrays]

    if error is None:
        combiner.attention(**arguments)  # its plan is kept
    before = state()
    for _ in range(3):
        if error is None:
            saved = combiner.attention_forward(**arguments)[1]
            combiner.attention_backward(grad_out, saved)
            with pytest.raises(ValueError, match="grad_out"):
                combiner.attention_backward(grad_out[:, 1:], saved)
            with pytest.raises(TypeError, match="grad_lse"):
                combiner.attention_backward(grad_out, saved, grad_lse=7)
            del saved
        else:
            with pytest.raises(error):
                combiner.attention(**arguments)
            with pytest.raises(error):
                combiner.attention_forward(**arguments)
    assert state() == before
