# SPDX-License-Identifier: Apache-2.0
"""combiner.jax: wrong arguments, and custom calls that something is wrong with."""

import functools
import os
import re

import numpy as np
import pytest
from fresh import fresh_process, run_python

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax_problems import CLUSTERS, DV, L, arrays, with_gradients  # noqa: E402

import combiner  # noqa: E402
import combiner.jax as cj  # noqa: E402
from combiner import Fixed, Mixture, Routing  # noqa: E402
from combiner.jax import custom_call, evaluate, plans  # noqa: E402
from combiner.jax.call import NUMBERS  # noqa: E402


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# ---- errors --------------------------------------------------------------------------------------


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
        (TypeError, r"key_mask must be bool, a jax\.Array .*, got float32", {"key_mask": mask.astype(np.float32)}),
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
        (TypeError, r"attention\(\) has no 'causal': is_causal=True is causality", {"causal": True}),
        (ValueError, "layout must be one of 'BHLD', 'BLHD', got 'BSHD'", {"layout": "BSHD"}),
        (
            ValueError,
            re.escape(
                "value must have shape (2, 3, 16, Dv), got (1, 3, 16, 4), with heads before positions, as layout='BHLD'"
            ),
            {**{name: x.swapaxes(1, 2) for name in ("query", "key")}, "value": x[:1].swapaxes(1, 2), "layout": "BLHD"},
        ),
        *(
            (
                TypeError,
                f"{name} must be known when the function is traced, got a traced array: .",
                {**given, "traced": name},
            )
            for name, given in traced
        ),
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


def test_traced_clusters_are_named(rng):
    q, k, v, _ = arrays(rng)
    with pytest.raises(TypeError, match=r"clusters must be .* got DynamicJaxprTracer"):
        jax.jit(lambda clusters: cj.attention(q, k, v, Routing(clusters)))(CLUSTERS)


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
    monkeypatch.setattr(evaluate, "number_of", lambda plan: 12345)
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


def test_exported_functions_run(rng):
    """jax.export asks to be told that the calls are no part of its guarantees."""
    export = pytest.importorskip("jax.export")
    x = arrays(rng)[1]
    call = jax.jit(lambda x: jax.grad(lambda x: cj.attention(x, x, x, Fixed(4)).sum())(x))
    checks = [export.DisabledSafetyCheck.custom_call(f"combiner_{name}") for name in ("forward", "backward")]
    np.testing.assert_array_equal(export.export(call, disabled_checks=checks)(x).call(x), call(x))


def test_foreign_custom_call_is_an_error():
    custom_call.register()
    x = jnp.zeros((1, 1, 4, 2))
    call = jax.ffi.ffi_call("combiner_forward", jax.ShapeDtypeStruct(x.shape, x.dtype))
    for attributes in ({}, {"arrays": np.array([0, 99])}, {"arrays": np.array([0, 10]), "scale": np.float64(1)}):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"cannot read [a-z ,_]+ of the custom call"):
            call(x, **attributes)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("key_mask", jnp.ones((1, 15), bool)),
        ("key_mask", jnp.ones((1, 16), np.int32)),
        ("seed", jnp.zeros(3, np.uint32)),
        ("seed", jnp.zeros(4, np.float32)),
        ("selected", jnp.zeros((1, 1, 3, 1), np.int32)),
        ("selected", jnp.zeros((1, 1, 2, 1), np.uint32)),
        ("components", 2),
    ],
)
def test_foreign_custom_call_with_a_short_mask_or_seed_is_an_error(name, given):
    custom_call.register()
    x = jnp.zeros((1, 1, 16, 2))
    arrays = {"query": x, "key": x, "value": x, "key_mask": jnp.ones((1, 16), bool), "seed": jnp.zeros(4, np.uint32)}
    attributes = {"stages": 3, "batch": 1, "heads_last": 0, "scale": 1.0, "softcap": 0.0, "dropout_p": 0.5}
    arrays["selected"] = jnp.zeros((1, 1, 2, 1), np.int32)
    attributes |= {"components": 1, "offset": -1, "selection": np.array([8, 1, 1])}
    attributes |= {"plans": (plans.number_of(Fixed(4).plan(16)),), "segments": np.zeros(0, np.int64)}

    def call(arrays, attributes):
        names = (*arrays, "out", "lse")
        results = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape[:-1], x.dtype)
        given = {"arrays": np.array([NUMBERS[each] for each in names], np.int64)}
        for each, number in attributes.items():
            given[each] = np.float64(number) if isinstance(number, float) else np.asarray(number, np.int64)[()]
        return jax.ffi.ffi_call("combiner_forward", results)(*arrays.values(), **given)

    jax.block_until_ready(call(arrays, attributes))
    (arrays if name in arrays else attributes)[name] = given
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{name} does not fit the query and the plan"):
        jax.block_until_ready(call(arrays, attributes))


def test_another_plan_is_an_error(rng, monkeypatch):
    """One of other sizes than the function was compiled for."""
    inputs = arrays(rng)[:3]
    for other, message in (
        (Fixed().plan(L + 1), "plan must be of length 53, got 54"),
        (Fixed(2).plan(L), "does not fit"),
    ):
        number = plans.number_of(other)
        monkeypatch.setattr(evaluate, "number_of", lambda plan, number=number: number)
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


# ---- custom calls --------------------------------------------------------------------------------


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
    own = x.size + 2 * 4 * 64 * 2 + 2 * 4 * 8 * (8 + 2)  # out, softmax, summary_value and summary_softmax
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


def test_refused_custom_calls_are_an_error(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("of another version")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    with pytest.raises(RuntimeError, match=r"JAX [0-9.]+ refuses combiner's custom calls: of another version"):
        custom_call.register.__wrapped__()
