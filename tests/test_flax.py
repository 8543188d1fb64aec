# SPDX-License-Identifier: Apache-2.0
"""Attention of Flax's modules."""

import functools
import re
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import combiner  # noqa: E402
import combiner.jax as cj  # noqa: E402
from combiner import Dense, Fixed  # noqa: E402


def modules():
    """The attention modules of linen and nnx, as functions of (attention_fn, x, mask)."""
    linen = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")

    def run_linen(attention_fn, x, mask=None, **options):
        module = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention_fn, **options)
        weights = linen.MultiHeadDotProductAttention(num_heads=4).init(jax.random.key(0), x)
        return module.apply(weights, x, mask=mask, rngs={"dropout": jax.random.key(1)})

    def run_nnx(attention_fn, x, mask=None, **options):
        module = nnx.MultiHeadAttention(
            4, x.shape[-1], attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0), **options
        )
        return module(x, mask=mask)

    return {"linen": run_linen, "nnx": run_nnx}


@pytest.mark.parametrize("name", ("linen", "nnx"))
@pytest.mark.parametrize("masked", (False, True))
def test_flax_dense_is_flaxs_own(rng, name, masked):
    """With Dense(), the module's own attention; and its gradients."""
    x = rng.standard_normal((2, 33, 16)).astype(np.float32)
    keys = rng.random((2, 33)) < 0.7
    run = modules()[name]
    mask = keys[:, None, None, :] if masked else None
    causal = np.tri(33, dtype=bool)
    attention_fn = cj.attention_fn(Dense(), is_causal=True)
    dense = sys.modules[f"flax.{name}"].dot_product_attention

    def ours(x):
        return run(attention_fn, x, mask)

    def theirs(x):
        return run(dense, x, causal if mask is None else causal & mask)

    seen = (causal & keys[:, None, :]).any(-1) if masked else np.ones((2, 33), bool)  # theirs are NaN or a mean there
    for f, g in ((ours, theirs), tuple(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))[seen])) for f in (ours, theirs))):
        np.testing.assert_allclose(f(x)[seen], g(x)[seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ("linen", "nnx"))
def test_flax_calls_combiner(rng, name):
    """A factorization within the module has the bits of combiner.attention on what the module hands over."""
    handed = []
    attention_fn = cj.attention_fn(Fixed(4), is_causal=True)

    def spy(query, key, value, mask=None, **options):
        handed.extend((query, key, value, attention_fn(query, key, value, mask=mask, **options)))
        return handed[-1]

    modules()[name](spy, rng.standard_normal((2, 3, 21, 16)).astype(np.float32))
    query, key, value, out = (np.asarray(x).swapaxes(-2, -3) for x in handed)
    assert query.shape == (2, 3, 4, 21, 4)
    np.testing.assert_array_equal(out, combiner.attention(query, key, value, Fixed(4), is_causal=True))


@pytest.mark.parametrize("name", ("linen", "nnx"))
def test_flax_dropout_and_refusals(rng, name):
    run, attention_fn = modules()[name], cj.attention_fn(Fixed(4))
    x = rng.standard_normal((2, 21, 16)).astype(np.float32)
    without = run(attention_fn, x)
    np.testing.assert_array_equal(run(attention_fn, x, dropout_rate=0.5, deterministic=True), without)
    options = {"dropout_rate": 0.5, "deterministic": False}
    for broadcast_dropout in (True, False):  # True is Flax's default
        dropped = run(attention_fn, x, broadcast_dropout=broadcast_dropout, **options)
        assert (dropped != without).any()
        assert (dropped[0] != run(attention_fn, x[::-1], broadcast_dropout=broadcast_dropout, **options)[1]).any()


def flax_masks():
    """Masks that Flax makes of tokens [B, L], 0 for padding; and whether they are causal, and the keys they leave."""
    nn = pytest.importorskip("flax.linen")
    tokens = np.array([[1] * 21, [1] * 13 + [0] * 8, [0] * 5 + [1] * 16])
    real = tokens > 0
    causal, padding = nn.make_causal_mask(tokens), nn.make_attention_mask(real, real)
    keys = nn.make_attention_mask(np.ones_like(real), real)
    return real, [
        (causal, True, None),
        (nn.make_causal_mask(tokens, dtype=bool), True, None),
        (nn.make_causal_mask(tokens[:1], dtype=np.int32), True, None),
        (padding, False, real),
        (keys, False, real),
        (keys[:, :, -1:], False, real),
        (nn.combine_masks(causal, padding), True, real),
        (nn.combine_masks(causal, keys, dtype=bool), True, real),
        (np.broadcast_to(causal, (3, 4, 21, 21)), True, None),
        (nn.make_causal_mask(tokens)[0, 0], True, None),
    ]


def test_flax_masks_are_causality_and_keys(rng):
    """Causal masks, masks of padding and both, of any dtype, outside of jit; the same as what combiner is told."""
    real, masks = flax_masks()
    query, key, value = (rng.standard_normal((3, 21, 4, 8), dtype=np.float32) for _ in range(3))
    by_heads = [x.swapaxes(1, 2) for x in (query, key, value)]
    for n, (mask, is_causal, keys) in enumerate(masks):
        expected = combiner.attention(*by_heads, Fixed(4), is_causal=is_causal, key_mask=keys)
        out = np.asarray(cj.attention_fn(Fixed(4))(query, key, value, mask=mask)).swapaxes(1, 2)
        np.testing.assert_array_equal(out, expected, err_msg=str(n))
        gradient = jax.grad(lambda x, mask=mask: cj.attention_fn(Fixed(4))(x, key, value, mask=mask).sum())(query)
        assert np.isfinite(gradient).all()
    under_jit = jax.jit(lambda *x, mask: cj.attention_fn(Fixed(4), is_causal=True)(*x, mask=mask))
    for mask in (masks[5][0], masks[5][0].astype(bool), masks[6][0][:, :, -1:] * 0 + real[:, None, None]):
        expected = combiner.attention(*by_heads, Fixed(4), is_causal=True, key_mask=real)
        np.testing.assert_array_equal(np.asarray(under_jit(query, key, value, mask=mask)).swapaxes(1, 2), expected)
    closed_over = jax.jit(lambda *x: cj.attention_fn(Fixed(4))(*x, mask=masks[6][0]))
    expected = combiner.attention(*by_heads, Fixed(4), is_causal=True, key_mask=real)
    np.testing.assert_array_equal(np.asarray(closed_over(query, key, value)).swapaxes(1, 2), expected)


@pytest.mark.parametrize("name", ("linen", "nnx"))
def test_flax_modules_take_their_own_masks(rng, name):
    """With Dense(), what the module's own attention makes of the mask, for queries that are no padding."""
    real, masks = flax_masks()
    x = rng.standard_normal((3, 21, 16)).astype(np.float32)
    run, dense = modules()[name], sys.modules[f"flax.{name}"].dot_product_attention
    for mask, *_ in masks[:-1]:
        ours, theirs = (run(function, x, mask) for function in (cj.attention_fn(Dense()), dense))
        np.testing.assert_allclose(ours[real], theirs[real], rtol=1e-4, atol=1e-5)


def test_flax_masks_that_are_no_factorizations(rng):
    x = rng.standard_normal((2, 21, 4, 8), dtype=np.float32)
    call = functools.partial(cj.attention_fn(Fixed(4)), x, x, x)
    window = np.tri(21, dtype=bool) & ~np.tri(21, k=-3, dtype=bool)
    with pytest.raises(ValueError, match=r"mask must be causal, of padding, or both, .*combiner\.Plan\.from_mask"):
        call(mask=np.broadcast_to(window, (2, 1, 21, 21)))
    with pytest.raises(ValueError, match="mask must be the same for all heads"):
        call(mask=np.stack([np.tri(21), np.ones((21, 21))] * 2)[None])
    for mask in (np.ones((2, 1, 1, 20)), np.ones((3, 1, 1, 21)), np.ones((2, 2, 1, 21)), np.ones((1, 2, 1, 1, 21))):
        with pytest.raises(ValueError, match=re.escape("mask must have shape (2, 1, 1, 21) or (2, 1, 21, 21), got")):
            call(mask=mask)
    with pytest.raises(TypeError, match=r"mask must be bool, or of numbers .*, got complex64"):
        call(mask=np.ones((2, 1, 1, 21), np.complex64))
    with pytest.raises(TypeError, match=r"mask must be a jax\.Array or a NumPy array, got list"):
        call(mask=[[1]])
    with pytest.raises(
        ValueError, match=r"of keys alone, \(2, 1, 1, 21\), where it is traced.*is_causal=True.*\[:, :, -1:\]"
    ):
        jax.jit(lambda mask: call(mask=mask))(np.ones((2, 1, 21, 21), np.float32))


def test_flax_decoding_and_cross_attention_are_named(rng):
    """decode=True in both modules, and keys of another sequence."""
    nn, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")
    x = rng.standard_normal((2, 9, 16)).astype(np.float32)
    attention_fn = cj.attention_fn(Fixed(4), is_causal=True)
    module = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention_fn, decode=True)
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"no decoding with a cache \(decode=True\).*combiner\.Decoder"):
        module.apply(variables, x[:, :1], mutable=["cache"])
    module = nnx.MultiHeadAttention(4, 16, attention_fn=attention_fn, decode=True, rngs=nnx.Rngs(0))
    module.init_cache(x.shape)
    with pytest.raises(ValueError, match=r"no decoding with a cache \(decode=True\).*combiner\.Decoder"):
        module(x[:, :1])
    q = np.zeros((2, 9, 4, 4), np.float32)
    with pytest.raises(ValueError, match="must be of one sequence, got lengths 9 and 5: no cross-attention"):
        attention_fn(q, q[:, :5], q[:, :5])


def test_attention_fn_refuses_what_it_cannot_do(rng):
    x = rng.standard_normal((2, 21, 4, 4)).astype(np.float32)
    call = functools.partial(cj.attention_fn(Fixed(4)), x, x, x)
    for name in ("bias", "module", "qk_attn_weights_einsum", "attn_weights_value_einsum"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            call(**{name: x})
    with pytest.raises(ValueError, match="dropout_rng must be given"):
        call(dropout_rate=0.5)
    with pytest.raises(ValueError, match=re.escape("query must have shape (batch..., L, heads, features), got (4, 4)")):
        cj.attention_fn(Fixed(4))(x[0, 0], x[0, 0], x[0, 0])
    np.testing.assert_array_equal(call(is_causal=True), cj.attention_fn(Fixed(4), is_causal=True)(x, x, x))
    assert call(dtype=jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="dtype must be float32, float64, bfloat16 or float16, got int32"):
        call(dtype=jnp.int32)


# ---- terms of the logit


@pytest.mark.parametrize("name", ("softcap", "key_bias", "sink", "alibi", "all"))
def test_flax_terms_are_attentions(rng, name):
    """The bits of cj.attention with the same terms, and under jit their gradients."""
    query, key, value, grad = (rng.standard_normal((2, 21, 4, 8), dtype=np.float32) for _ in range(4))
    bias, sink = rng.standard_normal((4, 21), dtype=np.float32), rng.standard_normal(4, dtype=np.float32)
    every = {"softcap": {"softcap": 2.0}, "key_bias": {"key_bias": bias}, "sink": {"sink": sink}}
    every["all"] = {term: x for terms in every.values() for term, x in terms.items()}
    given = every.get(name, {"alibi": True})
    expected = every.get(name, {"key_bias": combiner.alibi_bias(4, 21)})
    options = {"is_causal": True, "layout": "BLHD"}
    out = cj.attention_fn(Fixed(4), is_causal=True, **given)(query, key, value)
    np.testing.assert_array_equal(out, cj.attention(query, key, value, Fixed(4), **options, **expected))
    if name != "all":
        return

    @jax.jit
    def ours(query, bias, sink):
        return cj.attention_fn(Fixed(4), is_causal=True, softcap=2.0, key_bias=bias, sink=sink)(query, key, value)

    def theirs(query, bias, sink):
        return cj.attention(query, key, value, Fixed(4), softcap=2.0, key_bias=bias, sink=sink, **options)

    pulled = [jax.vjp(f, query, bias, sink)[1](grad) for f in (ours, theirs)]
    for x, y in zip(*pulled, strict=True):
        assert np.abs(y).min() > 0
        np.testing.assert_array_equal(x, y)


def test_a_flax_module_learns_its_sinks():
    """A module that makes its attention_fn of a parameter."""
    linen = pytest.importorskip("flax.linen")

    class Attention(linen.Module):
        @linen.compact
        def __call__(self, x):
            sink = self.param("sink", linen.initializers.zeros, (4,))
            attention_fn = cj.attention_fn(Fixed(4), is_causal=True, sink=sink)
            return linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention_fn)(x)

    x = jax.random.normal(jax.random.key(0), (2, 21, 16))
    out, variables = Attention().init_with_output(jax.random.key(1), x)
    gradient = jax.jit(jax.grad(lambda weights: (Attention().apply(weights, x) ** 2).sum()))(variables)
    assert out.shape == x.shape and np.abs(gradient["params"]["sink"]).min() > 0


@pytest.mark.parametrize("shape", ((2, 4, 1, 21), (1, 4, 1, 21), (4, 1, 21), (2, 1, 1, 21), (1, 21)), ids=str)
def test_flax_biases_of_keys(rng, shape):
    """Those that Flax hands over, in 16 bits too: dense attention is Flax's own."""
    nnx = pytest.importorskip("flax.nnx")
    query, key, value = (rng.standard_normal((2, 21, 4, 8), dtype=np.float32) for _ in range(3))
    bias = rng.standard_normal(shape, dtype=np.float32)
    out = cj.attention_fn(Dense())(query, key, value, bias=bias)
    np.testing.assert_allclose(out, nnx.dot_product_attention(query, key, value, bias=bias), rtol=1e-4, atol=1e-5)
    half = cj.attention_fn(Dense())(query, key, value, bias=bias.astype(jnp.bfloat16), dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16


def test_flax_terms_that_are_refused(rng):
    x = rng.standard_normal((2, 21, 4, 4), dtype=np.float32)
    sink, bias = np.zeros(4, np.float32), np.zeros(21, np.float32)

    def refuses(error, message, given, **options):
        with pytest.raises(error, match=message):
            cj.attention_fn(Fixed(4), **given)(x, x, x, **options)

    refuses(ValueError, "sink must be None where alibi is True", {"alibi": True, "sink": sink})
    refuses(ValueError, "key_bias must be None where alibi is True", {"alibi": True, "key_bias": bias})
    refuses(ValueError, "is_causal must be True where alibi is", {"alibi": True})
    refuses(TypeError, "alibi must be a bool, got int", {"alibi": 1})
    refuses(ValueError, "softcap must be positive and finite, got -1", {"softcap": -1.0})
    refuses(ValueError, r"sink must have shape \(2, 4\), got \(3,\)", {"sink": sink[:3]})
    refuses(TypeError, "sink must be a jax.Array or a NumPy array, got bool", {"sink": True})
    refuses(ValueError, "key_bias must have shape", {"key_bias": bias[1:]})
    refuses(ValueError, "bias must be None where attention_fn was given", {"key_bias": bias}, bias=bias[None])
    pairs = np.zeros((2, 4, 21, 21), np.float32)
    refuses(ValueError, r"of keys alone, \(2, 4, 1, 21\), got \(2, 4, 21, 21\)", {}, bias=pairs)
