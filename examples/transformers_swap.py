# SPDX-License-Identifier: Apache-2.0
"""Swap the attention of a Hugging Face model: a small Llama with new weights learns the standard library's bytes.

    python examples/transformers_swap.py                  # about half a minute
    python examples/transformers_swap.py --length 8192    # a longer context: the model's own attention falls behind

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
    """One step of training; its loss in bits per byte."""
    loss = model(batch, labels=batch, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item() / math.log(2)


def time_step(model: LlamaForCausalLM, attention: str, batch: torch.Tensor) -> float:
    """Seconds of a step of training by this attention, the better of two; the weights stay as they are."""
    model.set_attn_implementation(attention)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        step(model, optimizer, batch)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of training (default %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="bytes in a sequence (default %(default)s)")
    parser.add_argument("--span", type=int, default=32, help="span of the Fixed pattern (default %(default)s)")
    parser.add_argument("--new", type=int, default=200, help="bytes to generate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and sample (default %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    combiner.transformers.register(combiner.Fixed(args.span))  # attn_implementation="combiner"

    text, model = read_text(), new_model(args.length)
    print(f"{len(text):,} bytes; a Llama of {model.num_parameters():,} weights; length {args.length}")
    for attention in ("sdpa", "combiner"):
        seconds = time_step(model, attention, text[None, : args.length])
        print(f"  a step of training with {attention:<9}{1000 * seconds:8.0f} ms")

    model.set_attn_implementation("combiner")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    starts = torch.randint(len(text) - args.length, (args.steps,)).tolist()
    losses = [
        step(model, optimizer, text[None, n : n + args.length])
        for n in map(starts.__getitem__, trange(args.steps, disable=None))
    ]
    shown = max(1, args.steps // 5)
    for n in range(0, args.steps, shown):
        part = losses[n : n + shown]
        print(f"  steps {n + 1:4} to {n + len(part):4}: {sum(part) / len(part):.3f} bits per byte")

    model.eval()
    prompt = text[None, : args.length // 2]
    started = time.perf_counter()
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": args.new, "do_sample": True, "top_k": 10}
    generated = model.generate(prompt, **options)[0, prompt.shape[1] :]
    seconds = time.perf_counter() - started
    print(f"generated with a cache, {1000 * seconds / args.new:.1f} ms a byte:")
    print("  " + bytes(generated.tolist()).decode("utf-8", "replace").replace("\n", "\n  "))


if __name__ == "__main__":
    main()
