# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4: layers with a window, and those that attend compressed keys too, all or chosen ones, with sinks, beside
eager attention."""

import itertools
import warnings

import pytest

import combiner
from combiner import Dense, Fixed, HeavilyCompressed, Window

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():  # of its own dependencies
    warnings.simplefilter("ignore")
    import transformers
    from transformers import DynamicCache

    import combiner.transformers
from transformers_problems import FLOAT32, MASKS, L, close, logits, make, masked, small, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, WINDOW = 6, 5
SPARSE_RATE = 4  # of the layers that choose 3 compressed keys
HEAVY = ("sliding_attention", "heavily_compressed_attention")
SPARSE = ("compressed_sparse_attention", "sliding_attention", "compressed_sparse_attention")
EVERY = ("heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention")
every_kind = pytest.mark.parametrize("kinds", (HEAVY, SPARSE, EVERY), ids=("heavy", "sparse", "every"))


def deepseek_v4(kinds=HEAVY, **options):
    """The last keys of the window are 5; a compressed key stands for 6 positions: each kind covers what the other does
    not, or both do."""
    sizes = {"q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 8, "hc_mult": 2}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 1}
    sizes |= {"layer_types": list(kinds), "mlp_layer_types": ["moe"] * len(kinds), "num_hidden_layers": len(kinds)}
    rates = {"compressed_sparse_attention": SPARSE_RATE, "heavily_compressed_attention": RATE}
    sizes |= {"compress_rates": rates, "index_topk": 3}
    config = small(transformers.DeepseekV4Config, sliding_window=WINDOW, **sizes | options)
    return transformers.DeepseekV4ForCausalLM(config)


def losses_and_gradients(made, ids, **options):
    """Logits of the tokens, and the gradients of a loss over them, by combiner and by eager attention."""
    is_token = options.get("attention_mask", torch.ones_like(ids)) > 0
    for name in ("combiner", "eager"):
        made.set_attn_implementation(name)
        made.zero_grad()
        out = made(ids, **options).logits[is_token]
        torch.nn.functional.cross_entropy(out, ids[is_token]).backward()
        yield out.detach(), {n: x.grad.clone() for n, x in made.named_parameters() if x.grad is not None}


@every_kind
@pytest.mark.parametrize("length", [1, RATE - 1, RATE, RATE + 1, 4 * RATE])
def test_loss_and_all_gradients(length, kinds):
    """In float32, in which the model computes its gates and norms: 1e-7, after two layers with weights about 1."""
    made, ids = make(lambda: deepseek_v4(kinds), Dense()).float(), tokens(2, length)
    (out, found), (expected, gradients) = losses_and_gradients(made, ids)
    close(out, expected, FLOAT32)
    assert set(found) == set(gradients)
    shortest = min(RATE if kind == HEAVY[1] else SPARSE_RATE for kind in kinds if kind != HEAVY[0])
    assert any("sinks" in n for n in gradients) and any("compressor" in n for n in gradients) == (length >= shortest)
    for n, exact in gradients.items():
        close(found[n], exact, 1e-4 * max(exact.abs().max().item(), 1e-3))


@every_kind
def test_gradients_beside_padding(kinds):
    made, ids = make(lambda: deepseek_v4(kinds), Dense()).float(), tokens(3, L)
    (out, found), (expected, gradients) = losses_and_gradients(made, ids, **masked("holes"))
    close(out, expected, FLOAT32)
    for n, exact in gradients.items():
        close(found[n], exact, 1e-4 * max(exact.abs().max().item(), 1e-3))


def test_layers_say_what_they_run():
    made = make(deepseek_v4).float()
    report = combiner.transformers.swap(made, Fixed(4))
    logits(made, tokens(1, L))
    assert list(report.taken.values()) == [Window(WINDOW), HeavilyCompressed(RATE, WINDOW)]
    made = make(lambda: deepseek_v4(EVERY)).float()
    report = combiner.transformers.swap(made, Fixed(4))
    logits(made, tokens(1, L))
    heavy, sparse = HeavilyCompressed(RATE, WINDOW), HeavilyCompressed(SPARSE_RATE, WINDOW)
    assert list(report.taken.values()) == [heavy, sparse, heavy]


@every_kind
def test_generation_with_a_cache(kinds):
    made, ids = make(lambda: deepseek_v4(kinds), Dense()).float(), tokens(2, L)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    text = made.generate(ids, **options)
    made.set_attn_implementation("eager")
    assert torch.equal(text, made.generate(ids, **options))


def in_parts(made, ids, bounds, **options):
    """The logits of a text whose tokens come in parts, with a cache."""
    cache = DynamicCache(config=made.config)
    mask = options.get("attention_mask")
    found = []
    for first, end in itertools.pairwise(bounds):
        given = {} if mask is None else {"attention_mask": mask[:, :end]}
        given |= {name: x[:, first:end] for name, x in options.items() if name == "position_ids"}
        found.append(logits(made, ids[:, first:end], cache=cache, **given))
    return torch.cat(found, 1)


@every_kind
@pytest.mark.parametrize("bounds", ((0, 9, 12, L), (0, 1, 2, 19, L), (0, 4, 12, 18, L)), ids=str)
def test_several_tokens_after_a_past(kinds, bounds):
    """Parts that begin and end within a span, and with it; longer and shorter than the window."""
    made, ids = make(lambda: deepseek_v4(kinds), Dense()).float(), tokens(2, L)
    found = in_parts(made, ids, bounds)
    close(found, logits(made, ids, use_cache=False), FLOAT32)
    made.set_attn_implementation("eager")
    close(found, in_parts(made, ids, bounds), FLOAT32)


@every_kind
@pytest.mark.parametrize("name, has_positions", [*((name, True) for name in sorted(MASKS)), ("left", False)])
def test_padding(kinds, name, has_positions):
    """Compressed keys stand for the positions of a row, whatever the padding hides; a query sees those before its
    position in the text. A single token after a past sees all, in the model too."""
    made, ids = make(lambda: deepseek_v4(kinds), Dense()).float(), tokens(3, L)
    options = masked(name) or {"attention_mask": MASKS[name].long()}
    if not has_positions:
        options.pop("position_ids", None)
    found = []
    for implementation in ("combiner", "eager"):
        made.set_attn_implementation(implementation)
        each = logits(made, ids, **options), in_parts(made, ids, (0, 14, 15, L), **options)
        found.append([x[MASKS[name]] for x in each])
    for x, expected in zip(*found, strict=True):
        close(x, expected, FLOAT32)


def test_packed_sequences_are_refused():
    made, ids = make(deepseek_v4, Dense()).float(), tokens(1, L)
    packed = torch.cat([torch.arange(9), torch.arange(L - 9)])[None]
    with pytest.raises(
        NotImplementedError, match="DeepseekV4Attention must have one sequence in each row, got several"
    ):
        logits(made, ids, position_ids=packed, use_cache=False)
