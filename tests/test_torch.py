# SPDX-License-Identifier: Apache-2.0
"""The PyTorch adapter: the library's own bits, and all that PyTorch does with an operator."""

import copy
import gc
import io
import itertools
import os
import pathlib
import subprocess
import sys
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

import combiner  # noqa: E402
import combiner.torch as ct  # noqa: E402
from combiner import (  # noqa: E402
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    LogSparse,
    Mixture,
    Plan,
    Tree,
    torch_ops,
)

L = 37
CLUSTERS = np.arange(L) * 7 % 5
PATTERNS = [
    Dense(),
    Fixed(8),
    Fixed(pooling="mean", size_bias=True),
    LogSparse(hierarchical=True),
    Axial(6, "rowmajor", "weighted"),
    AxialMixture(6).sparse(),
    Tree(3, 2),
    Mixture(Fixed(4), LogSparse()),
    Fixed(5).plan(L, True),
    Mixture(Fixed(4), Fixed(5).plan(L, True)),
    combiner.Routing(CLUSTERS),
    combiner.Routing(CLUSTERS).sparse(),
    ct.Routing(torch.from_numpy(CLUSTERS), pooling="mean"),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{type(p).__name__}-{str(p)[:30]}")
compiled = {"fullgraph": True, "backend": "aot_eager"}
# torch.compile and opcheck ask it of what they are given.
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def as_numpy(pattern):
    """The pattern as `combiner.attention` takes it."""
    if not isinstance(pattern, ct.Routing):
        return pattern
    return combiner.Routing(pattern.clusters.numpy(), pooling=pattern.pooling, size_bias=pattern.size_bias)


def tensors(*shapes, dtype=torch.float64, requires_grad=True):
    return [torch.randn(shape, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def problem(pattern, *, grouped=True, **options):
    """query, key and value with GQA and the region query and key where the pattern has any, and a mask."""
    q, k, v = tensors((2, 4, L, 6), (2, 4 // (1 + grouped), L, 6), (2, 4 // (1 + grouped), L, 5))
    options = {"is_causal": True, "key_mask": torch.rand(2, L) > 0.2, **options}
    return (q, k, v), options


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- results


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
    out, saved = combiner.attention_forward(*map(torch_ops.as_array, inputs), pattern, is_causal=True)
    actual = ct.attention(*inputs, pattern, is_causal=True, return_lse=has_lse)
    actual, lse = actual if has_lse else (actual, None)
    assert actual.dtype == dtype
    assert np.array_equal(torch_ops.as_array(actual), out)
    assert lse is None or (lse.dtype == torch.float32 and np.array_equal(torch_ops.as_array(lse), saved["lse"]))
    g = torch.randn_like(actual)
    expected = combiner.attention_backward(torch_ops.as_array(g), saved)
    for x, y in zip(torch.autograd.grad(actual, inputs, g), expected, strict=False):
        assert x.dtype == dtype
        assert np.array_equal(torch_ops.as_array(x), y)


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
    R = sum(
        sum(plan.region_count for plan in plans) if isinstance(plans, tuple) else plans.region_count
        for plans in (pattern.plan(n) for n in np.diff(cu_seqlens).tolist())
    )
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
        for x, y in zip(torch.autograd.grad(actual, inputs, grad_out), expected, strict=True):
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
    attention = combiner.attention

    def spy(*args, **options):
        seen.append((args, attention(*args, **options)))
        return seen[-1][1]

    monkeypatch.setattr(combiner, "attention", spy)
    packed = torch.randn(2, L, 3, 4, 8, requires_grad=True)  # [B, L, 3, H, D]
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    out, lse = ct.attention(q, k, v[:, :1].expand(-1, 4, -1, -1), Fixed(8), return_lse=True)
    ((query, key, value, _), results) = seen[0]
    for array, tensor in zip((query, key, value, *results), (q, k, v, out, lse), strict=True):
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
    kept = len(torch_ops._numbers)
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
    assert len(torch_ops._numbers) == kept


# ---- what PyTorch does with operators


def operands(pattern, **options):
    """What the operator takes."""
    inputs, options = problem(pattern, **options)
    clusters = pattern.clusters if isinstance(pattern, ct.Routing) else None
    given = *inputs, torch_ops._text(pattern), clusters, True, None, options["key_mask"], None, None, None
    seed = torch.tensor(5) if options.get("dropout_p") else None
    return *given, options.get("dropout_p", 0.0), seed


@quiet
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("pattern", (Fixed(8), PATTERNS[-1], PATTERNS[7], PATTERNS[8]), ids=lambda p: type(p).__name__)
def test_opcheck(pattern, dropout_p):
    given = operands(pattern, dropout_p=dropout_p)
    torch.library.opcheck(torch.ops.combiner.attention, given)
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
    out, lse = torch.ops.combiner.attention(*given)
    torch.library.opcheck(torch.ops.combiner.attention_backward, (torch.randn_like(out), None, out, lse, *given))


@every_pattern
def test_compile(pattern):
    inputs, options = problem(pattern)

    def f(q, k, v):
        return ct.attention(q * 2, k, v, pattern, **options)

    out, expected = torch.compile(f, **compiled)(*inputs), f(*inputs)
    assert torch.equal(out, expected)
    g = torch.randn_like(out)
    assert same(torch.autograd.grad(out, inputs, g), torch.autograd.grad(expected, inputs, g))


@pytest.mark.slow
def test_inductor():
    inputs, options = problem(Fixed(8), dropout_p=0.3, seed=1)

    def f(q, k, v):
        return ct.attention(q * 2, k.transpose(-1, -2).contiguous().transpose(-1, -2), v + 1, Fixed(8), **options) * 3

    out, expected = torch.compile(f, fullgraph=True)(*inputs), f(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


def test_compiled_code_is_of_any_length_and_one_pattern():
    """A pattern made on the way is a constant like any other; one from outside is guarded."""
    counter = CompileCounterWithBackend("aot_eager")

    def f(q, k, v, pattern):
        out, lse = ct.attention(q, k, v, Fixed(4, pooling="mean"), is_causal=True, return_lse=True)
        return ct.attention(q, k, v, pattern, is_causal=True) + out, lse

    g = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    plan = Plan.from_parts([[i] for i in range(L)], is_causal=True)
    frames = set()
    for length, pattern in ((L, Fixed(8)), (64, Fixed(8)), (200, Fixed(8)), (L, plan)):
        inputs = tensors((2, length, 4), (2, length, 4), (2, length, 4))
        actual, expected = g(*inputs, pattern), f(*inputs, pattern)
        assert same(actual, expected)
        assert same(
            torch.autograd.grad(actual[0].sum() + actual[1].sum(), inputs),
            torch.autograd.grad(expected[0].sum() + expected[1].sum(), inputs),
        )
        frames.add((counter.frame_count, type(pattern)))
    assert len(frames) == 2
    other = Plan.from_parts([[0] for i in range(L)], is_causal=True)
    assert same(g(*inputs, other), f(*inputs, other))


def test_compiled_clusters_may_change():
    counter = CompileCounterWithBackend("aot_eager")

    def f(q, k, v, clusters):
        return ct.attention(q, k, v, ct.Routing(clusters))

    g = torch.compile(f, fullgraph=True, backend=counter)
    inputs = tensors((1, 2, L, 4), (1, 2, L, 4), (1, 2, L, 4))
    frames = set()
    for _ in range(3):
        clusters = torch.randint(5, (1, 2, L))
        assert torch.equal(g(*inputs, clusters), f(*inputs, clusters))
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_compiled_dropout():
    (q, k, v), _ = problem(Fixed(8))

    def f(seed=None):
        return ct.attention(q, k, v, Fixed(8), dropout_p=0.4, seed=seed)

    g = torch.compile(f, **compiled)
    for seed in (2**64 - 1, 5, 6, 7):
        assert torch.equal(g(seed), f(seed))
    torch.manual_seed(0)
    first, second = g(), g()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, g())


@pytest.mark.parametrize("strict", (False, True))
def test_export(strict):
    """For any length, and for any process."""
    pattern = Mixture(Fixed(), AxialMixture(4, size_bias=True).sparse())

    class Model(torch.nn.Module):
        def forward(self, q, k, v, key_mask):
            return ct.attention(q, k, v, pattern, key_mask=key_mask) + ct.attention(q, k, v, LogSparse())

    def given(n):
        return *tensors((2, 2, n, 4), (2, 2, n, 4), (2, 2, n, 4), requires_grad=False), torch.rand(2, n) > 0.3

    n = torch.export.Dim("L", min=2, max=4096)
    shapes = {"q": {2: n}, "k": {2: n}, "v": {2: n}, "key_mask": {1: n}}
    program = torch.export.export(Model(), given(L), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for length in (2, 100):
        x = given(length)
        assert torch.equal(program.module()(*x), Model()(*x))
        assert torch.equal(loaded.module()(*x), Model()(*x))


def test_a_text_of_another_process():
    given = operands(Fixed(8))
    with pytest.raises(RuntimeError, match="pattern must be alive and of this process"):
        torch.ops.combiner.attention(*given[:3], "123456789", *given[4:])
    for text in ("print('x')", "Fixed(print('x'))", "__import__('os').sparse()"):
        with pytest.raises(ValueError):
            torch.ops.combiner.attention(*given[:3], text, *given[4:])


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@every_pattern
def test_vmap(pattern, dropout_p):
    """As the entries one by one, along any axis, some of the inputs shared."""
    q, k, v = tensors((2, L, 3, 4), (2, L, 4), (3, 2, L, 4), requires_grad=False)
    masks = torch.rand(3, L) > 0.3

    def f(q, k, v, key_mask):
        return ct.attention(q, k, v, pattern, is_causal=True, key_mask=key_mask, dropout_p=dropout_p, seed=3)

    expected = torch.stack([f(q[:, :, n], k, v[n], masks[n]) for n in range(3)])
    assert torch.equal(torch.vmap(f, in_dims=(2, None, 0, 0))(q, k, v, masks), expected)
    expected = torch.stack([f(q[0, :, n], k[0], v[n, 0], masks[n]) for n in range(3)])
    assert torch.equal(torch.vmap(f, in_dims=(1, None, 0, 0))(q[0], k[0], v[:, 0], masks), expected)


def test_vmap_of_clusters_and_sequences():
    q, k, v = tensors((3, 2, L, 4), (3, 2, L, 4), (3, 2, L, 4), requires_grad=False)
    clusters, cu_seqlens = torch.randint(5, (3, L)), torch.tensor([[0, 5, L], [0, 9, L], [0, 0, L]])

    def f(q, k, v, clusters, cu_seqlens):
        return ct.attention(q, k, v, ct.Routing(clusters), cu_seqlens=cu_seqlens)

    expected = torch.stack([f(*x) for x in zip(q, k, v, clusters, cu_seqlens, strict=True)])
    assert torch.equal(torch.vmap(f)(q, k, v, clusters, cu_seqlens), expected)


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_gradients_through_vmap(dropout_p):
    q, k, v = tensors((3, 2, L, 4), (2, L, 4), (3, 2, L, 4))

    def f(q, k, v):
        return ct.attention(q, k, v, Fixed(8), dropout_p=dropout_p, seed=3)

    out = torch.vmap(f, in_dims=(0, None, 0))(q, k, v)
    expected = torch.stack([f(q[n], k, v[n]) for n in range(3)])
    assert torch.equal(out, expected)
    g = torch.randn_like(out)
    actual, expected = (torch.autograd.grad(x, (q, k, v), g) for x in (out, expected))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", ((), (2,), (2, 2)))
def test_vmap_of_the_backward_operator(lead):
    given = operands(Fixed(8))
    *inputs, mask = tensors((3, *lead, L, 4), (3, *lead, L, 4), (3, *lead, L, 4), requires_grad=False), None
    (q, k, v), rest = inputs[0], ("Fixed(span=8)", None, True, None, mask, *given[8:])

    def f(q, k, v):
        out, lse = torch.ops.combiner.attention(q, k, v, *rest)
        return torch.ops.combiner.attention_backward(torch.ones_like(out), lse, out, lse, q, k, v, *rest)

    expected = [torch.stack(x) for x in zip(*(f(*x) for x in zip(q, k, v, strict=True)), strict=True)]
    assert same(torch.vmap(f)(q, k, v), expected)
    assert torch.vmap(f, randomness="different")(q, k, v)[0].shape == q.shape


# ---- the two stages


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize(
    "pattern", (Fixed(8), Axial(6, "rowmajor", "weighted"), PATTERNS[-1], PATTERNS[8]), ids=lambda p: type(p).__name__
)
def test_the_stages_are_attention(pattern, dropout_p):
    inputs, options = problem(pattern)
    options.update(is_causal=not isinstance(pattern, ct.Routing), scale=0.3)
    dropout = {"dropout_p": dropout_p, "seed": 9}
    summary = ct.summarize(*inputs, pattern, **options)
    actual = ct.attend(*inputs, *summary[:2], pattern, return_lse=True, **options, **dropout)
    expected = ct.attention(*inputs, pattern, return_lse=True, **options, **dropout)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(actual[0]), torch.randn_like(actual[1])
    actual, expected = (torch.autograd.grad(x, inputs, g) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_the_stages():
    q, k, v, rk, rq = tensors((2, 11, 3), (1, 11, 3), (1, 11, 2), (1, 3, 3), (2, 3, 3))

    def both(q, k, v, region_query):
        summary = ct.summarize(q, k, v, Fixed(4), region_query=region_query)
        return summary[:2]

    torch.autograd.gradcheck(both, (q, k, v, rq))
    (h,) = tensors((2, 3, 2))
    torch.autograd.gradcheck(lambda *x: ct.attend(*x, Fixed(4), is_causal=True, return_lse=True)[1:], (q, k, v, rk, h))
    torch.autograd.gradcheck(lambda *x: ct.attend(*x, Fixed(4), is_causal=True), (q, k, v, rk, h))


@quiet
def test_stages_in_compiled_code():
    inputs = tensors((2, L, 4), (2, L, 4), (2, L, 4))

    def f(q, k, v):
        summary = ct.summarize(q * 2, k, v, Fixed(8))
        return ct.attend(q * 2, k, v, summary.key, summary.value, Fixed(8)) + 1

    g = torch.compile(f, backend="aot_eager")
    assert torch.equal(g(*inputs), f(*inputs))
    assert same(torch.autograd.grad(g(*inputs).sum(), inputs), torch.autograd.grad(f(*inputs).sum(), inputs))


def test_what_backward_reads_must_stay():
    q, k, v = tensors((2, L, 4), (2, L, 4), (2, L, 4))
    for function in (lambda q: ct.summarize(q, k, v, Fixed(8)).value, lambda q: ct.attention(q, k, v, Fixed(8))):
        x = q * 1
        out = function(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_merge():
    """Two halves of the keys are the whole, where one half or both hold nothing too."""
    q, k, v = tensors((2, L, 4), (2, L, 4), (2, L, 3))
    mask = torch.rand(L) > 0.3

    def halves(q, k, v, attend):
        parts = []
        for keys in (torch.arange(L) < 20, torch.arange(L) >= 20):
            parts += attend(q, k, v, Dense(), is_causal=True, key_mask=mask & keys, return_lse=True)
        return ct.merge(*parts)

    mask[:2] = False  # the first two queries see nothing
    expected = ct.attention(q, k, v, Dense(), is_causal=True, key_mask=mask, return_lse=True)
    actual = halves(q, k, v, ct.attention)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(v)
    actual, expected = (torch.autograd.grad(x[0], (q, k, v), g, retain_graph=True) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match=r"lse_b must be torch.float64 .* got torch.float32"):
        ct.merge(v, v[..., 0], v, v[..., 0].float())
    with pytest.raises(ValueError, match=r"out_b must have shape \(2, 37, 3\), got \(1, 37, 3\)"):
        ct.merge(v, v[..., 0], v[:1], v[..., 0])
    with pytest.raises(TypeError, match=r"out_a must be a torch.Tensor, got ndarray"):
        ct.merge(v.detach().numpy(), v[..., 0], v, v[..., 0])


@every_pattern
def test_attention_weights(pattern):
    (q, k, v), options = problem(pattern, grouped=False)
    weights = ct.attention_weights(q, k, pattern, **options)
    torch.testing.assert_close(weights @ v, ct.attention(q, k, v, pattern, **options), rtol=1e-12, atol=1e-12)
    assert weights.requires_grad
    assert ct.attention_weights(q[..., :0, :], k[..., :0, :], Fixed(4)).shape == (2, 4, 0, 0)


# ---- modules


def module(pattern, E=24, heads=4, **options):
    made = ct.CombinerAttention(E, heads, pattern, dtype=torch.float64, **options)
    for bias in (made.in_proj_bias, made.out_proj.bias):
        if bias is not None:
            torch.nn.init.normal_(bias)
    return made


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("bias", (True, False))
def test_multihead_attention(batch_first, bias):
    """With Dense, its weights and its masks, the module is PyTorch's own."""
    E, B = 24, 3
    theirs = torch.nn.MultiheadAttention(E, 4, bias=bias, batch_first=batch_first, dtype=torch.float64)
    ours = module(Dense(), bias=bias, batch_first=batch_first)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    ignored = torch.rand(B, L) > 0.7
    ignored[:, 0] = False  # a query that sees nothing is NaN there and 0 here
    x, y, z = tensors(*[(B, L, E) if batch_first else (L, B, E)] * 3)
    causal = torch.triu(torch.ones(L, L, dtype=torch.bool), 1)
    for inputs in ((x, x, x), (x, y, y), (x, y, z)):
        for is_causal in (False, True):
            expected, weights = theirs(*inputs, ignored, True, causal if is_causal else None)
            actual = ours(*inputs, ignored, need_weights=True, is_causal=is_causal)
            torch.testing.assert_close(actual, (expected, weights), rtol=1e-10, atol=1e-10)
    additive = torch.zeros(B, L, dtype=torch.float64).masked_fill(ignored, -torch.inf)
    actual, weights = ours(x, key_padding_mask=additive, need_weights=True, average_attn_weights=False)
    expected = theirs(x, x, x, ignored, True, average_attn_weights=False)
    torch.testing.assert_close((actual, weights), expected, rtol=1e-10, atol=1e-10)
    one = x[0] if batch_first else x[:, 0]
    torch.testing.assert_close(ours(one)[0], theirs(one, one, one)[0], rtol=1e-10, atol=1e-10)
    assert ours(x)[1] is None
    torch.testing.assert_close(ours(x, y)[0], ours(x, y, y)[0], rtol=0, atol=0)


def test_grouped_heads():
    """As all heads, with the weights of each key and value head for its whole group."""
    E, D = 24, 6
    grouped, whole = module(Fixed(8), num_key_value_heads=2, is_causal=True), module(Fixed(8), is_causal=True)
    state = grouped.state_dict()
    for name in ("in_proj_weight", "in_proj_bias"):
        q, k, v = state[name].split([E, 2 * D, 2 * D])
        k, v = (x.unflatten(0, (2, D)).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v))
        state[name] = torch.cat([q, k, v])
    whole.load_state_dict(state)
    (x,) = tensors((2, L, E))
    torch.testing.assert_close(grouped(x), whole(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grouped(x * 1, x * 1), whole(x), rtol=1e-12, atol=1e-12)


def test_dropout_is_of_training():
    attention = module(Fixed(8), dropout=0.5)
    (x,) = tensors((2, L, 24))
    torch.manual_seed(1)
    first, second = attention(x)[0], attention(x)[0]
    torch.manual_seed(1)
    assert torch.equal(first, attention(x)[0])
    assert not torch.equal(first, second)
    attention.eval()
    assert torch.equal(attention(x)[0], attention(x)[0])


@pytest.mark.parametrize("pattern", (Fixed(8), LogSparse(), Fixed(5).plan(L, True)), ids=lambda p: type(p).__name__)
def test_deep_sets(pattern):
    """The module's own formula in loops; its gradients reach every parameter; masked positions reach nothing."""
    attention = module(pattern, num_key_value_heads=2, is_causal=True, abstraction="deepsets")
    (x,) = tensors((2, L, 24))
    ignored = torch.rand(2, L) > 0.7
    ignored[0, 8:16] = True
    out, _ = attention(x, key_padding_mask=ignored)
    q, k, v = (
        y.unflatten(-1, (-1, 6)).transpose(1, 2)
        for y in torch.nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).split([24, 12, 12], -1)
    )
    plan = pattern if isinstance(pattern, Plan) else pattern.plan(L, True)
    net = attention.abstraction

    def regions(y, phi, rho):
        y = torch.nn.functional.gelu(phi(y))
        rows = torch.zeros(2, y.shape[1], plan.region_count, 6, dtype=y.dtype)
        for b in range(2):
            for r, members in enumerate(plan.regions):
                live = [j for j in members.tolist() if not ignored[b, j]]
                if live:
                    rows[b, :, r] = y[b, :, live].mean(1)
        return rho(rows)

    given = {
        "region_query": regions(q, net.query_phi, net.query_rho),
        "region_key": regions(k, net.key_phi, net.key_rho),
    }
    expected = ct.attention(q, k, v, pattern, is_causal=True, key_mask=~ignored, **given)
    expected = attention.out_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    g = torch.randn_like(out)
    wanted = (x, *attention.parameters())
    actual, expected = (torch.autograd.grad(y, wanted, g) for y in (out, expected))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert all(grad.any() for grad in actual)
    without = attention(x)[0]
    torch.testing.assert_close(without, attention(x, key_padding_mask=torch.zeros_like(ignored))[0])


@pytest.mark.parametrize("pooling", ("max", "mean", "sum"))
def test_a_pooling_for_an_abstraction(pooling):
    attention = module(Fixed(8), abstraction=pooling)
    assert attention.abstraction is None and attention.pattern == Fixed(8, pooling=pooling)


def test_a_module_of_ones_own_for_an_abstraction():
    class Maximum(torch.nn.Module):
        """What pooling="max" does."""

        def forward(self, query, key, regions, key_mask):
            cuts = regions.offsets.diff().tolist()
            return [
                torch.stack([part.amax(-2) for part in x[..., regions.members, :].split(cuts, -2)], -2)
                for x in (query, key)
            ]

    attention = module(Fixed(8), is_causal=True, abstraction=Maximum())
    pooled = module(Fixed(8), is_causal=True)
    pooled.load_state_dict(attention.state_dict())
    (x,) = tensors((2, L, 24))
    torch.testing.assert_close(attention(x), pooled(x), rtol=1e-12, atol=1e-12)


def test_gradcheck_of_region_mean():
    (x,) = tensors((2, 3, 9, 2))
    regions = ct.Regions(torch.tensor([0, 1, 5, 5, 8]), torch.tensor([0, 3, 3, 5]))
    mask = torch.rand(2, 9) > 0.4
    torch.autograd.gradcheck(lambda x: ct.region_mean(x, regions, mask), x)
    torch.autograd.gradcheck(lambda x: ct.region_mean(x, regions), x)


def test_online_routing():
    """Keys' clusters are their centroids'; in training these move by the unmasked keys of the batch."""
    routing = ct.OnlineRouting(5, 2, 6, decay=0.9, pooling="mean", dtype=torch.float64)
    attention = module(routing, num_key_value_heads=2, is_causal=True)
    (x,) = tensors((3, L, 24))
    ignored = torch.rand(3, L) > 0.7
    before = routing.centroids.clone()
    q, k, v = attention._project(x, None, None)
    clusters = combiner.assign_clusters(k.detach().numpy(), before.expand(3, -1, -1, -1).numpy())
    pattern = combiner.Routing(clusters, pooling="mean")
    expected = attention._merge_heads(ct.attention(q, k, v, pattern, is_causal=True, key_mask=~ignored))

    attention.eval()
    assert torch.equal(attention(x, key_padding_mask=ignored)[0], expected)
    assert torch.equal(routing.centroids, before)
    attention.train()
    assert torch.equal(attention(x, key_padding_mask=ignored)[0], expected)
    for head in range(2):
        rows, ids = k[:, head][~ignored].detach().numpy(), clusters[:, head][~ignored.numpy()]
        moved = combiner.update_centroids(before[head].numpy(), rows, ids, decay=0.9)
        np.testing.assert_allclose(routing.centroids[head].numpy(), moved, rtol=1e-12)
    assert not torch.equal(routing.centroids, before)

    fresh = module(
        ct.OnlineRouting(5, 2, 6, pooling="mean", dtype=torch.float64), num_key_value_heads=2, is_causal=True
    )
    fresh.load_state_dict(attention.state_dict())
    assert torch.equal(fresh.eval()(x)[0], attention.eval()(x)[0])
    prefix = attention(x[:, :20])[0]
    torch.testing.assert_close(prefix, attention(x)[0][:, :20], rtol=1e-12, atol=1e-12)


def test_cluster_operators():
    x, centroids = tensors((2, L, 6), (2, 5, 6), requires_grad=False)
    clusters = ct.assign_clusters(x, centroids, balanced=True)
    assert np.array_equal(clusters, combiner.assign_clusters(x.numpy(), centroids.numpy(), balanced=True))
    torch.library.opcheck(torch.ops.combiner.assign_clusters, (x, centroids, False))
    torch.library.opcheck(torch.ops.combiner.update_centroids, (centroids, x, clusters, 0.5))


def build(kind):
    options = {"num_key_value_heads": 2, "is_causal": True}
    if kind == "routing":
        return module(ct.OnlineRouting(5, 2, 6, dtype=torch.float64), **options)
    return module(Fixed(8), abstraction="deepsets" if kind == "deepsets" else None, dropout=0.1, **options)


@quiet
@pytest.mark.parametrize("kind", ("pooled", "deepsets", "routing"))
def test_module_life(kind):
    """state_dict, copies, compiled and exported code."""
    attention = build(kind).eval()
    (x,) = tensors((2, L, 24))
    expected, _ = attention(x)
    file = io.BytesIO()
    torch.save(attention.state_dict(), file)
    file.seek(0)
    fresh = build(kind).eval()
    assert not torch.equal(fresh(x)[0], expected)
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(x)[0], expected)
    assert torch.equal(copy.deepcopy(attention)(x)[0], expected)
    actual = torch.compile(attention, backend="aot_eager", fullgraph=kind != "deepsets")(x)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    wanted = tuple(attention.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), rtol=1e-10, atol=1e-10
    )
    if kind != "deepsets":
        shapes = ({1: torch.export.Dim("L", min=5, max=4096)},)
        program = torch.export.export(attention, (x,), dynamic_shapes=shapes).module()
        torch.testing.assert_close(program(x[:, :20])[0], attention(x[:, :20])[0], rtol=1e-12, atol=1e-12)
    assert "Fixed(span=8)" in repr(attention) or "OnlineRouting(5" in repr(attention)


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("pattern", (Fixed(8), LogSparse(), Tree(3), Axial(6, "rowmajor")), ids=str)
def test_decoder(pattern, batch_first):
    attention = module(pattern, num_key_value_heads=2, is_causal=True, batch_first=batch_first).eval()
    (x,) = tensors((2, L, 24))
    expected = attention(x if batch_first else x.transpose(0, 1))[0]
    expected = expected if batch_first else expected.transpose(0, 1)
    decoder = attention.decoder()
    for start in (0, 19):
        parts = []
        for n, (first, end) in enumerate(itertools.pairwise([0, start, *range(start + 1, 30), 35, L])):
            part = x[:, first:end] if batch_first else x[:, first:end].transpose(0, 1)
            out = decoder.prefill(part) if n == 0 else decoder.step(part)
            parts.append(out if batch_first else out.transpose(0, 1))
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-10, atol=1e-10)
        decoder.reset()
    assert not parts[0].requires_grad


def test_transformer_layer():
    """In PyTorch's own layer it is used in evaluation too, where that has a short cut for dense attention."""
    layer = torch.nn.TransformerEncoderLayer(24, 4, 32, dropout=0, batch_first=True, dtype=torch.float64).eval()
    layer.self_attn = module(Fixed(8), dropout=0.0).eval()
    (x,) = tensors((2, L, 24), requires_grad=False)
    ignored = torch.rand(2, L) > 0.7
    with torch.no_grad():
        y = layer.norm1(x + layer.self_attn(x, key_padding_mask=ignored)[0])
        y = layer.norm2(y + layer.linear2(torch.relu(layer.linear1(y))))
        torch.testing.assert_close(layer(x, src_key_padding_mask=ignored), y, rtol=1e-12, atol=1e-12)


def test_module_arguments():
    (x,) = tensors((2, L, 24))

    def refuses(error, match, call):
        with pytest.raises(error, match=match):
            call()

    refuses(ValueError, "embed_dim must be a multiple of num_heads, got 24 and 5", lambda: module(Fixed(8), 24, 5))
    refuses(
        ValueError,
        "num_heads must be a multiple of num_key_value_heads, got 4 and 3",
        lambda: module(Fixed(8), num_key_value_heads=3),
    )
    refuses(ValueError, "dropout must be between 0 and 1, got 2", lambda: module(Fixed(8), dropout=2))
    refuses(ValueError, "abstraction must be one of 'max', 'mean'", lambda: module(Fixed(8), abstraction="median"))
    refuses(ValueError, "abstraction must be None, a pooling", lambda: module(Fixed(8), abstraction=3))
    mixture = Mixture(Fixed(8))
    refuses(ValueError, "abstraction must be None where the pattern has", lambda: module(mixture, abstraction="max"))
    refuses(TypeError, r"pattern must be a pattern such as .* got str", lambda: module("fixed"))
    refuses(TypeError, r"pattern must be a pattern such as .* got Fixed", lambda: module(Fixed))
    routing = ct.OnlineRouting(5, 4, 6)
    refuses(ValueError, "abstraction must be None where pattern", lambda: module(routing, abstraction="deepsets"))
    attention = module(Fixed(8), is_causal=True)
    refuses(ValueError, "attn_mask must be None", lambda: attention(x, attn_mask=torch.zeros(L, L)))
    refuses(ValueError, "is_causal must be True or None", lambda: attention(x, is_causal=False))
    refuses(
        TypeError,
        "key_padding_mask must be bool, .* got torch.int64",
        lambda: attention(x, key_padding_mask=torch.zeros(2, L, dtype=torch.int64)),
    )
    refuses(
        ValueError,
        "key_padding_mask must hold 0 and -inf alone",
        lambda: attention(x, key_padding_mask=torch.ones(2, L)),
    )
    refuses(ValueError, "attention must be made with is_causal=True", lambda: module(Fixed(8)).decoder())
    refuses(ValueError, "attention must have a pattern of its own", lambda: build("deepsets").decoder())
    refuses(ValueError, "attention must have a pattern of its own", lambda: build("routing").decoder())
    refuses(ValueError, "pattern must have a span", lambda: module(Fixed(), is_causal=True).decoder())
    mixed = module(Mixture(Fixed(8)), abstraction="deepsets")
    refuses(ValueError, "pattern must make one plan for all heads", lambda: mixed(x))


# ---- errors


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
    refuses(ValueError, r"key must have shape", q, k[:, 1:], v)
    refuses(TypeError, r"pattern must be a pattern such as combiner.Fixed\(\) or a Plan, got str", pattern="fixed")
    refuses(TypeError, r"pattern must be a pattern such as", pattern=Fixed)
    refuses(ValueError, r"return_lse must be False with a Mixture", pattern=Mixture(Fixed(4)), return_lse=True)
    refuses(TypeError, r"clusters must be a torch.Tensor of int64", pattern=ct.Routing(CLUSTERS))
    refuses(ValueError, r"clusters must lie between", pattern=ct.Routing(torch.full((L,), L)))
    refuses(ValueError, r"dropout_p must be between 0 and 1", dropout_p=2.0)
    refuses(ValueError, r"seed must be at least 0", seed=-1)
    refuses(TypeError, r"seed must be an integer", seed=0.5, dropout_p=0.1)


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
    with pytest.raises(NotImplementedError, match="value must have no tangent: there is no forward-mode"):
        torch.func.jvp(lambda v: ct.attention(q, k, v, Fixed(4)), (v,), (v,))
    with pytest.raises(RuntimeError, match="setup_context"):  # PyTorch's own words
        torch.func.grad(lambda v: ct.attention(q, k, v, Fixed(4)).sum())(v)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="query must have no tangent"):
        ct.attention(torch.autograd.forward_ad.make_dual(q, q), k, v, Fixed(4))


# ---- the example


def test_example():
    """All parts, at a size at which nothing is learned."""
    pytest.importorskip("tqdm")  # which the module asks for whose text it reads
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, root / "examples" / "torch_bytes.py", "--steps", "2", "--length", "256"]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    for line in ("unigram", "Combiner-Fixed", "step     2:", "sample"):
        assert line in done.stdout
