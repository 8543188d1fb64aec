# SPDX-License-Identifier: Apache-2.0
"""How the public names are used, as a type checker sees it: run by mypy, never by Python."""

from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import combiner
from combiner import AttendGradients, Dense, Fixed, Gradients, LogSparse, Plan, Summary

Array = npt.NDArray[Any]
x: npt.NDArray[np.float32] = np.zeros((1, 2, 16, 8), np.float32)

assert_type(combiner.attention(x, x, x, Fixed(4), is_causal=True), Array)
assert_type(combiner.attention(x, x, x, Fixed(4), return_lse=True), tuple[Array, Array])
combiner.attention(x, x, x, Dense(pooling="mean", size_bias=True), scale=0.5, key_mask=np.ones((1, 16), bool), out=x)
combiner.attention(x, x, x, LogSparse(hierarchical=True).sparse())
combiner.attention(x, x, x, Fixed().plan(16, True))
combiner.attention(x, x, x, (Fixed(4).plan(16), Fixed(8).plan(16)))

out, saved = combiner.attention_forward(x, x, x, Fixed(4))
assert_type(combiner.attention_backward(out, saved), Gradients)
assert_type(combiner.attention_backward(out, saved).region_key, Array | None)
assert_type(combiner.summarize(x, x, x, Fixed(4)), Summary)
summary, saved = combiner.summarize_forward(x, x, x, Fixed(4))
assert_type(combiner.summarize_backward(None, summary.value, saved), Gradients)
assert_type(combiner.attend(x, x, x, summary.key, summary.value, Fixed(4)), Array)
out, saved = combiner.attend_forward(x, x, x, summary.key, summary.value, Fixed(4))
assert_type(combiner.attend_backward(out, saved, grad_lse=out[..., 0]), AttendGradients)
assert_type(combiner.merge(out, out[..., 0], out, out[..., 0]), tuple[Array, Array])
assert_type(combiner.attention_weights(x, x, Fixed(4)), Array)

plan = Plan.from_parts([[0], [1]], [[], [0]], [[0]], is_causal=True, cover="partition")
assert_type(plan, Plan)
assert_type(plan.length, int)
assert_type(plan.regions, tuple[Array, ...])
assert_type(plan.is_partition, bool)
assert_type(plan.flops(8, 4, backward=True), int)
a = plan.arrays
again = Plan.from_arrays(
    a["wave"], a["task"], a["pool"], a["tile"], a["run"], a["index"], a["mask"], length=2, regions=1, is_causal=True
)
assert_type(again, Plan)
assert_type(Plan.from_mask(np.ones((2, 2), bool), is_causal=None), Plan)
assert_type(plan.to_mask(), Array)
assert_type(combiner.Mixture(Fixed(4), plan).plan(16, True), combiner.Mixture)
assert_type(combiner.attention(x, x, x, Fixed(4), layout="BLHD", return_lse=True), tuple[Array, Array])
assert_type(combiner.Decoder(Fixed(4), layout="BLHD").step(x, x, x), Array)
assert_type(combiner.Decoder(Fixed(4), sink=x[0, :, 0, 0]).prefill(x, x, x, key_bias=x[..., 0]), Array)
assert_type(combiner.reference.attention.__name__, str)

centroids = combiner.fit_centroids(x, 3, iterations=5, seed=1)
assert_type(centroids, Array)
assert_type(combiner.assign_clusters(x, centroids, balanced=True), Array)
assert_type(combiner.cluster(x, 3, balanced=True), Array)
assert_type(combiner.update_centroids(centroids, x, combiner.cluster(x, 3), decay=0.9), Array)
combiner.attention(x, x, x, combiner.Routing(combiner.cluster(x, 3)))

with combiner.num_threads(2):
    assert_type(combiner.get_num_threads(), int)
assert_type(combiner.info()["isas"], tuple[str, ...])

combiner.attention(x, x, x, 3)  # type: ignore[call-overload]
combiner.attention(x, x, x)  # type: ignore[call-overload]
combiner.attention([[1.0]], x, x, Fixed(4))  # type: ignore[call-overload]
combiner.attention(x, x, x, Fixed(4), attn_mask=x)  # type: ignore[call-overload]
combiner.attention(x, x, x, Fixed(4), layout="LBHD")  # type: ignore[call-overload]
combiner.summarize(x, x, x, Fixed(4), attn_mask=x)  # type: ignore[call-arg]
combiner.atention(x, x, x, Fixed(4))  # type: ignore[attr-defined]
Fixed(4, pooling="average")  # type: ignore[arg-type]
Fixed(4, "max")  # type: ignore[call-arg]
Fixed(4).span = 5  # type: ignore[misc]
combiner.cluster(x, 3, True)  # type: ignore[call-arg]
plan.length = 3  # type: ignore[misc]
