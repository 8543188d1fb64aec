# SPDX-License-Identifier: Apache-2.0
"""The PyTorch adapter: the library's own bits, and its errors."""

import gc
import weakref

import numpy as np
import pytest
from fresh import run_file

torch = pytest.importorskip("torch")

from torch_problems import CLUSTERS, PATTERNS, L, compiled, every_pattern, problem, same, tensors  # noqa: E402

import combiner  # noqa: E402
import combiner.torch as ct  # noqa: E402
from combiner import (  # noqa: E402
    Axial,
    Fixed,
    LogSparse,
    Mixture,
    Plan,
    Tree,
)
from combiner.problem import make_problem  # noqa: E402
from combiner.torch import pattern_text  # noqa: E402
from combiner.torch.tensors import as_array  # noqa: E402


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def as_numpy(pattern):
    """The pattern as `combiner.attention` takes it."""
    if isinstance(pattern, ct.Selected):
        return combiner.Selected(pattern.pattern, pattern.regions.numpy(), block=pattern.block)
    if not isinstance(pattern, ct.Routing):
        return pattern
    return combiner.Routing(pattern.clusters.numpy(), pooling=pattern.pooling, size_bias=pattern.size_bias)


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@every_pattern
def test_the_librarys_bits(pattern, dropout_p):
    inputs, options = problem(pattern, dropout_p=dropout_p, seed=2**63 + 5)
    given = [x.detach().numpy() for x in inputs]
    numpy_options = {**options, "key_mask": options["key_mask"].numpy()}
    out, saved = combiner.attention_forward(*given, as_numpy(pattern), **numpy_options)
    grad_out = torch.randn(out.shape, dtype=torch.float64)
    expected = combiner.attention_backward(grad_out.numpy(), saved)
    actual = ct.attention(*inputs, pattern, **options)
    assert np.array_equal(actual.detach().numpy(), out)
    gradients = torch.autograd.grad(actual, inputs, grad_out)
    for x, y in zip(gradients, expected, strict=False):
        assert np.array_equal(x.numpy(), y)


@pytest.mark.parametrize("pattern", (Fixed(8), Mixture(Fixed(4), LogSparse()), PATTERNS[4]), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_dtypes(pattern, dtype):
    """The library's bits in each; lse, where there is one, is float32."""
    if dtype == torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    has_lse = not isinstance(pattern, Mixture)
    inputs = tensors((2, 4, L, 6), (2, 2, L, 6), (2, 2, L, 5), dtype=dtype)
    out, saved = combiner.attention_forward(*map(as_array, inputs), pattern, is_causal=True)
    actual = ct.attention(*inputs, pattern, is_causal=True, return_lse=has_lse)
    actual, lse = actual if has_lse else (actual, None)
    assert actual.dtype == dtype
    assert np.array_equal(as_array(actual), out)
    assert lse is None or (lse.dtype == torch.float32 and np.array_equal(as_array(lse), saved["lse"]))
    g = torch.randn_like(actual)
    expected = combiner.attention_backward(as_array(g), saved)
    for x, y in zip(torch.autograd.grad(actual, inputs, g), expected, strict=False):
        assert x.dtype == dtype
        assert np.array_equal(as_array(x), y)


def test_autocast():
    """As PyTorch's own attention: all but float64 is cast, and gradients come back as the inputs are."""
    pytest.importorskip("ml_dtypes")
    q, k, v = tensors((2, L, 4), (2, L, 4), (2, L, 4), dtype=torch.float32)
    mixed, double = (q, k, v.detach().bfloat16()), (q.double(), k.double(), v.double())

    def f(q, k, v):
        return ct.attention(q, k, v, Fixed(8))

    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            out, other = f(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v)
            assert out.dtype == other.dtype == dtype
            assert torch.equal(torch.compile(f, **compiled)(q, k, v), out)
            assert f(*mixed).dtype == dtype
            assert f(*double).dtype == torch.float64
        assert torch.equal(out, f(*(x.to(dtype) for x in (q, k, v))))
        assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.float().sum(), (q, k, v)))
    with pytest.raises(TypeError, match=r"value must be torch.float32 like query, got torch.bfloat16"):
        f(*mixed)


@pytest.mark.parametrize(
    "pattern", (Fixed(8), Mixture(Fixed(8), LogSparse()), Axial(6, "rowmajor", "weighted")), ids=str
)
def test_given_regions_and_packed_sequences(pattern):
    cu_seqlens = [0, 20, 20, L]
    components = pattern.patterns if isinstance(pattern, Mixture) else (pattern,)
    R = sum(each.plan(n).region_count for each in components for n in np.diff(cu_seqlens).tolist())
    inputs = tensors((3, L, 6), (3, L, 6), (3, L, 5), (3, R, 6), (3, R, 6))
    *given, region_query, region_key = (x.detach().numpy() for x in inputs)
    out, saved = combiner.attention_forward(
        *given, pattern, cu_seqlens=cu_seqlens, region_query=region_query, region_key=region_key
    )
    grad_out = torch.randn(out.shape, dtype=torch.float64)
    expected = combiner.attention_backward(grad_out.numpy(), saved)
    for form in (cu_seqlens, torch.tensor(cu_seqlens, dtype=torch.int32)):
        q, k, v, rq, rk = inputs
        actual = ct.attention(q, k, v, pattern, cu_seqlens=form, region_query=rq, region_key=rk)
        assert np.array_equal(actual.detach().numpy(), out)
        for x, y in zip(torch.autograd.grad(actual, inputs, grad_out), expected[:5], strict=True):
            assert np.array_equal(x.numpy(), y)


@pytest.mark.parametrize("pattern", (Fixed(4), Axial(3, "rowmajor", "weighted"), Mixture(Fixed(4), Tree(2))), ids=str)
def test_gradcheck(pattern):
    """Against finite differences, with lse where there is one."""
    has_lse = not isinstance(pattern, Mixture)
    inputs = tensors((2, 11, 3), (1, 11, 3), (1, 11, 2))
    torch.autograd.gradcheck(
        lambda q, k, v: ct.attention(q, k, v, pattern, is_causal=True, return_lse=has_lse, scale=0.7), inputs
    )


def test_gradcheck_of_given_regions():
    inputs = tensors((2, 8, 3), (1, 8, 3), (1, 8, 2), (2, 4, 3), (1, 4, 3))

    def f(q, k, v, region_query, region_key):
        return ct.attention(q, k, v, Fixed(2), region_query=region_query, region_key=region_key, return_lse=True)[1:]

    torch.autograd.gradcheck(f, inputs)


def test_views_are_read_where_they_are(monkeypatch):
    """And results are handed over as they were made."""
    seen = []

    class Spy:
        def __init__(self, *given, **terms):
            self.problem = make_problem(*given, **terms)

        def forward(self, *options):
            seen.append((self.problem, self.problem.forward(*options)))
            return seen[-1][1]

        def __getattr__(self, name):
            return getattr(self.problem, name)

    monkeypatch.setattr(combiner.torch.ops, "make_problem", Spy)
    packed = torch.randn(2, L, 3, 4, 8, requires_grad=True)  # [B, L, 3, H, D]
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    out, lse = ct.attention(q, k, v[:, :1].expand(-1, 4, -1, -1), Fixed(8), return_lse=True)
    used, results = seen[0]
    query, key, value = used.query, used.key, used.value
    for array, tensor in zip((query, key, value, *results[:2]), (q, k, v, out, lse), strict=True):
        assert array.ctypes.data == tensor.data_ptr()
    assert query.strides == tuple(4 * n for n in q.stride())
    assert value.strides[1] == 0
    out.sum().backward()
    assert packed.grad.isfinite().all()


def test_dropout():
    (q, k, v), options = problem(Fixed(8), dropout_p=0.4)

    def draw(seed):
        torch.manual_seed(seed)
        return ct.attention(q, k, v, Fixed(8), **options)

    out = draw(3)
    assert torch.equal(out, draw(3))
    assert not torch.equal(out, draw(4))
    torch.manual_seed(3)
    first, second = (ct.attention(q, k, v, Fixed(8), **options) for _ in range(2))
    assert not torch.equal(first, second)
    # out = W v, so sum(out * g) = sum(v * dv) if and only if backward has forward's W
    g = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, g)
    torch.testing.assert_close((out * g).sum(), (v * dv).sum(), rtol=1e-12, atol=0)


def test_without_dropout_nothing_is_drawn():
    (q, k, v), options = problem(Fixed(8))
    before = torch.get_rng_state()
    ct.attention(q, k, v, Fixed(8), **options)
    assert torch.equal(before, torch.get_rng_state())


def test_checkpointed_dropout():
    """What is computed again has the seed that it had."""
    inputs, options = problem(Fixed(8), dropout_p=0.4)

    def f(q, k, v):
        return ct.attention(q, k, v, Fixed(8), **options).square()

    torch.manual_seed(3)
    expected = torch.autograd.grad(f(*inputs).sum(), inputs)
    torch.manual_seed(3)
    out = torch.utils.checkpoint.checkpoint(f, *inputs, use_reentrant=False)
    assert same(torch.autograd.grad(out.sum(), inputs), expected)


def test_a_plan_for_each_head():
    inputs = tensors((2, 4, L, 6), (2, 2, L, 6), (2, 2, L, 5))
    plans = tuple(Fixed(span).plan(L, True) for span in (4, 5, 6, 7))

    def f(q, k, v):
        return ct.attention(q, k, v, plans)

    out = f(*inputs)
    assert np.array_equal(out.detach(), combiner.attention(*(x.detach().numpy() for x in inputs), plans))
    actual, g = torch.compile(f, **compiled)(*inputs), torch.randn_like(out)
    assert torch.equal(actual, out)
    assert same(torch.autograd.grad(actual, inputs, g), torch.autograd.grad(out, inputs, g))


def test_deterministic_algorithms():
    inputs, options = problem(Fixed(8))

    def run():
        out = ct.attention(*inputs, Fixed(8), **options)
        return out, *torch.autograd.grad(out.sum(), inputs)

    expected = run()
    torch.use_deterministic_algorithms(True)
    try:
        assert same(expected, run())
    finally:
        torch.use_deterministic_algorithms(False)


def test_patterns_do_not_outlive_their_use():
    q, k, v = tensors((L, 6), (L, 6), (L, 6))
    kept = len(pattern_text._numbers)
    plan = Fixed(5).plan(L, True)
    plan = Plan.from_arrays(**plan.arrays, length=L, regions=plan.region_count, is_causal=True)  # not cached
    alive = weakref.ref(plan)
    out = ct.attention(q, k, v, plan)
    del plan
    assert alive() is not None, "backward needs it"
    expected = torch.autograd.grad(ct.attention(q, k, v, Fixed(5), is_causal=True).sum(), q)
    assert same(torch.autograd.grad(out.sum(), q), expected)
    del out
    gc.collect()
    assert alive() is None
    assert len(pattern_text._numbers) == kept


@pytest.mark.parametrize("pattern", (Fixed(8), Mixture(Fixed(8), LogSparse())), ids=("one", "mixture"))
def test_heads_after_positions(pattern):
    """layout="BLHD" is of transposed tensors in all but lse, and copies none."""
    inputs, options = problem(pattern)
    has_lse = not isinstance(pattern, Mixture)
    swapped = [x.transpose(1, 2).contiguous().detach().requires_grad_() for x in inputs]
    expected = ct.attention(*inputs, pattern, return_lse=has_lse, **options)
    actual = ct.attention(*swapped, pattern, return_lse=has_lse, layout="BLHD", **options)
    if has_lse:
        (expected, lse), (actual, of_swapped) = expected, actual
        assert torch.equal(of_swapped, lse)
        stages = ct.summarize(*swapped, pattern, layout="BLHD", **options)
        summary = ct.summarize(*inputs, pattern, **options)
        assert torch.equal(stages.key, summary.key.transpose(1, 2)) and torch.equal(stages.lse, summary.lse)
        attended = ct.attend(*swapped, stages.key, stages.value, pattern, layout="BLHD", **options)
        torch.testing.assert_close(attended, actual, rtol=1e-12, atol=1e-12)
    assert torch.equal(actual.transpose(1, 2), expected)
    g = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, swapped, g.transpose(1, 2))
    assert same([x.transpose(1, 2) for x in gradients], torch.autograd.grad(expected, inputs, g))
    q, k, _ = inputs
    weights = ct.attention_weights(q, k, pattern, **options)
    assert torch.equal(ct.attention_weights(*swapped[:2], pattern, layout="BLHD", **options), weights)
    bytes_taken = ct.workspace_bytes(*inputs, pattern, **options)
    assert bytes_taken == ct.workspace_bytes(*swapped, pattern, layout="BLHD", **options)
    numpy_options = options | {"key_mask": options["key_mask"].numpy()}
    assert bytes_taken == combiner.workspace_bytes(*(x.detach().numpy() for x in inputs), pattern, **numpy_options)


def test_masks_that_broadcast():
    inputs, options = problem(Fixed(8))
    row = options["key_mask"][0]
    expected = ct.attention(*inputs, Fixed(8), **options | {"key_mask": row.expand(2, L)})
    for mask in (row, row[None], row[None, None, None]):
        assert torch.equal(ct.attention(*inputs, Fixed(8), **options | {"key_mask": mask}), expected)
    whole = options["key_mask"]
    expected = ct.attention(*inputs, Fixed(8), **options)
    assert torch.equal(ct.attention(*inputs, Fixed(8), **options | {"key_mask": whole[:, None, None]}), expected)


@pytest.mark.parametrize("is_causal", (False, True))
def test_routing_is_combiners(is_causal):
    """Its sparse baseline, its plans, and clusters of any integers."""
    inputs, options = problem(Fixed(8), is_causal=is_causal)
    numpy_options = options | {"key_mask": options["key_mask"].numpy()}
    arrays = [x.detach().numpy() for x in inputs]
    theirs, ours = combiner.Routing(CLUSTERS, pooling="mean"), ct.Routing(torch.from_numpy(CLUSTERS), pooling="mean")
    small = ct.Routing(torch.from_numpy(CLUSTERS).to(torch.int32), pooling="mean")
    for expected, actual in ((theirs, ours), (theirs, small), (theirs.sparse(), ours.sparse())):
        out = ct.attention(*inputs, actual, **options)
        assert np.array_equal(out.detach(), combiner.attention(*arrays, expected, **numpy_options))
        assert actual.plan(L, is_causal).pairs == expected.plan(L, is_causal).pairs
        packed = ct.attention(*inputs, actual, cu_seqlens=[0, 5, L], **options)
        assert np.array_equal(
            packed.detach(), combiner.attention(*arrays, expected, cu_seqlens=[0, 5, L], **numpy_options)
        )
    mixture = Mixture(ours.as_numpy(), Fixed(4))
    expected = combiner.attention(*arrays, Mixture(theirs, Fixed(4)), **numpy_options)
    assert np.array_equal(ct.attention(*inputs, mixture, **options).detach(), expected)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_arguments():
    q, k, v = tensors((2, L, 4), (2, L, 4), (2, L, 4), requires_grad=False)
    mask = torch.ones(L, dtype=torch.bool)

    def refuses(error, match, *inputs, pattern=Fixed(4), **options):  # noqa: B008
        with pytest.raises(error, match=match):
            ct.attention(*(inputs or (q, k, v)), pattern, **options)

    refuses(TypeError, r"query must be a torch.Tensor, got ndarray", q.numpy(), k, v)
    refuses(TypeError, r"query must be float32, float64, bfloat16 or float16, got torch.int64", q.long(), k, v)
    refuses(TypeError, r"key must be torch.float64 like query, got torch.float32", q, k.float(), v)
    refuses(TypeError, r"region_key must be torch.float64 like query", region_key=q.float())
    refuses(TypeError, r"key_mask must be a torch.Tensor, got ndarray", key_mask=mask.numpy())
    refuses(TypeError, r"key_mask must be bool.* got torch.float64: .*key_mask == 0", key_mask=torch.zeros_like(q[0]))
    refuses(TypeError, r"key_mask must be bool.* got torch.uint8$", key_mask=mask.byte())
    refuses(
        ValueError, rf"key_mask must have shape \({L},\), got \({L}, {L}\): .*is_causal", key_mask=mask.expand(L, L)
    )
    refuses(ValueError, rf"key_mask must have shape \({L},\), got \(2, {L}\)$", key_mask=mask.expand(2, L))
    refuses(ValueError, r"key must have query's length, 37, got .* there is no cross-attention", q, k[:, 1:], v)
    refuses(ValueError, r"value must have query's length, 37, got .* there is no cross-attention", q, k, v[:, 1:])
    refuses(ValueError, r"key must have shape", q, k[..., 1:], v)
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor([q[0], q[0, 1:]], layout=layout)
        refuses(ValueError, r"query must be one tensor, got a nested one: .* cu_seqlens", nested, nested, nested)
    refuses(TypeError, r"pattern must be a pattern such as combiner.Fixed\(\) or a Plan, got str", pattern="fixed")
    refuses(TypeError, r"pattern must be a pattern such as .* got Fixed, a class: call it", pattern=Fixed)
    refuses(ValueError, r"return_lse must be False with a Mixture", pattern=Mixture(Fixed(4)), return_lse=True)
    refuses(TypeError, r"clusters must be a torch.Tensor of integers, got ndarray", pattern=ct.Routing(CLUSTERS))
    refuses(TypeError, r"clusters must be .* got torch.bool", pattern=ct.Routing(torch.ones(L, dtype=torch.bool)))
    refuses(ValueError, r"clusters must lie between", pattern=ct.Routing(torch.full((L,), -1)))
    routing = ct.Routing(torch.from_numpy(CLUSTERS))
    refuses(TypeError, r"pattern must be a Mixture of .* give as_numpy\(\)", pattern=Mixture(routing, Fixed(4)))
    refuses(ValueError, r"layout must be one of 'BHLD', 'BLHD', got 'LBHD'", layout="LBHD")
    refuses(ValueError, r"dropout_p must be between 0 and 1", dropout_p=2.0)
    refuses(ValueError, r"seed must be at least 0", seed=-1)
    refuses(TypeError, r"seed must be an integer", seed=0.5, dropout_p=0.1)


def test_a_scale_that_would_get_no_gradient_is_refused():
    q, k, v, h = tensors((2, L, 4), (2, L, 4), (2, L, 4), (2, 10, 4))
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for call in (
        lambda: ct.attention(q, k, v, Fixed(4), scale=scale),
        lambda: ct.attention(q, k, v, Fixed(4), scale=scale.detach()),
        lambda: ct.attention_weights(q, k, Fixed(4), scale=scale),
        lambda: ct.summarize(q, k, v, Fixed(4), scale=scale),
        lambda: ct.attend(q, k, v, h, h, Fixed(4), scale=scale),
        lambda: ct.workspace_bytes(q, k, v, Fixed(4), scale=scale),
    ):
        with pytest.raises(TypeError, match=r"scale must be a number, got a torch.Tensor, .* query \* scale"):
            call()
    expected = ct.attention(q, k, v, Fixed(4), scale=0.3)
    actual = ct.attention(q * scale, k, v, Fixed(4), scale=1.0)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    step = 1e-6
    ends = (ct.attention(q, k, v, Fixed(4), scale=0.3 + each).square().sum() for each in (step, -step))
    (slope,) = torch.autograd.grad(actual.square().sum(), scale)
    torch.testing.assert_close(slope, (next(ends) - next(ends)) / (2 * step), rtol=1e-7, atol=1e-7)


def test_names_of_other_libraries():
    q = torch.randn(2, L, 4)
    for name in ("attn_mask", "causal", "window_size", "enable_gqa", "dropout"):
        for call in (
            lambda **options: ct.attention(q, q, q, Fixed(4), **options),
            lambda **options: ct.attend(q, q, q, q, q, Fixed(4), **options),
        ):
            with pytest.raises(TypeError, match=rf"att\w+\(\) has no '{name}': "):
                call(**{name: None})
    with pytest.raises(TypeError, match=r"summarize\(\) has no 'attn_mask': "):
        ct.summarize(q, q, q, Fixed(4), attn_mask=None)
    with pytest.raises(TypeError, match=r"attention_weights\(\) has no 'causal': "):
        ct.attention_weights(q, q, Fixed(4), causal=True)


def test_devices():
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda:0")

    q, k, v = tensors((2, L, 4), (2, L, 4), (2, L, 4), requires_grad=False)
    with pytest.raises(ValueError, match=r"key must be on the CPU, got cuda:0: key.cpu\(\) is"):
        ct.attention(q, k.as_subclass(Elsewhere), v, Fixed(4))
    assert ct.attention(*(x.to("meta") for x in (q, k, v)), Fixed(4)).shape == q.shape


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_one_derivative():
    q, k, v = tensors((2, L, 4), (2, L, 4), (2, L, 4))
    (dq,) = torch.autograd.grad(ct.attention(q, k, v, Fixed(4)).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="there is no second derivative"):
        dq.sum().backward()
    q, k, v = (x.detach() for x in (q, k, v))

    def loss(v):
        return ct.attention(q, k, v, Fixed(4)).square().sum()

    with pytest.raises(NotImplementedError, match="value must have no tangent: there is no forward-mode"):
        torch.func.jvp(loss, (v,), (v,))
    with pytest.raises(NotImplementedError, match=r"there is no forward-mode .* take gradients in reverse mode"):
        torch.func.hessian(loss)(v)
    with pytest.raises(NotImplementedError, match="there is no second derivative; take differences of gradients"):
        torch.func.jacrev(torch.func.grad(loss))(v)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="query must have no tangent"):
        ct.attention(torch.autograd.forward_ad.make_dual(q, q), k, v, Fixed(4))


# ---- the example ---------------------------------------------------------------------------------


def test_example():
    """All parts, at a size at which nothing is learned."""
    pytest.importorskip("tqdm")  # which the module asks for whose text it reads
    said = run_file("examples/torch_bytes.py", "--steps", "2", "--length", "256")
    for line in ("unigram", "Combiner-Fixed", "step     2:", "sample"):
        assert line in said


def test_example_of_heavily_compressed_layers(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "mask.png"
    options = ("--steps=1", "--length=64", "--width=32", "--rate=8", "--window=8")
    said = run_file("examples/deepseek_v4_layer.py", *options, "--out", picture)
    assert "bits per byte" in said and "sinks of the first layer" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
