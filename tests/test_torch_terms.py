# SPDX-License-Identifier: Apache-2.0
"""PyTorch: the terms of a logit, through the operator, the stages, compiled code, vmap and export."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_problems import L, compiled, every_pattern, problem, quiet, same, tensors  # noqa: E402

import combiner  # noqa: E402
import combiner.torch as ct  # noqa: E402
from combiner import Fixed, LogSparse, Mixture  # noqa: E402


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def terms_of(dtype=torch.float64) -> dict:
    """Every term but the biases of regions: one bias for all batch entries, one sink for each query head."""
    bias, sink = tensors((4, L), (4,), dtype=dtype)
    return {"softcap": 2.0, "key_bias": bias, "sink": sink}


def arrays_of(options: dict) -> dict:
    return {name: x.detach().numpy() if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@every_pattern
def test_the_bits_and_gradients_are_combiners(pattern):
    inputs, options = problem(pattern)
    options |= terms_of()
    out = ct.attention(*inputs, pattern, **options)
    own = pattern.as_numpy() if isinstance(pattern, ct.Routing) else pattern
    expected, saved = combiner.attention_forward(*(x.detach().numpy() for x in inputs), own, **arrays_of(options))
    assert out.detach().numpy().tobytes() == expected.tobytes()
    grad = torch.randn_like(out)
    made = torch.autograd.grad(out, [*inputs, options["key_bias"], options["sink"]], grad)
    exact = combiner.attention_backward(grad.numpy(), saved)
    wanted = (exact.query, exact.key, exact.value, exact.key_bias, exact.sink)
    for x, y in zip(made, wanted, strict=True):
        np.testing.assert_allclose(x.numpy(), y, rtol=0, atol=1e-12)


@quiet
@pytest.mark.parametrize("pattern", (Fixed(8), LogSparse(hierarchical=True)), ids=str)
def test_gradcheck(pattern):
    q, k, v = tensors((2, 12, 3), (1, 12, 3), (1, 12, 2))
    R = pattern.plan(12, True).region_count
    bias, regions, sink = tensors((2, 12), (1, R), (2,))

    def f(q, k, v, bias, regions, sink):
        terms = {"softcap": 2.0, "key_bias": bias, "region_bias": regions, "sink": sink}
        return ct.attention(q, k, v, pattern, is_causal=True, return_lse=True, **terms)

    assert torch.autograd.gradcheck(f, (q, k, v, bias, regions, sink))


def test_compile_and_export():
    inputs, options = problem(Fixed(8))
    options |= terms_of()
    rest = options["key_bias"], options["sink"]

    def f(q, k, v, bias, sink):
        given = options | {"key_bias": bias, "sink": sink}
        return ct.attention(q * 2, k, v, Fixed(8), **given)

    out, expected = torch.compile(f, **compiled)(*inputs, *rest), f(*inputs, *rest)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    assert same(torch.autograd.grad(out, [*inputs, *rest], grad), torch.autograd.grad(expected, [*inputs, *rest], grad))

    class Model(torch.nn.Module):
        def forward(self, q, k, v, bias, sink):
            return f(q, k, v, bias, sink)

    program = torch.export.export(Model(), tuple(x.detach() for x in (*inputs, *rest)))
    assert torch.equal(program.module()(*(x.detach() for x in (*inputs, *rest))), expected)


def test_vmap_and_func():
    pattern = Fixed(4)
    q, k, v = tensors((3, 2, 20, 4), (3, 2, 20, 4), (3, 2, 20, 4), requires_grad=False)
    shared, own, sink = tensors((20,), (3, 2, 20), (3, 2), requires_grad=False)

    def f(q, k, v, bias, sink):
        return ct.attention(q, k, v, pattern, key_bias=bias, sink=sink).square().sum()

    for bias, dim in ((shared, None), (own, 0)):
        dims = 0, 0, 0, dim, 0
        mapped = torch.func.vmap(torch.func.grad(f, argnums=(0, 3, 4)), in_dims=dims)(q, k, v, bias, sink)
        for n in range(3):
            one = torch.func.grad(f, argnums=(0, 3, 4))(q[n], k[n], v[n], bias if dim is None else bias[n], sink[n])
            for x, y in zip(mapped, one, strict=True):
                torch.testing.assert_close(x[n], y, rtol=0, atol=1e-12)


def test_vmap_without_heads():
    q, k, v = tensors((3, 20, 4), (3, 20, 4), (3, 20, 4), requires_grad=False)
    bias, sink = tensors((20,), (3,), requires_grad=False)

    def f(q, k, v, sink):
        return ct.attention(q, k, v, Fixed(4), key_bias=bias, sink=sink).square().sum()

    mapped = torch.func.vmap(torch.func.grad(f, argnums=(0, 3)))(q, k, v, sink)
    for n in range(3):
        for x, y in zip(mapped, torch.func.grad(f, argnums=(0, 3))(q[n], k[n], v[n], sink[n]), strict=True):
            torch.testing.assert_close(x[n], y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", (Fixed(8), LogSparse(hierarchical=True)), ids=str)
def test_the_stages_are_the_whole(pattern):
    inputs, options = problem(pattern)
    terms = terms_of()
    whole = ct.attention(*inputs, pattern, **options, **terms)
    summary = ct.summarize(*inputs, pattern, **options, softcap=2.0, key_bias=terms["key_bias"])
    out = ct.attend(*inputs, summary.key, summary.value, pattern, **options, **terms, region_bias=summary.bias)
    assert torch.equal(out, whole)
    leaves = [*inputs, terms["key_bias"], terms["sink"]]
    grad = torch.randn_like(out)
    for x, y in zip(*(torch.autograd.grad(made, leaves, grad) for made in (out, whole)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_mixtures_weights_and_bytes():
    inputs, options = problem(Fixed(8))
    terms = terms_of()
    W = ct.attention_weights(*inputs[:2], Fixed(8), **options, **terms)
    out = ct.attention(*inputs, Fixed(8), **options, **terms)
    torch.testing.assert_close(W @ inputs[2].repeat_interleave(2, dim=1), out)
    mixture = ct.attention(*inputs, Mixture(Fixed(8), LogSparse()), **options, **terms)
    torch.testing.assert_close(mixture, (out + ct.attention(*inputs, LogSparse(), **options, **terms)) / 2)
    sizes = [ct.workspace_bytes(*inputs, Fixed(8), backward=True, **given) for given in ({}, terms)]
    assert sizes[0] < sizes[1]


def test_half_precision_and_autocast():
    inputs, options = problem(Fixed(8))
    half = [x.detach().to(torch.bfloat16) for x in inputs]
    terms = terms_of(torch.float32)
    out = ct.attention(*half, Fixed(8), **options, **terms)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and terms["key_bias"].grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ct.attention(*(x.detach().float() for x in inputs), Fixed(8), **options, **terms), out)


@pytest.mark.parametrize(
    "name, value, error, message",
    (
        ("softcap", torch.tensor(2.0), TypeError, "softcap must be a number or None, got a torch.Tensor"),
        ("softcap", -1.0, ValueError, "softcap must be positive and finite, got -1"),
        ("key_bias", torch.zeros(L), TypeError, "key_bias must be torch.float64, as lse is, got torch.float32"),
        ("key_bias", np.zeros(L), TypeError, "key_bias must be a torch.Tensor, got ndarray"),
        ("key_bias", torch.zeros(L + 1).double(), ValueError, "key_bias must have shape"),
        ("region_bias", torch.zeros(3, 5).double(), ValueError, "region_bias must have shape"),
        ("sink", torch.zeros(3).double(), ValueError, r"sink must have shape \(2, 4\), got \(3,\)"),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_bad_term_is_named(name, value, error, message):
    inputs, options = problem(Fixed(8))
    with pytest.raises(error, match=message):
        ct.attention(*inputs, Fixed(8), **options, **{name: value})
