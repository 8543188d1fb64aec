# SPDX-License-Identifier: Apache-2.0
"""Models of Hugging Face with this attention: against their own, against the reference, and piece by piece."""

import warnings

import pytest

from combiner import Dense, Fixed, LogSparse, reference

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():  # of its own dependencies
    warnings.simplefilter("ignore")
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
    from transformers.masking_utils import flash_attention_mask

    import combiner.transformers
from transformers_problems import FLOAT32, MASKS, VOCABULARY, L, bert, close, gpt2, llama, logits, make, masked, tokens  # noqa: E402

# ----  --------------------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("model", [llama, gpt2, bert], ids=lambda f: f.__name__)
def test_dense_is_the_models_own_attention(model, mask):
    """Of the same positions: BERT alone has none of its own for padding."""
    made, ids, options = make(model, Dense()), tokens(3, L), masked(mask)
    actual = logits(made, ids, **options)
    made.set_attn_implementation("sdpa")
    close(actual[MASKS[mask]], logits(made, ids, **options)[MASKS[mask]])


def test_dense_in_float32():
    made, ids = make(llama, Dense()).float(), tokens(3, L)
    actual = logits(made, ids)
    made.set_attn_implementation("sdpa")
    close(actual, logits(made, ids), FLOAT32)


def test_bfloat16():
    """As far from float32 as the model's own attention in bfloat16, give or take: 8 bits, two layers."""
    pytest.importorskip("ml_dtypes")
    made, ids = make(llama, Dense()), tokens(3, L)
    options = masked("left")
    exact = logits(made.float(), ids, **options)
    error = {}
    for name in ("combiner", "sdpa"):
        made.bfloat16().set_attn_implementation(name)
        actual = logits(made, ids, **options)
        assert actual.dtype == torch.bfloat16
        error[name] = (actual - exact)[MASKS["left"]].abs().max().item()
    assert 0 < error["combiner"] < 2 * error["sdpa"]
    made.set_attn_implementation("combiner")
    cache = DynamicCache(config=made.config)
    steps = [logits(made, ids[:, a:b], cache=cache) for a, b in ((0, 20), (20, 21), (21, L))]
    assert (torch.cat(steps, 1) - logits(made, ids)).abs().max() < 2 * error["sdpa"]
    assert train(made.train(), 2)[0] > 0


def reference_attention(pattern):
    """The definition, in NumPy, of each row without its padding."""

    def forward(module, query, key, value, attention_mask, scaling=None, is_causal=None, **_):
        is_causal = module.is_causal if is_causal is None else is_causal
        B, Hq, length, _ = query.shape
        out = torch.zeros(B, length, Hq, value.shape[-1], dtype=query.dtype)
        for b in range(B):
            keep = torch.ones(length, dtype=torch.bool) if attention_mask is None else attention_mask[b]
            rows = (x[b][:, keep].numpy() for x in (query, key, value))
            row = reference.attention(*rows, pattern, is_causal=is_causal, scale=scaling)
            out[b, keep] = torch.from_numpy(row).transpose(0, 1)
        return out, None

    return forward


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("model", [llama, gpt2, bert], ids=lambda f: f.__name__)
def test_against_the_reference(model, mask):
    for pattern in (Fixed(4), LogSparse()):
        made, ids, options = make(model, pattern), tokens(3, L), masked(mask)
        actual = logits(made, ids, **options)
        AttentionInterface.register("reference", reference_attention(pattern))
        AttentionMaskInterface.register("reference", flash_attention_mask)
        made.set_attn_implementation("reference")
        close(actual[MASKS[mask]], logits(made, ids, **options)[MASKS[mask]])


@pytest.mark.parametrize("model", [llama, gpt2], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", [{}, {"attention_mask": MASKS["right"].long()}], ids=["no mask", "right"])
def test_the_future_does_not_leak(model, options):
    """Not one bit of a logit depends on later tokens, whether or not the model asks for a mask."""
    made, ids = make(model), tokens(3, L)
    for position in (1, 6, 8, 13):
        other = ids.clone()
        other[:, position:] = (other[:, position:] + 7) % VOCABULARY
        before, after = (logits(made, x, **options) for x in (ids, other))
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=0)
        assert not torch.equal(after[:, position:], before[:, position:])


def test_without_a_mask_attention_is_causal():
    """As a model without mask functions calls it: what the module does not say is causal."""
    combiner.transformers.register(Fixed(4))
    attend = AttentionInterface()["combiner"]
    x = torch.randn(1, 2, L, 8)
    causal = combiner.torch.attention(x, x, x, Fixed(4), is_causal=True).transpose(1, 2)
    module = torch.nn.Module()
    assert torch.equal(attend(module, x, x, x, None)[0], causal)
    module.is_causal = False
    assert torch.equal(attend(module, x, x, x, None, is_causal=True)[0], causal)
    full = combiner.torch.attention(x, x, x, Fixed(4)).transpose(1, 2)
    assert torch.equal(attend(module, x, x, x, None)[0], full) and not torch.equal(full, causal)


@pytest.mark.parametrize("mask", ["left", "right", "holes"])
def test_padding_counts_for_nothing(mask):
    """A padded row has the logits of its tokens alone, whatever the padding holds."""
    made, ids = make(llama), tokens(3, L)
    padded = logits(made, ids, **masked(mask))
    for row, keep in enumerate(MASKS[mask]):
        close(padded[row][keep], logits(made, ids[row : row + 1, keep])[0])
    other = torch.where(MASKS[mask], ids, 5)
    assert torch.equal(logits(made, other, **masked(mask))[MASKS[mask]], padded[MASKS[mask]])


@pytest.mark.parametrize("model", [llama, gpt2], ids=lambda f: f.__name__)
def test_packed_sequences_are_alone(model):
    """Rows of several sequences, not the same in each: position_ids that restart are all that says so."""
    made, ids = make(model), tokens(2, L)
    lengths = [[9, 1, 13], [L]]
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    actual = logits(made, ids, position_ids=position_ids, use_cache=False)
    for row, parts in enumerate(lengths):
        for each, expected in zip(ids[row].split(parts), actual[row].split(parts), strict=True):
            close(logits(made, each[None])[0], expected)


POSITIONS = {
    "strided": 2 * torch.arange(L),
    "gap": torch.arange(L) + 10 * (torch.arange(L) >= 12),
    "zeros": torch.zeros(L, dtype=torch.long),
    "backwards": torch.arange(L).flip(0) + 1,
    "restarts": torch.arange(L) % 12,
}


@pytest.mark.parametrize("is_masked", [False, True], ids=["no mask", "mask of ones"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_that_do_not_go_up_by_one_split_only_where_the_model_does(positions, use_cache, is_masked):
    """That is without a mask and without a cache. Elsewhere restarts are refused rather than joined in silence."""
    made, ids = make(llama, Dense()), tokens(2, L)
    options = {"position_ids": POSITIONS[positions][None].expand(2, -1), "use_cache": use_cache}
    if is_masked:
        options["attention_mask"] = torch.ones_like(ids)
    if positions == "restarts" and (is_masked or use_cache):
        with pytest.raises(ValueError, match="position_ids must not restart beside an attention_mask or a cache"):
            logits(made, ids, **options)
        return
    actual = logits(made, ids, **options)
    for name, within in (("sdpa", 1e-9), ("eager", 1e-4)):  # whose softmax is in float32
        made.set_attn_implementation(name)
        close(actual, logits(made, ids, **options), within)


def test_positions_of_padding_do_not_restart():
    """Whatever they are: those of tokens count, and of a padded row they go on."""
    made, ids = make(llama, Dense()), tokens(3, L)
    options = masked("holes")
    options["position_ids"] = torch.where(MASKS["holes"], options["position_ids"], 0)
    actual = logits(made, ids, **options)
    made.set_attn_implementation("sdpa")
    close(actual[MASKS["holes"]], logits(made, ids, **options)[MASKS["holes"]])


@pytest.mark.parametrize("model", [llama, gpt2], ids=lambda f: f.__name__)
def test_flattened_batches_say_where_sequences_begin(model):
    """As DataCollatorWithFlattening makes them, beside positions that restart or, beside a cache, without them."""
    made, ids = make(model), tokens(1, L)
    parts = ids[0].split([9, 1, 13])
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": x.tolist()} for x in parts])
    del batch["labels"], batch["input_ids"]
    found = [logits(made, ids, **batch, use_cache=use_cache) for use_cache in (False, True)]
    for actual in found:
        for part, x in zip(parts, actual[0].split([9, 1, 13]), strict=True):
            close(logits(made, part[None], use_cache=False)[0], x)
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_q"] + 1
    with pytest.raises(ValueError, match="cu_seq_lens_q must go from 0 to the length of one row"):
        logits(made, ids, **batch)


def train(model, steps: int, **options) -> list[float]:
    ids, losses = tokens(4, L), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(ids, labels=ids, **options).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("model", [llama, gpt2, bert], ids=lambda f: f.__name__)
def test_training(model):
    dropout = {
        llama: {"attention_dropout": 0.1},
        gpt2: {"attn_pdrop": 0.1},
        bert: {"attention_probs_dropout_prob": 0.1},
    }
    made = make(model, **dropout[model]).float().train()
    losses = train(made, 12)
    assert losses[-1] < losses[0] - 0.5, losses  # of about 4.1, log(61)


@pytest.mark.parametrize("mask", ["none", "left"])
def test_gradients_are_those_of_the_models_own_attention(mask):
    made, ids = make(llama, Dense()), tokens(3, L)
    labels = torch.where(MASKS[mask], ids, -100)
    gradients = []
    for name in ("combiner", "sdpa"):
        made.set_attn_implementation(name)
        made.zero_grad()
        made(ids, labels=labels, **masked(mask)).loss.backward()
        gradients.append([x.grad for x in made.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        close(actual, expected, 1e-8)


def test_dropout_is_the_models():
    """In training only, of the share the model has, from PyTorch's generator."""
    made, ids = make(llama, attention_dropout=0.5), tokens(1, L)
    plain = logits(made, ids)
    made.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(logits(made, ids))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2]) and not torch.allclose(found[0], plain)


def test_checkpointed_layers_drop_the_same_again():
    made, ids = make(llama, attention_dropout=0.5).train(), tokens(1, L)
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            made.activation_checkpointing_enable()
        torch.manual_seed(1)
        made.zero_grad()
        made(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([x.grad for x in made.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        close(actual, expected)


def test_scaling_is_the_models():
    made, ids = make(gpt2, Dense(), scale_attn_by_inverse_layer_idx=True), tokens(1, L)
    actual = logits(made, ids)
    made.set_attn_implementation("sdpa")
    close(actual, logits(made, ids))


def test_a_pattern_for_each_layer_and_name():
    made, ids = make(llama, Dense()), tokens(1, L)
    combiner.transformers.register(lambda module: (Dense(), Fixed(4))[module.layer_idx], "by-layer")
    combiner.transformers.register(Fixed(4), "combiner-fixed")
    found = {}
    for name in ("combiner", "by-layer", "combiner-fixed"):
        made.set_attn_implementation(name)
        found[name] = logits(made, ids)
    assert len({x.sum().item() for x in found.values()}) == 3
    for pattern in (Fixed, None, 3):
        with pytest.raises(TypeError, match=r"pattern must be a pattern such as combiner.Fixed"):
            combiner.transformers.register(pattern)
