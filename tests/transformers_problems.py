# SPDX-License-Identifier: Apache-2.0
"""Small models of Hugging Face, for the tests."""

import warnings

import pytest

from combiner import Fixed

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():  # of its own dependencies
    warnings.simplefilter("ignore")
    import transformers
    from transformers import AttentionInterface

    import combiner.transformers


VOCABULARY, L = 61, 23
SIZES = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def llama(**options):
    config = transformers.LlamaConfig(
        **SIZES
        | {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        | options
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(**options):
    config = transformers.GPT2Config(**SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | options)
    return transformers.GPT2LMHeadModel(config)


def bert(**options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES | sizes | options))


def make(model, pattern=Fixed(4), **options):  # noqa: B008
    """A model in float64, whose errors are of rounding only, with larger weights than new ones have: they attend to
    something."""
    torch.manual_seed(0)
    combiner.transformers.register(pattern)
    made = model(**options).double().eval()
    with torch.no_grad():
        for name, x in made.named_parameters():
            if x.ndim > 1 and "emb" not in name:
                x.mul_(8)
    made.set_attn_implementation("combiner")
    return made


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


LEFT = torch.arange(L) >= torch.tensor([[0], [5], [9]])
MASKS = {"none": torch.ones(3, L, dtype=torch.bool), "left": LEFT, "right": LEFT.flip(1)}
MASKS["holes"] = MASKS["left"] & (torch.arange(L) % 7 != 3)


def masked(name: str) -> dict[str, torch.Tensor]:
    """attention_mask, and position_ids as generation has them."""
    if name == "none":
        return {}
    return {"attention_mask": MASKS[name].long(), "position_ids": (MASKS[name].long().cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def logits(model, ids, **options) -> torch.Tensor:
    return model(ids, **options).logits


# Of float32, where 6e-8 grows to 1e-5 (1.1e-5 on a processor where PyTorch adds in another order). A wrong mask or
# position moves logits, which are about 1, by more than 1e-2.
FLOAT32 = 1e-4


def close(actual: torch.Tensor, expected: torch.Tensor, within: float = 1e-9) -> None:
    """float64 through two layers of weights about 1: 1e-16 grows to 1e-12 at most."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error < within, f"{error:.3g} from the expected"


def greedy(model, ids: torch.Tensor, new: int, **options) -> torch.Tensor:
    """The whole text through the model for every token, without a cache."""
    mask = options.get("attention_mask", torch.ones_like(ids))
    for _ in range(new):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        chosen = logits(model, ids, attention_mask=mask, position_ids=position_ids, use_cache=False)[:, -1].argmax(-1)
        ids, mask = (torch.cat([x, y[:, None]], 1) for x, y in ((ids, chosen), (mask, torch.ones_like(chosen))))
    return ids


def small(kind, **options):
    """A configuration of a decoder, or of an encoder and a decoder, with the sizes of these tests."""
    names = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    names |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    names |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2}
    names |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
    known = kind().to_dict()
    return kind(**{name: x for name, x in (SIZES | names).items() if name in known} | options)


@torch.no_grad()
def own_logits(model, ids, name="sdpa", **options):
    """Of the attention that the model has without combiner."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    found = logits(model, ids, **options)
    model.set_attn_implementation(before)
    return found


def attend(**options):
    """A direct call, as models make it."""
    combiner.transformers.register(Fixed(4))
    x = torch.randn(1, 2, L, 8)
    return AttentionInterface()["combiner"](torch.nn.Module(), x, x, x, options.pop("attention_mask", None), **options)
