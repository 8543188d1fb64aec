# SPDX-License-Identifier: Apache-2.0
"""The backward passes beside the sweep of test_attention.py: slopes of the library's own forward, ties, repetition."""

import numpy as np
import pytest
from cases import agree

import combiner
from combiner import Fixed, LogSparse, reference


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("pooling", ("max", "mean", "sum"))
@pytest.mark.parametrize("hierarchical", (True, False))
def test_finite_differences(rng, hierarchical, pooling, is_causal):
    """Independent of the reference: the library's backward is the slope of the library's forward."""
    pattern = LogSparse(hierarchical=hierarchical, pooling=pooling)
    R = len(pattern.plan(19, is_causal).regions)
    shapes = {"query": (4, 19, 5), "key": (2, 19, 5), "value": (2, 19, 3)}
    for given in ((), ("region_query",), ("region_key",)):
        inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        inputs |= {name: rng.standard_normal((4 if name == "region_query" else 2, R, 5)) for name in given}
        grad_out, grad_lse = rng.standard_normal((4, 19, 3)), rng.standard_normal((4, 19))

        def loss(inputs, grad_out=grad_out, grad_lse=grad_lse) -> float:
            out, lse = combiner.attention(pattern=pattern, is_causal=is_causal, return_lse=True, **inputs)
            return float((out * grad_out).sum() + (lse * grad_lse).sum())

        _, saved = combiner.attention_forward(pattern=pattern, is_causal=is_causal, **inputs)
        gradients = combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)._asdict()
        for name, x in inputs.items():
            direction = 1e-6 * rng.standard_normal(x.shape)
            slope = (loss(inputs | {name: x + direction}) - loss(inputs | {name: x - direction})) / 2e-6
            assert (gradients[name] * direction).sum() / 1e-6 == pytest.approx(slope, rel=1e-6, abs=1e-6), name


def test_ties_go_to_the_lowest_position(rng):
    """Small integers make ties in nearly every pool."""
    for pattern in (Fixed(8), LogSparse(), LogSparse(hierarchical=True)):
        q, k, v = rng.integers(-1, 2, (3, 50, 6)).astype(np.float64)
        for is_causal in (True, False):
            _, saved = combiner.attention_forward(q, k, v, pattern, is_causal=is_causal)
            _, exact = reference.attention_forward(q, k, v, pattern, is_causal=is_causal)
            agree(combiner.attention_backward(v, saved), reference.attention_backward(v, exact))


def test_ties_of_zeros_go_to_the_lowest_position(rng):
    """+0 and -0 are equal."""
    q, v = rng.standard_normal((2, 24, 4))
    k = np.where(rng.random((24, 4)) < 0.5, 0.0, -0.0)
    _, saved = combiner.attention_forward(q, k, v, Fixed(6))
    _, exact = reference.attention_forward(q, k, v, Fixed(6))
    agree(combiner.attention_backward(v, saved), reference.attention_backward(v, exact))


def test_backward_twice(rng):
    """saved is not spent, and a second cotangent is as good as the first."""
    q, k, v, a, b = rng.standard_normal((5, 2, 33, 8))
    _, saved = combiner.attention_forward(q, k, v, Fixed(8), is_causal=True)
    first = combiner.attention_backward(a, saved)
    combiner.attention_backward(b, saved)
    for x, y in zip(first[:3], combiner.attention_backward(a, saved)[:3], strict=True):
        np.testing.assert_array_equal(x, y)
