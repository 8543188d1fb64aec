# SPDX-License-Identifier: Apache-2.0
"""What PyTorch does with the operators: compile, export, vmap, torch.func; and the two stages."""

import io

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch_problems import PATTERNS, L, compiled, every_pattern, problem, quiet, same, tensors  # noqa: E402

import combiner.torch as ct  # noqa: E402
from combiner import (  # noqa: E402
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    LogSparse,
    Mixture,
    Plan,
)
from combiner.torch import pattern_text  # noqa: E402
from combiner.torch.patterns import choices_of  # noqa: E402


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


# ---- what PyTorch does with operators ------------------------------------------------------------


def operands(pattern, **options):
    """What the operator takes."""
    inputs, own = problem(pattern, **options)
    clusters, regions = choices_of(pattern)
    given = *inputs, pattern_text.text_of(pattern), clusters, True, None, own["key_mask"], None, None, None
    seed = torch.tensor(5) if options.get("dropout_p") else None
    return *given, options.get("dropout_p", 0.0), seed, *terms_of(inputs[0], pattern, **options).values(), regions


def terms_of(query, pattern, has_terms=False, **options):
    """The terms of the logit by name, or None for each."""
    if not has_terms:
        return dict.fromkeys(("softcap", "key_bias", "region_bias", "sink"))
    *lead, heads, length, _ = query.shape
    bias, sink = tensors((*lead, heads, length), (*lead, heads))
    return {"softcap": 2.0, "key_bias": bias, "region_bias": None, "sink": sink}


@quiet
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("has_terms", (False, True))
@pytest.mark.parametrize(
    "pattern", (Fixed(8), PATTERNS[-1], PATTERNS[-2], PATTERNS[7], PATTERNS[8]), ids=lambda p: type(p).__name__
)
def test_opcheck(pattern, has_terms, dropout_p):
    given = operands(pattern, dropout_p=dropout_p, has_terms=has_terms)
    torch.library.opcheck(torch.ops.combiner.attention, given)
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
    out, _, softmax = torch.ops.combiner.attention(*given)
    torch.library.opcheck(torch.ops.combiner.attention_backward, (torch.randn_like(out), None, out, softmax, *given))


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


@pytest.mark.parametrize(
    "pattern",
    (Fixed(8), Fixed(5).plan(L, True), PATTERNS[-1], Mixture(Fixed(4), LogSparse())),
    ids=lambda p: str(p)[:9],
)
def test_gradients_by_torch_func(pattern):
    """grad, vjp, jacrev, vmap of grad and per-sample gradients are autograd's."""
    inputs, options = problem(pattern)
    del options["key_mask"]
    detached = tuple(x.detach() for x in inputs)

    def attend(*inputs):
        return ct.attention(*inputs, pattern, **options)

    def loss(*inputs):
        return attend(*inputs).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    assert same(torch.func.grad(loss, (0, 1, 2))(*detached), expected)
    out, pull = torch.func.vjp(attend, *detached)
    assert same(pull(2 * out), expected)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss, (0, 1, 2)))(*detached), expected, **close)

    def scaled(weight, *inputs):
        return loss(inputs[0] * weight, *inputs[1:])

    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    each = [torch.autograd.grad(scaled(weight, *(x[n] for x in inputs)), weight)[0] for n in range(2)]
    per_sample = torch.vmap(torch.func.grad(scaled), (None, 0, 0, 0))(weight.detach(), *detached)
    torch.testing.assert_close(per_sample, torch.stack(each), **close)


def test_jacobians():
    """Row by row, by one vectorized backward pass, and by torch.func's; with given regions, whose gradients are few."""
    q, k, v, rq, rk = tensors((2, 8, 3), (1, 8, 3), (1, 8, 2), (2, 4, 3), (1, 4, 3), requires_grad=False)

    def f(q, region_key):
        return ct.attention(q, k, v, Fixed(2), is_causal=True, region_query=rq, region_key=region_key)

    expected = torch.autograd.functional.jacobian(f, (q, rk))
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, (q, rk), vectorize=True), expected)
    torch.testing.assert_close(torch.func.jacrev(f, (0, 1))(q, rk), expected)
    torch.testing.assert_close(
        torch.func.jacrev(lambda q: ct.attention(q, k, v, Fixed(2)))(q),
        torch.autograd.functional.jacobian(lambda q: ct.attention(q, k, v, Fixed(2)), q),
    )


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
        out, lse, softmax = torch.ops.combiner.attention(q, k, v, *rest)
        return torch.ops.combiner.attention_backward(torch.ones_like(out), lse, out, softmax, q, k, v, *rest)

    expected = [torch.stack(x) for x in zip(*(f(*x) for x in zip(q, k, v, strict=True)), strict=True)]
    assert same(torch.vmap(f)(q, k, v), expected)
    assert torch.vmap(f, randomness="different")(q, k, v)[0].shape == q.shape


# ---- the two stages ------------------------------------------------------------------------------


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


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("pattern", (Fixed(8), PATTERNS[-1]), ids=lambda p: type(p).__name__)
def test_gradients_of_the_stages_by_torch_func(pattern):
    inputs, options = problem(pattern)
    masks = options["key_mask"]
    detached = tuple(x.detach() for x in inputs)

    def loss(*inputs, key_mask=masks):
        summary = ct.summarize(*inputs, pattern, key_mask=key_mask)
        out, lse = ct.attend(*inputs, *summary[:2], pattern, return_lse=True, key_mask=key_mask)
        return out.square().sum() + lse.sin().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    assert same(torch.func.grad(loss, (0, 1, 2))(*detached), expected)
    each = torch.vmap(lambda *x: torch.func.grad(loss, (0, 1, 2))(*x[:3], key_mask=x[3]))(*detached, masks)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(NotImplementedError, match="there is no second derivative; take differences of gradients"):
        gradients = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
        gradients[0].sum().backward()
    with pytest.raises(NotImplementedError, match="there is no forward-mode differentiation"):
        torch.func.jvp(lambda q: loss(q, *detached[1:]), detached[:1], detached[:1])


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


@quiet
def test_attend_of_some_positions():
    """With an offset: the bits of a whole call's rows, and the gradients that these rows give; under vmap too."""
    pattern = Fixed(8)
    inputs, options = problem(pattern)
    summary = ct.summarize(*inputs, pattern, **options)
    q, *others = [x.detach().requires_grad_() for x in (*inputs, *summary[:2])]
    rows = slice(11, 30)
    own = ct.attend(q[..., rows, :], *others, pattern, offset=11, return_lse=True, **options)
    whole = ct.attend(q, *others, pattern, return_lse=True, **options)
    expected = whole[0][..., rows, :], whole[1][..., rows]
    assert same(own, expected)
    grads = [torch.randn_like(x) for x in own]
    made, exact = (torch.autograd.grad(x, [q, *others], grads) for x in (own, expected))
    for x, y in zip(made, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)

    def one(q, *others):
        return ct.attend(q, *others, pattern, offset=11, is_causal=True)

    each = [x.detach() for x in (q[..., rows, :], *others)]
    mapped = torch.vmap(one)(*each)
    assert torch.equal(mapped, ct.attend(*each, pattern, offset=11, is_causal=True))
    with pytest.raises(ValueError, match="offset must be between 0 and 18, key's length less query's, got 19"):
        ct.attend(*each, pattern, offset=19)
