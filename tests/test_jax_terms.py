# SPDX-License-Identifier: Apache-2.0
"""JAX: the terms of a logit, under jit, grad and vmap, and through the stages."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax_problems import HK, HQ, B, L, arrays, with_gradients  # noqa: E402

import combiner  # noqa: E402
import combiner.jax as cj  # noqa: E402
from combiner import Axial, Fixed, LogSparse, Mixture, Tree  # noqa: E402

PATTERNS = [
    Fixed(8),
    LogSparse(hierarchical=True, pooling="mean"),
    Axial(7, "rowmajor"),
    Axial(7, "rowmajor", "weighted"),
    Tree(3).sparse(),
    Mixture(Fixed(8), LogSparse()),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def terms_of(rng, **shapes) -> dict:
    """Every term but the biases of regions: one bias for all batch entries, one sink for each query head."""
    shapes = {"key_bias": (HK, L), "sink": (HQ,)} | shapes
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@every_pattern
@pytest.mark.parametrize("layout", ("BHLD", "BLHD"))
def test_the_bits_and_gradients_are_combiners(rng, pattern, layout):
    *inputs, grad = arrays(rng)
    terms = terms_of(rng)
    out, _, expected = with_gradients(inputs, pattern, grad, is_causal=True, softcap=2.0, **terms)

    def turn(x):
        return x.swapaxes(1, 2) if layout == "BLHD" else x

    @jax.jit
    def f(inputs, terms):
        given = [turn(x) for x in inputs]
        return turn(cj.attention(*given, pattern, is_causal=True, layout=layout, softcap=2.0, **terms))

    made, pull_back = jax.vjp(f, inputs, terms)
    assert np.asarray(made).tobytes() == out.tobytes()
    of_inputs, of_terms = pull_back(grad)
    for name, x in {**dict(zip(("query", "key", "value"), of_inputs, strict=True)), **of_terms}.items():
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("pattern", (Fixed(8), Mixture(Fixed(8), Tree(2))), ids=str)
def test_given_biases_of_regions(rng, pattern):
    *inputs, grad = arrays(rng)
    R = combiner.attention_forward(*inputs, pattern)[1].problem.region_count
    terms = terms_of(rng, region_bias=(B, 1, R))
    out, _, expected = with_gradients(inputs, pattern, grad, **terms)
    made, pull_back = jax.vjp(lambda terms: cj.attention(*inputs, pattern, **terms), terms)
    np.testing.assert_allclose(made, out, rtol=0, atol=1e-6)
    for name, x in pull_back(grad)[0].items():
        assert x.shape == terms[name].shape
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=2e-5, err_msg=name)


def test_vmap_and_arrays_without_heads(rng):
    q, k, v = rng.standard_normal((3, 5, L, 4)).astype(np.float32)
    bias, sink = rng.standard_normal((5, L)).astype(np.float32), rng.standard_normal(5).astype(np.float32)

    def f(q, k, v, bias, sink):
        return (cj.attention(q, k, v, Fixed(8), key_bias=bias, sink=sink) ** 2).sum()

    mapped = jax.vmap(jax.grad(f, argnums=(0, 3, 4)))(q, k, v, bias, sink)
    for n in range(5):
        for x, y in zip(mapped, jax.grad(f, argnums=(0, 3, 4))(q[n], k[n], v[n], bias[n], sink[n]), strict=True):
            np.testing.assert_allclose(x[n], y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=str)
def test_the_stages_are_the_whole(rng, pattern):
    *inputs, grad = arrays(rng)
    terms = terms_of(rng)

    def staged(inputs, bias, sink):
        summary = cj.summarize(*inputs, pattern, softcap=2.0, key_bias=bias)
        given = {"softcap": 2.0, "key_bias": bias, "region_bias": summary.bias, "sink": sink}
        return cj.attend(*inputs, summary.key, summary.value, pattern, **given)

    def whole(inputs, bias, sink):
        return cj.attention(*inputs, pattern, softcap=2.0, key_bias=bias, sink=sink)

    (a, back_a), (b, back_b) = (jax.vjp(f, inputs, terms["key_bias"], terms["sink"]) for f in (staged, whole))
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for x, y in zip(jax.tree.leaves(back_a(grad)), jax.tree.leaves(back_b(grad)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)


def test_weights_bytes_and_half_precision(rng):
    *inputs, _ = arrays(rng)
    terms = terms_of(rng)
    W = cj.attention_weights(*inputs[:2], Fixed(8), softcap=2.0, **terms)
    out = cj.attention(*inputs, Fixed(8), softcap=2.0, **terms)
    np.testing.assert_allclose(W @ np.repeat(inputs[2], HQ // HK, axis=1), out, rtol=0, atol=1e-5)
    sizes = [cj.workspace_bytes(*inputs, Fixed(8), backward=True, **given) for given in ({}, terms)]
    assert sizes[0] < sizes[1]
    half = [x.astype(jnp.bfloat16) for x in inputs]
    made, pull_back = jax.vjp(lambda terms: cj.attention(*half, Fixed(8), **terms), terms)
    assert made.dtype == jnp.bfloat16 and pull_back(made)[0]["key_bias"].dtype == np.float32


@pytest.mark.parametrize(
    "name, value, error, message",
    (
        ("softcap", -1.0, ValueError, "softcap must be positive and finite, got -1"),
        ("key_bias", [0.0], TypeError, "key_bias must be a jax.Array or a NumPy array, got list"),
        ("key_bias", np.zeros(L, np.float16), TypeError, "key_bias must be float32 like query, got float16"),
        ("key_bias", np.zeros(L + 1, np.float32), ValueError, "key_bias must have shape"),
        ("sink", np.zeros(3, np.float32), ValueError, r"sink must have shape \(2, 4\), got \(3,\)"),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_bad_term_is_named(rng, name, value, error, message):
    *inputs, _ = arrays(rng)
    with pytest.raises(error, match=message):
        cj.attention(*inputs, Fixed(8), **{name: value})
    if name == "softcap":
        with pytest.raises(TypeError, match="softcap must be known when the function is traced"):
            jax.jit(lambda cap: cj.attention(*inputs, Fixed(8), softcap=cap))(2.0)
