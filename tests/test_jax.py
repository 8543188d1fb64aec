# SPDX-License-Identifier: Apache-2.0
"""combiner.jax against combiner, whose bits it must have, and JAX's own transformations against their meaning."""

import functools
import gc
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fresh import fresh_process, run_python

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import combiner  # noqa: E402
import combiner.jax as cj  # noqa: E402
from combiner import Axial, Dense, Fixed, LogSparse, Mixture, Plan, Routing, Tree  # noqa: E402

DTYPES = [np.float32, np.float64, jnp.bfloat16, np.float16]
B, HQ, HK, L, D, DV = 2, 4, 2, 53, 8, 5
CU_SEQLENS = (0, 1, 20, 20, 53)
CLUSTERS = np.random.default_rng(1).integers(0, 6, (B, HK, L))
PATTERNS = [
    Dense(),
    Fixed(),
    Fixed(4, pooling="mean", size_bias=True),
    LogSparse(),
    Axial(5, "rowmajor", "weighted"),
    Tree(3).sparse(),
    Routing(CLUSTERS[0, 0]),
    Routing(CLUSTERS),
    Mixture(Fixed(4), Axial(3), Routing(CLUSTERS)),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@pytest.fixture(params=["custom call", "callback"])
def both_ways(request, monkeypatch):
    """Through XLA's custom calls, and through jax.pure_callback."""
    assert cj._takes_custom_calls()
    monkeypatch.setattr(cj, "_takes_custom_calls", lambda: request.param == "custom call")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def arrays(rng, dtype=np.float32, L=L):
    """query, key, value and a cotangent of out."""
    return [
        rng.standard_normal((B, *shape)).astype(dtype) for shape in ((HQ, L, D), (HK, L, D), (HK, L, DV), (HQ, L, DV))
    ]


def count_regions(pattern, options) -> int:
    """R, from the gradient that a region_query of the right size has."""
    inputs = arrays(np.random.default_rng(0))[:3]
    if isinstance(pattern, Mixture):
        return sum(count_regions(each, options) for each in pattern.patterns)
    return combiner.summarize(*inputs, pattern, **options).value.shape[-2]


def with_gradients(inputs, pattern, grad_out, grad_lse=None, **options):
    """out (and lse) of combiner.attention, and the gradients of what is given, by name."""
    out, saved = combiner.attention_forward(*inputs, pattern, **options)
    gradients = combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)._asdict()
    return out, saved.get("lse"), {name: x for name, x in gradients.items() if x is not None}


def assert_same(result, expected, exact=True):
    """Bit by bit; a mixture's mean alone may be rounded otherwise by XLA."""
    assert result.dtype == expected.dtype
    if exact:
        np.testing.assert_array_equal(np.asarray(result), expected)
    else:
        eps = float(jnp.finfo(expected.dtype).eps)
        np.testing.assert_allclose(
            np.asarray(result, np.float64), expected.astype(np.float64), rtol=4 * eps, atol=4 * eps
        )


# ---- the same as combiner ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", (True, False))
@every_pattern
def test_attention_and_gradients_are_combiners(rng, pattern, is_causal, both_ways, x64):
    """out, lse and every gradient; dtypes, masks, given regions, packed sequences and dropout in turn."""
    turn = PATTERNS.index(pattern) + 3 * is_causal
    dtype = DTYPES[turn % len(DTYPES)]
    lse_dtype = np.float64 if dtype is np.float64 else np.float32
    *inputs, grad_out = arrays(rng, dtype)
    options = {"is_causal": is_causal, "scale": (None, 0.3)[turn % 2]}
    if turn % 3 == 1:
        options |= {"key_mask": rng.random((B, L)) < 0.7}
    if turn % 4 == 2:
        options |= {"cu_seqlens": CU_SEQLENS}
    if turn % 3 != 2:
        options |= {"dropout_p": 0.3, "seed": 2**63 + 5}
    plain = {name: x for name, x in options.items() if name not in ("dropout_p", "seed", "scale")}
    R = count_regions(pattern, plain)
    given = dict(zip(("query", "key", "value"), inputs, strict=True))
    if turn % 2:
        given["region_query"] = rng.standard_normal((B, HQ, R, D)).astype(dtype)
        given["region_key"] = rng.standard_normal((B, HK, R, D)).astype(dtype)
    return_lse = not isinstance(pattern, Mixture)
    grad_lse = rng.standard_normal((B, HQ, L)).astype(lse_dtype) if return_lse else None

    @jax.jit
    def value(given):
        done = cj.attention(**given, pattern=pattern, return_lse=return_lse, **options)
        out, lse = done if return_lse else (done, None)
        loss = jnp.sum((out * grad_out).astype(lse_dtype)) + (jnp.sum(lse * grad_lse) if return_lse else 0)
        return loss, (out, lse)

    gradients, (out, lse) = jax.grad(value, has_aux=True)(given)
    regions = {name: x for name, x in given.items() if name.startswith("region")}
    expected = with_gradients(inputs, pattern, grad_out, grad_lse, **regions, **options)
    exact = return_lse
    assert_same(out, expected[0], exact)
    if return_lse:
        assert_same(lse, expected[1])
    assert gradients.keys() == expected[2].keys()
    for name, gradient in gradients.items():
        assert_same(gradient, expected[2][name], exact)


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("pattern", [Fixed(), Axial(5, "rowmajor", "weighted")], ids=str)
def test_two_stages_are_combiners(rng, pattern, is_causal, both_ways):
    *inputs, grad_out = arrays(rng)
    options = {"is_causal": is_causal, "key_mask": rng.random((B, L)) < 0.7}
    summary, saved = combiner.summarize_forward(*inputs, pattern, **options)
    cotangents = [rng.standard_normal(x.shape).astype(x.dtype) for x in summary]

    def summarize(*inputs):
        return cj.summarize(*inputs, pattern, **options)

    result, pull_back = jax.vjp(summarize, *inputs)
    for x, expected in zip(result, summary, strict=True):
        assert_same(x, expected)
    expected = combiner.summarize_backward(*cotangents[:2], saved)
    for x, y in zip(pull_back(cj.Summary(*cotangents)), expected, strict=False):
        assert_same(x, y)

    given = *inputs, summary.key, summary.value
    options |= {"dropout_p": 0.2, "seed": 3}
    out, saved = combiner.attend_forward(*given, pattern, **options)
    grad_lse = cotangents[2][..., :1] * np.ones((1, 1, L), np.float32)
    result, pull_back = jax.vjp(lambda *given: cj.attend(*given, pattern, return_lse=True, **options), *given)
    assert_same(result[0], out)
    assert_same(result[1], saved["lse"])
    expected = combiner.attend_backward(grad_out, saved, grad_lse=grad_lse)
    for x, y in zip(pull_back((grad_out, grad_lse)), expected, strict=True):
        assert_same(x, y)


def test_stages_together_are_attention(rng):
    *inputs, grad_out = arrays(rng)

    def staged(*inputs):
        summary = cj.summarize(*inputs, Fixed(), is_causal=True)
        return cj.attend(*inputs, summary.key, summary.value, Fixed(), is_causal=True)

    out, pull_back = jax.vjp(staged, *inputs)
    expected, _, gradients = with_gradients(inputs, Fixed(), grad_out, is_causal=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for x, y in zip(pull_back(grad_out), gradients.values(), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (np.float32, jnp.bfloat16))
def test_merge_is_combiners_and_finite(rng, dtype):
    parts = [rng.standard_normal(shape).astype(np.float32) for shape in ((6, DV), (6,), (6, DV), (6,))]
    parts[::2] = (x.astype(dtype) for x in parts[::2])
    parts[1][:3] = -np.inf, -np.inf, 200
    parts[3][1:4] = -np.inf, -200, 300
    for x, expected in zip(jax.jit(cj.merge)(*parts), combiner.merge(*parts), strict=True):
        assert_same(x, expected, exact=False)
    gradients = jax.grad(lambda parts: jnp.sum(cj.merge(*parts)[0]) + jnp.sum(cj.merge(*parts)[1][2:]))(parts)
    assert all(np.isfinite(x).all() for x in gradients)


def test_merge_of_halves_is_the_whole(rng):
    """Two disjoint sets of keys, and the gradients through both."""
    query, key, value, grad_out = arrays(rng)
    first = np.arange(L) < 20
    first, second = (np.broadcast_to(mask, (B, L)) for mask in (first, ~first))

    def halves(*inputs):
        parts = (cj.attention(*inputs, Dense(), key_mask=mask, return_lse=True) for mask in (first, second))
        return cj.merge(*itertools.chain.from_iterable(parts))[0]

    out, pull_back = jax.vjp(halves, query, key, value)
    expected, _, gradients = with_gradients((query, key, value), Dense(), grad_out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for x, y in zip(pull_back(grad_out), gradients.values(), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_dense_is_the_formula(rng, x64):
    """Values and gradients of plain softmax attention as JAX itself differentiates it."""
    *inputs, _ = arrays(rng, np.float64)

    def formula(query, key, value):
        key, value = (jnp.repeat(x, HQ // HK, axis=1) for x in (key, value))
        logits = jnp.where(np.tri(L, dtype=bool), query @ key.swapaxes(-1, -2) / np.sqrt(D), -jnp.inf)
        return jnp.sum(jnp.sin(jax.nn.softmax(logits) @ value))

    def ours(query, key, value):
        return jnp.sum(jnp.sin(cj.attention(query, key, value, Dense(), is_causal=True)))

    argnums = 0, 1, 2
    np.testing.assert_allclose(ours(*inputs), formula(*inputs), rtol=1e-12)
    for x, y in zip(jax.grad(ours, argnums)(*inputs), jax.grad(formula, argnums)(*inputs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pattern", [Fixed(4), LogSparse(pooling="mean")], ids=str)
def test_check_grads(rng, pattern, x64):
    """Finite differences in float64; steps of 1e-6 change the largest key of no region here."""
    inputs = [rng.standard_normal((2, 13, 3)) for _ in range(3)]
    check_grads(functools.partial(cj.attention, pattern=pattern, is_causal=True), inputs, 1, "rev", eps=1e-6, rtol=1e-6)


@pytest.mark.parametrize("length", (0, 1, 17))
def test_without_heads_and_empty(rng, length, both_ways):
    query, key, value = (rng.standard_normal((length, n)).astype(np.float32) for n in (D, D, DV))
    mask = rng.random(length) < 0.7
    out, lse = cj.attention(query, key, value, Fixed(4), key_mask=mask, return_lse=True)
    expected = combiner.attention(query, key, value, Fixed(4), key_mask=mask, return_lse=True)
    assert_same(out, expected[0])
    assert_same(lse, expected[1])
    summary = cj.summarize(query, key, value, Fixed(4))
    for x, y in zip(summary, combiner.summarize(query, key, value, Fixed(4)), strict=True):
        assert_same(x, y)
    assert_same(cj.attend(query, key, value, *summary[:2], Fixed(4)), combiner.attention(query, key, value, Fixed(4)))


def test_no_batch_entries_and_no_heads():
    for shape in ((0, 2, 16, 4), (2, 0, 16, 4)):
        x = jnp.zeros(shape)
        assert jax.grad(lambda x: cj.attention(x, x, x, Fixed()).sum())(x).shape == shape


# ---- transformations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, dropout_p", [(Fixed(4), 0.0), (Routing(CLUSTERS), 0.0), (Mixture(Fixed(4), Dense()), 0.4)], ids=str
)
def test_vmap_is_a_loop(rng, pattern, dropout_p, both_ways):
    """Nested, with axes anywhere, unmapped keys and mapped seeds; gradients of each entry too."""
    query = rng.standard_normal((2, B, HQ, L, 3, D)).astype(np.float32)
    key, value = (rng.standard_normal((3, B, HK, L, n)).astype(np.float32) for n in (D, DV))
    seeds = np.arange(3, dtype=np.uint32)
    grad_out = rng.standard_normal((B, HQ, L, DV)).astype(np.float32)

    def loss(query, key, value, seed):
        return jnp.sum(grad_out * cj.attention(query, key, value, pattern, dropout_p=dropout_p, seed=seed))

    gradient = jax.value_and_grad(loss, (0, 1, 2))
    inner = jax.vmap(gradient, (-2, 0, 0, 0))
    value_, gradients = jax.jit(jax.vmap(inner, (0, None, None, None)))(query, key, value, seeds)
    for n in range(2):
        for m in range(3):
            expected = gradient(query[n, ..., m, :], key[m], value[m], seeds[m])
            np.testing.assert_allclose(value_[n, m], expected[0], rtol=1e-5, atol=1e-3)  # a sum of 2,120 terms
            for x, y in zip(gradients, expected[1], strict=True):
                np.testing.assert_array_equal(x[n, m], y)


def test_scan_and_checkpoint(rng):
    """Layers in a scan, recomputed in backward, have the gradients of layers written out."""
    x = rng.standard_normal((HQ, L, D)).astype(np.float32)
    weights = rng.standard_normal((3, D, D)).astype(np.float32)

    def layer(x, weight, seed):
        return x + cj.attention(x @ weight, x, x, Fixed(), is_causal=True, dropout_p=0.1, seed=seed)

    def written_out(weights):
        y = x
        for n, weight in enumerate(weights):
            y = layer(y, weight, jnp.uint32(n))
        return jnp.sum(jnp.sin(y))

    def scanned(weights):
        step = jax.checkpoint(lambda y, each: (layer(y, *each), None))
        return jnp.sum(jnp.sin(jax.lax.scan(step, x, (weights, jnp.arange(3, dtype=jnp.uint32)))[0]))

    for x_, y_ in zip(jax.value_and_grad(scanned)(weights), jax.value_and_grad(written_out)(weights), strict=True):
        np.testing.assert_allclose(x_, y_, rtol=1e-4, atol=1e-4)


def test_equal_patterns_are_traced_once(rng):
    inputs = arrays(rng)[:3]
    traces = []

    @functools.partial(jax.jit, static_argnames="pattern")
    def step(inputs, pattern, seed):
        traces.append(pattern)
        return cj.attention(*inputs, pattern, dropout_p=0.1, seed=seed)

    for seed in range(3):
        step(inputs, Fixed(4), seed)
        step(inputs, Mixture(Fixed(4), LogSparse()), seed)
    assert len(traces) == 2
    step(inputs, Fixed(8), 0)
    assert len(traces) == 3


def test_compiled_functions_keep_their_plans(rng):
    """Plans that nothing but compiled code refers to, made of lists, and more of them than any cache keeps."""
    q, k, v = arrays(rng, L=8)[:3]

    def make(n):
        plan = Plan.from_parts([[i, (i + n) % 8] for i in range(8)])
        return jax.jit(lambda q, k, v: cj.attention(q, k, v, plan)).lower(q, k, v).compile()

    def expected(n):
        return combiner.attention(q, k, v, Plan.from_parts([[i, (i + n) % 8] for i in range(8)]))

    compiled = [make(n) for n in range(7)]
    cj._digest.cache_clear()
    jax.clear_caches()
    gc.collect()
    for n, function in enumerate(compiled):
        assert_same(function(q, k, v), expected(n))


def test_equal_plans_are_kept_once(rng):
    inputs = arrays(rng)[:3]
    before = len(cj._plans)
    for _ in range(3):
        cj.attention(*inputs, Plan.from_parts([[i] for i in range(L)]))
    assert len(cj._plans) == before + 1


def test_forward_mode_and_second_derivatives_raise(rng):
    x = arrays(rng)[1]

    def loss(x):
        return cj.attention(x, x, x, Fixed()).sum()

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (x,), (x,))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(x)


@fresh_process(XLA_FLAGS="--xla_force_host_platform_device_count=2")
def test_shard_map_over_two_devices():
    """Over batch and over heads, where key and value are one head that both devices have."""
    from jax.sharding import Mesh, PartitionSpec

    rng = np.random.default_rng(0)
    mesh = Mesh(np.array(jax.devices()), ("device",))
    assert mesh.size == 2
    by_batch, by_head, whole = PartitionSpec("device"), PartitionSpec(None, "device"), PartitionSpec()
    query, key, value, grad_out = arrays(rng)
    for specs, heads in (((by_batch,) * 3, HK), ((by_head,) * 3, HK), ((by_head, whole, whole), 1)):
        inputs = query, key[:, :heads], value[:, :heads]
        for pattern, check_vma in itertools.product((Fixed(), Mixture(Fixed(), Dense())), (True, False)):
            call = functools.partial(cj.attention, pattern=pattern, is_causal=True, dropout_p=0.0)
            shared = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=check_vma)
            out, pull_back = jax.vjp(jax.jit(shared), *inputs)
            expected, _, gradients = with_gradients(inputs, pattern, grad_out, is_causal=True)
            np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
            for x, y in zip(pull_back(grad_out), gradients.values(), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)  # sums over devices


# ---- dropout -----------------------------------------------------------------------------------------


def test_seeds_of_any_kind(rng, x64):
    inputs = arrays(rng)[:3]

    def drop(seed):
        return np.asarray(jax.jit(functools.partial(cj.attention, pattern=Fixed(), dropout_p=0.5))(*inputs, seed=seed))

    of_64_bits = 2**63 + 2**40 + 7  # closed over, as jax.jit takes no such int for an argument
    out = jax.jit(lambda *inputs: cj.attention(*inputs, Fixed(), dropout_p=0.5, seed=of_64_bits))(*inputs)
    assert_same(out, combiner.attention(*inputs, Fixed(), dropout_p=0.5, seed=of_64_bits))
    for seed, number in (
        (2**40 + 7, 2**40 + 7),
        (np.uint64(2**40 + 7), 2**40 + 7),
        (np.int64(7), 7),
        (jnp.int32(7), 7),
        (jnp.uint64(2**63 + 1), 2**63 + 1),
    ):
        np.testing.assert_array_equal(drop(seed), combiner.attention(*inputs, Fixed(), dropout_p=0.5, seed=number))
    for make in (jax.random.key, jax.random.PRNGKey):
        np.testing.assert_array_equal(drop(make(3)), drop(make(3)))
        assert (drop(make(3)) != drop(make(4))).any()


# ---- errors ------------------------------------------------------------------------------------------


def wrong_arguments():
    x = np.zeros((2, 3, 16, 4), np.float32)
    mask = np.ones((2, 16), bool)
    traced = [
        ("cu_seqlens", {"cu_seqlens": np.array([0, 16])}),
        ("is_causal", {"is_causal": np.array(True)}),
        ("scale", {"scale": np.float32(1)}),
        ("dropout_p", {"dropout_p": np.float32(0.1), "seed": 1}),
    ]
    return [
        (TypeError, "query must be a jax.Array or a NumPy array, got list", {"query": x.tolist()}),
        (TypeError, "query must be a float32, .* array, got int32", {"query": x.astype(np.int32)}),
        (TypeError, "key must be float32 like query, got float64", {"key": x.astype(np.float64)}),
        (
            ValueError,
            re.escape("key must have shape (2, Hk, 16, 4), got (2, 3, 16, 5)"),
            {"key": x[..., :1].repeat(5, -1)},
        ),
        (ValueError, "value must have shape", {"value": x[:1]}),
        (ValueError, "multiple of the heads of key", {"key": x[:, :2], "value": x[:, :2]}),
        (
            ValueError,
            re.escape("key_mask must have shape (2, 16), got (16, 16)"),
            {"key_mask": np.ones((16, 16), bool)},
        ),
        (TypeError, "key_mask must be a bool .*, got float32", {"key_mask": mask.astype(np.float32)}),
        (ValueError, "region_query must have shape", {"region_query": x}),
        (TypeError, "pattern must be a pattern such as", {"pattern": Fixed}),
        (ValueError, "pattern must be a plan for the length of query, 16", {"pattern": Fixed().plan(17)}),
        (
            ValueError,
            "is_causal must be False with a bidirectional plan",
            {"pattern": Fixed().plan(16), "is_causal": True},
        ),
        (ValueError, "scale must be finite", {"scale": np.inf}),
        (ValueError, "cu_seqlens must run from 0", {"cu_seqlens": [0, 15]}),
        (ValueError, "dropout_p must be between 0 and 1", {"dropout_p": 1.5, "seed": 1}),
        (ValueError, "seed must be given where dropout_p > 0", {"dropout_p": 0.1}),
        (TypeError, "seed must be an integer", {"dropout_p": 0.1, "seed": 1.5}),
        (TypeError, "seed must be an integer or one key", {"dropout_p": 0.1, "seed": np.zeros(3, np.uint32)}),
        (ValueError, "seed must be at least 0", {"dropout_p": 0.1, "seed": -1}),
        (ValueError, "return_lse must be False with a Mixture", {"pattern": Mixture(Fixed()), "return_lse": True}),
        *((TypeError, f"{name} must be", {**given, "traced": name}) for name, given in traced),
    ]


@pytest.mark.parametrize("kind, message, wrong", wrong_arguments())
def test_wrong_arguments_raise_when_traced(kind, message, wrong, x64):
    x = np.zeros((2, 3, 16, 4), np.float32)
    given = {"query": x, "key": x, "value": x, "pattern": Fixed(), **wrong}
    traced = given.pop("traced", None)
    call = functools.partial(cj.attention, **{name: value for name, value in given.items() if name != traced})
    with pytest.raises(kind, match=message):
        if traced:
            jax.make_jaxpr(lambda value: call(**{traced: value}))(given[traced])
        else:
            jax.eval_shape(call)


def test_other_functions_name_their_arguments(rng):
    q, k, v, _ = arrays(rng)
    summary = combiner.summarize(q, k, v, Fixed())
    with pytest.raises(TypeError, match=r"region_key must be a jax\.Array or a NumPy array, got NoneType"):
        cj.attend(q, k, v, None, summary.value, Fixed())
    with pytest.raises(ValueError, match="region_value must have shape"):
        cj.attend(q, k, v, summary.key, summary.value[..., :1, :], Fixed())
    with pytest.raises(ValueError, match="pattern must have one normaliser, got a Mixture"):
        cj.summarize(q, k, v, Mixture(Fixed()))
    with pytest.raises(ValueError, match="lse_b must have shape"):
        cj.merge(q, q[..., 0], q, q[..., :1, 0])
    with pytest.raises(TypeError, match="out_b must be of floating point, got int32"):
        cj.merge(q, q[..., 0], q.astype(np.int32), q[..., 0])
    with pytest.raises(TypeError, match="lse_b must be float32 like out_a, got float16"):
        cj.merge(q, q[..., 0], q, q[..., 0].astype(np.float16))


def test_unknown_plan_is_an_error(rng, monkeypatch):
    """As in a function that another process compiled."""
    monkeypatch.setattr(cj, "_digest", lambda plan: 12345)
    with pytest.raises(jax.errors.JaxRuntimeError, match="does not know the plan"):
        cj.attention(*arrays(rng)[:3], Fixed())


def test_functions_of_a_cache_on_disk_find_their_plans(tmp_path):
    """What one process has compiled runs in another, which has traced other plans before."""
    code = """
import jax, numpy as np, combiner, combiner.jax
x = np.random.default_rng(0).standard_normal((2, 40, 8), dtype=np.float32)
{}
out = jax.jit(lambda x: combiner.jax.attention(x, x, x, combiner.Fixed(4)))(x)
print(np.array_equal(out, combiner.attention(x, x, x, combiner.Fixed(4))))
"""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first = run_python(code.format(""), JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1", **cache)
    compiled = [path.name for path in tmp_path.glob("jit__lambda*-cache")]
    assert first.stdout == "True\n" and len(compiled) == 1, first.stderr
    other = "combiner.jax.attention(x, x, x, combiner.LogSparse())"
    second = run_python(code.format(other), JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1", **cache)
    assert second.stdout == "True\n", second.stderr
    assert [path.name for path in tmp_path.glob("jit__lambda*-cache")] == compiled


def test_foreign_custom_call_is_an_error():
    assert cj._takes_custom_calls()
    x = jnp.zeros((1, 1, 4, 2))
    call = jax.ffi.ffi_call("combiner_forward", jax.ShapeDtypeStruct(x.shape, x.dtype))
    for attributes in ({}, {"arrays": np.array([0, 99])}, {"arrays": np.array([0, 10]), "scale": np.float64(1)}):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"cannot read [a-z ,_]+ of the custom call"):
            call(x, **attributes)


def test_another_plan_is_an_error(rng, monkeypatch):
    """One of other sizes than the function was compiled for."""
    inputs = arrays(rng)[:3]
    for other, message in (
        (Fixed().plan(L + 1), "plan must be of length 53, got 54"),
        (Fixed(2).plan(L), "does not fit"),
    ):
        number = cj._digest(other)
        monkeypatch.setattr(cj, "_digest", lambda plan, number=number: number)
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.jit(lambda *inputs: jax.vjp(lambda *a: cj.attention(*a, Fixed()), *inputs)[1](inputs[0][..., :DV]))(
                *inputs
            )
        monkeypatch.undo()


@fresh_process(COMBINER_TEST_ALLOCATOR="1")
def test_memory_that_runs_out_is_an_error():
    q, k, v = (jnp.asarray(x) for x in arrays(np.random.default_rng(0))[:3])
    call = jax.jit(lambda q, k, v: cj.attention(q, k, v, Fixed()))
    expected = np.asarray(call(q, k, v))
    combiner._core._fail_allocation(1)
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match=r"RESOURCE_EXHAUSTED.*no memory for a workspace of"
    ):
        call(q, k, v).block_until_ready()
    np.testing.assert_array_equal(call(q, k, v), expected)


# ---- custom calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads_last", (False, True))
def test_no_copies(heads_last):
    """What XLA compiles is the custom calls alone: no transposition, copy or buffer of its own but lse and h_R."""
    x = jnp.zeros((2, 64, 4, 8)) if heads_last else jnp.zeros((2, 4, 64, 8))
    pattern = Fixed(8)
    call = cj.attention_fn(pattern) if heads_last else functools.partial(cj.attention, pattern=pattern)
    compiled = jax.jit(lambda q, k, v, g: jax.vjp(call, q, k, v)[1](g)).lower(x, x + 1, x + 2, x + 3).compile()
    text = compiled.as_text()
    assert text.count("custom-call(") == 2
    assert not re.search(r" (copy|transpose|fusion|convert|pad)\(", text), text
    own = x.size + 2 * 4 * 64 + 2 * 4 * 8 * (8 + 1)  # out, lse, summary_value and summary_lse
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * own + 1024


@fresh_process(COMBINER_NUM_THREADS="3")
def test_xla_lends_its_threads():
    """The library's own pool starts for NumPy's call alone; the bits are the same, also where threads share a head."""

    def count() -> int:
        return len(os.listdir("/proc/self/task"))

    x = np.random.default_rng(0).standard_normal((1, 4096, 64), dtype=np.float32)
    call = jax.jit(lambda x: jax.vjp(lambda *x: cj.attention(*x, Fixed()), x, x, x)[1](x))
    gradients = jax.block_until_ready(call(x))
    before = count()
    for x_, y_ in zip(call(x), gradients, strict=True):
        np.testing.assert_array_equal(x_, y_)
    assert count() == before
    _, _, expected = with_gradients((x, x, x), Fixed(), x)
    assert count() == before + 2
    for x_, y_ in zip(gradients, expected.values(), strict=True):
        np.testing.assert_array_equal(x_, y_)


def test_callback_by_environment():
    code = "import combiner.jax as cj; print(cj._takes_custom_calls())"
    assert run_python(code, COMBINER_JAX="callback").stdout == "False\n"
    assert "COMBINER_JAX must be 'callback' or not set, got 'no'" in run_python(code, COMBINER_JAX="no").stderr


def test_refused_custom_calls_fall_back_with_one_warning(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("of another version")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    with pytest.warns(RuntimeWarning, match="takes no custom calls of combiner.*of another version") as warned:
        assert not cj._takes_custom_calls.__wrapped__()
    assert len(warned) == 1


# ---- Flax --------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="broadcast_dropout must be False"):
        run(attention_fn, x, **options)
    dropped = run(attention_fn, x, broadcast_dropout=False, **options)
    assert (dropped != without).any()
    with pytest.raises(ValueError, match="mask must be of keys alone"):
        run(attention_fn, x, np.ones((2, 1, 21, 21), bool))
    with pytest.raises(TypeError, match="mask must be bool"):
        run(attention_fn, x, np.ones((2, 1, 1, 21), np.float32))


def test_attention_fn_refuses_what_it_cannot_do(rng):
    x = rng.standard_normal((2, 21, 4, 4)).astype(np.float32)
    call = functools.partial(cj.attention_fn(Fixed(4)), x, x, x)
    for name in ("bias", "module", "qk_attn_weights_einsum", "attn_weights_value_einsum"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            call(**{name: x})
    with pytest.raises(ValueError, match="dropout_rng must be given"):
        call(dropout_rate=0.5)
    with pytest.raises(ValueError, match=re.escape("query must have shape (batch..., L, heads, D), got (4, 4)")):
        cj.attention_fn(Fixed(4))(x[0, 0], x[0, 0], x[0, 0])
    np.testing.assert_array_equal(call(is_causal=True), cj.attention_fn(Fixed(4), is_causal=True)(x, x, x))
    assert call(dtype=jnp.float32).dtype == jnp.float32


# ---- the example -------------------------------------------------------------------------------------


def test_example_trains():
    example = Path(__file__).parent.parent / "examples" / "jax_step.py"
    done = subprocess.run([sys.executable, str(example), "--quick"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout
