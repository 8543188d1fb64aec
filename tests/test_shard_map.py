# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism within jax.shard_map against the reference of the whole sequence."""

import numpy as np
import pytest
from fresh import fresh_process

from combiner import Axial, Dense, Fixed, LogSparse, Tree, reference

jax = pytest.importorskip("jax")
pytest.importorskip("combiner.jax")

from combiner import shard_map  # noqa: E402

n = 8  # positions of a device
D, DV = 8, 5
CASES = {  # devices, pattern, is_causal
    "fixed": (2, Fixed(4), True),
    "rowmajor, weighted, biased": (2, Axial(4, "rowmajor", "weighted", size_bias=True), False),
    "hierarchical, mean, biased": (4, LogSparse(hierarchical=True, pooling="mean", size_bias=True), True),
    "tree of two levels": (4, Tree(2, 2), True),
    "logsparse": (5, LogSparse(), True),  # a device is in two blocks of devices, and some are cut short
}


def sharded(devices, pattern, names=(), **options):
    """`shard_map.attention` as a function of whole arrays: query, key and value, and the named terms of the logit."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("sequence",))
    by_position, whole = jax.sharding.PartitionSpec(None, None, "sequence"), jax.sharding.PartitionSpec()

    def function(query, key, value, *terms):
        given = dict(zip(names, terms, strict=True))
        return shard_map.attention(query, key, value, pattern, "sequence", **given, **options)

    specs = [by_position] * 3 + [by_position if name == "key_bias" else whole for name in names]
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=by_position))


@pytest.mark.parametrize("name", CASES)
@fresh_process(XLA_FLAGS="--xla_force_host_platform_device_count=5", JAX_PLATFORMS="cpu")
def test_devices(name):
    jax.config.update("jax_enable_x64", True)
    devices, pattern, is_causal = CASES[name]
    rng = np.random.default_rng(0)
    for dtype, within in ((np.float64, 1e-12), (np.float32, 1e-6))[: 1 + (name == "fixed")]:  # each is compiled
        shapes = ((2, 4, n * devices, D), (2, 2, n * devices, D), (2, 2, n * devices, DV), (2, 4, n * devices, DV))
        *inputs, grad_out = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        expected, saved = reference.attention_forward(*inputs, pattern, is_causal=is_causal, scale=0.3)
        exact = expected, *reference.attention_backward(grad_out, saved)[:3]
        out, pull_back = jax.vjp(sharded(devices, pattern, is_causal=is_causal, scale=0.3), *inputs)
        for x, whole in zip((out, *pull_back(grad_out)), exact, strict=True):
            assert x.dtype == dtype
            np.testing.assert_allclose(x, whole, rtol=0, atol=within * max(1, np.abs(whole).max()))


@pytest.mark.parametrize("name", CASES)
@fresh_process(XLA_FLAGS="--xla_force_host_platform_device_count=5", JAX_PLATFORMS="cpu")
def test_terms(name):
    """Softcap, sinks, and biases of keys, of regions, or of both."""
    jax.config.update("jax_enable_x64", True)
    devices, pattern, is_causal = CASES[name]
    rng, L = np.random.default_rng(1), n * devices
    shapes = ((2, 4, L, D), (2, 2, L, D), (2, 2, L, DV), (2, 4, L, DV))
    *inputs, grad_out = (rng.standard_normal(shape) for shape in shapes)
    R = pattern.plan(L, is_causal).region_count
    every = {"key_bias": (2, 2, L), "region_bias": (2, 4, R), "sink": (4,)}
    every = {term: rng.standard_normal(shape) for term, shape in every.items()}
    options = {"is_causal": is_causal, "scale": 0.3, "softcap": 2.0}
    for left_out in ("region_bias", "key_bias", ""):
        terms = {term: x for term, x in every.items() if term != left_out}
        expected, saved = reference.attention_forward(*inputs, pattern, **options, **terms)
        exact = reference.attention_backward(grad_out, saved)
        wanted = expected, *exact[:3], *(getattr(exact, term) for term in terms)
        out, pull_back = jax.vjp(sharded(devices, pattern, tuple(terms), **options), *inputs, *terms.values())
        for x, whole in zip((out, *pull_back(grad_out)), wanted, strict=True):
            np.testing.assert_allclose(x, whole, rtol=0, atol=1e-12 * max(1, np.abs(whole).max()))


@fresh_process(XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
def test_refused():
    q = np.zeros((1, 1, 2 * n, D), np.float32)
    for pattern, says in ((Dense(), "pattern must have summaries"), (Fixed(3), "divides the positions of a rank, 8")):
        with pytest.raises(ValueError, match=says):
            sharded(2, pattern)(q, q, q)
    for term, x, error, says in (
        (
            "region_bias",
            np.zeros(3, np.float32),
            ValueError,
            "region_bias must be of all 4 regions of the whole sequence",
        ),
        ("region_bias", np.zeros((3, 4), np.float32), ValueError, "region_bias must have shape"),
        ("sink", np.zeros(2, np.float32), ValueError, "sink must have shape"),
        ("key_bias", np.zeros((1, 3, 2 * n), np.float32), ValueError, "key_bias must have shape"),
        ("key_bias", np.zeros((1, 1, 2 * n), np.float16), TypeError, "key_bias must be float32"),
    ):
        with pytest.raises(error, match=says):
            sharded(2, Fixed(4), (term,))(q, q, q, x)
    with pytest.raises(ValueError, match="softcap must be positive and finite, got -1"):
        sharded(2, Fixed(4), softcap=-1.0)(q, q, q)
