# SPDX-License-Identifier: Apache-2.0
"""combiner.jax of arrays that are divided over a mesh of devices: what XLA compiles, and the numbers of the whole."""

import functools
import re

import numpy as np
import pytest
from fresh import fresh_process

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

import combiner  # noqa: E402
import combiner.jax as cj  # noqa: E402
from combiner import Axial, Dense, Fixed, Mixture, Routing  # noqa: E402

four_devices = fresh_process(timeout=240, XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu")
L, D, DV = 29, 8, 6
COMMUNICATION = (
    r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\("
)


def make_mesh(*shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("batch", "heads")[: len(shape)], axis_types=(kind,) * len(shape))


def arrays(batch=4, heads=8, key_heads=4, dtype=np.float32):
    """query, key, value and a cotangent of out."""
    rng = np.random.default_rng(0)
    shapes = (batch, heads, L, D), (batch, key_heads, L, D), (batch, key_heads, L, DV), (batch, heads, L, DV)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def place(mesh, specs, inputs):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(inputs, specs, strict=True)]


def with_gradients(function):
    """(out, gradients of query, key, value and more) of inputs and a cotangent, the last."""

    def call(*inputs):
        out, pull_back = jax.vjp(function, *inputs[:-1])
        return out, *pull_back(inputs[-1])

    return call


def compiled(function, *given):
    """The compiled function, the names of what its devices say to each other, and the specs of its results."""
    program = jax.jit(function).lower(*given).compile()
    specs = [sharding.spec for sharding in jax.tree.leaves(program.output_shardings)]
    return program, re.findall(COMMUNICATION, program.as_text()), specs


def assert_close(results, expected, dtype=np.float32):
    for x, y in zip(results, expected, strict=True):
        tolerance = 30 * float(jnp.finfo(dtype).eps) * max(1, np.abs(np.asarray(y, np.float32)).max())
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=0, atol=tolerance)


def expected_of(inputs, pattern, **options):
    out, saved = combiner.attention_forward(*inputs[:3], pattern, **options)
    return out, *(x for x in combiner.attention_backward(inputs[3], saved) if x is not None)


@four_devices
def test_sharded_batch_and_heads_are_not_gathered():
    """Forward and backward say nothing to each other, results are divided as the inputs are, and have the same bits."""
    rng = np.random.default_rng(1)
    mask = rng.random((4, L)) < 0.7
    dropout = {"dropout_p": 0.4, "seed": 2**63 + 5}
    cases = (
        (Fixed(4), {"is_causal": True}),
        (Fixed(4), {"key_mask": mask, **dropout}),
        (Fixed(4), {"cu_seqlens": (0, 11, 11, L), **dropout}),
        (Axial(5, "rowmajor", "weighted"), {"is_causal": True}),
        (Mixture(Fixed(4), Dense()), {"is_causal": True, **dropout}),
    )
    inputs = arrays()
    for shape, spec in (((4,), ("batch",)), ((2, 2), (("batch", "heads"),)), ((2, 2), ("batch", "heads"))):
        mesh, spec = make_mesh(*shape), PartitionSpec(*spec)
        for pattern, options in cases:
            call = with_gradients(functools.partial(cj.attention, pattern=pattern, **options))
            given = place(mesh, [spec] * 4, inputs)
            program, said, specs = compiled(call, *given)
            assert not said and specs == [spec] * 4
            for x, y in zip(program(*given), expected_of(inputs, pattern, **options), strict=True):
                if isinstance(pattern, Mixture):  # XLA may round its mean otherwise
                    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
                else:
                    np.testing.assert_array_equal(x, y)


@four_devices
def test_sharded_regions_masks_and_both_stages():
    """Every array that may be given, all divided; and the two stages in turn."""
    rng = np.random.default_rng(1)
    mesh, spec = make_mesh(2, 2), PartitionSpec("batch", "heads")
    *inputs, grad_out = arrays()
    R = combiner.summarize(*inputs, Fixed(4)).value.shape[-2]
    more = [rng.standard_normal((4, heads, R, D), dtype=np.float32) for heads in (8, 4)]
    mask = rng.random((4, L)) < 0.7

    def attention(q, k, v, region_query, region_key, key_mask=mask):
        return cj.attention(q, k, v, Fixed(4), key_mask=key_mask, region_query=region_query, region_key=region_key)

    given = place(mesh, [spec] * 6, [*inputs, *more, grad_out])
    [divided_mask] = place(mesh, [PartitionSpec("batch")], [mask])
    program, said, specs = compiled(
        lambda mask, *given: with_gradients(functools.partial(attention, key_mask=mask))(*given), divided_mask, *given
    )
    assert not said and specs == [spec] * 6
    options = {"key_mask": mask, "region_query": more[0], "region_key": more[1]}
    for x, y in zip(program(divided_mask, *given), expected_of([*inputs, grad_out], Fixed(4), **options), strict=True):
        np.testing.assert_array_equal(x, y)

    def staged(q, k, v):
        summary = cj.summarize(q, k, v, Fixed(4), is_causal=True)
        return cj.attend(q, k, v, summary.key, summary.value, Fixed(4), is_causal=True)

    given = given[:3] + given[5:]
    program, said, specs = compiled(with_gradients(staged), *given)
    assert not said and specs == [spec] * 4
    assert_close(program(*given), expected_of([*inputs, grad_out], Fixed(4), is_causal=True))


@four_devices
def test_sharded_query_heads_of_one_key_head():
    """Each device has some queries of the one key head, whose gradients are summed."""
    mesh, spec = make_mesh(2, 2), PartitionSpec("batch", "heads")
    options = {"is_causal": True, "dropout_p": 0.3, "seed": 7}
    for pattern in (Fixed(4), Axial(5, "rowmajor", "weighted")):
        inputs = arrays(key_heads=1)
        by_batch = PartitionSpec("batch")
        given = place(mesh, [spec, by_batch, by_batch, spec], inputs)
        call = with_gradients(functools.partial(cj.attention, pattern=pattern, **options))
        program, said, specs = compiled(call, *given)
        assert set(said) == {"all-reduce"} and specs == [spec, spec, by_batch, by_batch]
        assert_close(program(*given), expected_of(inputs, pattern, **options))


@pytest.mark.parametrize("kind", ("Auto", "Explicit"))
@four_devices
def test_sharded_otherwise_is_right(kind):
    """Positions and features, heads that the devices do not divide, arrays that are divided in different ways, and
    plans of each batch entry and head: some of it is gathered, and the numbers are the same."""
    kind = getattr(AxisType, kind)
    P = PartitionSpec
    rng = np.random.default_rng(1)
    own_plans = Routing(rng.integers(0, 5, (4, 2, L)))
    cases = (
        ((2, 2), 2, [P(None, ("batch", "heads")), P(None, "batch"), P(None, "batch")], Fixed(4)),
        ((4,), 2, [P(None, "batch"), P(), P()], Fixed(4)),
        ((4,), 4, [P(), P(None, "batch"), P(None, "batch")], Fixed(4)),
        ((2, 2), 4, [P("batch"), P(None, "heads"), P(None, "batch")], Fixed(4)),
        ((2, 2), 4, [P(None, None, None, "batch"), P(None, None, None, "batch"), P("heads")], Fixed(4)),
        ((2, 2), 2, [P("batch", "heads")] * 3, own_plans),
    )
    for shape, key_heads, specs, pattern in cases:
        mesh, inputs = make_mesh(*shape, kind=kind), arrays(key_heads=key_heads)
        options = {"dropout_p": 0.3, "seed": 7}
        given = place(mesh, specs, inputs[:3])

        def loss(*given, pattern=pattern, options=options, grad_out=inputs[3]):
            return jnp.sum(cj.attention(*given, pattern, **options) * grad_out)

        with jax.set_mesh(mesh):
            value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*given)
        out, *expected = expected_of(inputs, pattern, **options)
        np.testing.assert_allclose(value, np.sum(out * inputs[3]), rtol=1e-4)
        assert_close(gradients, expected)


@four_devices
def test_sharded_leading_axes_with_dropout():
    """A part knows its batch entries by the first axis: the others are gathered, and the numbers are the same."""
    mesh = make_mesh(2, 2)
    inputs = [x.reshape(2, 2, *x.shape[1:]) for x in arrays()]
    options = {"dropout_p": 0.3, "seed": 7}
    call = with_gradients(functools.partial(cj.attention, pattern=Fixed(4), **options))
    for spec, is_silent in ((("batch", None, "heads"), True), (("batch", "heads"), False)):
        given = place(mesh, [PartitionSpec(*spec)] * 4, inputs)
        program, said, _ = compiled(call, *given)
        assert is_silent == (not said)
        for x, y in zip(program(*given), expected_of(inputs, Fixed(4), **options), strict=True):
            np.testing.assert_array_equal(x, y)


@four_devices
def test_explicit_axes_are_in_the_types():
    mesh, spec = make_mesh(2, 2, kind=AxisType.Explicit), PartitionSpec("batch", "heads", None, None)
    given = place(mesh, [spec] * 4, arrays())

    def call(*inputs):
        out, lse = cj.attention(*inputs[:3], Fixed(4), return_lse=True)
        assert jax.typeof(out).sharding.spec == spec
        assert jax.typeof(lse).sharding.spec == PartitionSpec("batch", "heads", None)
        return with_gradients(functools.partial(cj.attention, pattern=Fixed(4)))(*inputs)

    _, said, specs = compiled(call, *given)
    assert not said and specs == [spec] * 4


@four_devices
def test_sharded_under_transformations():
    """vmap over the divided axis and over another, with a seed each; layers in a scan, computed again in backward;
    shard_map over one of two axes; calls that jit does not wrap; Flax's order of axes."""
    mesh, spec = make_mesh(2, 2), PartitionSpec("batch", "heads")
    inputs = arrays()
    given = place(mesh, [spec] * 4, inputs)
    call = functools.partial(cj.attention, pattern=Fixed(4), is_causal=True)
    expected = expected_of(inputs, Fixed(4), is_causal=True)

    program, said, specs = compiled(with_gradients(jax.vmap(call)), *given)
    assert not said and specs == [spec] * 4
    assert_close(program(*given), expected)
    program, said, _ = compiled(with_gradients(jax.vmap(call, 1, 1)), *(x[:, :4] for x in given))
    assert not said
    assert_close(program(*(x[:, :4] for x in given)), expected_of([x[:, :4] for x in inputs], Fixed(4), is_causal=True))

    def drop(q, k, v, seed):
        return cj.attention(q, k, v, Fixed(4), dropout_p=0.4, seed=seed)

    seeds = np.arange(4, dtype=np.uint32)
    program, said, _ = compiled(jax.vmap(drop), *given[:3], seeds)
    assert not said
    for n, x in enumerate(program(*given[:3], seeds)):
        each = (y[n] for y in inputs[:3])
        np.testing.assert_array_equal(x, combiner.attention(*each, Fixed(4), dropout_p=0.4, seed=n))

    weights = np.random.default_rng(2).standard_normal((3, D, D), dtype=np.float32)

    def loss(weights, x):
        def layer(x, weight):
            return x + call(x @ weight, x, x), None

        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer), x, weights)[0]))

    program, said, _ = compiled(jax.grad(loss), weights, given[0])
    assert set(said) <= {"all-reduce"}  # of the weights' gradients
    np.testing.assert_allclose(program(weights, given[0]), jax.grad(loss)(weights, inputs[0]), rtol=1e-3, atol=1e-3)

    by_batch = PartitionSpec("batch")
    for names, check_vma in ((("batch",), True), (("batch",), False), (("batch", "heads"), True)):
        shared = jax.shard_map(
            call, mesh=mesh, in_specs=by_batch, out_specs=by_batch, axis_names=set(names), check_vma=check_vma
        )
        assert_close(jax.jit(with_gradients(shared))(*given), expected)

    out, *gradients = with_gradients(call)(*given)
    assert [x.sharding.spec for x in (out, *gradients)] == [spec] * 4
    assert_close((out, *gradients), expected)

    last = PartitionSpec("batch", None, "heads")
    swapped = place(mesh, [last] * 4, [x.swapaxes(1, 2) for x in inputs])
    program, said, specs = compiled(with_gradients(cj.attention_fn(Fixed(4), is_causal=True)), *swapped)
    assert not said and specs == [last] * 4
    assert_close((np.asarray(x).swapaxes(1, 2) for x in program(*swapped)), expected)


@four_devices
def test_sharded_by_the_older_partitioner():
    """GSPMD, which Shardy has replaced."""
    jax.config.update("jax_use_shardy_partitioner", False)
    mesh, spec = make_mesh(2, 2), PartitionSpec("batch", "heads")
    inputs = arrays()
    given = place(mesh, [spec] * 4, inputs)
    call = with_gradients(functools.partial(cj.attention, pattern=Fixed(4), dropout_p=0.3, seed=7))
    program, said, specs = compiled(call, *given)
    assert not said and specs == [spec] * 4
    assert_close(program(*given), expected_of(inputs, Fixed(4), dropout_p=0.3, seed=7))


@four_devices
def test_sharded_16_bits():
    mesh, spec = make_mesh(2, 2), PartitionSpec("batch", "heads")
    inputs = arrays(dtype=jnp.bfloat16)
    given = place(mesh, [spec] * 4, inputs)
    program, said, _ = compiled(with_gradients(functools.partial(cj.attention, pattern=Fixed(4))), *given)
    assert not said
    for x, y in zip(program(*given), expected_of(inputs, Fixed(4)), strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)
