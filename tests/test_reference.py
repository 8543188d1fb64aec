# SPDX-License-Identifier: Apache-2.0
"""The judge itself: against the authors' code (golden files), finite differences, and the mathematics' identities."""

import json

import numpy as np
import pytest
from cases import GOLDEN, Case, draw, golden_pattern, random_parts

from combiner import Axial, Dense, Fixed, LogSparse, Tree, reference
from combiner.reference import Parts


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path):
    with np.load(path) as file:
        golden = {name: x.swapaxes(1, 2) for name, x in file.items() if name != "meta"}
        meta = json.loads(str(file["meta"]))
    q, k, v = (golden[name] for name in "qkv")
    pattern = golden_pattern(meta["variant"], meta["seg"])
    out, saved = reference.attention_forward(
        q, k, v, pattern, is_causal=meta["causal"], scale=meta["scale"], region_key=golden.get("kr")
    )
    gradients = reference.attention_backward(golden["ct"], saved)
    np.testing.assert_allclose(out, golden["out"], rtol=0, atol=1e-12)
    for name, gradient in zip(("dq", "dk", "dv"), gradients[:3], strict=True):
        np.testing.assert_allclose(gradient, golden[name], rtol=0, atol=1e-12, err_msg=name)
    if "kr" in golden:
        np.testing.assert_allclose(gradients.region_key, golden["dkr"], rtol=0, atol=1e-12)


FLAGS = [
    {},
    {"pooling": "mean"},
    {"pooling": "sum", "size_bias": True},
    {"size_bias": True, "masked": 0.4},
    {"given": "query"},
    {"given": "key", "pooling": "mean"},
    {"given": "query key", "masked": 0.4},
    {"pick": True},
    {"pick": True, "masked": 0.4},
    {"weighted": True},
    {"weighted": True, "pick": True, "size_bias": True},
    {"weighted": True, "given": "key"},
]


def random_problem(rng, is_causal, flags):
    parts_flags = {name: flags[name] for name in ("pooling", "size_bias", "pick", "weighted") if name in flags}
    case_flags = {name: flags[name] for name in ("masked", "given") if name in flags}
    case = Case("random", L=11, B=2, Hq=4, Hk=2, D=3, Dv=2, is_causal=is_causal, **case_flags)
    return draw(rng, random_parts(rng, case.L, 7, is_causal, **parts_flags), case)


def slope(function, inputs: dict, name: str, direction: np.ndarray) -> float:
    step = 1e-6
    at = [function(**{**inputs, name: inputs[name] + sign * step * direction}) for sign in (1, -1)]
    return (at[0] - at[1]) / (2 * step)


def finite_sum(x: np.ndarray, weight: np.ndarray) -> float:
    return float((np.where(np.isfinite(x), x, 0) * weight).sum())


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_finite_differences(rng, is_causal, flags):
    problem = random_problem(rng, is_causal, flags)
    inputs = dict(zip(("query", "key", "value"), problem.inputs, strict=True))
    given = {name: x for name, x in problem.options.items() if name.startswith("region")}
    rest = problem.of_attend

    def loss(**inputs) -> float:
        out, lse = reference.attention(pattern=problem.pattern, return_lse=True, **inputs, **rest)
        return finite_sum(out, problem.grad_out) + finite_sum(lse, problem.grad_lse)

    _, saved = reference.attention_forward(pattern=problem.pattern, **inputs, **given, **rest)
    gradients = reference.attention_backward(problem.grad_out, saved, grad_lse=problem.grad_lse)._asdict()
    for name, x in {**inputs, **given}.items():
        direction = rng.standard_normal(x.shape)
        expected = slope(loss, {**inputs, **given}, name, direction)
        assert (gradients[name] * direction).sum() == pytest.approx(expected, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_finite_differences_of_the_stages(rng, is_causal, flags):
    problem = random_problem(rng, is_causal, flags)
    inputs = dict(zip(("query", "key", "value"), problem.inputs, strict=True))
    given = {name: x for name, x in problem.options.items() if name.startswith("region")}
    rest = problem.of_attend
    summary, saved = reference.summarize_forward(pattern=problem.pattern, **inputs, **given, **rest)
    weights = [rng.standard_normal(x.shape) for x in summary[:2]]

    def summary_loss(**inputs) -> float:
        summary = reference.summarize(pattern=problem.pattern, **inputs, **rest)
        return sum(float((x * weight).sum()) for x, weight in zip(summary, weights, strict=False))

    gradients = reference.summarize_backward(*weights, saved)._asdict()
    for name, x in {**inputs, **given}.items():
        direction = rng.standard_normal(x.shape)
        expected = slope(summary_loss, {**inputs, **given}, name, direction)
        assert (gradients[name] * direction).sum() == pytest.approx(expected, rel=1e-6, abs=1e-6), name

    inputs |= {"region_key": summary.key, "region_value": summary.value}

    def loss(**inputs) -> float:
        out, lse = reference.attend(pattern=problem.pattern, return_lse=True, **inputs, **rest)
        return finite_sum(out, problem.grad_out) + finite_sum(lse, problem.grad_lse)

    _, saved = reference.attend_forward(pattern=problem.pattern, **inputs, **rest)
    gradients = reference.attend_backward(problem.grad_out, saved, grad_lse=problem.grad_lse)._asdict()
    for name, x in inputs.items():
        direction = rng.standard_normal(x.shape)
        expected = slope(loss, inputs, name, direction)
        assert (gradients[name] * direction).sum() == pytest.approx(expected, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_stages_compose(rng, is_causal, flags):
    problem = random_problem(rng, is_causal, flags)
    out, saved = reference.attention_forward(*problem.inputs, problem.pattern, **problem.options)
    whole = reference.attention_backward(problem.grad_out, saved)
    rest = problem.of_attend
    summary, saved_summary = reference.summarize_forward(*problem.inputs, problem.pattern, **problem.of_summarize)
    again, saved = reference.attend_forward(*problem.inputs, *summary[:2], problem.pattern, **rest)
    np.testing.assert_array_equal(again, out)
    attended = reference.attend_backward(problem.grad_out, saved)
    summarized = reference.summarize_backward(attended.region_key, attended.region_value, saved_summary)
    for name in ("query", "key", "value"):
        parts = getattr(attended, name) + getattr(summarized, name)
        np.testing.assert_allclose(parts, getattr(whole, name), rtol=0, atol=1e-12)
    for name in ("region_query", "region_key"):
        if getattr(whole, name) is not None:
            np.testing.assert_allclose(getattr(summarized, name), getattr(whole, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_weights(rng, is_causal, flags):
    problem = random_problem(rng, is_causal, flags)
    q, k, v = problem.inputs
    out, lse = reference.attention(q, k, v, problem.pattern, return_lse=True, **problem.options)
    W = reference.attention_weights(q, k, problem.pattern, **problem.of_summarize)
    np.testing.assert_allclose(W @ np.repeat(v, 2, axis=1), out, rtol=0, atol=1e-13)
    np.testing.assert_allclose(W.sum(-1), np.isfinite(lse), rtol=0, atol=1e-13)
    assert (W >= 0).all()
    assert not is_causal or not np.triu(W, 1).any()


def test_merge(rng):
    parts = random_parts(rng, 9, 4, False)
    problem = draw(rng, parts, Case("random", L=9, B=1, Hq=2, Hk=1, D=3, Dv=2, is_causal=False))
    nothing = [[] for _ in range(9)]
    direct = Parts(parts.direct, nothing, [])
    regions = Parts(nothing, parts.regions, parts.members)
    out, lse = reference.attention(*problem.inputs, parts, return_lse=True)
    a = reference.attention(*problem.inputs, direct, return_lse=True)
    b = reference.attention(*problem.inputs, regions, return_lse=True)
    merged, merged_lse = reference.merge(*a, *b)
    np.testing.assert_allclose(merged, out, rtol=0, atol=1e-13)
    np.testing.assert_allclose(merged_lse, lse, rtol=0, atol=1e-13)


def test_ties_go_to_the_lowest_position():
    k = np.array([[1.0, 0.0], [2.0, 3.0], [2.0, 3.0], [0.0, 3.0]])
    parts = Parts([[3]] * 4, [[1]] * 4, [[3, 2], [4, 1, 0]])  # the nested region is listed first
    _, saved = reference.attention_forward(k, k, k, parts, region_query=np.zeros((2, 2)))  # so that stage 1 is level
    dk = reference.attention_backward(np.ones((4, 2)), saved, grad_lse=np.ones(4)).key
    assert dk[1].all() and not dk[0].any() and not dk[2].any()


def test_fully_masked_query(rng):
    q, k, v = rng.standard_normal((3, 6, 4))
    k[:3], v[:3] = np.nan, np.inf
    mask = np.arange(6) >= 3
    (out, saved) = reference.attention_forward(q, k, v, Fixed(2), is_causal=True, key_mask=mask)
    assert not out[:3].any() and np.isneginf(saved["lse"][:3]).all()
    gradients = reference.attention_backward(np.ones((6, 4)), saved, grad_lse=np.ones(6))
    assert not gradients.query[:3].any() and not gradients.key[:3].any() and not gradients.value[:3].any()
    assert all(np.isfinite(x).all() for x in gradients[:3])


PARTITIONS = [
    Dense(),
    Fixed(),
    Fixed(1),
    Fixed(3),
    Fixed(100),
    LogSparse(),
    LogSparse(hierarchical=True),
    Tree(2),
    Tree(3, 2),
    Axial(),
    Axial(5),
    Axial(1, "horizontal"),
    Axial(7, "horizontal"),
    Axial(4, "rowmajor"),
]


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("pattern", PARTITIONS, ids=str)
def test_parts_cover_the_support_once(pattern, is_causal):
    for L in range(40):
        parts = reference.parts(pattern, L, is_causal)
        below = [[j] for j in range(L)]
        for rows in parts.members:
            below.append([j for m in rows for j in below[m]])
        for i in range(L):
            covered = parts.direct[i] + [j for r in parts.regions[i] for j in below[L + r]]
            assert sorted(covered) == list(range(i + 1 if is_causal else L))


def test_parts_of_a_small_case():
    fixed = reference.parts(Fixed(3), 7, is_causal=True)
    assert fixed.direct[4] == [3, 4] and fixed.regions[4] == [0] and fixed.regions[6] == [0, 1]
    assert fixed.members == [[0, 1, 2], [3, 4, 5], [6]]
    log = reference.parts(LogSparse(hierarchical=True), 7, is_causal=False)
    assert log.members == [[0, 1], [2, 3], [4, 5], [6], [7, 8], [9, 10]]
    assert log.direct[6] == [6] and log.regions[6] == [2, 4] and log.regions[2] == [0, 5]
    sparse = reference.parts(LogSparse().sparse(), 7, is_causal=False)
    assert sparse.direct[5] == [3, 4, 5, 6] and sparse.direct[0] == [0, 1, 2, 4]
    assert reference.parts(Fixed(3).sparse(), 8, is_causal=True).direct[7] == [2, 5, 6, 7]


def test_equal_keys_with_size_bias_are_dense(rng):
    q, v = rng.standard_normal((2, 12, 5))
    k = np.repeat(rng.standard_normal((3, 5)), 4, axis=0)
    ours, dense = (
        reference.attention_forward(q, k, v, pattern, is_causal=True) for pattern in (Fixed(4, size_bias=True), Dense())
    )
    np.testing.assert_allclose(ours[0], dense[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(ours[1]["lse"], dense[1]["lse"], rtol=0, atol=1e-13)
