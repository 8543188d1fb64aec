# SPDX-License-Identifier: Apache-2.0
"""Arrays of other libraries are read in place and answered in kind; threadpoolctl limits combiner's threads."""

import re
import types

import fresh
import numpy as np
import pytest

import combiner
from combiner import Dense, Fixed, Mixture, Routing

B, HQ, HK, L, D, DV, SPAN = 2, 4, 2, 24, 8, 5, 4


class Tensor:
    """An array of a library that has nothing but what the array API asks for."""

    def __init__(self, x: np.ndarray, device: int = 1):
        self.x, self.device_type = x, device

    device = property(lambda self: f"device {self.device_type}")
    dtype = property(lambda self: self.x.dtype)
    shape = property(lambda self: self.x.shape)

    def __array_namespace__(self, api_version=None):
        return library

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device_type, 0


library = types.SimpleNamespace(__name__="library", from_dlpack=lambda x: Tensor(np.from_dlpack(x)))


class Plain:
    name, dtypes, convert, kind = "plain", (np.float32, np.float64, np.float16), Tensor, Tensor

    @staticmethod
    def array(x: Tensor) -> np.ndarray:
        return x.x


class Torch:
    name = "torch"

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        self.bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
        self.dtypes, self.kind = (np.float32, np.float64, np.float16, self.bfloat16), self.torch.Tensor

    def convert(self, x: np.ndarray):
        if x.dtype == self.bfloat16:
            return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(x)

    def array(self, x) -> np.ndarray:
        if x.dtype == self.torch.bfloat16:
            return x.view(self.torch.int16).numpy().view(self.bfloat16)
        return x.numpy()


class Jax:
    name = "jax"

    def __init__(self):
        jax = pytest.importorskip("jax")
        self.convert, self.kind, self.array = jax.numpy.asarray, jax.Array, np.asarray
        self.dtypes = np.float32, np.float16, jax.numpy.bfloat16  # and no float64 unless it is told to


@pytest.fixture(params=[Plain, Torch, Jax], ids=lambda made: made.name)
def other(request):
    return request.param()


def inputs(rng, dtype=np.float32) -> dict[str, np.ndarray]:
    shapes = {"query": (B, HQ, L, D), "key": (B, HK, L, D), "value": (B, HK, L, DV)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def same(other, actual, expected) -> None:
    """Arrays of the library, and the bits that NumPy's arrays give."""
    if isinstance(expected, tuple):
        assert type(actual) is type(expected) and len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            same(other, a, b)
    elif isinstance(expected, np.ndarray):
        assert isinstance(actual, other.kind), type(actual)
        np.testing.assert_array_equal(other.array(actual), expected, strict=True)
    else:
        assert actual == expected


def calls(x: dict[str, np.ndarray], rng):
    """Every function, as (function, arrays, other arguments); all that is an array is of one library."""
    q, k, v = x.values()
    dtype = q.dtype
    mask = rng.random((B, L)) < 0.8
    regions = -(-L // SPAN)
    region_key = rng.standard_normal((B, HK, regions, D)).astype(dtype)
    region_value = rng.standard_normal((B, HQ, regions, DV)).astype(dtype)
    options = {"pattern": Fixed(SPAN), "is_causal": True}
    out, lse = combiner.attention(q, k, v, Fixed(), return_lse=True)
    yield combiner.attention, x | {"key_mask": mask, "region_key": region_key}, options | {"return_lse": True}
    yield combiner.attention, x, {"pattern": Mixture(Fixed(SPAN), Dense())}
    yield combiner.attention, x | {"cu_seqlens": np.array([0, 5, L])}, options
    yield combiner.workspace_bytes, x, options
    yield combiner.summarize, x, options
    yield combiner.attend, x | {"region_key": region_key, "region_value": region_value}, options | {"return_lse": True}
    yield combiner.merge, {"out_a": out, "lse_a": lse, "out_b": out[::-1].copy(), "lse_b": lse}, {}
    yield combiner.attention_weights, {"query": q, "key": k}, options


def test_every_function_answers_in_kind(other, rng):
    for dtype in other.dtypes:
        for function, arrays, options in calls(inputs(rng, dtype), rng):
            actual = function(**{name: other.convert(x) for name, x in arrays.items()}, **options)
            same(other, actual, function(**arrays, **options))


def test_gradients_answer_in_kind(other, rng):
    x = inputs(rng)
    regions = -(-L // SPAN)
    region_key = rng.standard_normal((B, HK, regions, D)).astype(np.float32)
    region_value = rng.standard_normal((B, HQ, regions, DV)).astype(np.float32)
    for forward, backward, extra in [
        (combiner.attention_forward, combiner.attention_backward, {}),
        (combiner.attend_forward, combiner.attend_backward, {"region_key": region_key, "region_value": region_value}),
    ]:
        given = x | extra
        expected, saved = forward(**given, pattern=Fixed(SPAN))
        grad_out, grad_lse = expected + 1, saved["lse"]
        out, other_saved = forward(**{name: other.convert(a) for name, a in given.items()}, pattern=Fixed(SPAN))
        same(other, out, expected)
        actual = backward(other.convert(grad_out), other_saved, grad_lse=other.convert(grad_lse))
        same(other, actual, backward(grad_out, saved, grad_lse=grad_lse))
    summary, saved = combiner.summarize_forward(**x, pattern=Fixed(SPAN))
    actual = combiner.summarize_backward(None, other.convert(summary.value), saved)
    same(other, actual, combiner.summarize_backward(None, summary.value, saved))


def test_decoder_and_clusters_answer_in_kind(other, rng):
    q, k, v = inputs(rng).values()
    sink = np.ones(HQ, np.float32)
    numpy, decoder = combiner.Decoder(Fixed(SPAN), sink=sink), combiner.Decoder(Fixed(SPAN), sink=other.convert(sink))
    for first, end, name in [(0, 9, "prefill"), (9, 10, "step"), (10, L, "step")]:
        parts = [np.ascontiguousarray(x[..., first:end, :]) for x in (q, k, v)]
        bias = np.ascontiguousarray(parts[1][..., 0])
        actual = getattr(decoder, name)(*map(other.convert, parts), key_bias=other.convert(bias))
        same(other, actual, getattr(numpy, name)(*parts, key_bias=bias))
    centroids = combiner.fit_centroids(k, 3)
    same(other, combiner.fit_centroids(other.convert(k), 3), centroids)
    clusters = combiner.assign_clusters(other.convert(k), other.convert(centroids))
    np.testing.assert_array_equal(other.array(clusters), combiner.assign_clusters(k, centroids))
    actual = combiner.attention(*map(other.convert, (q, k, v)), Routing(other.array(clusters)))
    same(other, actual, combiner.attention(q, k, v, Routing(combiner.assign_clusters(k, centroids))))


def test_memory_is_shared(rng):
    """Inputs in any layout, `out`, and results: nothing is copied on the way."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(rng.standard_normal((B, L, HQ, D)).astype(np.float32)).transpose(1, 2)
    seen = []

    class Spy:
        def plan(self, length, is_causal=False):
            seen.append(combiner.interchange._Library({"x": x}).take("x", x))
            return Fixed(SPAN).plan(length, is_causal)

    out = torch.zeros(B, HQ, L, D)
    assert combiner.attention(x, x, x, Spy(), out=out) is out
    assert seen[0].ctypes.data == x.data_ptr() and seen[0].strides == tuple(4 * s for s in x.stride())
    expected = combiner.attention(*(x.numpy(),) * 3, Fixed(SPAN))
    np.testing.assert_array_equal(out.numpy(), expected)
    array = np.zeros_like(expected)
    assert combiner.attention(x, x, x, Fixed(SPAN), out=array) is array
    np.testing.assert_array_equal(array, expected)
    assert combiner.attention(x, x, x, Mixture(Fixed(SPAN), Dense()), out=out) is out


def test_read_only_arrays(rng):
    """JAX's are: they serve as inputs, and as `out` they are refused."""
    jnp = pytest.importorskip("jax.numpy")
    x = jnp.asarray(rng.standard_normal((B, HQ, L, D)).astype(np.float32))
    before = np.array(x)
    expected = combiner.attention(before, before, before, Fixed(SPAN))
    np.testing.assert_array_equal(np.asarray(combiner.attention(x, x, x, Fixed(SPAN))), expected)
    with pytest.raises(ValueError, match="out must be writeable, got a read-only array"):
        combiner.attention(x, x, x, Fixed(SPAN), out=jnp.zeros_like(x))
    np.testing.assert_array_equal(np.asarray(x), before)


def test_empty_arrays(other):
    x = np.zeros((B, HQ, 0, D), np.float32)
    same(other, combiner.attention(*(other.convert(x),) * 3, Dense()), x)


def test_libraries_do_not_mix(rng):
    x = inputs(rng)
    tensors = {name: Tensor(a) for name, a in x.items()}
    for name in x:
        with pytest.raises(TypeError, match=r"must be .*, got .*(ndarray|Tensor)"):
            combiner.attention(**tensors | {name: x[name]}, pattern=Dense())
        with pytest.raises(TypeError, match=r"must be .*, got .*(ndarray|Tensor)"):
            combiner.attention(**x | {name: tensors[name]}, pattern=Dense())
    positional = [*list(x.values())[:2], tensors["value"], Dense()]
    with pytest.raises(TypeError, match=r"value must be .* NumPy array, got Tensor"):
        combiner.attention(*positional)
    with pytest.raises(TypeError, match=r"key must be an array of library like query, got numpy.ndarray"):
        combiner.attention(tensors["query"], x["key"], tensors["value"], Dense())
    with pytest.raises(TypeError, match=r"out must be .* NumPy array, got Tensor"):
        combiner.attention(*x.values(), Dense(), out=Tensor(x["query"][..., :DV].copy()))


def test_two_other_libraries_do_not_mix(rng):
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    x = rng.standard_normal((L, D)).astype(np.float32)
    with pytest.raises(TypeError, match=r"value must be an array of torch like query, got jaxlib.ArrayImpl"):
        combiner.attention(torch.from_numpy(x), torch.from_numpy(x), jnp.asarray(x), Dense())


def test_another_device_is_named(rng):
    x = inputs(rng)
    tensors = {name: Tensor(a) for name, a in x.items()} | {"key": Tensor(x["key"], device=2)}
    with pytest.raises(ValueError, match=r"key must be on the CPU, got test_interchange.Tensor on device 2"):
        combiner.attention(**tensors, pattern=Dense())
    torch = pytest.importorskip("torch")
    meta = torch.empty(L, D, device="meta")
    with pytest.raises(TypeError, match=r"query must be an array that DLPack can share .* got torch.Tensor: .*meta"):
        combiner.attention(meta, meta, meta, Dense())


def test_what_wants_gradients_or_tracing_is_sent_to_the_adapters(rng):
    torch = pytest.importorskip("torch")
    x = torch.zeros(L, D)
    with pytest.raises(TypeError, match=r"key must be .* \(combiner.torch .* got torch.Parameter: .* require gradient"):
        combiner.attention(x, torch.nn.Parameter(x), x, Dense())
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"query must be .*combiner.jax .* got jax.\w*Tracer"):
        jax.jit(lambda x: combiner.attention(x, x, x, Dense()))(jax.numpy.zeros((L, D)))


def test_errors_stay_what_they_are(other, rng):
    """Kinds and shapes are refused as they are with NumPy's arrays."""
    x = {name: other.convert(a) for name, a in inputs(rng).items()}
    with pytest.raises(ValueError, match="key must have shape"):
        combiner.attention(**x | {"key": other.convert(np.zeros((B, HK, L, D + 1), np.float32))}, pattern=Dense())
    with pytest.raises(TypeError, match=r"query must be .* NumPy array, got int32"):
        combiner.attention(**x | {"query": other.convert(np.zeros((B, HQ, L, D), np.int32))}, pattern=Dense())
    with pytest.raises(TypeError, match=r"key must be .* NumPy array, got list"):
        combiner.attention(x["query"], [0.0], x["value"], Dense())
    with pytest.raises(TypeError, match="missing a required argument: 'value'"):
        combiner.attention(x["query"], x["key"])


def test_combiner_imports_no_library():
    code = "import sys, combiner; print({'torch', 'jax', 'threadpoolctl', 'ml_dtypes'} & set(sys.modules))"
    done = fresh.run_python(code)
    assert done.stdout == "set()\n", done.stderr


LIMIT = """
with threadpoolctl.threadpool_limits(1):
    print(combiner.get_num_threads())
print(combiner.get_num_threads())
with threadpoolctl.threadpool_limits(1, user_api="combiner"), threadpoolctl.threadpool_limits(2, user_api="blas"):
    print(combiner.get_num_threads())
[info] = [each for each in threadpoolctl.threadpool_info() if each["internal_api"] == "combiner"]
print(info["num_threads"], info["version"] == combiner.__version__, info["filepath"])
"""


@pytest.mark.parametrize(
    "imports",
    ["import threadpoolctl, combiner", "import combiner, threadpoolctl, combiner.threadpoolctl"],
    ids=["threadpoolctl first", "combiner first"],
)
def test_threadpoolctl_limits_combiner(imports):
    pytest.importorskip("threadpoolctl")
    done = fresh.run_python(imports + LIMIT, COMBINER_NUM_THREADS="3")
    assert re.fullmatch(r"1\n3\n1\n3 True .*_core.*\n", done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize("error", [KeyError, IndexError, OSError, ZeroDivisionError, NotImplementedError])
@pytest.mark.parametrize("method", ["__dlpack__", "__dlpack_device__"])
def test_whatever_another_librarys_array_raises_names_the_argument(error, method):
    """KeyError and IndexError came out raw."""

    def fail(self, **options):
        raise error("inside")

    x = np.ones((2, 8, 4), np.float32)
    good, bad = Tensor(x), type("Bad", (Tensor,), {method: fail})(x)
    with pytest.raises(TypeError, match=r"key must be an array that DLPack can share .*inside"):
        combiner.attention(good, bad, good, Dense())


def test_a_library_without_from_dlpack_is_named():
    lone = type("Lone", (), {"__dlpack__": None, "__module__": "nowhere"})()
    with pytest.raises(TypeError, match="query must be an array of NumPy or of a library with a function from_dlpack"):
        combiner.attention(lone, lone, lone, Dense())
