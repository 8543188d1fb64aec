# SPDX-License-Identifier: Apache-2.0
"""The terms of a logit in `CombinerAttention`: softcap, sinks and ALiBi of the module, biases of keys of a call."""

import copy
import io
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_problems import L, quiet, tensors  # noqa: E402

import combiner  # noqa: E402
import combiner.torch as ct  # noqa: E402
from combiner import Axial, Dense, Fixed, LogSparse, Tree  # noqa: E402

E, H = 24, 4
TERMS = {
    "softcap": {"softcap": 2.0},
    "sink": {"sink": True},
    "alibi": {"alibi": True},
    "softcap and sink": {"softcap": 2.0, "sink": True},
    "softcap and alibi": {"softcap": 2.0, "alibi": True},
}
every_term = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def module(pattern=Fixed(8), dtype=torch.float64, **options):  # noqa: B008
    options = {"batch_first": True, "is_causal": True, "dtype": dtype, **options}
    made = ct.CombinerAttention(E, H, pattern, **options)
    if made.sink is not None:
        torch.nn.init.normal_(made.sink)
    return made


def by_hand(made, x, key_bias=None, **options):
    """The module's output from `combiner.torch.attention` and the definition of ALiBi."""
    q, k, v = made._project(x, None, None)
    if made.alibi:
        slopes = torch.from_numpy(combiner.alibi_slopes(H))
        key_bias = (slopes[:, None] * torch.arange(x.shape[-2])).to(torch.promote_types(q.dtype, torch.float32))
    terms = {"softcap": made.softcap, "key_bias": key_bias, "sink": made.sink}
    return made._merge_heads(ct.attention(q, k, v, made.pattern, is_causal=True, **terms, **options))


@every_term
@pytest.mark.parametrize("groups", (4, 2))
@pytest.mark.parametrize("pattern", (Fixed(8), LogSparse(hierarchical=True), Axial(6, "rowmajor"), Tree(3)), ids=str)
def test_a_module_hands_its_terms_over(pattern, groups, terms):
    """The output, the weights and the gradients of every parameter, those of sinks among them."""
    made = module(pattern, num_key_value_heads=groups, **terms)
    (x,) = tensors((2, L, E))
    ignored = torch.rand(2, L) > 0.7
    out, weights = made(x, key_padding_mask=ignored, need_weights=True, average_attn_weights=False)
    expected = by_hand(made, x, key_mask=~ignored)
    assert torch.equal(out, expected)
    _, _, v = made._project(x, None, None)
    torch.testing.assert_close(made._merge_heads(weights @ v.repeat_interleave(H // groups, dim=1)), out)
    wanted, grad = (x, *made.parameters()), torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, wanted, grad), torch.autograd.grad(expected, wanted, grad))
    if made.sink is not None:
        assert torch.autograd.grad(made(x)[0].sum(), made.sink)[0].abs().min() > 0


def test_a_sink_starts_as_a_part_of_logit_zero():
    """By hand: of dense attention, one in the denominator."""
    made = ct.CombinerAttention(E, H, Dense(), batch_first=True, sink=True, dtype=torch.float64)
    assert made.sink.shape == (H,) and not made.sink.any()
    (x,) = tensors((2, L, E))
    q, k, v = made._project(x, None, None)
    e = (q @ k.mT * 6**-0.5).exp()
    expected = made._merge_heads((e / (1 + e.sum(-1, keepdim=True))) @ v)
    torch.testing.assert_close(made(x)[0], expected, rtol=1e-10, atol=1e-10)
    torch.nn.init.ones_(made.sink)
    made.reset_parameters()
    assert not made.sink.any()


@pytest.mark.parametrize("shape", ((L,), (H, L), (2, 1, L), (2, 2, L), (2, H, L)), ids=str)
def test_biases_of_a_call(shape):
    """Of each key, for all heads, key heads or query heads, with gradients; whatever axis comes first in the inputs."""
    made = module(num_key_value_heads=2, sink=True, softcap=3.0)
    x, bias = tensors((2, L, E), shape)
    out, expected = made(x, key_bias=bias)[0], by_hand(made, x, bias)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (x, bias), grad), torch.autograd.grad(expected, (x, bias), grad)
    )
    turned = module(num_key_value_heads=2, sink=True, softcap=3.0, batch_first=False)
    turned.load_state_dict(made.state_dict())
    first = turned(x.transpose(0, 1), key_bias=bias)[0].transpose(0, 1)
    torch.testing.assert_close(first, out, rtol=0, atol=1e-12)
    if bias.ndim < 3:
        torch.testing.assert_close(made(x[1], key_bias=bias)[0], out[1], rtol=0, atol=1e-14)


def test_packed_sequences():
    """Each with the rows that it has alone: a bias of ALiBi is a difference, wherever the sequence begins."""
    bounds = [0, 5, 5, 20, L]
    (x,) = tensors((2, L, E))
    for terms in ({}, *TERMS.values()):
        made = module(**terms)
        whole = made(x, cu_seqlens=torch.tensor(bounds))[0]
        alone = [made(x[:, a:b])[0] for a, b in itertools.pairwise(bounds) if a < b]
        torch.testing.assert_close(whole, torch.cat(alone, dim=1), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="cu_seqlens must be None where the abstraction is learned"):
        module(abstraction="deepsets")(x, cu_seqlens=bounds)


@quiet
@every_term
def test_compiled_and_exported(terms):
    """Without a break of the graph, and of any length."""
    made = module(**terms)
    given = () if made.alibi else (torch.randn(2, H, L, dtype=torch.float64),)
    (x,) = tensors((2, L, E))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.made = made

        def forward(self, x, bias=None):
            return self.made(x, key_bias=bias)[0]

    expected = Model()(x, *given)
    actual = torch.compile(Model(), backend="aot_eager", fullgraph=True)(x, *given)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    wanted = tuple(made.parameters())
    gradients = (torch.autograd.grad(y.square().sum(), wanted) for y in (actual, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    n = torch.export.Dim("L", min=5, max=4096)
    program = torch.export.export(Model(), (x, *given), dynamic_shapes=({1: n}, *({2: n} for _ in given))).module()
    short = x[:, :20], *(bias[..., :20] for bias in given)
    torch.testing.assert_close(program(*short), Model()(*short), rtol=1e-12, atol=1e-12)


@every_term
def test_checkpoints(terms):
    """A module with sinks has one parameter more; others load MultiheadAttention's checkpoints as ever."""
    made = module(**terms)
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    names = set(made.state_dict()) - set(theirs.state_dict())
    assert names == ({"sink"} if "sink" in terms else set())
    (x,) = tensors((2, L, E))
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    other = module(**terms)
    other.load_state_dict(torch.load(file))
    for each in (other, copy.deepcopy(made)):
        assert torch.equal(each(x)[0], made(x)[0])
    if names:
        with pytest.raises(RuntimeError, match=r'Missing key.* "sink"'):
            made.load_state_dict(theirs.state_dict())
    else:
        made.load_state_dict(theirs.state_dict())
    swapped = ct.CombinerAttention.from_mha(theirs, Fixed(8), is_causal=True, **terms)
    expected = module(**terms)
    expected.load_state_dict(theirs.state_dict(), strict=False)
    if names:
        expected.reset_parameters()
        expected.load_state_dict(theirs.state_dict(), strict=False)
        assert swapped.sink.dtype == torch.float64 and swapped.sink.requires_grad
    assert torch.equal(swapped(x)[0], expected(x)[0])


@every_term
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_16_bits_and_autocast(terms, dtype):
    """Terms are float32, as lse is, whatever the dtype of the module."""
    if dtype == torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    made = module(dtype=torch.float32, **terms)
    x = torch.randn(2, L, E)
    key_bias = {} if made.alibi else {"key_bias": torch.randn(H, L)}
    expected = made(x, **key_bias)[0]
    with torch.autocast("cpu", dtype):
        out = made(x, **key_bias)[0]
    half = copy.deepcopy(made).to(dtype)(x.to(dtype), **key_bias)[0]
    for each in (out, half):
        assert each.dtype == dtype
        torch.testing.assert_close(each.float(), expected, rtol=0, atol=2**-4 if dtype == torch.bfloat16 else 2**-7)
    out.float().sum().backward()
    assert made.sink is None or made.sink.grad.dtype == torch.float32


def test_a_layer_of_pytorch_takes_it():
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, dropout=0, batch_first=True, dtype=torch.float64)
    layer.self_attn = ct.CombinerAttention.from_mha(layer.self_attn, Fixed(8), softcap=2.0, sink=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    (x,) = tensors((2, L, E))
    model(x, is_causal=True).sum().backward()
    assert all(each.self_attn.sink.grad is not None for each in model.layers)
    model.eval()
    with torch.no_grad():
        assert model(x, is_causal=True).shape == x.shape


@every_term
@pytest.mark.parametrize("groups", (4, 2))
@pytest.mark.parametrize("pattern", (Fixed(8), Axial(6), Axial(6, "rowmajor")), ids=str)
def test_a_decoder_has_the_modules_terms(pattern, terms, groups):
    made = module(pattern, num_key_value_heads=groups, **terms)
    (x,) = tensors((2, L, E), requires_grad=False)
    for module_, given in ((made, x), (copy.deepcopy(made).float(), x.float())):
        decoder, within = module_.decoder(), 1e-10 if given.dtype == torch.float64 else 1e-5
        for _ in range(2):
            parts = [decoder.prefill(given[:, :20]), *(decoder.step(given[:, i : i + 1]) for i in range(20, L))]
            torch.testing.assert_close(torch.cat(parts, dim=1), module_(given)[0], rtol=within, atol=within)
            decoder.reset()
    half = copy.deepcopy(made).bfloat16()
    assert half.decoder().prefill(x.bfloat16()).dtype == torch.bfloat16


def test_it_says_its_terms():
    assert repr(module()).split("\n")[0] == "CombinerAttention("
    assert "softcap=2.0, sink=True" in repr(module(**TERMS["softcap and sink"]))
    assert "softcap=2.0, alibi=True" in repr(module(**TERMS["softcap and alibi"]))
    assert "softcap" not in repr(module()) and "sink" not in repr(module()) and "alibi" not in repr(module())


def test_arguments():
    (x,) = tensors((2, L, E))

    def refuses(error, match, call):
        with pytest.raises(error, match=match):
            call()

    for bad in (0, -1.0, float("inf"), float("nan")):
        refuses(
            ValueError, f"softcap must be positive and finite, got {float(bad)}", lambda bad=bad: module(softcap=bad)
        )
    refuses(TypeError, "softcap must be a number or None, got str", lambda: module(softcap="2"))
    refuses(TypeError, "sink must be a bool, got Tensor", lambda: module(sink=torch.zeros(H)))
    refuses(TypeError, "alibi must be a bool, got ndarray", lambda: module(alibi=combiner.alibi_slopes(H)))
    alibi = module(alibi=True)
    refuses(ValueError, "key_bias must be None where alibi is True", lambda: alibi(x, key_bias=torch.zeros(L)))
    refuses(ValueError, "is_causal must be True where alibi is", lambda: module(alibi=True, is_causal=False)(x))
    refuses(TypeError, "key_bias must be torch.float64, as lse is, got torch.float32",
            lambda: module()(x, key_bias=torch.zeros(L)))  # fmt: skip
    refuses(TypeError, "key_bias must be a torch.Tensor, got ndarray", lambda: module()(x, key_bias=np.zeros(L)))
    refuses(ValueError, "key_bias must have shape", lambda: module()(x, key_bias=torch.zeros(H, L + 1).double()))
    refuses(ValueError, "sink must be False where alibi is True", lambda: module(sink=True, alibi=True))
    refuses(TypeError, r"CombinerAttention\(\) has no 'sinks': sink is its name", lambda: module(sinks=True))
