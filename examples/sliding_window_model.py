# SPDX-License-Identifier: Apache-2.0
"""Swap the attention of a Hugging Face model with sliding windows: the same logits, in less time.

Three of four layers of the model attend the last 128 positions; the fourth attends all. `combiner.transformers.swap`
runs the first as `Window(128)`, the fourth as `Dense()` or as any pattern.

    python examples/sliding_window_model.py                  # about half a minute
    python examples/sliding_window_model.py --length 16384   # a longer text

Needs torch and transformers; nothing is downloaded, and the weights are random.
"""

import argparse
import time

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import combiner
import combiner.transformers


def new_model(length: int) -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=128,
        layer_types=3 * ["sliding_attention"] + ["full_attention"],
        max_position_embeddings=length,
    )
    return Gemma3ForCausalLM(config).eval()


@torch.no_grad()
def run(model: Gemma3ForCausalLM, tokens: torch.Tensor, rounds: int) -> tuple[torch.Tensor, float]:
    """The logits, and the seconds of the fastest of some forward passes."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        logits = model(tokens, use_cache=False).logits
        seconds.append(time.perf_counter() - started)
    return logits, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens of the text (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="forward passes that are timed (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and text (default %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, tokens = new_model(args.length), torch.randint(3, 256, (1, args.length))

    own, seconds = run(model, tokens, args.rounds)
    print(f"sdpa                     {1000 * seconds:8.0f} ms for {args.length} tokens")
    report = combiner.transformers.swap(model)  # Window(128) in the local layers, Dense() in the other
    logits, seconds = run(model, tokens, args.rounds)
    print(f"combiner                 {1000 * seconds:8.0f} ms")
    print(report)
    print(f"largest difference of a logit: {(logits - own).abs().max():.1e}, largest logit: {own.abs().max():.1f}")
    combiner.transformers.swap(model, combiner.Fixed(128, window=128, pooling="mean", size_bias=True))
    _, seconds = run(model, tokens, args.rounds)
    print(f"combiner, and regions    {1000 * seconds:8.0f} ms: the full layer takes Fixed(128, window=128)")


if __name__ == "__main__":
    main()
