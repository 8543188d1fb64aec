# SPDX-License-Identifier: Apache-2.0
"""Swap the attention of a Hugging Face model.

A small Llama learns the bytes of the standard library with its own attention, continues with Combiner's, and generates.

    python examples/transformers_swap.py                  # about a minute
    python examples/transformers_swap.py --length 8192    # a longer context: the model's own attention falls behind

For a model that was trained with dense attention, use `pooling="mean", size_bias=True`: a summary then counts as many
keys as it stands for. The default pooling is the paper's, for models trained with it from the start.

Needs torch and transformers; nothing is downloaded.
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

import combiner
import combiner.transformers


def read_text() -> torch.Tensor:
    """The bytes of the standard library's top-level modules, in order of name."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"\0".join(path.read_bytes() for path in paths)), dtype=torch.uint8).long()


def new_model(length: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * length,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    """One training step; returns its loss in bits per byte."""
    loss = model(batch, labels=batch, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item() / math.log(2)


def time_step(model: LlamaForCausalLM, batch: torch.Tensor) -> float:
    """The time of a training step in seconds, the better of two; the weights do not change."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        step(model, optimizer, batch)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def train(model: LlamaForCausalLM, text: torch.Tensor, length: int, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for n in trange(steps, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (n + 1) / 20)
        start = int(torch.randint(len(text) - length, ()))
        step(model, optimizer, text[None, start : start + length])


@torch.no_grad()
def measure(model: LlamaForCausalLM, text: torch.Tensor, length: int) -> float:
    """Bits per byte of the text, in sequences of this length."""
    batches = text[: len(text) // length * length].view(-1, 1, length)
    losses = [model(batch, labels=batch, use_cache=False).loss for batch in batches]
    return torch.stack(losses).mean().item() / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--steps", type=int, default=200, help="with the model's own attention (default %(default)s)")
    parser.add_argument("--more", type=int, default=50, help="steps after the swap (default %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="bytes in a sequence (default %(default)s)")
    parser.add_argument("--span", type=int, default=32, help="span of the Fixed pattern (default %(default)s)")
    parser.add_argument("--new", type=int, default=200, help="bytes to generate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and sample (default %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    text, model = read_text(), new_model(args.length)
    held_out, text = text[: 16 * args.length], text[16 * args.length :]
    batch = text[None, : args.length]
    print(f"{len(text):,} bytes; a Llama of {model.num_parameters():,} weights; length {args.length}")
    print(f"  a step of training with sdpa    {1000 * time_step(model, batch):8.0f} ms")
    train(model, text, args.length, args.steps, 3e-3)
    print(f"  after {args.steps} steps {measure(model, held_out, args.length):.3f} bits per byte of a text held out")

    for pattern in (combiner.Fixed(args.span), combiner.Fixed(args.span, pooling="mean", size_bias=True)):
        report = combiner.transformers.swap(model, pattern)
        print(f"  swapped, {pattern}: {measure(model, held_out, args.length):.3f}")
    print(report)
    print(f"  a step of training with combiner{1000 * time_step(model, batch):8.0f} ms")
    train(model, text, args.length, args.more, 1e-3)
    print(f"  after {args.more} more steps {measure(model, held_out, args.length):.3f} bits per byte")

    model.eval()
    prompt = held_out[None, : args.length // 2]
    started = time.perf_counter()
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": args.new, "do_sample": True, "top_k": 10}
    generated = model.generate(prompt, **options)[0, prompt.shape[1] :]
    seconds = time.perf_counter() - started
    print(f"generated with a cache, {1000 * seconds / args.new:.1f} ms a byte:")
    print("  " + bytes(generated.tolist()).decode("utf-8", "replace").replace("\n", "\n  "))


if __name__ == "__main__":
    main()
