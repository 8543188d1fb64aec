# SPDX-License-Identifier: Apache-2.0
"""Every model family of the installed Transformers, tiny and with random weights: with `Dense()` its logits are those
of its own attention, or the first call is a clear error."""

import re
import warnings
from typing import NamedTuple

import pytest

from combiner import Dense, Fixed

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
with warnings.catch_warnings():  # of its own dependencies
    warnings.simplefilter("ignore")
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    import combiner.transformers

VOCABULARY, L = 61, 14

WIDTH, HEADS = 32, 4
SIZES = {  # by the names that configurations have for them
    name: size
    for size, names in [
        (
            WIDTH,
            "hidden_size d_model n_embd dim embed_dim embedding_size decoder_hidden_size encoder_hidden_size emb_dim",
        ),
        (
            WIDTH,
            "projection_dim word_embed_proj_dim hidden_dim lru_width attention_hidden_size expansion_size conv_dim",
        ),
        (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
        (HEADS, "num_decoder_attention_heads num_encoder_attention_heads"),
        (2, "num_key_value_heads num_kv_heads n_head_kv decoder_num_key_value_heads"),
        (2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth"),
        (2, "num_encoder_layers decoder_num_hidden_layers encoder_num_hidden_layers"),
        (48, "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner moe_intermediate_size"),
        (48, "shared_expert_intermediate_size ffn_hidden_size intermediate_size_mlp expert_ffn_hidden_size"),
        (48, "encoder_intermediate_size decoder_intermediate_size moe_shared_expert_intermediate_size"),
        (
            8,
            "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim attention_head_dim swa_head_dim",
        ),
        (8, "linear_key_head_dim linear_value_head_dim rotary_dim global_head_dim hidden_size_per_layer_input"),
        (16, "q_lora_rank kv_lora_rank o_lora_rank index_head_dim image_size num_mel_bins"),
        (4, "num_experts n_routed_experts num_local_experts moe_num_experts n_shared_experts patch_size"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k index_n_heads top_k_experts"),
        (2, "linear_num_key_heads linear_num_value_heads eos_token_id"),
        (1, "n_group topk_group first_k_dense_replace num_nextn_predict_layers n_groups"),
        (1, "bos_token_id decoder_start_token_id"),
        (0, "pad_token_id dropout"),
        (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size text_vocab_size"),
        (64, "max_position_embeddings n_positions n_ctx max_target_positions max_source_positions"),
        (64, "max_seq_len max_sequence_length seq_length max_seq_length"),
        (6, "sliding_window attention_chunk_size local_attention window_size attention_window_size"),
    ]
    for name in names.split()
}


def tiny(kind: type) -> object:
    """A configuration with small sizes, a layer of each kind that the default has."""
    default = kind()
    fields = default.to_dict()
    options = {name: size for name, size in SIZES.items() if isinstance(fields.get(name), int | float)}
    if isinstance(fields.get("image_size"), list | tuple):
        options["image_size"] = [SIZES["image_size"]] * 2
    if "kv_lora_rank" in options:
        options["num_key_value_heads"] = HEADS
    types = fields.get("layer_types")
    if types and all("attention" in x for x in types):
        types = list(dict.fromkeys(types))
        types = types if len(types) > 1 else types * 2
        options |= {"layer_types": types, "num_hidden_layers": len(types)}
    for name in getattr(kind, "sub_configs", None) or {}:
        inner = getattr(default, name, None)
        if inner is not None:
            options[name] = tiny(type(inner)).to_dict()
    return kind(**options)


MAPPINGS = [
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
]


def class_of(family: str) -> type:
    for mapping in MAPPINGS:
        if family in mapping:
            name = mapping[family]
            return getattr(transformers, name if isinstance(name, str) else name[0])
    raise LookupError("no model class")


class Skip(Exception):
    """A family that cannot be built or run from what is known here."""


def build(family: str):
    """A model that attends to something: new weights are too small."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind, config = class_of(family), tiny(CONFIG_MAPPING[family])
            with torch.device("meta"):
                size = sum(x.numel() for x in kind._from_config(config, attn_implementation="eager").parameters())
            if size > 1e7:
                raise Skip(f"{size / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = kind._from_config(config, attn_implementation="eager").float().eval()
    except Skip:
        raise
    except Exception as error:
        raise Skip(f"not built: {type(error).__name__}: {str(error)[:100]}") from error
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim > 1 and "emb" not in name and x.is_floating_point():
                x.mul_(4)
    return model


def inputs(model) -> list[dict[str, torch.Tensor]]:
    """What it is called with: without a mask, and, of tokens, with padding at the right and at the left."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    match model.main_input_name:
        case "input_ids":
            size = getattr(config.get_text_config(), "vocab_size", None) or VOCABULARY
            ids = torch.randint(3, min(size, VOCABULARY), (2, L), generator=generator)
            given = {"input_ids": ids}
            if config.is_encoder_decoder:
                given["decoder_input_ids"] = ids[:, : L - 2]
            mask = torch.ones_like(ids)
            mask[1, -4:] = 0
            return [given, given | {"attention_mask": mask}, given | {"attention_mask": mask.flip(1)}]
        case "pixel_values":
            config = getattr(config, "vision_config", None) or config
            size = getattr(config, "image_size", 16)
            size = [size, size] if isinstance(size, int) else list(size)
            if max(size) > 64:
                raise Skip(f"images of {size}")
            return [{"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), *size, generator=generator)}]
        case "input_values":
            return [{"input_values": torch.randn(2, 1600, generator=generator)}]
        case "input_features":
            length = 2 * getattr(config, "max_source_positions", 64)
            given = {"input_features": torch.randn(2, getattr(config, "num_mel_bins", 80), length, generator=generator)}
            if config.is_encoder_decoder:
                given["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, L), generator=generator)
            return [given]
        case other:
            raise Skip(f"main input is {other}")


@torch.no_grad()
def run(model, given: dict[str, torch.Tensor], **options) -> torch.Tensor:
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model(**given, **options)
    for name in ("logits", "last_hidden_state"):
        if isinstance(found.get(name), torch.Tensor):
            return found[name]
    return next(x for x in found.values() if isinstance(x, torch.Tensor) and x.is_floating_point())


def far(actual: torch.Tensor, expected: torch.Tensor, given: dict[str, torch.Tensor]) -> float:
    """The largest error beside the largest value, where there are tokens."""
    mask = given.get("attention_mask")
    if mask is not None and actual.shape[:2] == mask.shape:
        actual, expected = actual[mask.bool()], expected[mask.bool()]
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


OURS = re.compile(r"combiner|fallback=True|use_cache=False|attention_mask must|'sdpa' or 'eager'|takes the pattern")


def is_ours(error: Exception) -> bool:
    """A clear refusal, rather than what some line of the model's code stumbles over."""
    return isinstance(error, NotImplementedError | ValueError) and OURS.search(str(error)) is not None


@torch.no_grad()
def generate(model, given: dict[str, torch.Tensor]) -> torch.Tensor:
    given = {name: x for name, x in given.items() if name != "decoder_input_ids"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def attempt(function, *args):
    """What it returns, or its error."""
    try:
        return function(*args)
    except Exception as error:
        return error


class Verdict(NamedTuple):
    """How a family fares: "equal" or "refused" or "wrong" with the logits of a whole text and with generation by a
    cache; None for what is not there or its own attention cannot do."""

    whole: str
    cached: str | None = None
    detail: str = ""


def judge(family: str, fallback: bool) -> Verdict:
    model = build(family)
    calls = inputs(model)
    expected = [attempt(run, model, given) for given in calls]
    if isinstance(expected[0], Exception) or not expected[0].isfinite().all():
        raise Skip(f"its own attention gives {expected[0]!r:.200}")
    if expected[0].ndim < 3:  # pooled: what a token of padding has is nobody's matter
        calls = calls[:2]
    is_generative = model.can_generate() and model.main_input_name == "input_ids"
    text = attempt(generate, model, calls[-1]) if is_generative else None
    try:
        swapped = combiner.transformers.swap(model, Dense(), fallback=fallback)
        errors = [
            far(run(model, given), x, given)
            for given, x in zip(calls, expected, strict=False)
            if not isinstance(x, Exception)
        ]
    except Exception as error:
        return Verdict("refused" if is_ours(error) else f"{type(error).__name__}", None, str(error))
    if max(errors) > 5e-4:
        return Verdict("wrong", None, f"by {errors}")
    detail = f"{len(swapped.taken)} layers taken, {len(swapped.left)} left"
    cached = None
    if isinstance(text, torch.Tensor):
        found = attempt(generate, model, calls[-1])
        if isinstance(found, Exception):
            cached, detail = "refused" if is_ours(found) else type(found).__name__, f"{detail}; {found}"
        else:
            cached = "equal" if torch.equal(found, text) else "wrong"
    combiner.transformers.swap(model, Fixed(2), fallback=fallback)
    if far(run(model, calls[0]), expected[0], calls[0]) < 1e-3:
        detail += "; other patterns change little"
    return Verdict("equal", cached, detail)


BOTH = [("equal", "equal")] * 2
REFUSED = ("refused", None)
QUICK = {  # without and with fallback
    "bart": BOTH,
    "bert": [("equal", "refused")] * 2,
    "bloom": [REFUSED, REFUSED],
    "deepseek_v3": [("equal", "refused")] * 2,
    "diffllama": [("equal", "refused")] * 2,
    "falcon": [REFUSED, REFUSED],
    "gemma2": [("equal", "equal"), REFUSED],  # all layers have softcaps
    "gemma3_text": BOTH,
    "gpt2": BOTH,
    "gpt_oss": [("equal", "equal"), REFUSED],  # all layers have sinks
    "llama": BOTH,
    "mistral": [("equal", "equal"), REFUSED],  # with fallback no layer takes the pattern
    "modernbert": [("equal", None)] * 2,
    "qwen2_moe": BOTH,
    "t5": [REFUSED, REFUSED],
    "vit": [("equal", None)] * 2,
    "whisper": [("equal", None)] * 2,
}


@pytest.fixture(autouse=True)
def quietly():
    """One thread: these sizes are none for several. And without the warnings of Transformers' own log."""
    before, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with combiner.num_threads(1):
        yield
    torch.set_num_threads(before)
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("family", QUICK)
def test_a_few_families(family):
    for fallback, expected in zip((False, True), QUICK[family], strict=True):
        verdict = judge(family, fallback)
        assert verdict[:2] == expected, verdict


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(CONFIG_MAPPING_NAMES) - set(QUICK)))
def test_every_family_is_right_or_refused(family):
    """Those that cannot be built from what `SIZES` knows are skipped, with the reason."""
    for fallback in (False, True):
        try:
            verdict = judge(family, fallback)
        except Skip as reason:
            pytest.skip(str(reason))
        assert verdict.whole in ("equal", "refused") and verdict.cached in ("equal", "refused", None), verdict
        print(family, fallback, verdict)
