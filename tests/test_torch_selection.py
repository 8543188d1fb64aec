# SPDX-License-Identifier: Apache-2.0
"""Selection in combiner.torch: `select` and `Selected` are combiner's, under autograd, compile, export and vmap."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch_problems import CLUSTERS, L, compiled, problem, same, tensors  # noqa: E402

import combiner  # noqa: E402
import combiner.torch as ct  # noqa: E402
from combiner import Axial, Fixed, HeavilyCompressed, LogSparse, Mixture, Routing, Tree  # noqa: E402

BLOCK = 8
BLOCKS = -(-L // BLOCK)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def choose(q, k, v, **options):
    """Attention that selects for itself."""
    regions = ct.select(q, k, Fixed(4), 2, block=BLOCK, is_causal=True, **options)
    return ct.attention(q, k, v, ct.Selected(Fixed(4), regions, block=BLOCK), is_causal=True, **options)


# ---- select --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    (
        {"is_causal": True},
        {"score": "mean", "scale": 0.3},
        {"is_causal": True, "causal_score": False},
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_select_is_combiners(dtype, options):
    """With masks, given region keys, bfloat16, and a Routing of a tensor."""
    q, k = tensors((2, 4, L, 6), (2, 2, L, 6), dtype=dtype)
    mask = torch.rand(2, L) > 0.3
    wide = [x.detach().float().numpy() for x in (q, k)]
    for pattern in (Fixed(4, size_bias=True), LogSparse(), Fixed(4).plan(L, bool(options.get("is_causal")))):
        chosen = ct.select(q, k, pattern, 3, block=BLOCK, key_mask=mask, **options)
        expected = combiner.select(*wide, pattern, 3, block=BLOCK, key_mask=mask.numpy(), **options)
        assert chosen.dtype == torch.int64 and not chosen.requires_grad and np.array_equal(chosen, expected)
    (given,) = tensors((2, 2, Fixed(4).plan(L).region_count, 6), dtype=dtype)
    chosen = ct.select(q, k, Fixed(4), 3, region_key=given, **options)
    assert np.array_equal(
        chosen, combiner.select(*wide, Fixed(4), 3, region_key=given.detach().float().numpy(), **options)
    )
    assert np.array_equal(
        ct.select(q[0, 0], k[0, 0], Fixed(4), 3), combiner.select(*(x[0, 0] for x in wide), Fixed(4), 3)
    )
    routing = ct.select(q, k, ct.Routing(torch.from_numpy(CLUSTERS)), 2)
    assert np.array_equal(routing, combiner.select(*wide, Routing(CLUSTERS), 2))


def test_the_operator_select():
    (q, k), mask = tensors((2, 4, L, 6), (2, 2, L, 6), requires_grad=False), torch.rand(2, L) > 0.3
    given = q, k, "Fixed(span=4)", None, 2, 16, True, 0.5, mask, None, None, None, "max", None
    torch.library.opcheck(torch.ops.combiner.select, given)
    routing = "Routing(pooling='max', size_bias=False)", torch.from_numpy(CLUSTERS)
    torch.library.opcheck(torch.ops.combiner.select, (q, k, *routing, 2, 16, False, *given[7:]))


def test_select_in_compiled_code():
    """One graph, compiled once; tensors without numbers get the right shape."""
    counter = CompileCounterWithBackend("aot_eager")
    g = torch.compile(choose, fullgraph=True, backend=counter)
    for _ in range(2):
        inputs = tensors((2, 4, L, 6), (2, 2, L, 6), (2, 2, L, 5))
        out, expected = g(*inputs), choose(*inputs)
        assert torch.equal(out, expected)
        assert same(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))
    assert counter.frame_count == 1
    with torch.device("meta"):
        q, k = torch.empty(2, 4, L, 6), torch.empty(2, 2, L, 6)
    with torch._subclasses.FakeTensorMode():
        regions = ct.select(torch.empty(3, 4, 130, 6), torch.empty(3, 2, 130, 6), Fixed(4), 5)
        assert regions.shape == (3, 2, 3, 5) and regions.dtype == torch.int64
    assert ct.select(q, k, Fixed(4), 5).shape == (2, 2, 1, 5)


def test_export_of_any_length():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return choose(q, k, v)

    n = torch.export.Dim("L", min=BLOCK + 1, max=4096)  # an axis of one block would be a constant
    program = torch.export.export(
        Model(), tuple(tensors(*[(2, 2, L, 4)] * 3, requires_grad=False)), dynamic_shapes=[{2: n}] * 3
    )
    for length in (9, 150):
        inputs = tensors(*[(2, 2, length, 4)] * 3, requires_grad=False)
        assert torch.equal(program.module()(*inputs), Model()(*inputs))


def test_vmap_and_torch_func():
    """As the entries one by one; the gradients that autograd has."""
    inputs = tensors((3, 4, L, 6), (3, 2, L, 6), (3, 2, L, 5))
    detached = [x.detach() for x in inputs]
    expected = torch.stack([choose(*x) for x in zip(*inputs, strict=True)])
    assert torch.equal(torch.vmap(choose)(*detached), expected)
    assert torch.equal(
        torch.vmap(choose)(*(x[:, 0] for x in detached)),
        torch.stack([choose(*(x[n, 0] for x in detached)) for n in range(3)]),
    )
    expected = torch.autograd.grad(expected.square().sum(), inputs)
    gradients = torch.func.grad(lambda *x: choose(*x).square().sum(), (0, 1, 2))(*detached)
    assert same(gradients, expected)
    each = torch.vmap(torch.func.grad(lambda *x: choose(*x).square().sum(), (0, 1, 2)))(*detached)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"block": 0}, ValueError, "block must be at least 1, got 0"),
        ({"score": "sum"}, ValueError, "score must be one of 'max', 'mean', got 'sum'"),
        ({"query": np.zeros((4, 8))}, TypeError, "query must be a torch.Tensor, got ndarray"),
        ({"key": torch.zeros(2, L, 6, dtype=torch.float64)}, TypeError, "key must be torch.float32 like query"),
        ({"pattern": Fixed}, TypeError, "pattern must be a pattern such as .*, got Fixed, a class: call it"),
        ({"pattern": Mixture(Fixed(4))}, ValueError, "pattern must have one softmax, got a Mixture"),
        ({"scale": torch.ones(())}, TypeError, "scale must be a number"),
        ({"key_mask": torch.ones(9, dtype=torch.bool)}, ValueError, "key_mask must have shape"),
        ({"regions": 2}, TypeError, "unexpected keyword argument 'regions'"),
    ],
    ids=str,
)
def test_arguments_of_select(change, error, says):
    with pytest.raises(error, match=says):
        ct.select(**{"query": torch.zeros(2, L, 6), "key": torch.zeros(2, L, 6), "pattern": Fixed(4), "k": 2} | change)


# ---- Selected ------------------------------------------------------------------------------------


def draw(R, lead=(2, 2)):
    return torch.randint(-1, R, (*lead, BLOCKS, 3))


@pytest.mark.parametrize("open, rest", ((True, True), (True, False), (False, False)))
@pytest.mark.parametrize(
    "base", (Fixed(4), Fixed(4, window=6), HeavilyCompressed(4, 6), LogSparse(), Tree(3)), ids=lambda p: str(p)
)
def test_selected_is_combiners(base, open, rest):
    """A set for each key head, int32, gradients, the sparse form, plans; packed sequences of one length."""
    inputs, options = problem(base)
    regions = draw(base.plan(L, True).region_count)
    choice = {"block": BLOCK, "open": open, "rest": rest}
    theirs = combiner.Selected(base, regions.numpy(), **choice)
    arrays, mask = [x.detach().numpy() for x in inputs], options["key_mask"].numpy()
    expected, saved = combiner.attention_forward(*arrays, theirs, is_causal=True, key_mask=mask)
    for own in (regions, regions.to(torch.int32), regions.clone().expand(2, 2, -1, -1)):
        out = ct.attention(*inputs, ct.Selected(base, own, **choice), **options)
        assert np.array_equal(out.detach(), expected)
        gradients = torch.autograd.grad(out.sum(), inputs)
        for x, y in zip(gradients, combiner.attention_backward(np.ones_like(expected), saved), strict=False):
            assert np.array_equal(x, y)
    ours = ct.Selected(base, regions, **choice)
    sparse = ct.attention(*inputs, ours.sparse(), **options).detach()
    assert np.array_equal(sparse, combiner.attention(*arrays, theirs.sparse(), is_causal=True, key_mask=mask))
    assert [x.pairs for x in ours.plan(L, True)] == [x.pairs for x in theirs.plan(L, True)]


def test_selected_of_a_routing_of_a_tensor():
    inputs, options = problem(Fixed(4), is_causal=False)
    clusters, regions = torch.randint(5, (2, 2, L)), draw(5)
    ours = ct.Selected(ct.Routing(clusters, pooling="mean"), regions, block=BLOCK)
    theirs = combiner.Selected(Routing(clusters.numpy(), pooling="mean"), regions.numpy(), block=BLOCK)
    numpy_options = options | {"key_mask": options["key_mask"].numpy()}
    expected = combiner.attention(*(x.detach().numpy() for x in inputs), theirs, **numpy_options)
    assert np.array_equal(ct.attention(*inputs, ours, **options).detach(), expected)
    g = torch.compile(lambda *x: ct.attention(*x, ours, **options), **compiled)
    assert np.array_equal(g(*inputs).detach(), expected)
    assert len(ours.as_numpy().plan(L)) == 4


def test_gradcheck():
    """The exact derivatives, given the choice."""
    inputs, regions = tensors((2, 4, 13, 3), (2, 2, 13, 3), (2, 2, 13, 2)), torch.randint(-1, 4, (2, 2, 3, 2))
    for options in ({}, {"rest": False}, {"rest": False, "open": False}):
        pattern = ct.Selected(Fixed(4, pooling="mean"), regions, block=5, **options)
        torch.autograd.gradcheck(lambda *x, p=pattern: ct.attention(*x, p, is_causal=True), inputs)


def test_compiled_regions_may_change():
    counter = CompileCounterWithBackend("aot_eager")

    def f(q, k, v, regions):
        return ct.attention(q, k, v, ct.Selected(Fixed(4), regions, block=BLOCK), is_causal=True)

    g = torch.compile(f, fullgraph=True, backend=counter)
    inputs, _ = problem(Fixed(4))
    for _ in range(3):
        regions = draw(10)
        out, expected = g(*inputs, regions), f(*inputs, regions)
        assert torch.equal(out, expected)
        assert same(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("lead", ((), (2,)), ids=("one set", "a set for each head"))
def test_vmap_of_regions(lead):
    """Mapped and not, for all heads and for each."""
    q, k, v = tensors((3, 4, L, 6), (3, 2, L, 6), (3, 2, L, 5), requires_grad=False)

    def f(q, k, v, regions):
        return ct.attention(q, k, v, ct.Selected(Fixed(4), regions, block=BLOCK), is_causal=True)

    regions = draw(10, (3, *lead))
    expected = torch.stack([f(*x) for x in zip(q, k, v, regions, strict=True)])
    assert torch.equal(torch.vmap(f)(q, k, v, regions), expected)
    expected = torch.stack([f(*x, regions[0]) for x in zip(q, k, v, strict=True)])
    assert torch.equal(torch.vmap(f, in_dims=(0, 0, 0, None))(q, k, v, regions[0]), expected)


def test_the_stages_and_weights_of_selected():
    inputs, options = problem(Fixed(4))
    pattern = ct.Selected(Fixed(4), draw(10), block=BLOCK)
    summary = ct.summarize(*inputs, pattern, **options)
    actual = ct.attend(*inputs, *summary[:2], pattern, **options)
    expected = ct.attention(*inputs, pattern, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(actual)
    actual, expected = (torch.autograd.grad(x, inputs, g) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = ct.attention_weights(*inputs[:2], pattern, **options)
    out = weights @ inputs[2].repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, ct.attention(*inputs, pattern, **options), rtol=1e-12, atol=1e-12)
    own = {"is_causal": True, "key_mask": options["key_mask"].numpy()}
    assert ct.workspace_bytes(*inputs, pattern, **options) == combiner.workspace_bytes(
        *(x.detach().numpy() for x in inputs), pattern.as_numpy(), **own
    )


def test_selected_that_are_refused():
    q, k, v = tensors((2, L, 4), (2, L, 4), (2, L, 4), requires_grad=False)
    regions = torch.zeros(BLOCKS, 1, dtype=torch.int64)

    def refuses(error, match, pattern, **options):
        with pytest.raises(error, match=match):
            ct.attention(q, k, v, pattern, **options)

    refuses(
        TypeError, "regions must be a torch.Tensor of integers, got ndarray", ct.Selected(Fixed(4), regions.numpy())
    )
    refuses(TypeError, "regions must be .* got torch.float32", ct.Selected(Fixed(4), regions.float()))
    refuses(ValueError, "pattern must be Fixed, .* or a Routing of a tensor", ct.Selected(Routing(CLUSTERS), regions))
    refuses(ValueError, r"pattern must have regions that queries share", ct.Selected(Axial(4), regions, block=BLOCK))
    refuses(TypeError, "got Fixed, a class: call it", ct.Selected(Fixed, regions))
    refuses(ValueError, "regions must have 1 blocks of 64 queries", ct.Selected(Fixed(4), regions))
    refuses(ValueError, "regions must lie between -1 and 9", ct.Selected(Fixed(4), regions + 10, block=BLOCK))
    refuses(ValueError, "open must be True where rest", ct.Selected(Fixed(4), regions, block=BLOCK, open=False))
    routing = ct.Selected(ct.Routing(torch.from_numpy(CLUSTERS)), regions, block=BLOCK)
    refuses(ValueError, "pattern must not be a Routing where is_causal is True", routing, is_causal=True)
    mixture = Mixture(ct.Selected(Fixed(4), regions, block=BLOCK), Fixed(4))
    refuses(TypeError, r"pattern must be a Mixture of .* combiner.torch.Selected: give as_numpy\(\)", mixture)


# ---- modules -------------------------------------------------------------------------------------


def module(pattern, **options):
    options = {"select_block": BLOCK, **options}
    return ct.CombinerAttention(24, 4, pattern, batch_first=True, dtype=torch.float64, **options)


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("abstraction", (None, "mean", "deepsets"))
def test_a_module_selects_by_its_own_query_and_key(abstraction, is_causal):
    """By learned abstractions where there are any; gradients reach every parameter."""
    attention = module(Fixed(4), num_key_value_heads=2, select=2, abstraction=abstraction, is_causal=is_causal)
    (x,) = tensors((2, L, 24))
    ignored = torch.rand(2, L) > 0.7
    out, weights = attention(x, key_padding_mask=ignored, need_weights=True, average_attn_weights=False)
    parts = torch.nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).split([24, 12, 12], -1)
    q, k, v = (y.unflatten(-1, (-1, 6)).transpose(1, 2) for y in parts)
    options = {"is_causal": is_causal, "key_mask": ~ignored}
    of_regions = {}
    if abstraction == "deepsets":
        plan = Fixed(4).plan(L, is_causal)
        members = torch.from_numpy(np.concatenate(plan.regions))
        offsets = torch.tensor([0, *np.cumsum([len(x) for x in plan.regions])])
        of_regions["region_query"], of_regions["region_key"] = attention.abstraction(
            q, k, ct.Regions(members, offsets), ~ignored
        )
    base = Fixed(4, pooling="mean" if abstraction == "mean" else "max")
    regions = ct.select(q, k, base, 2, block=BLOCK, region_key=of_regions.get("region_key"), **options)
    expected = ct.attention(q, k, v, ct.Selected(base, regions, block=BLOCK), **options, **of_regions)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, dim=1), expected, rtol=1e-10, atol=1e-10)
    expected = attention.out_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    actual, expected = (torch.autograd.grad(y.sum(), (x, *attention.parameters())) for y in (out, expected))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert all(y.abs().max() > 0 for y in actual)


def test_a_module_that_opens_everything_is_dense():
    """With MultiheadAttention's weights it is that module; with OnlineRouting it opens clusters."""
    theirs = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)
    (x,) = tensors((2, L, 24))
    ours = ct.CombinerAttention.from_mha(theirs, Fixed(4), select=10, select_block=1)
    torch.testing.assert_close(ours(x)[0], theirs(x, x, x)[0], rtol=1e-10, atol=1e-10)
    routing = module(ct.OnlineRouting(5, 4, 6, dtype=torch.float64), select=5).eval()
    routing.load_state_dict(theirs.state_dict(), strict=False)
    torch.testing.assert_close(routing(x)[0], theirs(x, x, x)[0], rtol=1e-10, atol=1e-10)
    assert "Fixed(span=4), is_causal=False, select=10, select_block=1" in repr(ours)


def test_a_causal_module_knows_nothing_of_later_positions():
    attention = module(Fixed(4), select=2, is_causal=True)
    (x,) = tensors((1, L, 24), requires_grad=False)
    out, _ = attention(x)
    for n in (3, 17, L - 1):
        other = x.clone()
        other[:, n:] = torch.randn(1, L - n, 24, dtype=x.dtype) * 5
        assert torch.equal(attention(other)[0][:, :n], out[:, :n])


def test_training_with_selection():
    """A few steps of a causal model that copies one token from far away: its loss falls; compiled, it is the same."""
    attention = module(Fixed(4, pooling="mean"), select=2, is_causal=True)
    head = torch.nn.Linear(24, 24, dtype=torch.float64)
    (x,) = tensors((4, L, 24), requires_grad=False)
    target = x[:, 2]  # of the last position, which sees it through a summary, or directly where it opens that
    optimizer = torch.optim.Adam([*attention.parameters(), *head.parameters()], 0.01)
    losses = []
    for _ in range(30):
        loss = (head(attention(x)[0][:, -1]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    g = torch.compile(lambda x: attention(x)[0], **compiled)
    assert torch.equal(g(x), attention(x)[0])


def test_the_decoder_of_a_module_that_selects():
    attention = module(Fixed(4), select=2, select_block=1, is_causal=True)
    x = torch.randn(1, L, 24, dtype=torch.float64)
    decoder = attention.decoder()
    rows = [decoder.prefill(x[:, :20]), *(decoder.step(x[:, i : i + 1]) for i in range(20, L))]
    torch.testing.assert_close(torch.cat(rows, dim=1), attention(x)[0], rtol=0, atol=1e-12)


def test_modules_that_are_refused():
    for pattern, error, says in (
        (Axial(4), ValueError, "pattern must have regions that queries share"),
        (Mixture(Fixed(4)), ValueError, "pattern must have regions that queries share"),
        (Fixed(4).plan(L), TypeError, "pattern must be a pattern such as .*, got Plan"),
    ):
        with pytest.raises(error, match=says):
            module(pattern, select=2)
    with pytest.raises(ValueError, match="select must be at least 0, got -1"):
        module(Fixed(4), select=-1)
    with pytest.raises(TypeError, match="select must be an integer, got float"):
        module(Fixed(4), select=1.5)
    attention = module(Fixed(4), select=2, is_causal=True)
    with pytest.raises(ValueError, match=f"attention must have select_block=1: each step .*, got {BLOCK}"):
        attention.decoder()


# ---- packed sequences ----------------------------------------------------------------------------

CU_SEQLENS = [0, 9, 9, 20, L]


@pytest.mark.parametrize("base", (Fixed(4), Tree(3, pooling="mean"), Routing(CLUSTERS)), ids=str)
def test_packed_sequences_are_combiners(base):
    """Regions, outputs and gradients; of a Routing of a tensor too."""
    inputs, options = problem(base, is_causal=not isinstance(base, Routing))
    arrays = [x.detach().numpy() for x in inputs]
    options["cu_seqlens"] = torch.tensor(CU_SEQLENS)
    theirs = options | {name: options[name].numpy() for name in ("key_mask", "cu_seqlens")}
    ours = ct.Routing(torch.from_numpy(base.clusters.copy())) if isinstance(base, Routing) else base
    regions = ct.select(*inputs[:2], ours, 2, block=BLOCK, **options)
    np.testing.assert_array_equal(regions, combiner.select(*arrays[:2], base, 2, block=BLOCK, **theirs))
    assert regions.shape == (2, 2, 2 + 2 + 3, 2)
    out = ct.attention(*inputs, ct.Selected(ours, regions, block=BLOCK), **options)
    selected = combiner.Selected(base, regions.numpy(), block=BLOCK)
    expected, saved = combiner.attention_forward(*arrays, selected, **theirs)
    assert np.array_equal(out.detach(), expected)
    gradients = torch.autograd.grad(out.sum(), inputs)
    for x, y in zip(gradients, combiner.attention_backward(np.ones_like(expected), saved), strict=False):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("fullgraph", (False, True))
def test_packed_sequences_in_compiled_code(fullgraph):
    """One graph for any boundaries where dynamic shapes are captured; else the graph breaks at `select`."""

    def f(q, k, v, cu_seqlens):
        return choose(q, k, v, cu_seqlens=cu_seqlens)

    counter = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=fullgraph):
        g = torch.compile(f, fullgraph=fullgraph, backend=counter)
        for bounds in (CU_SEQLENS, [0, 1, 2, 30, L], [0, 8, 16, 24, L]):
            inputs = tensors((2, 4, L, 6), (2, 2, L, 6), (2, 2, L, 5))
            out, expected = (call(*inputs, torch.tensor(bounds)) for call in (g, f))
            assert torch.equal(out, expected)
            assert same(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))
    assert counter.frame_count == 1 or not fullgraph


def test_the_operator_select_of_packed_sequences():
    q, k = tensors((2, 4, L, 6), (2, 2, L, 6), requires_grad=False)
    given = q, k, "Fixed(span=4)", None, 2, 16, True, 0.5, None, torch.tensor(CU_SEQLENS), None, None, "max", None
    torch.library.opcheck(torch.ops.combiner.select, given)


def test_a_module_selects_in_each_packed_sequence():
    attention = module(Fixed(4), num_key_value_heads=2, select=2, is_causal=True)
    (x,) = tensors((2, L, 24), requires_grad=False)
    out = attention(x, cu_seqlens=CU_SEQLENS)[0]
    for a, b in ((0, 9), (9, 20), (20, L)):
        torch.testing.assert_close(out[:, a:b], attention(x[:, a:b])[0], rtol=0, atol=1e-12)
    routing = module(ct.OnlineRouting(5, 4, 6, dtype=torch.float64), select=2).eval()
    weights = routing(x, cu_seqlens=CU_SEQLENS, need_weights=True)[1]
    assert (weights[:, :9, 9:] == 0).all() and (weights[:, 20:, 20:].sum(-1) > 0.99).all()


def test_vmap_of_packed_sequences():
    inputs = tensors((3, 4, L, 6), (3, 2, L, 6), (3, 2, L, 5), requires_grad=False)
    bounds = torch.tensor(CU_SEQLENS)
    expected = torch.stack([choose(*x, cu_seqlens=bounds) for x in zip(*inputs, strict=True)])
    assert torch.equal(torch.vmap(lambda *x: choose(*x, cu_seqlens=bounds))(*inputs), expected)
