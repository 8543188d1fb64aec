# SPDX-License-Identifier: Apache-2.0
"""Bad and odd arguments of patterns, plans and settings; objects that are hardly arrays or numbers."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
from argument_problems import DV, HK, HQ, HUGE, PATTERN, B, D, L, R, good, normal
from cases import rebuilt
from fresh import fresh_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import combiner
from combiner import Dense, Fixed, LogSparse, Plan


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Fixed(0), ValueError, "span must be at least 1, got 0"),
        (lambda: Fixed(-3), ValueError, "span must be at least 1, got -3"),
        (lambda: Fixed(2**63), ValueError, r"span must be below 2\^63"),
        (lambda: Fixed(2.0), TypeError, "span must be an integer, got float"),
        (lambda: Fixed(True), TypeError, "span must be an integer, got bool"),
        (lambda: Fixed("4"), TypeError, "span must be an integer, got str"),
        (lambda: Fixed(4, pooling="avg"), ValueError, "pooling must be one of 'max', 'mean', 'sum', got 'avg'"),
        (lambda: Fixed(4, pooling="first"), ValueError, "pooling must be one of"),
        (lambda: Dense(pooling=None), TypeError, "pooling must be a str, got NoneType"),
        (lambda: Dense(size_bias=1), TypeError, "size_bias must be a bool, got int"),
        (lambda: LogSparse(hierarchical="yes"), TypeError, "hierarchical must be a bool, got str"),
        (lambda: Fixed(4, "max"), TypeError, "positional"),
        (lambda: Fixed(4).plan(-1), ValueError, "length must be at least 0, got -1"),
        (lambda: Fixed(4).plan(2.0), TypeError, "length must be an integer, got float"),
        (lambda: Fixed(4).plan(2**30 + 1), OverflowError, r"length must be at most 2\^30"),
        (lambda: Fixed(4).plan(2**70), ValueError, r"length must be below 2\^63"),
        (lambda: Fixed(4).plan(8, 1), TypeError, "is_causal must be a bool, got int"),
        (lambda: Fixed(4).sparse().plan(8, "yes"), TypeError, "is_causal must be a bool, got str"),
        (lambda: Plan(), TypeError, "cannot create"),
        (lambda: Plan.from_parts(3), TypeError, "direct must be a sequence of integer sequences"),
        (lambda: Plan.from_parts([[0.5]]), TypeError, "direct must be .*float"),
        (lambda: Plan.from_parts([[2**70]]), OverflowError, "direct must be "),
        (
            lambda: Plan.from_parts([[0]], length=2),
            ValueError,
            "direct must hold 2 lists, one for each position, got 1",
        ),
        (lambda: Plan.from_parts([[0]], [[], []]), ValueError, "regions must hold 1 lists"),
        (lambda: Plan.from_parts([[1]]), ValueError, r"direct\[0\] holds key 1, which is not a position below 1"),
        (lambda: Plan.from_parts([[0], [-1]]), ValueError, r"direct\[1\] holds key -1"),
        (lambda: Plan.from_parts([[1], [1]], is_causal=True), ValueError, r"direct\[0\] holds key 1, .* after query 0"),
        (lambda: Plan.from_parts([[0]], [[0]]), ValueError, r"regions\[0\] holds 0, but there are 0 regions"),
        (lambda: Plan.from_parts([[0]], [[0]], [[1]]), ValueError, r"members\[0\] holds region 0"),
        (lambda: Plan.from_parts([[0]], pooling="first"), ValueError, "pooling must be one of"),
        (lambda: Plan.from_parts([[0]], length=-1), ValueError, "length must be at least 0"),
        (
            lambda: Plan.from_parts((np.array([0, 5]), np.array([0]))),
            ValueError,
            "direct: the last offset must be .* 1",
        ),
        (lambda: Plan.from_parts((np.zeros(0, int), np.array([0]))), ValueError, "direct: the last offset must be"),
        (lambda: Plan.from_parts((np.array([0, -1, 1]), np.array([0]))), ValueError, "direct: offsets must"),
        (lambda: Plan.from_parts((np.array([0.0, 1.0]), np.array([0]))), TypeError, "direct must hold integers"),
        (lambda: Plan.from_parts((np.array([[0, 1]]), np.array([0]))), ValueError, r"direct must have shape \(n,\)"),
        (lambda: combiner.set_num_threads(0), ValueError, "count must be at least 1"),
        (lambda: combiner.set_num_threads(1.5), TypeError, "count must be an integer, got float"),
        (lambda: combiner.set_num_threads(10**9), ValueError, "count must be between 0 and"),
        (lambda: combiner.set_isa("sse9"), ValueError, "name must be one of 'base'.*, got 'sse9'"),
        (lambda: combiner.set_isa(None), TypeError, "name must be a str, got NoneType"),
        (lambda: PATTERN.plan(L, True).flops(0), ValueError, "dim must be at least 1"),
    ],
)
def test_patterns_plans_and_settings_name_a_bad_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_arrays_of_a_plan_are_checked():
    arrays = PATTERN.plan(L, True).arrays
    sizes = {"length": L, "regions": R, "is_causal": True}
    Plan.from_arrays(**arrays, **sizes)
    wrong: dict[str, list[Any]] = {name: [x[:-1], x.astype(float), x[None, None], ~x] for name, x in arrays.items()}
    wrong["mask"] = [arrays["mask"].astype(float), arrays["mask"][None]]
    wrong["index"] = [arrays["index"].astype(float), arrays["index"][None], np.full(1, 2**40)]
    for name, values in wrong.items():
        for value in values:
            if value.size and not np.array_equal(value, arrays[name]):
                with pytest.raises((TypeError, ValueError)):
                    Plan.from_arrays(**arrays | {name: value}, **sizes)
    for name in ("wave", "task", "tile"):
        with pytest.raises(ValueError, match=name):
            Plan.from_arrays(**arrays | {name: []}, **sizes)
    for name, value in [("length", L - 1), ("regions", R - 1), ("length", 2**31), ("scratch", 2**40), ("regions", "3")]:
        with pytest.raises((TypeError, ValueError, OverflowError)):
            Plan.from_arrays(**arrays, **sizes | {name: value})


ODD = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        0.5,
        float("nan"),
        "x",
        b"x",
        [],
        (),
        {},
        object(),
        np.float32(1),
        np.zeros(0),
        np.zeros((0, 0)),
        np.zeros((2, 2), bool),
        np.zeros((B, HQ, L, D), np.float32),
        np.zeros((B, HK, L, D)),
        np.zeros((L, D)),
        np.zeros((B, L), bool),
        np.full((B, HK, L, DV), np.nan),
        np.broadcast_to(np.float64(1), (B, HK, L, 1024)),
        np.broadcast_to(np.float64(1), (HUGE, 1, 4, 4)),
        np.zeros((B, HK, 0, D)),
        np.array("text"),
        np.zeros(3, "M8[s]"),
        Dense(),
        Fixed(3),
        Fixed(3).sparse(),
        PATTERN.plan(L, True),
        PATTERN.plan(L + 1),
        (PATTERN.plan(L, True),) * (B * HK),
    ]
)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(list(good())), ODD, min_size=1, max_size=5))
def test_any_arguments_give_an_answer_or_a_named_error(odd):
    arguments = good() | odd
    try:
        out = combiner.attention(**arguments)
    except (TypeError, ValueError, OverflowError) as error:
        assert re.search("|".join(good()), str(error)), f"names no argument: {error}"
    except MemoryError:
        assert any(isinstance(x, np.ndarray) and x.size > 2**40 for x in odd.values())
    else:
        assert out.shape == (*arguments["query"].shape[:-1], arguments["value"].shape[-1])


def test_values_of_patterns_and_plans():
    assert Fixed(np.int64(4)) == Fixed(4) and hash(Fixed(np.int64(4))) == hash(Fixed(4)) and Fixed(4) != Fixed(5)
    assert Fixed(4) != Fixed(4, pooling="mean") and Dense() != Fixed()
    assert Fixed(4).plan(L, True) is Fixed(4).plan(L, True)
    assert Dense().sparse() == Dense() and Fixed(4).sparse().sparse() == Fixed(4).sparse() != Fixed(5).sparse()
    assert repr(Fixed(4, pooling="mean").sparse()) == "Fixed(span=4, pooling='mean').sparse()"
    assert repr(LogSparse()) == "LogSparse()"
    plan = PATTERN.plan(L, True)
    assert repr(plan).startswith("Plan(length=12, is_causal=True, regions=3, pooling='max', size_bias=False, nbytes=")
    for change in ({"length": 3}, {"other": 1}):
        for name, value in change.items():
            with pytest.raises(AttributeError):
                setattr(plan, name, value)
    assert not any(x.flags.writeable for x in (*plan.arrays.values(), *plan.regions))
    assert [x.tolist() for x in plan.regions] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert plan.is_full and plan.is_partition and plan.pairs == 3 * 10 + 4 * (0 + 1 + 2)
    assert plan.flops(8, 4) == 2 * (plan.pairs + 8) * 12 and plan.flops(8, backward=True) == 2 * (plan.pairs + 8) * 40


X = np.ones((2, L, 4))


def odd(**methods):
    """An object whose special methods return what they should not."""
    return type("Odd", (), {name: staticmethod(method) for name, method in methods.items()})()


@pytest.mark.parametrize(
    "make, error, says",
    [
        (
            lambda: combiner.attention(X, X, X, PATTERN, dropout_p="0.5"),
            TypeError,
            "dropout_p must be a number, got str",
        ),
        (lambda: combiner.attention(X, X, X, PATTERN, dropout_p=10**400), ValueError, "dropout_p must be finite"),
        (lambda: combiner.workspace_bytes(X, X, X, PATTERN, dropout_p=b"1"), TypeError, "dropout_p must be a number"),
        (lambda: combiner.Decoder(PATTERN, scale="0.5"), TypeError, "scale must be a number or None, got str"),
        (lambda: combiner.Decoder(PATTERN, scale=10**400), ValueError, "scale must be finite"),
        (
            lambda: combiner.attention(X, X, X, PATTERN, cu_seqlens=np.array([0, L], "m8[s]")),
            TypeError,
            "cu_seqlens must hold integers, got timedelta64",
        ),
        (
            lambda: combiner.attention(X, X, X, PATTERN, cu_seqlens=[False, True]),
            TypeError,
            "cu_seqlens must hold integers, got bool",
        ),
        (
            lambda: combiner.attention(X, X, X, PATTERN, cu_seqlens=[[0], [1, L]]),
            ValueError,
            "cu_seqlens must be an array of integers, got list",
        ),
        (
            lambda: combiner.attention(X, X, X, PATTERN, cu_seqlens=[]),
            ValueError,
            r"cu_seqlens must have shape \(N \+ 1,\), got \(0,\)",
        ),
        (
            lambda: combiner.attention(X, X, X, PATTERN, cu_seqlens=odd(__array__=lambda *_, **__: 3)),
            (TypeError, ValueError),
            "cu_seqlens must be an array of integers, got Odd",
        ),
        (lambda: Fixed(int), TypeError, "span must be an integer, got type"),
        (lambda: Fixed(odd(__index__=lambda: "4")), TypeError, "span must be an integer, got Odd"),
        (lambda: Fixed(np.array([1, 2])), TypeError, "span must be an integer, got ndarray"),
        (lambda: combiner.attention(X, X, X, Fixed, cu_seqlens=[0, L]), TypeError, "pattern must be .*, got Fixed"),
    ],
)
def test_odd_numbers_and_arrays_name_their_argument(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_threads_and_info():
    before = combiner.get_num_threads()
    with combiner.num_threads(3):
        assert combiner.get_num_threads() == combiner.info()["threads"] == 3
    assert combiner.get_num_threads() == before
    with pytest.raises(KeyError), combiner.num_threads(1):
        raise KeyError
    assert combiner.get_num_threads() == before
    assert combiner.info()["version"] == combiner.__version__ and combiner.info()["isa"] in combiner.info()["isas"]


def test_references_are_given_back():
    arguments = good()
    objects = [x for x in arguments.values() if isinstance(x, np.ndarray)] + [grad := normal(B, HQ, L, DV)]

    def work() -> None:
        _, saved = combiner.attention_forward(**arguments)
        combiner.attention_backward(grad, saved)
        for name in ("query", "value", "key_mask", "out"):
            with pytest.raises(TypeError):
                combiner.attention(**arguments | {name: 3})

    work()
    before = [sys.getrefcount(x) for x in objects]
    for _ in range(20):
        work()
    assert [sys.getrefcount(x) for x in objects] == before


def test_scale_of_zero_is_zero(rng):
    """Not what the C library takes a scale that is left out for."""
    q, k, v = (rng.standard_normal((2, 9, 4)) for _ in range(3))
    out, saved = combiner.attention_forward(q, k, v, Dense(), scale=0.0)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=-2, keepdims=True), v.shape), rtol=1e-14)
    gradients = combiner.attention_backward(np.ones_like(out), rebuilt(saved, scale=0))
    assert not gradients.query.any() and not gradients.key.any()
    np.testing.assert_allclose(gradients.value, 1, rtol=1e-14)


ENDED = ([0], [[0, 0]], np.zeros((0, 4), int), [[0] * 5], np.zeros((0, 4), int), [], [])  # the arrays of an empty plan


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize(
    "scalar",
    (0, None, 1.5, np.int32(3), np.array(3), np.array(None), object()),
    ids=lambda x: re.sub(r" at 0x.*", "", repr(x)),
)
def test_arrays_of_a_plan_without_axes_are_refused(place, scalar):
    given = list(ENDED)
    given[place] = scalar
    with pytest.raises((TypeError, ValueError), match=r"must hold integers|must have shape"):
        Plan.from_arrays(*given, length=0)


def test_empty_arrays_of_a_plan_have_no_rows():
    """Whatever their shape says."""
    for place in (2, 4, 5, 6):
        given = list(ENDED)
        given[place] = np.zeros((3, 0), np.int64)
        plan = Plan.from_arrays(*given, length=2)
        assert len(list(plan.arrays.values())[place]) == 0


@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_rows_that_no_array_names_take_no_memory():
    assert Plan.from_arrays(*ENDED, length=2**29, scratch=2**29).length == 2**29
    assert combiner._core._peak_bytes() < 2**20


class NoArray:
    def __array__(self, *arguments, **options):
        return 3


class NoMethod:
    plan = 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: combiner.attention(NoArray(), x, x, Dense()), ValueError, "query must be .* array: .*__array__"),
        (lambda x: combiner.attention(x, x, x, NoMethod()), TypeError, "the plan of pattern must be a method, got int"),
        (lambda x: Plan._fixd(8, 2, False, False, 0, False), AttributeError, "no attribute '_fixd'"),
        (lambda x: Plan.from_arrays([[0], [1, 2]], *ENDED[1:], length=2), ValueError, "wave must be an array of int"),
        (lambda x: Plan.from_arrays(*ENDED, length=2, regions=2**62), ValueError, r"regions must be between 0 and 2\^"),
        (lambda x: Plan.from_arrays(*ENDED, length=2, scratch=2**62), ValueError, r"scratch must be between 0 and 2\^"),
        (
            lambda x: combiner.cluster(np.broadcast_to(x[0, 0, :1, :1], (2**31, 1)), 2),
            ValueError,
            r"x must have at most 2\^30 rows, got 2147483648",
        ),
    ],
)
def test_what_numpy_and_c_refuse_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(np.ones((1, 2, 4, 3)))


@pytest.mark.parametrize(
    "dropout", (3, [0.5, 1, None], "abc", object()), ids=lambda x: re.sub(r" at 0x.*", "", repr(x))
)
def test_saved_dropout_that_is_no_tuple_is_refused(rng, dropout):
    x = rng.standard_normal((2, 9, 4))
    _, saved = combiner.attention_forward(x, x, x, Dense())
    with pytest.raises(TypeError, match="dropout must be None or a tuple"):
        rebuilt(saved, dropout=dropout)


def test_heads_without_a_row_to_write_take_no_time():
    """Any number of them, as nothing interrupts what has no end."""
    x = np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (2**40, 1, 1), (0, 0, 4))
    assert combiner.summarize(x, x, x, Dense()).value.shape == (2**40, 0, 1)
    none = x[:, :0]
    assert combiner.attention(none, none, none, Fixed(4)).shape == (2**40, 0, 1)
    assert combiner.Decoder(Dense()).prefill(none, none, none).shape == (2**40, 0, 1)
