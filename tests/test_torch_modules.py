# SPDX-License-Identifier: Apache-2.0
"""The modules of combiner.torch: CombinerAttention, abstractions, online routing, the decoder."""

import copy
import io
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_problems import L, quiet, tensors  # noqa: E402

import combiner  # noqa: E402
import combiner.torch as ct  # noqa: E402
from combiner import (  # noqa: E402
    Axial,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Mixture,
    Plan,
    Tree,
)
from combiner.torch.tensors import as_array  # noqa: E402


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def module(pattern, E=24, heads=4, **options):
    made = ct.CombinerAttention(E, heads, pattern, **{"batch_first": True, "dtype": torch.float64, **options})
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
    with pytest.raises(ValueError, match="there is no cross-attention"):
        module(Fixed(8), bias=bias, batch_first=batch_first)(x, y, y)


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
    torch.testing.assert_close(grouped(x * 1, x * 1, x * 1), whole(x), rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("pattern", (Fixed(8), HeavilyCompressed(8, 5), Fixed(5).plan(L, True)), ids=str)
def test_channel_pool(pattern):
    """The module's own formula in loops; its gradients reach every parameter; masked positions reach nothing."""
    net = ct.ChannelPool(6, 8, dtype=torch.float64)
    torch.nn.init.normal_(net.query_bias)
    torch.nn.init.normal_(net.key_bias)
    attention = module(pattern, num_key_value_heads=2, is_causal=True, abstraction=net)
    (x,) = tensors((2, L, 24))
    ignored = torch.rand(2, L) > 0.7
    ignored[0, 8:16] = True
    out, _ = attention(x, key_padding_mask=ignored)
    q, k, v = (
        y.unflatten(-1, (-1, 6)).transpose(1, 2)
        for y in torch.nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).split([24, 12, 12], -1)
    )
    plan = pattern if isinstance(pattern, Plan) else pattern.plan(L, True)

    def regions(y, gate, bias):
        rows = torch.zeros(2, y.shape[1], plan.region_count, 6, dtype=y.dtype)
        for b in range(2):
            for r, members in enumerate(plan.regions):
                live = [(n, j) for n, j in enumerate(members.tolist()) if not ignored[b, j]]
                if live:
                    places, at = map(list, zip(*live, strict=True))
                    weight = (gate(y[b, :, at]) + bias[places]).softmax(1)
                    rows[b, :, r] = (weight * y[b, :, at]).sum(1)
        return rows

    given = {
        "region_query": regions(q, net.query_gate, net.query_bias),
        "region_key": regions(k, net.key_gate, net.key_bias),
    }
    expected = ct.attention(q, k, v, pattern, is_causal=True, key_mask=~ignored, **given)
    expected = attention.out_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    g = torch.randn_like(out)
    wanted = (x, *attention.parameters())
    actual, expected = (torch.autograd.grad(y, wanted, g) for y in (out, expected))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert all(y.abs().max() > 0 for y in actual)
    with pytest.raises(ValueError, match=r"regions must have at most rate = 8 positions, got one of 9"):
        module(Fixed(9), is_causal=True, abstraction=net)(x)
    dense = module(Dense(), is_causal=True, abstraction=net)  # no regions
    assert dense(x)[0].shape == x.shape


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


def test_online_routing_of_sequences_shorter_than_its_clusters():
    """Fewer positions than clusters: ids may lie beyond the length."""
    routing = ct.OnlineRouting(5, 1, 32, dtype=torch.float64)
    attention = module(routing, E=32, heads=1, is_causal=True).eval()
    for length in (1, 2, 4):
        x = torch.randn(20, length, 32, dtype=torch.float64)
        expected = [attention(each[None])[0][0] for each in x]
        torch.testing.assert_close(attention(x)[0], torch.stack(expected), rtol=1e-12, atol=1e-12)
        _, k, _ = attention._project(x, None, None)
        assert (routing(k).clusters >= length).any()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_the_same_cluster_functions(dtype):
    if dtype == torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    (x,) = tensors((2, L, 6), dtype=dtype)
    rows = as_array(x)
    centroids = ct.fit_centroids(x, 5, iterations=3, seed=1)
    assert centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert np.array_equal(centroids, combiner.fit_centroids(rows, 5, iterations=3, seed=1))
    clusters = ct.cluster(x, 5, balanced=True)
    assert np.array_equal(clusters, combiner.cluster(rows, 5, balanced=True))
    torch.library.opcheck(torch.ops.combiner.cluster, (x.detach(), 5, 3, True, 0))
    torch.library.opcheck(torch.ops.combiner.fit_centroids, (x.detach(), 5, 3, 0))
    with pytest.raises(TypeError, match="n must be an integer, got float"):
        ct.cluster(x, 5.0)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got ndarray"):
        ct.fit_centroids(rows, 5)


def test_cluster_operators():
    x, centroids = tensors((2, L, 6), (2, 5, 6), requires_grad=False)
    clusters = ct.assign_clusters(x, centroids, balanced=True)
    assert np.array_equal(clusters, combiner.assign_clusters(x.numpy(), centroids.numpy(), balanced=True))
    torch.library.opcheck(torch.ops.combiner.assign_clusters, (x, centroids, False))
    for dtype in (torch.float32, torch.bfloat16):  # of 16 bits: running means are float32
        given = centroids.to(dtype), x.to(dtype)
        assert ct.update_centroids(*given, clusters, decay=0.5).dtype == torch.float32
        torch.library.opcheck(torch.ops.combiner.update_centroids, (*given, clusters, 0.5))


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
    assert (decoder.length, decoder.nbytes, decoder.pattern) == (0, 0, pattern)
    decoder.step(x[:, :1] if batch_first else x[:, :1].transpose(0, 1))
    assert decoder.length == 1 and decoder.nbytes > 0
    assert repr(decoder) == f"<Decoder({pattern!r}) of length 1>"


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

    refuses(ValueError, "embed_dim must be a multiple of num_heads, .* got 24 and 5", lambda: module(Fixed(8), 24, 5))
    refuses(ValueError, "embed_dim must be .* both at least 1, got 0 and 4", lambda: module(Fixed(8), 0, 4))
    refuses(TypeError, "dropout must be a number, got str", lambda: module(Fixed(8), dropout="x"))
    refuses(TypeError, "batch_first must be a bool, got NoneType", lambda: module(Fixed(8), batch_first=None))
    refuses(TypeError, "is_causal must be a bool, got str", lambda: module(Fixed(8), is_causal="no"))
    refuses(TypeError, r"CombinerAttention\(\) has no 'causal': is_causal=True", lambda: module(Fixed(8), causal=True))
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
    refuses(TypeError, r"query must be a torch.Tensor, got NoneType", lambda: attention(None))
    refuses(ValueError, r"query must have shape \(B, L, E\).* got \(1, 2, 37, 24\)", lambda: attention(x[None]))
    refuses(ValueError, "attention must be made with is_causal=True", lambda: module(Fixed(8)).decoder())
    refuses(ValueError, "attention must have a pattern of its own", lambda: build("deepsets").decoder())
    refuses(ValueError, "attention must have a pattern of its own", lambda: build("routing").decoder())
    refuses(ValueError, "pattern must have a span", lambda: module(Fixed(), is_causal=True).decoder())
    mixed = module(Mixture(Fixed(8)), abstraction="deepsets")
    refuses(ValueError, "pattern must make one plan for all heads", lambda: mixed(x))
