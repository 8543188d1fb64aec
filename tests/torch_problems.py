# SPDX-License-Identifier: Apache-2.0
"""What the tests of PyTorch share: patterns, tensors, and what a call returns."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import combiner  # noqa: E402
import combiner.torch as ct  # noqa: E402
from combiner import (  # noqa: E402
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    LogSparse,
    Mixture,
    Tree,
)

L = 37
CLUSTERS = np.arange(L) * 7 % 5
PATTERNS = [
    Dense(),
    Fixed(8),
    Fixed(pooling="mean", size_bias=True),
    LogSparse(hierarchical=True),
    Axial(6, "rowmajor", "weighted"),
    AxialMixture(6).sparse(),
    Tree(3, 2),
    Mixture(Fixed(4), LogSparse()),
    Fixed(5).plan(L, True),
    Mixture(Fixed(4), Fixed(5).plan(L, True)),
    combiner.Window(5, pooling="mean"),
    Fixed(5, window=7),
    combiner.HeavilyCompressed(5, 7),
    combiner.Routing(CLUSTERS),
    combiner.Routing(CLUSTERS).sparse(),
    ct.Selected(Fixed(4, pooling="mean"), torch.tensor([[0, -1], [2, 0], [1, 1], [5, 2], [-1, 8]]), block=8),
    ct.Routing(torch.from_numpy(CLUSTERS), pooling="mean"),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{type(p).__name__}-{str(p)[:30]}")
compiled = {"fullgraph": True, "backend": "aot_eager"}
# torch.compile and opcheck ask it of what they are given.
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def tensors(*shapes, dtype=torch.float64, requires_grad=True):
    return [torch.randn(shape, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def problem(pattern, *, grouped=True, **options):
    """query, key and value with GQA and the region query and key where the pattern has any, and a mask."""
    q, k, v = tensors((2, 4, L, 6), (2, 4 // (1 + grouped), L, 6), (2, 4 // (1 + grouped), L, 5))
    options = {"is_causal": True, "key_mask": torch.rand(2, L) > 0.2, **options}
    return (q, k, v), options


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
