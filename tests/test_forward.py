# SPDX-License-Identifier: Apache-2.0
"""The forward passes beside the sweep of test_attention.py: the authors' own results, shapes, and odd sizes."""

import json

import numpy as np
import pytest
from cases import GOLDEN, agree, close, each_isa, golden_pattern

import combiner
from combiner import Dense, Fixed, LogSparse, reference


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_merge(rng, dtype):
    out_a, out_b = rng.standard_normal((2, 2, 3, 9, 5)).astype(dtype)
    lse_a, lse_b = (3 * rng.standard_normal((2, 2, 3, 9))).astype(dtype)
    lse_a[:, :, :3], lse_b[:, :, 2:5] = -np.inf, -np.inf
    out_a[:, :, :3], out_b[:, :, 2:5] = 0, 0
    out, lse = combiner.merge(out_a, lse_a, out_b, lse_b)
    expected, expected_lse = reference.merge(out_a, lse_a, out_b, lse_b)
    assert out.dtype == lse.dtype == dtype
    within = 16 * np.finfo(dtype).eps
    close(out, expected, within * 4, "out")
    close(lse, expected_lse, within * 8, "lse")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path):
    with np.load(path) as file:
        golden = {name: x.swapaxes(1, 2) for name, x in file.items() if name != "meta"}
        meta = json.loads(str(file["meta"]))
    pattern = golden_pattern(meta["variant"], meta["seg"])
    q, k, v, ct = (golden[name].astype(np.float64) for name in ("q", "k", "v", "ct"))
    options = {"is_causal": True, "scale": meta["scale"]}
    if "kr" in golden:
        options["region_key"] = golden["kr"].astype(np.float64)
    for _ in each_isa():
        out, saved = combiner.attention_forward(q, k, v, pattern, **options)
        gradients = combiner.attention_backward(ct, saved)
        for name, actual in zip(("out", "dq", "dk", "dv"), (out, *gradients[:3]), strict=True):
            close(actual, golden[name], 1e-10, name)
        if "kr" in golden:
            close(gradients.region_key, golden["dkr"], 1e-10, "dkr")


@pytest.mark.parametrize("leading", [None, (), (2,), (2, 1, 3)], ids=str)
def test_leading_axes(rng, leading):
    """[L, D] is one head without batch; any axes may stand before the head axis."""
    head = () if leading is None else (*leading, 2)
    q, k, v = (rng.standard_normal((*head, 20, d)) for d in (8, 8, 6))
    mask = rng.random((*(leading or ()), 20)) < 0.7
    out, lse = combiner.attention(q, k, v, Fixed(4), key_mask=mask, return_lse=True)
    expected, expected_lse = reference.attention(q, k, v, Fixed(4), key_mask=mask, return_lse=True)
    close(out, expected, 1e-12, "out")
    close(lse, expected_lse, 1e-12, "lse")
    summary = combiner.summarize(q, k, v, Fixed(4), key_mask=mask)
    agree(summary, reference.summarize(q, k, v, Fixed(4), key_mask=mask), 1e-12)
    out = combiner.attend(q, k, v, summary.key, summary.value, Fixed(4), key_mask=mask)
    close(out, expected, 1e-12, "out")


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize(
    "pattern", [Dense(), Fixed(), Fixed(3), LogSparse(), LogSparse(True), LogSparse().sparse()], ids=str
)
@pytest.mark.parametrize("B, H, L, Dv", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3)])
def test_nothing(pattern, is_causal, B, H, L, Dv):
    q, k, v = np.ones((B, H, L, 4)), np.ones((B, H, L, 4)), np.ones((B, H, L, Dv))
    out, saved = combiner.attention_forward(q, k, v, pattern, is_causal=is_causal)
    assert out.shape == v.shape
    gradients = combiner.attention_backward(out, saved)
    assert [x.shape for x in gradients[:3]] == [q.shape, k.shape, v.shape]
    assert combiner.attention_weights(q, k, pattern, is_causal=is_causal).shape == (B, H, L, L)


def test_out_is_filled(rng):
    q, k, v = rng.standard_normal((3, 2, 17, 8)).astype(np.float32)
    out = np.full_like(v, np.nan)
    assert combiner.attention(q, k, v, Fixed(4), out=out) is out
    np.testing.assert_array_equal(out, combiner.attention(q, k, v, Fixed(4)))


def test_largest_sizes(rng):
    """D and Dv up to 1024."""
    q, k = rng.standard_normal((2, 1, 19, 1024))
    v = rng.standard_normal((1, 19, 1024))
    for _ in each_isa():
        close(combiner.attention(q, k, v, Fixed(4)), reference.attention(q, k, v, Fixed(4)), 1e-12, "out")


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize(
    "pattern, L",
    [(Fixed(600), 1900), (Fixed(), 1100), (LogSparse(), 4300), (LogSparse(hierarchical=True), 4300), (Dense(), 700)],
    ids=str,
)
def test_long(rng, pattern, L, is_causal):
    """Beyond the sizes of tasks and of LogSparse's chunks, forward and backward."""
    q, k, v, grad_out = rng.standard_normal((4, 1, 2, L, 4))
    out, saved = combiner.attention_forward(q, k[:, :1], v[:, :1], pattern, is_causal=is_causal)
    expected, exact = reference.attention_forward(q, k[:, :1], v[:, :1], pattern, is_causal=is_causal)
    close(out, expected, 1e-11, "out")
    gradients = combiner.attention_backward(grad_out, saved)
    for name, x, y in zip("qkv", gradients[:3], reference.attention_backward(grad_out, exact)[:3], strict=True):
        close(x, y, 1e-10 * (1 + np.abs(y).max()), f"d{name}")


@pytest.mark.parametrize("size", (0, 1e-3, 1e3, 1e18))
def test_any_size_of_logits(rng, size):
    """One logit may outweigh all others; sums of exponentials neither overflow nor vanish."""
    q, k, v = rng.standard_normal((3, 1, 40, 8))
    for pattern in (Dense(), Fixed(8), LogSparse()):
        for dtype in (np.float32, np.float64):
            inputs = (size * q).astype(dtype), k.astype(dtype), v.astype(dtype)
            out, lse = combiner.attention(*inputs, pattern, is_causal=True, return_lse=True)
            expected, expected_lse = reference.attention(*inputs, pattern, is_causal=True, return_lse=True)
            close(lse, expected_lse, 16 * np.finfo(dtype).eps * (1 + size), "lse")
            if size <= 1e3:
                close(out, expected, 64 * np.finfo(dtype).eps * (1 + size), "out")
