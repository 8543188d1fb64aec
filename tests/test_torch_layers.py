# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own layers with `CombinerAttention` in place of their attention: with Dense they are what they were."""

import contextlib
import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from fresh import fresh_process  # noqa: E402
from torch import nn  # noqa: E402

import combiner.torch as ct  # noqa: E402
from combiner import Dense, Fixed, LogSparse, Plan  # noqa: E402

B, L, E, H = 3, 20, 24, 4
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
PADDED = torch.arange(L) >= torch.tensor([[L], [L - 4], [L - 7]])  # True for keys to leave out
ADDED = torch.zeros(B, L, dtype=torch.float64).masked_fill(PADDED, -torch.inf)
MASKS = {
    "none": {},
    "float": {"mask": CAUSAL},
    "bool": {"mask": CAUSAL.isneginf()},
    "float and hint": {"mask": CAUSAL, "is_causal": True},
    "bool and hint": {"mask": CAUSAL.isneginf(), "is_causal": True},
    "nothing hidden": {"mask": torch.zeros(L, L, dtype=torch.float64)},
    "padded": {"src_key_padding_mask": PADDED},
    "padded by -inf": {"src_key_padding_mask": ADDED},
    "padded, causal": {"src_key_padding_mask": PADDED, "mask": CAUSAL.isneginf()},
    "padded by -inf, causal": {"src_key_padding_mask": ADDED, "mask": CAUSAL, "is_causal": True},
}
# What torch.compile asks of what it is given.
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh():
    """One thread of PyTorch's: layers this small spend their time waiting for others on a busy machine."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer(kind=nn.TransformerEncoderLayer, **options):
    return kind(E, H, 32, dropout=0.0, dtype=torch.float64, **options)


def swapped(module, pattern=Dense(), **options):  # noqa: B008
    """A copy with our self-attention in every layer."""
    module = copy.deepcopy(module)
    for each in module.modules():
        if isinstance(each, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            each.self_attn = ct.CombinerAttention.from_mha(each.self_attn, pattern, **options)
    return module


def sequence(length=L, batch_first=True):
    return torch.randn((B, length, E) if batch_first else (length, B, E), dtype=torch.float64)


@contextlib.contextmanager
def fast_path(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


# ---- the same function


@pytest.mark.parametrize("enabled", (True, False), ids=("fast", "slow"))
@pytest.mark.parametrize("batch_first, norm_first", ((True, False), (False, True)))
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_an_encoder_takes_it(masks, batch_first, norm_first, enabled):
    """Stacked by deep copies, in training and evaluation, with and without gradients."""
    theirs = layer(batch_first=batch_first, norm_first=norm_first)
    encoders = [nn.TransformerEncoder(each, 2, enable_nested_tensor=False) for each in (theirs, swapped(theirs))]
    x = sequence(batch_first=batch_first)
    for is_training in (True, False):
        for is_differentiated in (True, False):
            with torch.set_grad_enabled(is_differentiated), fast_path(enabled):
                expected, actual = (each.train(is_training)(x, **masks) for each in encoders)
                close(actual, expected)
    of_theirs, of_ours = (torch.autograd.grad(each(x, **masks).sum(), [*each.parameters()]) for each in encoders)
    close(of_ours, of_theirs)


@pytest.mark.parametrize("batch_first", (True, False))
def test_a_decoder_takes_it_as_self_attention(batch_first):
    theirs = nn.TransformerDecoder(layer(nn.TransformerDecoderLayer, batch_first=batch_first), 2)
    x, memory = sequence(batch_first=batch_first), sequence(13, batch_first)
    for ours in (swapped(theirs), swapped(theirs, is_causal=True)):
        for is_causal in (None, True):
            actual = ours(x, memory, CAUSAL, tgt_is_causal=is_causal)
            close(actual, theirs(x, memory, CAUSAL, tgt_is_causal=is_causal))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning")
@pytest.mark.parametrize("batch_first", (True, False))
def test_a_transformer_takes_it(batch_first):
    options = {"dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    theirs = nn.Transformer(E, H, 2, 2, 32, **options)
    ours = swapped(theirs)
    source, target = sequence(13, batch_first), sequence(batch_first=batch_first)
    padded = {"src_key_padding_mask": PADDED[:, :13], "memory_key_padding_mask": PADDED[:, :13]}
    for masks in ({"tgt_is_causal": True}, padded):
        expected = theirs(source, target, tgt_mask=CAUSAL, **masks)
        close(ours(source, target, tgt_mask=CAUSAL, **masks), expected)
        with torch.no_grad():
            theirs.eval(), ours.eval()
            ours.encoder.use_nested_tensor = False
            close(ours(source, target, tgt_mask=CAUSAL, **masks), expected)
            theirs.train(), ours.train()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_a_nested_tensor_is_refused_with_a_way_out():
    """An encoder that was made before its attention was swapped makes nested tensors in evaluation."""
    ours = swapped(nn.TransformerEncoder(layer(batch_first=True), 2)).eval()
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"query must be a padded tensor, .* set its use_nested_tensor"),
    ):
        ours(sequence(), src_key_padding_mask=PADDED)


def test_cross_attention_is_refused():
    """Of another length, and of the same, which summaries of pairs would silently pass for one sequence."""
    decoder = layer(nn.TransformerDecoderLayer, batch_first=True)
    decoder.multihead_attn = ct.CombinerAttention.from_mha(decoder.multihead_attn, Fixed(4))
    with pytest.raises(ValueError, match=r"key must have query's shape .*: there is no cross-attention, .* leave a"):
        decoder(sequence(), sequence(13))
    with pytest.raises(ValueError, match=r"key and value must be of query's sequence.*: there is no cross-attention"):
        decoder(sequence(), sequence())


def test_a_causal_module_in_a_layer_that_says_nothing():
    """PyTorch's layers give is_causal=False where they are told nothing."""
    theirs = layer(batch_first=True)
    x = sequence()
    close(swapped(theirs, is_causal=True)(x), theirs(x, src_mask=CAUSAL))
    close(swapped(theirs)(x, is_causal=True), theirs(x, src_mask=CAUSAL))


@pytest.mark.parametrize("pattern", (Fixed(4), LogSparse()), ids=str)
def test_every_way_to_say_causal_is_one(pattern):
    ours = ct.CombinerAttention(E, H, pattern, batch_first=True, dtype=torch.float64)
    causal = ct.CombinerAttention(E, H, pattern, batch_first=True, is_causal=True, dtype=torch.float64)
    causal.load_state_dict(ours.state_dict())
    x = sequence()
    expected = causal(x)[0]
    for options in (
        {"is_causal": True},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL.float()},
        {"attn_mask": CAUSAL.isneginf()},
        {"attn_mask": CAUSAL.expand(B * H, L, L), "is_causal": True},
    ):
        assert torch.equal(ours(x, **options)[0], expected)
        assert torch.equal(causal(x, **options)[0], expected)
    for mask in (torch.zeros(L, L), torch.zeros(L, L, dtype=torch.bool)):
        assert torch.equal(ours(x, attn_mask=mask)[0], ours(x)[0])
        assert torch.equal(causal(x, attn_mask=mask)[0], expected)


def test_other_masks_are_refused():
    ours = ct.CombinerAttention(E, H, Fixed(4), batch_first=True, dtype=torch.float64)
    x = sequence()

    def refuses(error, match, **masks):
        with pytest.raises(error, match=match):
            ours(x, **masks)

    window = torch.ones(L, L, dtype=torch.bool).triu(1) | torch.ones(L, L, dtype=torch.bool).tril(-4)
    for is_causal in (None, True):
        refuses(ValueError, "attn_mask must be causal or hide nothing", attn_mask=window, is_causal=is_causal)
        refuses(ValueError, "attn_mask must hold 0 and -inf alone", attn_mask=CAUSAL + 1, is_causal=is_causal)
    refuses(ValueError, r"attn_mask must have shape \(20, 20\), got \(4, 4\)", attn_mask=CAUSAL[:4, :4])
    refuses(TypeError, "attn_mask must be bool, .* got torch.int64", attn_mask=window.long())
    refuses(TypeError, "attn_mask must be a torch.Tensor, got str", attn_mask="causal")
    refuses(TypeError, "key_padding_mask must be a torch.Tensor, got list", key_padding_mask=[0, 1])
    refuses(TypeError, "key_padding_mask must be bool, .* got torch.int64", key_padding_mask=PADDED.long())
    refuses(ValueError, "key_padding_mask must hold 0 and -inf alone", key_padding_mask=PADDED * -1e9)


# ---- from_mha


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("batch_first", (True, False))
def test_from_mha_copies_everything(batch_first, bias):
    """A mismatch of batch_first would attend over the batch without an error."""
    theirs = nn.MultiheadAttention(E, H, 0.25, bias, batch_first=batch_first, dtype=torch.float64).eval()
    theirs.out_proj.weight.requires_grad_(False)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = ct.CombinerAttention.from_mha(theirs, Dense(), is_causal=True)
    x = sequence(batch_first=batch_first)
    expected = theirs(x, x, x, attn_mask=CAUSAL, average_attn_weights=False)
    close(ours(x, need_weights=True, average_attn_weights=False), expected)
    assert (ours.dropout, ours.batch_first, ours.training, ours.is_causal) == (0.25, batch_first, False, True)
    assert ours.in_proj_weight.requires_grad and not ours.out_proj.weight.requires_grad
    assert set(ours.state_dict()) == set(theirs.state_dict())
    before = theirs.in_proj_weight.clone()
    with torch.no_grad():
        ours.in_proj_weight.zero_()
    assert torch.equal(theirs.in_proj_weight, before)
    assert ct.CombinerAttention.from_mha(theirs.train(), Fixed(4)).training
    learned = ct.CombinerAttention.from_mha(theirs, Fixed(4), abstraction="deepsets")
    assert learned.abstraction.key_phi.weight.dtype == torch.float64


def test_from_mha_refuses_what_is_not_there():
    def refuses(error, match, mha):
        with pytest.raises(error, match=match):
            ct.CombinerAttention.from_mha(mha, Fixed(4))

    refuses(
        ValueError, "mha must have kdim and vdim of embed_dim, 24, got 8 and 24", nn.MultiheadAttention(E, H, kdim=8)
    )
    refuses(ValueError, "mha must have add_bias_kv=False", nn.MultiheadAttention(E, H, add_bias_kv=True))
    refuses(ValueError, "mha must have add_zero_attn=False", nn.MultiheadAttention(E, H, add_zero_attn=True))
    refuses(TypeError, r"mha must be a torch.nn.MultiheadAttention, got torch.nn.*Linear", nn.Linear(E, E))
    quantizable = torch.ao.nn.quantizable.MultiheadAttention(E, H)
    refuses(TypeError, "mha must be a torch.nn.MultiheadAttention, got torch.ao", quantizable)


def test_batch_first_must_be_said():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'batch_first'"):
        ct.CombinerAttention(E, H, Fixed(4))


# ---- what is done with layers


@quiet
@pytest.mark.parametrize("name", ("none", "float and hint", "padded", "padded by -inf, causal"))
def test_a_compiled_encoder(name):
    """Without a break of its graph, with padding too; PyTorch's encoder breaks it for a mask without the hint."""
    masks = MASKS[name]
    ours = nn.TransformerEncoder(swapped(layer(batch_first=True), Fixed(4)), 2, enable_nested_tensor=False)
    x = sequence()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected, actual = ours(x, **masks), compiled(x, **masks)
    close(actual, expected)
    parameters = [*ours.parameters()]
    close(torch.autograd.grad(actual.sum(), parameters), torch.autograd.grad(expected.sum(), parameters))


@quiet
def test_masks_in_compiled_code():
    ours = ct.CombinerAttention(E, H, Fixed(4), batch_first=True, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = sequence()
    close(compiled(x, attn_mask=CAUSAL)[0], ours(x, is_causal=True)[0])
    with pytest.raises(RuntimeError, match="attn_mask must be causal in compiled code"):
        compiled(x, attn_mask=torch.zeros_like(CAUSAL))
    with pytest.raises(RuntimeError, match="key_padding_mask must hold 0 and -inf alone"):
        compiled(x, key_padding_mask=PADDED * -1e9)


PATTERNS = (
    Fixed(4),
    Fixed(4).plan(L, True),
    Plan.from_parts([list(range(i + 1)) for i in range(L)], is_causal=True),
)


@pytest.mark.parametrize("pattern", PATTERNS, ids=("value", "plan", "own plan"))
def test_copies_and_pickles(pattern):
    """Plans too, which `nn.TransformerEncoder` copies and checkpoints of whole modules hold."""
    ours = nn.TransformerEncoder(swapped(layer(batch_first=True), pattern), 2, enable_nested_tensor=False)
    x = sequence()
    expected = ours(x, mask=CAUSAL)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x, mask=CAUSAL), expected)
    other = nn.TransformerEncoder(swapped(layer(batch_first=True), pattern), 2, enable_nested_tensor=False)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(x, mask=CAUSAL), expected)


class Attended(torch.utils.data.Dataset):
    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 2

    def __getitem__(self, n):
        return self.module(torch.full((L, E), n + 1.0, dtype=torch.float64))[0].detach()


@fresh_process(timeout=120)
def test_spawned_workers():
    torch.manual_seed(0)
    data = Attended(ct.CombinerAttention(E, H, Fixed(4), batch_first=True, dtype=torch.float64))
    loader = torch.utils.data.DataLoader(data, num_workers=1, multiprocessing_context="spawn")
    assert [torch.equal(x[0], data[n]) for n, x in enumerate(loader)] == [True, True]


def test_checkpointed_layers():
    """With dropout: what is computed again drops the same weights."""
    ours = swapped(nn.TransformerEncoderLayer(E, H, 32, batch_first=True, dtype=torch.float64), Fixed(4))
    x = sequence().requires_grad_()
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(1)
        if is_checkpointed:
            out = torch.utils.checkpoint.checkpoint(ours, x, CAUSAL, use_reentrant=False)
        else:
            out = ours(x, CAUSAL)
        gradients.append(torch.autograd.grad(out.square().sum(), (x, *ours.parameters())))
    assert all(map(torch.equal, *gradients))


def test_autocast_layers():
    """As PyTorch's own in bfloat16, within that dtype's rounding of activations of size 1."""
    pytest.importorskip("ml_dtypes")
    theirs = layer(batch_first=True).float()
    ours, x = swapped(theirs), sequence().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (each(x, src_mask=CAUSAL.float()) for each in (theirs, ours))
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-5)
    actual.float().sum().backward()
    assert ours.self_attn.in_proj_weight.grad.dtype == torch.float32


def test_parametrized_weights():
    ours = ct.CombinerAttention(E, H, Fixed(4), batch_first=True, dtype=torch.float64)
    x = sequence()
    expected = ours(x)[0]
    nn.utils.parametrizations.weight_norm(ours, "in_proj_weight")
    close(ours(x)[0], expected)
