# SPDX-License-Identifier: Apache-2.0
"""combiner.jax against combiner, whose bits it must have, and JAX's own transformations against their meaning."""

import functools
import gc
import itertools

import numpy as np
import pytest
from fresh import fresh_process, run_file

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402
from jax_problems import CLUSTERS, DV, HK, HQ, B, D, L, arrays, with_gradients  # noqa: E402

import combiner  # noqa: E402
import combiner.jax as cj  # noqa: E402
from combiner import Axial, Dense, Fixed, HeavilyCompressed, LogSparse, Mixture, Plan, Routing, Tree, Window  # noqa: E402
from combiner.jax import plans  # noqa: E402

DTYPES = [np.float32, np.float64, jnp.bfloat16, np.float16]
CU_SEQLENS = (0, 1, 20, 20, 53)
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
    Window(7),
    Fixed(5, window=7),
    HeavilyCompressed(5, 7),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def count_regions(pattern, options) -> int:
    """R, from the gradient that a region_query of the right size has."""
    inputs = arrays(np.random.default_rng(0))[:3]
    if isinstance(pattern, Mixture):
        return sum(count_regions(each, options) for each in pattern.patterns)
    return combiner.summarize(*inputs, pattern, **options).value.shape[-2]


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


# ---- the same as combiner ------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", (True, False))
@every_pattern
def test_attention_and_gradients_are_combiners(rng, pattern, is_causal, x64):
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
def test_two_stages_are_combiners(rng, pattern, is_causal):
    *inputs, grad_out = arrays(rng)
    options = {"is_causal": is_causal, "key_mask": rng.random((B, L)) < 0.7}
    summary, saved = combiner.summarize_forward(*inputs, pattern, **options)
    assert summary.bias is None
    cotangents = [rng.standard_normal(x.shape).astype(x.dtype) for x in summary[:3]]

    def summarize(*inputs):
        return cj.summarize(*inputs, pattern, **options)

    result, pull_back = jax.vjp(summarize, *inputs)
    assert result.bias is None
    for x, expected in zip(result[:3], summary[:3], strict=True):
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
    for x, y in zip(pull_back((grad_out, grad_lse)), expected[:5], strict=True):
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
def test_without_heads_and_empty(rng, length):
    query, key, value = (rng.standard_normal((length, n)).astype(np.float32) for n in (D, D, DV))
    mask = rng.random(length) < 0.7
    out, lse = cj.attention(query, key, value, Fixed(4), key_mask=mask, return_lse=True)
    expected = combiner.attention(query, key, value, Fixed(4), key_mask=mask, return_lse=True)
    assert_same(out, expected[0])
    assert_same(lse, expected[1])
    summary = cj.summarize(query, key, value, Fixed(4))
    for x, y in zip(summary[:3], combiner.summarize(query, key, value, Fixed(4))[:3], strict=True):
        assert_same(x, y)
    assert_same(cj.attend(query, key, value, *summary[:2], Fixed(4)), combiner.attention(query, key, value, Fixed(4)))


def test_no_batch_entries_and_no_heads():
    for shape in ((0, 2, 16, 4), (2, 0, 16, 4)):
        x = jnp.zeros(shape)
        assert jax.grad(lambda x: cj.attention(x, x, x, Fixed()).sum())(x).shape == shape


# ---- layouts, masks, weights, clusters -----------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [Fixed(4), Axial(5, "rowmajor", "weighted"), Mixture(Fixed(4), LogSparse())], ids=str
)
def test_heads_after_positions(rng, pattern):
    """Every array that has heads, in and out, with gradients; the same bits."""
    *inputs, grad_out = arrays(rng)
    R = count_regions(pattern, {})
    more = {
        name: rng.standard_normal((B, heads, R, D), np.float32)
        for name, heads in (("region_query", HQ), ("region_key", HK))
    }
    given = dict(zip(("query", "key", "value"), inputs, strict=True)) | more
    options = {"dropout_p": 0.3, "seed": 5, "key_mask": rng.random((B, L)) < 0.7}

    def attention(given, layout):
        return cj.attention(**given, pattern=pattern, layout=layout, **options)

    out, pull_back = jax.vjp(functools.partial(attention, layout="BHLD"), given)
    turned = {name: x.swapaxes(1, 2) for name, x in given.items()}
    other, pull_back_other = jax.vjp(functools.partial(attention, layout="BLHD"), turned)
    np.testing.assert_array_equal(other.swapaxes(1, 2), out)
    [gradients], [others] = pull_back(grad_out), pull_back_other(grad_out.swapaxes(1, 2))
    for name, x in gradients.items():
        np.testing.assert_array_equal(others[name].swapaxes(1, 2), x)
    flat = {name: x[0, 0] for name, x in given.items()}
    call = functools.partial(cj.attention, **flat, pattern=pattern)
    np.testing.assert_array_equal(call(layout="BLHD"), call())


def test_stages_of_heads_after_positions(rng):
    inputs = arrays(rng)[:3]
    turned = [x.swapaxes(1, 2) for x in inputs]
    summary = cj.summarize(*inputs, Fixed(4))
    other = cj.summarize(*turned, Fixed(4), layout="BLHD")
    np.testing.assert_array_equal(other.key.swapaxes(1, 2), summary.key)
    np.testing.assert_array_equal(other.value.swapaxes(1, 2), summary.value)
    np.testing.assert_array_equal(other.lse, summary.lse)
    out, lse = cj.attend(*turned, *other[:2], Fixed(4), layout="BLHD", return_lse=True)
    expected = combiner.attend(*inputs, *map(np.asarray, summary[:2]), Fixed(4), return_lse=True)
    np.testing.assert_array_equal(out.swapaxes(1, 2), expected[0])
    np.testing.assert_array_equal(lse, expected[1])


def test_key_masks_are_broadcast(rng):
    """[L], [1, L], [B, 1, 1, L] and with heads after positions; and without heads."""
    inputs = arrays(rng)[:3]
    masks = rng.random((B, L)) < 0.7
    for mask, whole in ((masks[0], masks[:1]), (masks[:1], masks[:1]), (masks[:, None, None], masks), (masks, masks)):
        expected = combiner.attention(*inputs, Fixed(4), key_mask=np.broadcast_to(whole, (B, L)))
        np.testing.assert_array_equal(cj.attention(*inputs, Fixed(4), key_mask=mask), expected)
        turned = (x.swapaxes(1, 2) for x in inputs)
        out = jax.jit(functools.partial(cj.attention, pattern=Fixed(4), layout="BLHD"))(*turned, key_mask=mask)
        np.testing.assert_array_equal(out.swapaxes(1, 2), expected)
    flat = [x[0, 0] for x in inputs]
    expected = combiner.attention(*flat, Fixed(4), key_mask=masks[0])
    np.testing.assert_array_equal(cj.attention(*flat, Fixed(4), key_mask=masks[0]), expected)


@pytest.mark.parametrize("pattern", [LogSparse(), Mixture(Fixed(4), LogSparse())], ids=str)
def test_attention_weights_are_combiners(rng, pattern):
    """Under jit too, in both layouts; their product with the values is attention, and they have gradients."""
    query, key, value, _ = arrays(rng)
    weights = jax.jit(functools.partial(cj.attention_weights, pattern=pattern, is_causal=True))(query, key)
    assert_same(weights, combiner.attention_weights(query, key, pattern, is_causal=True), exact=False)
    turned = cj.attention_weights(query.swapaxes(1, 2), key.swapaxes(1, 2), pattern, is_causal=True, layout="BLHD")
    np.testing.assert_array_equal(turned, weights)
    np.testing.assert_allclose(
        weights @ np.repeat(value, HQ // HK, 1), cj.attention(query, key, value, pattern, is_causal=True), atol=1e-5
    )
    gradient = jax.grad(lambda query: (cj.attention_weights(query, key, pattern) ** 2).sum())(query)
    assert np.isfinite(gradient).all() and (gradient != 0).any()
    assert cj.attention_weights(query[..., :0, :], key[..., :0, :], pattern).shape == (B, HQ, 0, 0)
    long = rng.standard_normal((600, 4), np.float32)  # of more positions than one call has columns
    assert_same(cj.attention_weights(long, long, Fixed()), combiner.attention_weights(long, long, Fixed()), exact=False)


def test_clusters_are_combiners(rng):
    """Concrete, under jit and under vmap, with what `Routing` then makes of them."""
    key = arrays(rng)[1]
    clusters, centroids = combiner.cluster(key, 5), combiner.fit_centroids(key, 5)
    moved = combiner.update_centroids(centroids, key, clusters, decay=0.5)
    update = functools.partial(cj.update_centroids, decay=0.5)
    for wrap in (lambda f: f, jax.jit, lambda f: jax.jit(jax.vmap(f))):
        np.testing.assert_array_equal(wrap(lambda x: cj.cluster(x, 5))(key), clusters)
        np.testing.assert_array_equal(wrap(lambda x: cj.fit_centroids(x, 5))(key), centroids)
        np.testing.assert_array_equal(wrap(cj.assign_clusters)(key, centroids), clusters)
        np.testing.assert_array_equal(wrap(update)(centroids, key, clusters), moved)
    inputs = arrays(rng)[:3]
    out = cj.attention(*inputs, Routing(cj.cluster(inputs[1], 5, balanced=True)))
    expected = combiner.attention(*inputs, Routing(combiner.cluster(inputs[1], 5, balanced=True)))
    np.testing.assert_array_equal(out, expected)
    assert (jax.grad(lambda x: cj.fit_centroids(x, 5).sum())(key) == 0).all()
    with pytest.raises(TypeError, match=r"cluster\(\) has no 'n_clusters': n is the number of clusters"):
        cj.cluster(key, n_clusters=5)
    with pytest.raises(TypeError, match=r"x must be a jax\.Array or a NumPy array, got list"):
        cj.cluster([[1.0]], 1)
    with pytest.raises(ValueError, match="n must be at most the length of x, 53, got 54"):
        cj.cluster(key, 54)


def test_workspace_bytes_are_combiners(rng):
    inputs = arrays(rng)[:3]
    for options in ({}, {"backward": True, "is_causal": True}, {"key_mask": np.ones((B, L), bool)}):
        expected = combiner.workspace_bytes(*inputs, Fixed(4), **options)
        turned = (x.swapaxes(1, 2) for x in inputs)
        assert cj.workspace_bytes(*turned, Fixed(4), layout="BLHD", **options) == expected
        found = []
        jax.eval_shape(
            lambda *x, options=options, found=found: found.append(cj.workspace_bytes(*x, Fixed(4), **options)), *inputs
        )
        assert found == [expected]


# ---- transformations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, dropout_p", [(Fixed(4), 0.0), (Routing(CLUSTERS), 0.0), (Mixture(Fixed(4), Dense()), 0.4)], ids=str
)
def test_vmap_is_a_loop(rng, pattern, dropout_p):
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
    plans._numbers.clear()
    jax.clear_caches()
    gc.collect()
    for n, function in enumerate(compiled):
        assert_same(function(q, k, v), expected(n))


def test_equal_plans_are_kept_once(rng):
    inputs = arrays(rng)[:3]
    before = len(plans.kept)
    for _ in range(3):
        cj.attention(*inputs, Plan.from_parts([[i] for i in range(L)]))
    assert len(plans.kept) == before + 1


def test_forward_mode_and_second_derivatives_say_what_to_do(rng):
    x = arrays(rng)[1][0, 0]

    def loss(x):
        return cj.attention(x, x, x, Fixed()).sum()

    for call in (lambda: jax.jvp(loss, (x,), (x,)), lambda: jax.jacfwd(jax.jit(loss))(x), jax.jit(jax.jacfwd(loss))):
        with pytest.raises(TypeError, match="forward-mode"):
            call() if call.__name__ == "<lambda>" else call(x)
    with pytest.raises(TypeError, match=r"no forward-mode derivatives.*reverse mode, by jax\.grad"):
        jax.jacfwd(loss)(x)
    for second in (jax.grad(lambda x: jax.grad(loss)(x).sum()), jax.hessian(loss)):
        with pytest.raises(NotImplementedError, match=r"first derivatives only.*jax\.nn\.dot_product_attention"):
            second(x)
    assert jax.jacrev(loss)(x).shape == x.shape


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


# ---- dropout -------------------------------------------------------------------------------------


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


# ---- the example ---------------------------------------------------------------------------------


def test_example_trains():
    assert "bits per byte" in run_file("examples/jax_step.py", "--quick")


@pytest.mark.parametrize("layout", ("BHLD", "BLHD"))
@pytest.mark.parametrize("pattern", (Fixed(8), combiner.Routing(CLUSTERS)), ids=("Fixed", "Routing"))
def test_attend_of_some_positions(rng, pattern, layout):
    """With an offset: the bits of combiner's, and the gradients that these rows give, under jit and vmap."""
    inputs = arrays(rng)[:3]
    summary = combiner.summarize(*inputs, pattern)
    given = [inputs[0][..., 11:30, :], *inputs[1:], *summary[:2]]
    mask = rng.random((B, L)) < 0.8
    options = {"offset": 11, "key_mask": mask, "dropout_p": 0.2, "seed": 5}
    out, saved = combiner.attend_forward(*given, pattern, **options)
    grad_out, grad_lse = (rng.standard_normal(x.shape).astype(np.float32) for x in (out, saved["lse"]))

    def turn(x):
        return x.swapaxes(1, 2) if layout == "BLHD" else x

    @jax.jit
    def f(*given):
        made, lse = cj.attend(*map(turn, given), pattern, return_lse=True, layout=layout, **options)
        return turn(made), lse

    (made, lse), pull_back = jax.vjp(f, *given)
    assert np.asarray(made).tobytes() == out.tobytes() and np.asarray(lse).tobytes() == saved["lse"].tobytes()
    expected = combiner.attend_backward(grad_out, saved, grad_lse=grad_lse)
    for x, y in zip(pull_back((grad_out, grad_lse)), expected[:5], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="offset must be between 0 and 34, key's length less query's, got 35"):
        cj.attend(*given, pattern, offset=35)
    with pytest.raises(TypeError, match="offset must be known when the function is traced"):
        jax.jit(lambda offset: cj.attend(*given, pattern, offset=offset))(3)
