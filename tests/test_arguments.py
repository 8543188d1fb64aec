# SPDX-License-Identifier: Apache-2.0
"""What is accepted and what is refused: bad arguments are named, odd but right ones make no difference."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
from argument_problems import DV, HK, HQ, HUGE, PATTERN, SPAN, B, D, L, R, good, normal

import combiner
from combiner import Dense, Fixed, LogSparse


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
    ("key_mask", np.ones(L + 1, bool), ValueError, r"key_mask must have shape \(2, 12\), got \(13,\)"),
    ("key_mask", np.ones((3, L), bool), ValueError, r"key_mask must have shape \(2, 12\), got \(3, 12\)"),
    ("key_mask", np.ones((B, 1), bool), ValueError, r"key_mask must have shape \(2, 12\), got \(2, 1\)"),
    ("key_mask", np.ones((B, 1, L, L), bool), ValueError, r"key_mask must have shape \(2, 12\), got"),
    ("key_mask", np.ones((B, HQ, 1, L), bool), ValueError, r"key_mask must have shape \(2, 12\), got"),
    ("key_mask", np.ones((B, L, L), bool), ValueError, "key_mask must have shape"),
    ("key_mask", np.ones((B, L + 1), bool), ValueError, "key_mask must have shape"),
    (
        "region_key",
        normal(B, 3, R, D),
        ValueError,
        r"region_key must have shape \(2, Hk or Hq, 3, 8\), got \(2, 3, 3, 8\)",
    ),
    ("softcap", 0, ValueError, "softcap must be positive and finite, got 0"),
    ("softcap", -50.0, ValueError, "softcap must be positive and finite, got -50.0"),
    ("softcap", float("nan"), ValueError, "softcap must be positive and finite, got nan"),
    ("softcap", float("inf"), ValueError, "softcap must be positive and finite, got inf"),
    ("softcap", "50", TypeError, "softcap must be a number or None, got str"),
    ("key_bias", [0.0] * L, TypeError, "key_bias must be a NumPy array, got list"),
    ("key_bias", np.zeros(L, np.float32), TypeError, "key_bias must be float64 like query, got float32"),
    ("key_bias", np.zeros(L, np.int64), TypeError, "key_bias must be float64 like query, got int64"),
    ("key_bias", np.float64(1), ValueError, r"key_bias must have shape \(2, Hk or Hq, 12\), got \(\)"),
    ("key_bias", normal(L + 1), ValueError, r"key_bias must have shape \(2, Hk or Hq, 12\), got \(13,\)"),
    ("key_bias", normal(B, 3, L), ValueError, r"key_bias must have shape \(2, Hk or Hq, 12\), got \(2, 3, 12\)"),
    ("key_bias", normal(3, HK, L), ValueError, "key_bias must have shape"),
    ("key_bias", normal(B, HK, 1), ValueError, "key_bias must have shape"),
    ("key_bias", normal(1, B, HK, L), ValueError, "key_bias must have shape"),
    ("region_bias", normal(R + 1), ValueError, r"region_bias must have shape \(2, Hk or Hq, 3\), got \(4,\)"),
    ("region_bias", normal(R, dtype=np.float32), TypeError, "region_bias must be float64 like query, got float32"),
    ("sink", 1.0, TypeError, "sink must be a NumPy array, got float"),
    ("sink", normal(HK), ValueError, r"sink must have shape \(2, 4\), got \(2,\)"),
    ("sink", normal(B, HQ, 1), ValueError, "sink must have shape"),
    ("sink", normal(HQ, dtype=np.float32), TypeError, "sink must be float64 like query, got float32"),
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
    for scale in (1 / math.sqrt(D), 1 / np.sqrt(D), np.array(1 / np.sqrt(D))):
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
        (None, TypeError, "saved must be what attention_forward returned, got NoneType"),
        ({}, TypeError, "saved must be what attention_forward returned, got dict"),
        (combiner.summarize_forward(*list(arguments.values())[:4])[1], ValueError, "got one from summarize_forward"),
        (saved.with_results(summary_value=None), TypeError, r"saved\['summary_value'\] must be .*, got NoneType"),
        (saved.with_results(softmax=lse), ValueError, r"saved\['softmax'\] must have shape"),
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
