# SPDX-License-Identifier: Apache-2.0
"""Train a small byte-level language model on the Python standard library's own sources, in JAX.

A plain transformer: an embedding of the last three bytes, then blocks of attention and MLP, then a softmax over the
next byte. Each query attends by Combiner-Fixed: its own span key by key, every earlier span through a summary. The
training step (loss, gradients and Adam) is one compiled function, in which XLA calls the attention on XLA's buffers.
The score is the number of bits per byte on files that are not trained on.

    python examples/jax_step.py                 # under a minute
    python examples/jax_step.py --steps 100     # fewer steps

Letters: B batch, L positions, E model width, H heads, D = E / H head size.
"""

import argparse
import functools
import math
import sys
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import combiner
import combiner.jax

BYTES = 256
RECENT = 3  # bytes embedded together
DEPTH = 2
HEADS = 4
WIDTH = 64
ROWS_PER_STEP = 1024
LEARNING_RATE = 3e-3

Weights = dict[str, jax.Array]


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """The standard library's top-level modules in order of name, as bytes; every tenth file is held out."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for index, path in enumerate(paths):
        try:
            parts[index % 10 == 9].append(path.read_bytes() + b"\0")
        except OSError:
            continue
    train, held_out = (np.frombuffer(b"".join(part), np.uint8) for part in parts)
    return train, held_out


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Bytes [B, L + 1] from each start."""
    return text[starts[:, None] + np.arange(length + 1)]


def initial_weights(key: jax.Array) -> Weights:
    """Matrices map rows by `rows @ matrix`. The last matrix of each branch is zero: blocks start as identity."""
    E = WIDTH
    keys = iter(jax.random.split(key, 1 + 2 * DEPTH))
    p = {"embedding": jax.random.normal(next(keys), (RECENT, BYTES, E)) * E**-0.5}
    for n in range(DEPTH):
        p[f"norm_attention{n}"] = jnp.ones(E)
        p[f"qkv{n}"] = jax.random.normal(next(keys), (E, 3, HEADS, E // HEADS)) * E**-0.5
        p[f"project{n}"] = jnp.zeros((HEADS, E // HEADS, E))
        p[f"norm_mlp{n}"] = jnp.ones(E)
        p[f"up{n}"] = jax.random.normal(next(keys), (E, 4 * E)) * E**-0.5
        p[f"down{n}"] = jnp.zeros((4 * E, E))
    return {**p, "norm_out": jnp.ones(E), "head": jnp.zeros((E, BYTES))}


def normalise(x: jax.Array, gain: jax.Array) -> jax.Array:
    """RMSNorm of the rows of x [..., E]."""
    return gain * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def logits(p: Weights, tokens: jax.Array, pattern: combiner.patterns.Pattern) -> jax.Array:
    """Logits of the byte after each of tokens [B, L]: [B, L, 256]."""
    L = tokens.shape[1]
    padded = jnp.pad(tokens, ((0, 0), (RECENT - 1, 0)))
    x = sum(table[padded[:, n : n + L]] for n, table in enumerate(p["embedding"]))
    for n in range(DEPTH):
        q, k, v = jnp.einsum("ble,ethd->tbhld", normalise(x, p[f"norm_attention{n}"]), p[f"qkv{n}"])
        out = combiner.jax.attention(q, k, v, pattern, is_causal=True)
        x = x + jnp.einsum("bhld,hde->ble", out, p[f"project{n}"])
        u = jax.nn.relu(normalise(x, p[f"norm_mlp{n}"]) @ p[f"up{n}"])
        x = x + (u * u) @ p[f"down{n}"]
    return normalise(x, p["norm_out"]) @ p["head"]


def loss(p: Weights, rows: jax.Array, pattern: combiner.patterns.Pattern) -> jax.Array:
    """Mean bits per byte of rows [B, L + 1], without the first byte of each row."""
    tokens, targets = rows[:, :-1].astype(jnp.int32), rows[:, 1:, None].astype(jnp.int32)
    log_p = jax.nn.log_softmax(logits(p, tokens, pattern))
    return -jnp.mean(jnp.take_along_axis(log_p, targets, axis=-1)) / math.log(2)


@functools.partial(jax.jit, static_argnames="pattern", donate_argnames="state")
def step(
    state: tuple[Weights, Weights, Weights],
    rows: jax.Array,
    number: int,
    rate: float,
    pattern: combiner.patterns.Pattern,
) -> tuple[tuple[Weights, Weights, Weights], jax.Array]:
    """Step `number` (from 1) of Adam on (weights, means, squares): the new state, and the bits per byte before."""
    p, mean, square = state
    bits, grad = jax.value_and_grad(loss)(p, rows, pattern)
    mean = jax.tree.map(lambda m, g: m + 0.1 * (g - m), mean, grad)
    square = jax.tree.map(lambda s, g: s + 0.02 * (g * g - s), square, grad)
    rate = rate / (1 - 0.9**number)
    p = jax.tree.map(lambda w, m, s: w - rate * m / (jnp.sqrt(s / (1 - 0.98**number)) + 1e-8), p, mean, square)
    return (p, mean, square), bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="training steps (default %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="positions of one window (default %(default)s)")
    parser.add_argument("--span", type=int, default=16, help="span of the Fixed pattern (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few seconds, for tests: every part, nothing learned")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.length = 3, 128
    started = time.perf_counter()
    length, pattern, batch = args.length, combiner.Fixed(args.span), max(1, ROWS_PER_STEP // args.length)
    text, held_out = read_text()
    if min(len(text), len(held_out)) <= length:
        sys.exit(f"the standard library's sources are not here, or shorter than --length {length}")
    print(f"combiner {combiner.__version__}, JAX {jax.__version__}; {len(text):,} bytes to train on; {pattern}")

    rng = np.random.default_rng(args.seed)
    p = initial_weights(jax.random.key(args.seed))
    state = p, jax.tree.map(jnp.zeros_like, p), jax.tree.map(jnp.zeros_like, p)
    for number in range(1, args.steps + 1):
        rows = windows(text, rng.integers(0, len(text) - length, batch), length)
        rate = LEARNING_RATE * min(1, number / (0.1 * args.steps), (args.steps + 1 - number) / (0.6 * args.steps))
        state, bits = step(state, rows, number, rate, pattern)
        if number % max(1, args.steps // 10) == 0:
            print(f"step {number:5}: {bits:.3f} bits per byte, {time.perf_counter() - started:.0f} s")

    count = 2 if args.quick else 2**17 // length
    starts = np.linspace(0, len(held_out) - length - 1, count).astype(int)
    score = jax.jit(loss, static_argnames="pattern")
    scores = [score(state[0], rows[None], pattern=pattern) for rows in windows(held_out, starts, length)]
    print(f"held out: {np.mean(scores):.3f} bits per byte; total {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
