# SPDX-License-Identifier: Apache-2.0
"""What is accepted and what is refused: bad arguments are named, odd but right ones make no difference."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import combiner
from combiner import Dense, Fixed, LogSparse, Plan

B, HQ, HK, L, D, DV, SPAN = 2, 4, 2, 12, 8, 5, 4
R = L // SPAN
PATTERN = Fixed(SPAN)


def normal(*shape: int, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def good(dtype: type = np.float64) -> dict[str, Any]:
    """Every argument of `attention`, all of them right."""
    return {
        "query": normal(B, HQ, L, D, dtype=dtype),
        "key": normal(B, HK, L, D, dtype=dtype),
        "value": normal(B, HK, L, DV, dtype=dtype),
        "pattern": PATTERN,
        "is_causal": True,
        "scale": 0.3,
        "key_mask": np.random.default_rng(0).random((B, L)) < 0.8,
        "region_query": normal(B, HQ, R, D, dtype=dtype),
        "region_key": normal(B, HK, R, D, dtype=dtype),
        "out": np.full((B, HQ, L, DV), 7, dtype),
    }


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


def overlapping(*shape: int) -> np.ndarray:
    """A writeable array whose heads share memory."""
    x = np.zeros(shape)
    return np.lib.stride_tricks.as_strided(x, shape, (x.strides[0], 8, *x.strides[2:]), writeable=True)


ARRAYS = ("query", "key", "value", "region_query", "region_key", "out")
SHAPES = {
    "query": (B, HQ, L, D),
    "key": (B, HK, L, D),
    "value": (B, HK, L, DV),
    "region_query": (B, HQ, R, D),
    "region_key": (B, HK, R, D),
    "out": (B, HQ, L, DV),
}
HUGE = 2**45


def wrong_arrays() -> list[tuple[str, Any, type[Exception], str]]:
    """For every array argument: each wrong kind, dtype, byte order and shape."""
    wrong: list[tuple[str, Any, type[Exception], str]] = []
    for name in ARRAYS:
        x = normal(*SHAPES[name])
        wrong += [
            (
                name,
                x.tolist(),
                TypeError,
                f"{name} must be a float32, float64, bfloat16 or float16 NumPy array, got list",
            ),
            (name, "text", TypeError, f"{name} must be .*, got str"),
            (name, np.ma.masked_array(x), TypeError, f"{name} must be .*, got MaskedArray"),
            (name, x.astype(np.int64), TypeError, f"{name} must be .*, got int64"),
            (name, x.astype(np.float16), TypeError, "must be .* like query, got float"),
            (name, x.astype(complex), TypeError, f"{name} must be .*, got complex128"),
            (name, x.astype(object), TypeError, f"{name} must be .*, got object"),
            (name, x.astype([("a", "f8")]), TypeError, f"{name} must be .*, got "),
            (name, x.astype(">f8" if sys.byteorder == "little" else "<f8"), TypeError, f"{name} must be .* byte order"),
            (name, x[0], ValueError, "must have shape"),
            (name, x[None], ValueError, "must have shape"),
            (name, x[:1], ValueError, "must have shape"),
            (name, x[..., :-1, :], ValueError, "must have shape"),
        ]
        if name != "query":
            wrong += [
                (name, x.astype(np.float32), TypeError, f"{name} must be float64 like query, got float32"),
                (name, np.float64(1.0), (TypeError, ValueError), name),
            ]
        if name not in ("query", "region_query", "region_key", "out"):
            wrong.append(
                (
                    name,
                    None,
                    TypeError,
                    f"{name} must be a float32, float64, bfloat16 or float16 NumPy array, got NoneType",
                )
            )
        if name != "value":
            wrong.append((name, x[..., :-1], ValueError, "must have shape"))
    return wrong


WRONG = [
    *wrong_arrays(),
    ("query", np.float64(1), (TypeError, ValueError), "query"),
    ("query", normal(D), ValueError, r"query must have shape \(..., Hq, L, D\) or \(L, D\), got 1 axes"),
    ("query", normal(B, 3, L, D), ValueError, "the heads of query must be a multiple of the heads of key, got 3 and 2"),
    ("key", normal(B, 0, L, D), ValueError, "the heads of query must be a multiple of the heads of key, got 4 and 0"),
    ("query", normal(B, HQ, L, 0), ValueError, "query must have 1 to 1024 features, got 0"),
    ("query", np.zeros((B, HQ, L, 1025)), ValueError, "query must have 1 to 1024 features, got 1025"),
    ("value", normal(B, HK, L, 0), ValueError, "value must have 1 to 1024 features, got 0"),
    ("value", np.zeros((B, HK, L, 1025)), ValueError, "value must have 1 to 1024 features, got 1025"),
    ("pattern", 3, TypeError, r"pattern must be a pattern such as combiner.Fixed\(\), .*, got int"),
    ("pattern", None, TypeError, "pattern must be .*, got NoneType"),
    ("pattern", Fixed, TypeError, "pattern must be .*, got type"),
    ("pattern", (PATTERN,) * B * HK, TypeError, "each plan of pattern must be a combiner.Plan, got Fixed"),
    (
        "pattern",
        (PATTERN.plan(L, True),) * 3,
        ValueError,
        "pattern must be a tuple of one plan for each of 2 .* 2 .* 3",
    ),
    ("pattern", (), ValueError, "pattern must be a tuple .*, got 0"),
    ("pattern", PATTERN.plan(L + 1, True), ValueError, "pattern must be a plan for the length of query, 12, .* 13"),
    ("pattern", PATTERN.plan(L, False), ValueError, "is_causal must be False with a bidirectional plan"),
    (
        "pattern",
        (PATTERN.plan(L, True),) * 3 + (Fixed(SPAN, pooling="sum").plan(L, True),),
        ValueError,
        "plans of one call must agree in pooling",
    ),
    ("is_causal", 1, TypeError, "is_causal must be a bool, got int"),
    ("is_causal", None, TypeError, "is_causal must be a bool, got NoneType"),
    ("is_causal", "no", TypeError, "is_causal must be a bool, got str"),
    ("scale", "1", TypeError, "scale must be a number or None, got str"),
    ("scale", 1j, TypeError, "scale must be a number or None, got complex"),
    ("scale", float("nan"), ValueError, "scale must be finite, got nan"),
    ("scale", float("-inf"), ValueError, "scale must be finite, got -inf"),
    ("scale", 10**400, ValueError, "scale must be finite"),
    ("key_mask", [True] * L, TypeError, "key_mask must be a bool NumPy array, got list"),
    ("key_mask", np.ones((B, L)), TypeError, "key_mask must be a bool NumPy array, got float64"),
    ("key_mask", np.ones((B, L), np.uint8), TypeError, "key_mask must be a bool NumPy array, got uint8"),
    ("key_mask", np.ones(L, bool), ValueError, r"key_mask must have shape \(2, 12\), got \(12,\)"),
    ("key_mask", np.ones((B, L, L), bool), ValueError, "key_mask must have shape"),
    ("key_mask", np.ones((B, L + 1), bool), ValueError, "key_mask must have shape"),
    (
        "region_key",
        normal(B, 3, R, D),
        ValueError,
        r"region_key must have shape \(2, Hk or Hq, 3, 8\), got \(2, 3, 3, 8\)",
    ),
    ("out", read_only(normal(B, HQ, L, DV)), ValueError, "out must be writeable, got a read-only array"),
    ("out", np.broadcast_to(np.zeros(DV), (B, HQ, L, DV)), ValueError, "out must be writeable"),
    ("out", overlapping(B, HQ, L, DV), ValueError, "out must not overlap itself"),
]


@pytest.mark.parametrize("name, value, error, message", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_argument_is_named(name, value, error, message):
    arguments = good() | {name: value}
    before = {key: x.tobytes() for key, x in arguments.items() if isinstance(x, np.ndarray)}
    counts = {key: sys.getrefcount(arguments[key]) for key in before}
    with pytest.raises(error, match=message) as caught:
        combiner.attention(**arguments)
    del caught
    assert {key: arguments[key].tobytes() for key in before} == before, "an argument was written to"
    assert {key: sys.getrefcount(arguments[key]) for key in before} == counts, "a reference was lost"


@pytest.mark.parametrize("name", ["query", "key", "value", "region_query", "region_key", "key_mask"])
def test_out_may_not_overlap_an_input(name):
    arguments = good() | {"out": None}
    if name == "key_mask":
        memory = np.zeros((B, HQ, L, DV))
        arguments |= {"out": memory, name: memory.view(bool)[:, 0, :, 0]}
    else:
        x = arguments[name]
        memory = np.zeros((B, HQ, L, 4 * D))
        arguments["out"] = memory[..., :DV]
        arguments[name] = memory[:, : x.shape[1], : x.shape[2], DV - 1 : DV - 1 + x.shape[3]]
    before = memory.tobytes()
    with pytest.raises(ValueError, match=f"out must not overlap {name}, got an array that shares memory with it"):
        combiner.attention(**arguments)
    assert memory.tobytes() == before


def test_out_may_lie_between_inputs():
    """One buffer for everything, as fused projections leave it: bounds overlap, elements do not."""
    arguments = good() | {"region_query": None, "region_key": None, "out": None}
    expected = combiner.attention(**arguments)
    memory = np.zeros((B, HQ, L, 2 * D + 2 * DV))
    memory[..., :D] = arguments["query"]
    arguments |= {"query": memory[..., :D], "out": memory[..., D : D + DV]}
    assert combiner.attention(**arguments) is arguments["out"]
    np.testing.assert_array_equal(arguments["out"], expected)
    assert not memory[..., D + DV :].any()


@pytest.mark.parametrize("shape", [(HUGE, 1, 4, 8), (1, HUGE, 4, 8), (2**20, 2**25, 4, 8), (2**21, 2**21, 1, 4, 8)])
def test_sizes_that_no_machine_has(shape):
    x = np.broadcast_to(np.float32(1), shape)
    for function in (combiner.attention, combiner.attention_forward, combiner.summarize, combiner.attend):
        regions = (x[..., :0, :], x[..., :0, :]) if function is combiner.attend else ()
        with pytest.raises((ValueError, OverflowError, MemoryError)):
            function(x, x, x, *regions, Dense())


@pytest.mark.parametrize("length", [2**30 + 1, 2**31, 2**45])
def test_a_length_beyond_the_limit(length):
    x = np.broadcast_to(np.float32(1), (length, 1))
    with pytest.raises(OverflowError, match=r"length must be at most 2\^30"):
        combiner.attention(x, x, x, LogSparse())


def test_empty_arrays():
    for shape in [(0, HQ, L, D), (B, 0, L, D), (B, HQ, 0, D), (3, 0, 2, L, D), (0, D), (2**40, 0, L, D)]:
        x = np.zeros(shape)
        out, saved = combiner.attention_forward(x, x, x, PATTERN, is_causal=True)
        assert out.shape == shape and saved["lse"].shape == shape[:-1]
        assert [g.shape for g in combiner.attention_backward(out, saved)[:3]] == [shape] * 3
        assert combiner.summarize(x, x, x, PATTERN).lse.shape == (*shape[:-2], -(-shape[-2] // SPAN))
        if shape[0] < 2**40:
            assert combiner.attention_weights(x, x, PATTERN).shape == (*shape[:-1], shape[-2])


class OwnArray(np.ndarray):
    pass


class Exported:
    """No ndarray, but convertible, as a tensor of another library is."""

    def __init__(self, x: np.ndarray):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x


def misaligned(x: np.ndarray) -> np.ndarray:
    memory = np.zeros(x.nbytes + 1, np.uint8)
    y = memory[1:].view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


def odd_record(x: np.ndarray) -> np.ndarray:
    """A field of packed records: strides that are no multiple of the itemsize."""
    y = np.zeros(x.shape, [("pad", "u1"), ("x", x.dtype)])["x"]
    y[...] = x
    return y


LAYOUTS = {
    "heads after length": lambda x: np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2),
    "fortran": np.asfortranarray,
    "backwards": lambda x: np.ascontiguousarray(x[..., ::-1, ::-1, :])[..., ::-1, ::-1, :],
    "every other feature": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "features backwards": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "misaligned": misaligned,
    "records": odd_record,
    "padded": lambda x: np.pad(x, [(1, 2)] * x.ndim)[(slice(1, -2),) * x.ndim],
    "subclass": lambda x: x.copy().view(OwnArray),
    "read only": lambda x: read_only(x.copy()),
    "exported": Exported,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layouts_make_no_difference(layout, dtype):
    plain = good(dtype)
    out, saved = combiner.attention_forward(**plain)
    grad_out = normal(B, HQ, L, DV, dtype=dtype)
    grad_lse = saved["lse"].clip(-1, 1)
    expected = combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)

    change = LAYOUTS[layout]
    laid = {name: change(x) if name in SHAPES and name != "out" else x for name, x in plain.items()} | {"out": None}
    inputs = {name: x.x if isinstance(x, Exported) else x for name, x in laid.items() if name in SHAPES}
    before = {name: x.tobytes() for name, x in inputs.items() if x is not None}
    actual, saved = combiner.attention_forward(**laid)
    np.testing.assert_array_equal(actual, out)
    gradients = combiner.attention_backward(change(grad_out), saved, grad_lse=change(grad_lse))
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert {name: inputs[name].tobytes() for name in before} == before


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("read only", "exported")])
def test_out_in_any_layout(layout):
    arguments = good()
    expected = combiner.attention(**arguments | {"out": None})
    out = LAYOUTS[layout](np.zeros((B, HQ, L, DV)))
    assert combiner.attention(**arguments | {"out": out}) is out
    np.testing.assert_array_equal(out, expected)


def test_leading_axes():
    """[2, 3, H, L, D] is [6, H, L, D], whether or not one stride spans the leading axes; [L, D] is one head."""
    q, k, v = normal(2, 3, HQ, L, D), normal(2, 3, HK, L, D), normal(2, 3, HK, L, DV)
    mask = np.random.default_rng(0).random((2, 3, L)) < 0.8
    flat = [x.reshape(6, *x.shape[2:]) for x in (q, k, v)]
    expected = combiner.attention(*flat, PATTERN, key_mask=mask.reshape(6, L))
    turned = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in (q, k, v, mask)]
    for *x, m in ([q, k, v, mask], turned):
        np.testing.assert_array_equal(combiner.attention(*x, PATTERN, key_mask=m).reshape(expected.shape), expected)
    one = combiner.attention(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0], PATTERN, key_mask=mask[0, 0])
    np.testing.assert_array_equal(one, expected[0, 0])
    heads = combiner.attention(q[0, 0], k[0, 0], v[0, 0], PATTERN, key_mask=mask[0, 0])
    np.testing.assert_array_equal(heads, expected[0])


def test_a_plan_for_every_head():
    arguments = good() | {"region_query": None, "region_key": None}
    plans = tuple(Fixed(span).plan(L, True) for span in (4, 3, 6, 5))
    out = combiner.attention(**arguments | {"pattern": plans})
    for n, plan in enumerate(plans):
        b, head = divmod(n, HK)
        query_heads = slice(head * HQ // HK, (head + 1) * HQ // HK)
        one = combiner.attention(
            arguments["query"][b : b + 1, query_heads],
            arguments["key"][b : b + 1, head : head + 1],
            arguments["value"][b : b + 1, head : head + 1],
            plan,
            scale=0.3,
            key_mask=arguments["key_mask"][b : b + 1],
        )
        np.testing.assert_array_equal(out[b, query_heads], one[0])


def test_a_causal_plan_stays_causal():
    arguments = good() | {"out": None}
    expected = combiner.attention(**arguments)
    for is_causal in (False, True, np.True_):
        actual = combiner.attention(**arguments | {"pattern": PATTERN.plan(L, True), "is_causal": is_causal})
        np.testing.assert_array_equal(actual, expected)


def test_scale_of_any_number():
    arguments = good() | {"out": None, "scale": None}
    expected = combiner.attention(**arguments)
    for scale in (D**-0.5, np.float64(D**-0.5), np.array(D**-0.5)):
        np.testing.assert_array_equal(combiner.attention(**arguments | {"scale": scale}), expected)


STAGES = [
    ("region_key", None, TypeError, "region_key must be .*, got NoneType"),
    ("region_value", None, TypeError, "region_value must be .*, got NoneType"),
    ("region_key", normal(B, HK, R + 1, D), ValueError, "region_key must have shape"),
    (
        "region_value",
        normal(B, HK, R, DV),
        ValueError,
        r"region_value must have shape \(2, 4, 3, 5\), got \(2, 2, 3, 5\)",
    ),
    ("region_value", normal(B, HQ, R, DV, dtype=np.float32), TypeError, "region_value must be float64 like query"),
]


@pytest.mark.parametrize("name, value, error, message", STAGES)
def test_attend_names_a_bad_argument(name, value, error, message):
    arguments = good()
    del arguments["region_query"]
    arguments |= {"region_value": normal(B, HQ, R, DV)}
    combiner.attend(**arguments)
    for function in (combiner.attend, combiner.attend_forward):
        with pytest.raises(error, match=message):
            function(**arguments | {name: value})


def test_backward_names_a_bad_argument():
    arguments = good()
    out, saved = combiner.attention_forward(**arguments)
    lse = saved["lse"]
    for grad_out, error, message in [
        (None, TypeError, "grad_out must be a float32, float64, bfloat16 or float16 NumPy array, got NoneType"),
        (out.tolist(), TypeError, "grad_out must be .*, got list"),
        (out.astype(np.float32), TypeError, "grad_out must be float64 like query, got float32"),
        (out[..., :-1], ValueError, r"grad_out must have shape \(2, 4, 12, 5\), got \(2, 4, 12, 4\)"),
    ]:
        with pytest.raises(error, match=message):
            combiner.attention_backward(grad_out, saved)
    for grad_lse, error, message in [
        (lse.tolist(), TypeError, "grad_lse must be .*, got list"),
        (lse[..., None], ValueError, r"grad_lse must have shape \(2, 4, 12\), got \(2, 4, 12, 1\)"),
    ]:
        with pytest.raises(error, match=message):
            combiner.attention_backward(out, saved, grad_lse=grad_lse)
    for other, error, message in [
        (None, TypeError, "saved must be the dict that attention_forward returned, got NoneType"),
        ({}, ValueError, "saved must come from attention_forward, got one from None"),
        (combiner.summarize_forward(*list(arguments.values())[:4])[1], ValueError, "got one from summarize_forward"),
        (saved | {"summary_value": None}, TypeError, r"saved\['summary_value'\] must be .*, got NoneType"),
        (saved | {"lse": lse[:1]}, ValueError, r"saved\['lse'\] must have shape"),
    ]:
        with pytest.raises(error, match=message):
            combiner.attention_backward(out, other)

    summary, saved = combiner.summarize_forward(*list(arguments.values())[:4])
    with pytest.raises(ValueError, match="grad_summary_key must have shape"):
        combiner.summarize_backward(summary.key[..., :-1], None, saved)
    with pytest.raises(ValueError, match="grad_summary_value must have shape"):
        combiner.summarize_backward(None, summary.value[:, :1], saved)
    assert not any(x.any() for x in combiner.summarize_backward(None, None, saved)[:3])


def test_merge_names_a_bad_argument():
    out, lse = normal(B, L, DV), normal(B, L)
    for position, value, error, message in [
        (0, out.tolist(), TypeError, "out_a must be .*, got list"),
        (0, out.astype(int), TypeError, "out_a must be .*, got int64"),
        (1, lse.astype(np.float32), TypeError, "lse_a must be float64 like out_a, got float32"),
        (1, lse[0], ValueError, r"lse_a must have shape \(2, 12\), got \(12,\)"),
        (2, out[:1], ValueError, r"out_b must have shape \(2, 12, 5\), got \(1, 12, 5\)"),
        (3, None, TypeError, "lse_b must be .*, got NoneType"),
    ]:
        arguments: list[Any] = [out, lse, out, lse]
        arguments[position] = value
        with pytest.raises(error, match=message):
            combiner.merge(*arguments)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Fixed(0), ValueError, "span must be at least 1 and fit 64 bits, got 0"),
        (lambda: Fixed(-3), ValueError, "span must be at least 1 .*, got -3"),
        (lambda: Fixed(2**63), ValueError, "span must .* fit 64 bits"),
        (lambda: Fixed(2.0), TypeError, "span must be an integer, got float"),
        (lambda: Fixed(True), TypeError, "span must be an integer, got bool"),
        (lambda: Fixed("4"), TypeError, "span must be an integer, got str"),
        (lambda: Fixed(4, pooling="avg"), ValueError, "pooling must be one of 'max', 'mean', 'sum', got 'avg'"),
        (lambda: Fixed(4, pooling="first"), ValueError, "pooling must be one of"),
        (lambda: Dense(pooling=None), TypeError, "pooling must be a str, got NoneType"),
        (lambda: Dense(size_bias=1), TypeError, "size_bias must be a bool, got int"),
        (lambda: LogSparse(hierarchical="yes"), TypeError, "hierarchical must be a bool, got str"),
        (lambda: Fixed(4, "max"), TypeError, "positional"),
        (lambda: Fixed(4).plan(-1), ValueError, "length must be at least 0 .*, got -1"),
        (lambda: Fixed(4).plan(2.0), TypeError, "length must be an integer, got float"),
        (lambda: Fixed(4).plan(2**30 + 1), OverflowError, r"length must be at most 2\^30"),
        (lambda: Fixed(4).plan(2**70), ValueError, "length must .* fit 64 bits"),
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
        (lambda: combiner.set_isa("sse9"), ValueError, "isa must be one of base.*, got sse9"),
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
    assert repr(Fixed(4, pooling="mean").sparse()) == "Fixed(pooling='mean', span=4).sparse()"
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
