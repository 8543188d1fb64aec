# SPDX-License-Identifier: Apache-2.0
"""Every pattern, shape, option, dtype and instruction set against the reference: whole, and each stage alone."""

import numpy as np
import pytest
from cases import STAGED, Judge, agree, close, each_isa, grid, grid_of_terms, problem

import combiner
from combiner import reference

DTYPES = (np.float32, np.float64)


@pytest.fixture(scope="module", params=[*grid(), *grid_of_terms()], ids=str)
def judge(request) -> Judge:
    """One at a time: pytest runs the tests of a module case by case, and the reference is what takes their time."""
    return Judge(problem(request.param))


def test_forward(judge):
    for _ in each_isa():
        for dtype in DTYPES:
            p = judge.problem.as_type(dtype)
            out, lse = combiner.attention(*p.inputs, p.pattern, return_lse=True, **p.options)
            assert out.dtype == lse.dtype == dtype
            judge.accepts_forward(out, lse)


def test_backward(judge):
    for _ in each_isa():
        for dtype in DTYPES:
            p = judge.problem.as_type(dtype)
            _, saved = combiner.attention_forward(*p.inputs, p.pattern, **p.options)
            gradients = combiner.attention_backward(p.grad_out, saved, grad_lse=p.grad_lse)
            assert all(x.dtype == dtype for x in gradients if x is not None)
            judge.accepts_backward(gradients)


@pytest.mark.parametrize("case", STAGED, ids=str)
def test_stages(rng, case):
    p = problem(case)
    summary, saved = combiner.summarize_forward(*p.inputs, p.pattern, **p.of_summarize)
    expected, exact = reference.summarize_forward(*p.inputs, p.pattern, **p.of_summarize)
    agree(summary, expected)
    agree(combiner.summarize(*p.inputs, p.pattern, **p.of_summarize), expected)
    cotangents = [rng.standard_normal(x.shape) for x in summary[:2]]
    of_bias = None if summary.bias is None else rng.standard_normal(summary.bias.shape)
    for given in (cotangents, [cotangents[0], None], [None, cotangents[1]]):
        for bias in (None, of_bias):
            agree(
                combiner.summarize_backward(*given, saved, grad_summary_bias=bias),
                reference.summarize_backward(*given, exact, grad_summary_bias=bias),
            )

    inputs = (*p.inputs, summary.key, summary.value, p.pattern)
    options = p.of_attend | {"region_bias": summary.bias}
    out, saved = combiner.attend_forward(*inputs, **options)
    expected, exact = reference.attend_forward(*inputs, **options)
    close(out, expected, within := 1e-10 * (1 + np.abs(expected).max()), "out")
    close(saved["lse"], exact["lse"], 1e-10 * (1 + np.abs(exact["lse"])), "lse")
    close(combiner.attend(*inputs, **options), expected, within, "out")
    close(combiner.attention(*p.inputs, p.pattern, **p.options), expected, within, "out of both stages")
    agree(
        combiner.attend_backward(p.grad_out, saved, grad_lse=p.grad_lse),
        reference.attend_backward(p.grad_out, exact, grad_lse=p.grad_lse),
    )


@pytest.mark.parametrize("case", STAGED, ids=str)
def test_weights(case):
    p = problem(case)
    expected = reference.attention_weights(*p.inputs[:2], p.pattern, **p.of_weights)
    close(combiner.attention_weights(*p.inputs[:2], p.pattern, **p.of_weights), expected, 1e-12, "weights")
    p = p.as_type(np.float32)
    close(combiner.attention_weights(*p.inputs[:2], p.pattern, **p.of_weights), expected, 1e-4, "weights")
