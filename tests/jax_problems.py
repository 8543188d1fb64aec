# SPDX-License-Identifier: Apache-2.0
"""What the tests of JAX share: patterns, arrays, and the comparison with combiner."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import combiner  # noqa: E402
from combiner import Mixture  # noqa: E402

B, HQ, HK, L, D, DV = 2, 4, 2, 53, 8, 5
CLUSTERS = np.random.default_rng(1).integers(0, 6, (B, HK, L))


def arrays(rng, dtype=np.float32, L=L):
    """query, key, value and a cotangent of out."""
    return [
        rng.standard_normal((B, *shape)).astype(dtype) for shape in ((HQ, L, D), (HK, L, D), (HK, L, DV), (HQ, L, DV))
    ]


def with_gradients(inputs, pattern, grad_out, grad_lse=None, **options):
    """out (and lse) of combiner.attention, and the gradients of what is given, by name."""
    out, saved = combiner.attention_forward(*inputs, pattern, **options)
    gradients = combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)._asdict()
    lse = None if isinstance(pattern, Mixture) else saved["lse"]
    return out, lse, {name: x for name, x in gradients.items() if x is not None}
