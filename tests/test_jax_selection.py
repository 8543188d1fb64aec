# SPDX-License-Identifier: Apache-2.0
"""Selection in combiner.jax: `select` and `Selected` are combiner's, with regions that are traced."""

import functools

import numpy as np
import pytest
from fresh import fresh_process

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402
from jax_problems import CLUSTERS, HK, B, L, arrays, with_gradients  # noqa: E402

import combiner  # noqa: E402
import combiner.jax as cj  # noqa: E402
from combiner import Axial, Fixed, HeavilyCompressed, LogSparse, Routing, Tree  # noqa: E402

BLOCK = 8
BLOCKS = -(-L // BLOCK)


def draw(rng, R, lead=(B, HK)):
    return rng.integers(-1, R, (*lead, BLOCKS, 3))


def choose(q, k, v, pattern=Fixed(4), **options):  # noqa: B008
    """Attention that selects for itself."""
    regions = cj.select(q, k, pattern, 2, block=BLOCK, is_causal=True)
    return cj.attention(q, k, v, cj.Selected(pattern, regions, block=BLOCK), is_causal=True, **options)


@pytest.mark.parametrize("open, rest", ((True, True), (True, False), (False, False)))
@pytest.mark.parametrize("base", (Fixed(4, size_bias=True), HeavilyCompressed(4, 6), LogSparse(), Tree(3)), ids=str)
def test_traced_regions_are_combiners(rng, base, open, rest):
    """out, lse and gradients, with dropout and a mask; one compiled function for all choices; both layouts."""
    *inputs, grad_out = arrays(rng)
    choice = {"block": BLOCK, "open": open, "rest": rest}
    options = {"is_causal": True, "key_mask": rng.random((B, L)) < 0.7, "dropout_p": 0.3, "seed": 7}
    traces = []

    @jax.jit
    def value(inputs, regions):
        traces.append(1)
        out, lse = cj.attention(*inputs, cj.Selected(base, regions, **choice), return_lse=True, **options)
        return jnp.sum(out * grad_out), (out, lse)

    for _ in range(2):
        regions = draw(rng, base.plan(L, True).region_count)
        gradients, (out, lse) = jax.grad(value, has_aux=True)(inputs, regions)
        theirs = combiner.Selected(base, regions, **choice)
        expected = with_gradients(inputs, theirs, grad_out, **options)
        np.testing.assert_array_equal(out, expected[0])
        np.testing.assert_array_equal(lse, expected[1])
        for x, y in zip(gradients, expected[2].values(), strict=True):
            np.testing.assert_array_equal(x, y)
        turned = (x.swapaxes(1, 2) for x in inputs)
        other = cj.attention(*turned, cj.Selected(base, regions, **choice), layout="BLHD", **options)
        np.testing.assert_array_equal(other.swapaxes(1, 2), out)
    assert len(traces) == 1


def test_sets_of_regions(rng):
    """For all heads, for all blocks, with int32; without heads; of a Routing with a plan for each head."""
    inputs = arrays(rng)[:3]
    for regions in (np.array([1, 3]), draw(rng, 14, ()), draw(rng, 14).astype(np.int32)):
        own = combiner.Selected(Fixed(4), regions, block=BLOCK)
        expected = combiner.attention(*inputs, own)
        np.testing.assert_array_equal(cj.attention(*inputs, cj.Selected(Fixed(4), regions, block=BLOCK)), expected)
    flat, regions = [x[0, 0] for x in inputs], draw(rng, 14, ())
    expected = combiner.attention(*flat, combiner.Selected(Fixed(4), regions, block=BLOCK))
    np.testing.assert_array_equal(cj.attention(*flat, cj.Selected(Fixed(4), regions, block=BLOCK)), expected)
    regions = draw(rng, 6)
    ours, theirs = (made(Routing(CLUSTERS), regions, block=BLOCK) for made in (cj.Selected, combiner.Selected))
    np.testing.assert_array_equal(cj.attention(*inputs, ours), combiner.attention(*inputs, theirs))
    assert [x.pairs for x in ours.plan(L)] == [x.pairs for x in theirs.plan(L)]
    np.testing.assert_array_equal(cj.attention(*inputs, ours.sparse()), combiner.attention(*inputs, theirs.sparse()))
    empty = [x[:0] for x in inputs]
    assert cj.attention(*empty, cj.Selected(Fixed(4), regions[:0], block=BLOCK)).shape == (*empty[0].shape[:-1], 5)


def test_select_is_combiners(rng):
    """Concrete and under jit, with masks and given keys, and without heads."""
    query, key = arrays(rng)[:2]
    mask = rng.random((B, L)) < 0.7
    given = rng.standard_normal((B, HK, 14, 8), np.float32)
    for options in (
        {"is_causal": True},
        {"key_mask": mask, "score": "mean"},
        {"region_key": given, "causal_score": True, "scale": 0.1},
    ):
        expected = combiner.select(query, key, Fixed(4), 3, block=BLOCK, **options)
        call = functools.partial(cj.select, pattern=Fixed(4), k=3, block=BLOCK, **options)
        for wrap in (lambda f: f, jax.jit):
            regions = wrap(call)(query, key)
            assert regions.dtype == jnp.asarray(0).dtype
            np.testing.assert_array_equal(regions, expected)
    flat = query[0, 0], key[0, 0]
    np.testing.assert_array_equal(
        jax.jit(lambda *x: cj.select(*x, LogSparse(), 3))(*flat), combiner.select(*flat, LogSparse(), 3)
    )
    assert (jax.grad(lambda q: cj.select(q, key, Fixed(4), 3).astype(float).sum())(query) == 0).all()


def test_choosing_under_jit_grad_and_vmap(rng):
    *inputs, grad_out = arrays(rng)
    regions = combiner.select(*inputs[:2], Fixed(4), 2, block=BLOCK, is_causal=True)
    theirs = combiner.Selected(Fixed(4), regions, block=BLOCK)
    expected, _, gradients = with_gradients(inputs, theirs, grad_out, is_causal=True)
    out, pull_back = jax.vjp(jax.jit(choose), *inputs)
    np.testing.assert_array_equal(out, expected)
    for x, y in zip(pull_back(grad_out), gradients.values(), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(jax.vmap(choose)(*inputs), expected)
    each = jax.vmap(jax.grad(lambda q, k, v, g: jnp.sum(choose(q, k, v) * g), (0, 1, 2)))(*inputs, grad_out)
    for x, y in zip(each, gradients.values(), strict=True):
        np.testing.assert_array_equal(x, y)
    flat = [x[:, 0] for x in inputs]
    np.testing.assert_array_equal(jax.vmap(choose)(*flat), np.stack([choose(*(x[b] for x in flat)) for b in range(B)]))


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_vmap_of_regions(rng, dropout_p):
    """Mapped, or shared by the entries."""
    inputs, regions = [np.stack([x, x[::-1]]) for x in arrays(rng)[:3]], draw(rng, 14, (2, B, HK))

    def call(q, k, v, regions):
        pattern = cj.Selected(Fixed(4), regions, block=BLOCK)
        return cj.attention(q, k, v, pattern, is_causal=True, dropout_p=dropout_p, seed=3)

    for axes, each in (((0, 0, 0, 0), regions), ((0, 0, 0, None), [regions[0]] * 2)):
        expected = np.stack([call(*(x[n] for x in inputs), each[n]) for n in range(2)])
        given = regions if axes[3] == 0 else regions[0]
        np.testing.assert_array_equal(jax.vmap(call, axes)(*inputs, given), expected)


CU_SEQLENS = (0, 9, 9, 20, L)


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("base", (Fixed(4), HeavilyCompressed(4, 6), Tree(3), Routing(CLUSTERS)), ids=str)
def test_packed_sequences_are_combiners(rng, base, dropout_p):
    """`select`, then out and gradients with traced regions; under vmap; one list for all; both layouts."""
    *inputs, grad_out = arrays(rng)
    options = {"is_causal": not isinstance(base, Routing), "cu_seqlens": CU_SEQLENS}
    regions = combiner.select(*inputs[:2], base, 2, block=BLOCK, **options)
    ours = jax.jit(functools.partial(cj.select, pattern=base, k=2, block=BLOCK, **options))(*inputs[:2])
    np.testing.assert_array_equal(ours, regions)
    options |= {"dropout_p": dropout_p, "seed": 7}
    theirs = combiner.Selected(base, regions, block=BLOCK)
    expected, _, of_theirs = with_gradients(inputs, theirs, grad_out, **options)

    def call(q, k, v, regions, **layout):
        return cj.attention(q, k, v, cj.Selected(base, regions, block=BLOCK), **layout, **options)

    out, pull_back = jax.vjp(jax.jit(lambda *x: call(*x, ours)), *inputs)
    np.testing.assert_array_equal(out, expected)
    for x, y in zip(pull_back(grad_out), of_theirs.values(), strict=True):
        np.testing.assert_array_equal(x, y)
    turned = call(*(x.swapaxes(1, 2) for x in inputs), regions, layout="BLHD")
    np.testing.assert_array_equal(turned.swapaxes(1, 2), expected)
    one = combiner.attention(*inputs, combiner.Selected(base, [-1, 0], block=BLOCK), **options)
    np.testing.assert_array_equal(call(*inputs, np.array([-1, 0])), one)
    twice = [np.stack([x, x[::-1]]) for x in (*inputs, regions)]
    if not isinstance(base, Routing):  # which has clusters for each batch entry
        each = [call(*(x[n] for x in twice)) for n in range(2)]
        np.testing.assert_array_equal(jax.vmap(call)(*twice), np.stack(each))


def test_check_grads(rng):
    """Finite differences in float64, given the choice."""
    inputs, regions = [rng.standard_normal((2, 13, 3)) for _ in range(3)], rng.integers(-1, 4, (2, 3, 2))
    with jax.enable_x64(True):
        call = functools.partial(cj.attention, pattern=cj.Selected(Fixed(4, pooling="mean"), regions, block=5))
        check_grads(functools.partial(call, is_causal=True), inputs, 1, "rev", eps=1e-6, rtol=1e-6)


def test_stages_and_weights(rng):
    inputs, regions = arrays(rng)[:3], draw(rng, 14)
    pattern, theirs = (made(Fixed(4), regions, block=BLOCK) for made in (cj.Selected, combiner.Selected))
    summary = jax.jit(lambda *x: cj.summarize(*x, pattern, is_causal=True))(*inputs)
    expected = combiner.summarize(*inputs, theirs, is_causal=True)
    np.testing.assert_array_equal(summary.value, expected.value)
    out = cj.attend(*inputs, summary.key, summary.value, pattern, is_causal=True)
    np.testing.assert_array_equal(out, combiner.attend(*inputs, *expected[:2], theirs, is_causal=True))
    weights = cj.attention_weights(*inputs[:2], pattern, is_causal=True)
    np.testing.assert_allclose(weights @ inputs[2].repeat(2, 1), out, atol=1e-5)
    assert cj.workspace_bytes(*inputs, pattern, is_causal=True) > 0


def test_selections_that_are_refused(rng):
    inputs, regions = arrays(rng)[:3], draw(rng, 14)

    def refuses(error, match, pattern, **options):
        with pytest.raises(error, match=match):
            cj.attention(*inputs, pattern, **options)

    refuses(TypeError, "regions must be a jax.Array or a NumPy array of integers, got list", cj.Selected(Fixed(4), [1]))
    refuses(TypeError, "regions must be .*, got float64", cj.Selected(Fixed(4), regions.astype(float)))
    refuses(
        ValueError,
        r"regions must have shape \(k\) or \(1, k\) or \(2, 2, 1, k\) with blocks of 64 queries, got \(2, 2, 7, 3\)",
        cj.Selected(Fixed(4), regions),
    )
    refuses(ValueError, "pattern must have regions that queries share", cj.Selected(Axial(4), regions, block=BLOCK))
    refuses(ValueError, "open must be True where rest", cj.Selected(Fixed(4), regions, block=BLOCK, open=False))
    selected = cj.Selected(Fixed(4), regions, block=BLOCK)
    refuses(ValueError, r"shape \(k\) or \(8, k\) or \(2, 2, 8, k\) with blocks", selected, cu_seqlens=(0, 4, L))
    with pytest.raises(TypeError, match="cu_seqlens must be known when the function is traced, got a traced array"):
        jax.jit(lambda x: cj.select(*inputs[:2], Fixed(4), 2, cu_seqlens=x))(jnp.array([0, L]))
    routing = cj.Selected(Routing(CLUSTERS), regions, block=BLOCK)
    refuses(ValueError, "pattern must not be a Routing where is_causal is True", routing, is_causal=True)
    summary = cj.summarize(*inputs, Fixed(4))
    with pytest.raises(ValueError, match=r"offset must be None with combiner.jax.Selected, got 2"):
        cj.attend(inputs[0][..., :1, :], *inputs[1:], summary.key, summary.value, selected, offset=2)
    with pytest.raises(Exception, match="regions must lie between -1 and 13, got 20"):
        jax.block_until_ready(cj.attention(*inputs, cj.Selected(Fixed(4), regions * 0 + 20, block=BLOCK)))
    for name, value, error, says in (
        ("k", -1, ValueError, "k must be at least 0, got -1"),
        ("block", 0, ValueError, "block must be at least 1, got 0"),
        ("score", "sum", ValueError, "score must be one of 'max', 'mean', got 'sum'"),
        ("query", [1.0], TypeError, "query must be a jax.Array or a NumPy array, got list"),
    ):
        with pytest.raises(error, match=says):
            cj.select(**{"query": inputs[0], "key": inputs[1], "pattern": Fixed(4), "k": 2, name: value})


@fresh_process(timeout=240, XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu")
def test_divided_regions_are_not_gathered():
    """Devices that hold parts of the batch and of the heads make the plans of their own parts, and say nothing."""
    from test_jax_sharding import arrays as four_entries
    from test_jax_sharding import compiled, expected_of, make_mesh, place, with_gradients

    spec = jax.sharding.PartitionSpec("batch", "heads")
    inputs, regions = four_entries(), np.random.default_rng(0).integers(-1, 8, (4, 4, 4, 2))

    def attention(q, k, v, regions):
        return cj.attention(q, k, v, cj.Selected(Fixed(4), regions, block=BLOCK), is_causal=True)

    given = place(make_mesh(2, 2), [spec] * 5, [*inputs[:3], regions.astype(np.int32), inputs[3]])

    def call(q, k, v, regions, grad_out):
        return with_gradients(lambda q, k, v: attention(q, k, v, regions))(q, k, v, grad_out)

    program, said, specs = compiled(call, *given)
    assert not said and specs == [spec] * 4
    theirs = combiner.Selected(Fixed(4), regions, block=BLOCK)
    for x, y in zip(program(*given), expected_of(inputs, theirs, is_causal=True), strict=True):
        np.testing.assert_array_equal(x, y)
