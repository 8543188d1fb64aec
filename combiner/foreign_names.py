# SPDX-License-Identifier: Apache-2.0
"""Keywords of other libraries' attention: the TypeError for one of them names its substitute here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Keywords of PyTorch, flash-attn, FlexAttention, JAX, Transformers, NATTEN and sklearn, and those of `attention` that a
# decoder does not have. For each, an argument of ours
# and the sentence about it, which is for functions that have this argument.
_MASK = {
    "key_mask": "key_mask, True for keys that take part, leaves keys out",
    "is_causal": "is_causal=True is causality",
    "pattern": "combiner.Plan.from_mask makes a pattern of any other mask",
}
_HINTS: dict[str, dict[str, str]] = {
    "attn_mask attention_mask mask block_mask mask_mod mask_type attn_mask_type": _MASK,
    "key_padding_mask": {"key_mask": "key_mask is its opposite, True for keys that take part"},
    "causal use_causal_mask": {"is_causal": "is_causal=True is causality"},
    "window window_size sliding_window local_window_size kernel_size": {
        "pattern": "a window is a pattern: combiner.Window(size), or combiner.Plan.from_mask makes one of a window"
    },
    "soft_cap logit_cap logits_soft_cap attn_logit_softcapping": {
        "softcap": "softcap bounds the logits, softcap * tanh(logit / softcap)"
    },
    "bias attn_bias position_bias relative_position_bias alibi_slopes score_mod": {
        "key_bias": "key_bias is a bias of every key, the same for all queries; combiner.alibi_bias makes that of ALiBi"
    },
    "enable_gqa gqa num_kv_heads num_key_value_heads num_key_value_groups": {
        "query": "heads are grouped wherever query has a multiple of key's"
    },
    "softmax_scale sm_scale scaling scale_factor query_pre_attn_scalar": {"scale": "scale is the factor of the logits"},
    "temperature softmax_temp": {"scale": "scale is the factor of the logits, 1 / temperature"},
    "dropout dropout_rate attn_dropout attention_dropout p_dropout": {
        "dropout_p": "dropout_p is the share of weights that become 0"
    },
    "dropout_seed dropout_rng dropout_key prng_key rng rng_state random_state": {
        "seed": "seed is the integer that random numbers follow from"
    },
    "training is_training": {"dropout_p": "dropout_p=0.0 is attention without dropout"},
    "deterministic": {
        "dropout_p": "results have the same bits in every run, and dropout_p=0.0 is attention without dropout"
    },
    "need_weights return_weights return_attn_probs average_attn_weights output_attentions": {
        "pattern": "combiner.attention_weights returns the weights"
    },
    "return_softmax_lse return_residual return_aux": {"return_lse": "return_lse=True returns lse beside out"},
    "sinks s_aux learnable_sink": {"sink": "sink is its name"},
    "cu_seqlens_q cu_seqlens_k cu_seqlens_kv cu_seq_lens_q cu_seq_lens_k max_seqlen_q max_seqlen_k max_length_q "
    "max_length_k segment_ids": {
        "cu_seqlens": "cu_seqlens divides query, key and value alike; its differences are the lengths"
    },
    "query_seq_lengths key_value_seq_lengths kv_seqlen cache_seqlens": {
        "key_mask": "key_mask, True for keys that take part, leaves the end of a sequence out"
    },
    "qkv_layout qkv_format tensor_layout input_layout inputs_layout batch_first": {
        "layout": "layout='BLHD' is for arrays with heads after positions"
    },
    "q queries query_states": {"query": "query is its name"},
    "k keys key_states": {"key": "key is its name"},
    "v values value_states": {"value": "value is its name"},
    "backend implementation kernel_options": {"pattern": "there is one implementation, on the CPU"},
    "region_query region_key region_bias": {
        "rollback": "a decoder pools those of its tokens",
        "lengths": "a decoder pools those of its tokens",
    },
    "n_clusters num_clusters": {"n": "n is the number of clusters"},
    "max_iter n_iter num_iters": {"iterations": "iterations is the number of rounds"},
}
_HINT = {name: hints for names, hints in _HINTS.items() for name in names.split()}


def explains_foreign_names(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, with a TypeError that names the substitute for a keyword of another library.

    A call without an error costs one Python call more. Any other unknown keyword raises Python's own TypeError.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except TypeError:
            refuse_foreign_names(function, kwargs)
            raise

    return call


def refuse_foreign_names(function: Callable[..., object], keywords: Iterable[str]) -> None:
    """Raises TypeError for the first keyword that `function` does not have and that has a substitute."""
    parameters = inspect.signature(function).parameters
    for foreign in keywords:
        sentences = [sentence for own, sentence in _HINT.get(foreign, {}).items() if own in parameters]
        if sentences and foreign not in parameters:
            name = function.__qualname__.removesuffix(".__init__")
            raise TypeError(f"{name}() has no {foreign!r}: {', '.join(sentences)}") from None
