# SPDX-License-Identifier: Apache-2.0
"""Train a small byte-level language model on the Python standard library's own sources, with NumPy and combiner alone.

The model is a plain transformer: an embedding of the last three bytes, then blocks of attention and MLP, then a softmax
over the next byte. `forward` and `backward` are written out pass by pass. Models that start from the same weights and
see the same batches, the twins, differ in their attention. One attends by Combiner-Fixed: each query sees its own span,
and every earlier span through a summary. Another attends by the sparse pattern that Combiner-Fixed extends: of every
earlier span a query sees only the last position.

The first task shows what the far part is for: a mark is hidden in a text, and asked for far behind it. Only a model
that sees the whole text can answer. The second task is the next byte of the text, scored in bits per byte on files that
are not trained on. Most of what it needs is near.

    combiner demo                  # one to two minutes
    combiner demo --length 4096    # longer context; dense attention falls behind further

Letters: B batch, L positions, N = B * L rows, E model width, H heads, D = E / H head size.
"""

import argparse
import hashlib
import importlib.util
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import combiner
from combiner.cli.progress import progress
from combiner.patterns import Pattern
from combiner.stopwatch import fastest

BYTES = 256
ASKED, MARKS = 1, range(2, 8)  # bytes that the text does not have
RECENT = 3  # bytes embedded together
DEPTH = 2
HEADS = 4
ROWS_PER_STEP = 1024
LEARNING_RATE = 3e-3
MARK_STEPS = 200

Arrays = dict[str, np.ndarray]


# ---- the text ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Bytes of the files trained on and of those held out, each file followed by a zero byte."""

    train: np.ndarray
    held_out: np.ndarray
    files: tuple[int, int]


def read_text() -> Text:
    """The standard library's top-level modules in order of name; every tenth file is held out."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for index, path in enumerate(paths):
        try:
            parts[index % 10 == 9].append(path.read_bytes() + b"\0")
        except OSError:
            continue
    train, held_out = (np.frombuffer(b"".join(part), np.uint8).astype(np.int64) for part in parts)
    return Text(train, held_out, (len(parts[0]), len(parts[1])))


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [B, L] from each start, and the bytes that follow them."""
    rows = text[starts[:, None] + np.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


def hidden_marks(text: np.ndarray, count: int, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Windows of text with one of the bytes MARKS hidden in the first half, and asked for in the last quarter.

    The mark is at a random place, and is wanted after each of eight bytes ASKED. Every question is more than a quarter
    of the window away from its answer.

    Returns
    -------
    tokens, targets : [B, L] each; a target is the mark after ASKED, and -1 elsewhere.
    """
    tokens = windows(text, rng.integers(0, len(text) - length, count), length)[0].copy()
    targets = np.full_like(tokens, -1)
    quarter, marks = length // 4, rng.choice(MARKS, count)
    tokens[np.arange(count), rng.integers(0, 2 * quarter, count)] = marks
    asked = length - 1 - rng.permuted(np.tile(np.arange(quarter), (count, 1)), axis=1)[:, :8]
    np.put_along_axis(tokens, asked, ASKED, axis=1)
    np.put_along_axis(targets, asked, marks[:, None], axis=1)
    return tokens, targets


def count_models(train: np.ndarray, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Bits per byte of `targets` under unigram and bigram counts of the training text, with one added to each count."""
    ones = np.bincount(train, minlength=BYTES) + 1.0
    pairs = np.bincount(train[:-1] * BYTES + train[1:], minlength=BYTES * BYTES).reshape(BYTES, BYTES) + 1.0
    unigram = np.log2(ones / ones.sum())
    bigram = np.log2(pairs / pairs.sum(axis=1, keepdims=True))
    return -float(unigram[targets].mean()), -float(bigram[tokens, targets].mean())


# ---- the model ---------------------------------------------------------------------------------------


def initial_weights(dim: int, rng: np.random.Generator) -> Arrays:
    """Matrices map rows by `rows @ matrix`. The last matrix of each branch is zero: blocks start as identity."""

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, dim**-0.5, shape).astype(np.float32)

    def constant(value: float, *shape: int) -> np.ndarray:
        return np.full(shape, value, np.float32)

    p = {"embedding": normal(RECENT, BYTES, dim)}
    for n in range(DEPTH):
        p[f"norm_attention{n}"] = constant(1, dim)
        p[f"qkv{n}"] = normal(dim, 3 * dim)
        p[f"project{n}"] = constant(0, dim, dim)
        p[f"norm_mlp{n}"] = constant(1, dim)
        p[f"up{n}"] = normal(dim, 4 * dim)
        p[f"down{n}"] = constant(0, 4 * dim, dim)
    p["norm_out"] = constant(1, dim)
    p["head"] = constant(0, dim, BYTES)
    return p


def recent(tokens: np.ndarray) -> np.ndarray:
    """The last bytes up to each position of tokens [B, L], zero before the first: [RECENT, N]."""
    padded = np.pad(tokens, ((0, 0), (RECENT - 1, 0)))
    return sliding_window_view(padded, RECENT, axis=1).reshape(-1, RECENT).T


def normalise(x: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RMSNorm of the rows of x [N, E]: (gain * x * r, r) with r = 1 / rms(x) [N, 1]."""
    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * r * gain, r


def normalise_backward(
    grad: np.ndarray, x: np.ndarray, gain: np.ndarray, r: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients with respect to x and the gain."""
    unit = x * r
    grad_unit = grad * gain
    return r * (grad_unit - unit * np.mean(grad_unit * unit, axis=-1, keepdims=True)), np.sum(grad * unit, axis=0)


def forward(p: Arrays, tokens: np.ndarray, pattern: Pattern) -> tuple[np.ndarray, list]:
    """Logits [N, 256] of the byte after each of tokens [B, L], and what `backward` needs."""
    (B, L), E = tokens.shape, p["head"].shape[0]
    saved: list = []
    # pass 0: embed the last bytes in order, which is the only encoding of positions. With rotary ones the summaries are
    # worth nothing on this text at this size, and a window 0.05 to 0.08 bits (docs/quality.md)
    x = sum(table[byte] for table, byte in zip(p["embedding"], recent(tokens), strict=True))
    for n in range(DEPTH):
        # pass 1: normalise
        x_attention = x
        a, r_attention = normalise(x, p[f"norm_attention{n}"])
        # pass 2: queries, keys and values, [B, H, L, D] each: views of one product
        q, k, v = (a @ p[f"qkv{n}"]).reshape(B, L, 3, HEADS, E // HEADS).transpose(2, 0, 3, 1, 4)
        # pass 3: attention
        out, attention = combiner.attention_forward(q, k, v, pattern, is_causal=True)
        # pass 4: join the heads and add
        heads = out.swapaxes(1, 2).reshape(B * L, E)
        x = x + heads @ p[f"project{n}"]
        # pass 5: normalise
        x_mlp = x
        b, r_mlp = normalise(x, p[f"norm_mlp{n}"])
        # pass 6: MLP with squared ReLU, and add
        u = np.maximum(b @ p[f"up{n}"], 0)
        x = x + (u * u) @ p[f"down{n}"]
        saved.append((x_attention, a, r_attention, attention, heads, x_mlp, b, r_mlp, u))
    # pass 7: logits
    c, r_out = normalise(x, p["norm_out"])
    saved.append((x, c, r_out))
    return c @ p["head"], saved


def loss(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean bits per byte of targets [B, L] under logits [N, 256], and its gradient; targets below 0 do not count."""
    counted = np.flatnonzero(targets.ravel() >= 0)
    rows = np.arange(counted.size), targets.ravel()[counted]
    shifted = logits[counted]
    shifted -= shifted.max(axis=-1, keepdims=True)
    p = np.exp(shifted)
    total = p.sum(axis=-1, keepdims=True)
    bits = float(np.mean(np.log(total[:, 0]) - shifted[rows])) / math.log(2)
    p /= total
    p[rows] -= 1
    p /= counted.size * math.log(2)
    grad = np.zeros_like(logits)
    grad[counted] = p
    return bits, grad


def backward(p: Arrays, tokens: np.ndarray, grad_logits: np.ndarray, saved: list) -> Arrays:
    """Gradients of the loss with respect to every parameter: the passes of `forward`, last to first."""
    (B, L), E = tokens.shape, p["head"].shape[0]
    g: Arrays = {}
    # pass 7: c @ head
    x, c, r_out = saved[DEPTH]
    g["head"] = c.T @ grad_logits
    dx, g["norm_out"] = normalise_backward(grad_logits @ p["head"].T, x, p["norm_out"], r_out)
    for n in reversed(range(DEPTH)):
        x_attention, a, r_attention, attention, heads, x_mlp, b, r_mlp, u = saved[n]
        # pass 6: x + (u * u) @ down
        g[f"down{n}"] = (u * u).T @ dx
        du = (dx @ p[f"down{n}"].T) * (2 * u)
        g[f"up{n}"] = b.T @ du
        # pass 5: normalise
        dx_mlp, g[f"norm_mlp{n}"] = normalise_backward(du @ p[f"up{n}"].T, x_mlp, p[f"norm_mlp{n}"], r_mlp)
        dx = dx + dx_mlp
        # pass 4: x + heads @ project
        g[f"project{n}"] = heads.T @ dx
        dout = (dx @ p[f"project{n}"].T).reshape(B, L, HEADS, E // HEADS).swapaxes(1, 2)
        # pass 3: attention
        dq, dk, dv, *_ = combiner.attention_backward(dout, attention)
        # pass 2: a @ qkv
        dqkv = np.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4).reshape(B * L, 3 * E)
        g[f"qkv{n}"] = a.T @ dqkv
        # pass 1: normalise
        da, gain = dqkv @ p[f"qkv{n}"].T, p[f"norm_attention{n}"]
        dx_attention, g[f"norm_attention{n}"] = normalise_backward(da, x_attention, gain, r_attention)
        dx = dx + dx_attention
    # pass 0: rows of a table add up where a byte occurs more than once
    g["embedding"] = np.stack([np.eye(BYTES, dtype=dx.dtype)[byte].T @ dx for byte in recent(tokens)])
    return g


# ---- training, scoring, sampling ---------------------------------------------------------------------


class Twin:
    """A model, its pattern, and Adam's running means of its gradients and of their squares."""

    def __init__(self, first: Arrays, pattern: Pattern):
        self.pattern = pattern
        self.p = {name: weight.copy() for name, weight in first.items()}
        self.mean = {name: np.zeros_like(weight) for name, weight in first.items()}
        self.square = {name: np.zeros_like(weight) for name, weight in first.items()}

    def step(self, tokens: np.ndarray, targets: np.ndarray, number: int, rate: float) -> float:
        """Step `number` (from 1) of Adam; returns the bits per byte before the step."""
        logits, saved = forward(self.p, tokens, self.pattern)
        bits, grad_logits = loss(logits, targets)
        for name, grad in backward(self.p, tokens, grad_logits, saved).items():
            self.mean[name] += 0.1 * (grad - self.mean[name])
            self.square[name] += 0.02 * (grad * grad - self.square[name])
            deviation = np.sqrt(self.square[name] / (1 - 0.98**number)) + 1e-8
            self.p[name] -= rate / (1 - 0.9**number) * self.mean[name] / deviation
        return bits


def train(twins: dict[str, Twin], batches: Callable[[], tuple[np.ndarray, np.ndarray]], steps: int) -> None:
    """Train all twins on the same batches, at the same time, with one thread each."""
    bar = progress(range(1, steps + 1), "training", "step")
    with combiner.num_threads(1), ThreadPoolExecutor(len(twins)) as pool:
        for number in bar:
            batch = batches()
            rate = LEARNING_RATE * min(
                1, number / (0.1 * steps), (steps + 1 - number) / (0.6 * steps)
            )  # up, flat, down
            taken = {name: pool.submit(twin.step, *batch, number, rate) for name, twin in twins.items()}
            shown = ", ".join(f"{name} {step.result():.2f}" for name, step in taken.items())
            bar.set_postfix_str(f"bits per byte: {shown}", refresh=False)


def evaluate(p: Arrays, pattern: Pattern, tokens: np.ndarray, targets: np.ndarray) -> float:
    """Mean bits per byte of targets [B, L], window by window."""
    pairs = zip(tokens[:, None], targets[:, None], strict=True)
    return float(np.mean([loss(forward(p, t, pattern)[0], y)[0] for t, y in pairs]))


def share_right(p: Arrays, pattern: Pattern, tokens: np.ndarray, targets: np.ndarray) -> float:
    """The share of targets [B, L] that are the model's most probable byte; negative targets do not count."""
    likely = forward(p, tokens, pattern)[0].argmax(axis=-1).reshape(targets.shape)
    return float(np.mean((likely == targets)[targets >= 0]))


def sample(p: Arrays, pattern: Pattern, prompt: np.ndarray, count: int, rng: np.random.Generator) -> bytes:
    """`count` bytes drawn from the model at temperature 0.7, each from a window as long as the prompt."""
    window, drawn = prompt.copy(), []
    for _ in range(count):
        logits = forward(p, window[None], pattern)[0][-1].astype(np.float64) / 0.7
        weights = np.exp(logits - logits.max())
        drawn.append(int(rng.choice(BYTES, p=weights / weights.sum())))
        window = np.append(window[1:], drawn[-1])
    return bytes(drawn)


# ---- checks, times, picture --------------------------------------------------------------------------


def relative_error(value: Callable[[Arrays], float], at: Arrays, grad: Arrays, rng: np.random.Generator) -> float:
    """The error of `grad` beside the central difference of `value` in a random direction, in units of |grad|."""
    direction = {name: rng.normal(size=x.shape) for name, x in at.items()}
    step = 1e-8  # rounding adds about 1e-16 / step; a much longer step changes which key of a region is largest
    ahead, behind = (value({name: x + s * direction[name] for name, x in at.items()}) for s in (step, -step))
    exact = sum(float(np.vdot(grad[name], direction[name])) for name in at)
    size = math.sqrt(sum(float(np.vdot(grad[name], grad[name])) for name in at))
    return abs((ahead - behind) / (2 * step) - exact) / size


def check_attention(pattern: Pattern, rng: np.random.Generator) -> float:
    """The largest relative error of dq, dk and dv, in float64."""
    inputs = {name: rng.normal(size=(1, 2, 200, 16)) for name in ("query", "key", "value")}
    dout = rng.normal(size=(1, 2, 200, 16))
    _, saved = combiner.attention_forward(**inputs, pattern=pattern, is_causal=True)
    gradients = combiner.attention_backward(dout, saved)

    def value(moved: Arrays) -> float:
        return float(np.sum(dout * combiner.attention(**{**inputs, **moved}, pattern=pattern, is_causal=True)))

    return max(relative_error(value, {n: x}, {n: getattr(gradients, n)}, rng) for n, x in inputs.items())


def check_model(pattern: Pattern, tokens: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> float:
    """The relative error of the gradient of a small model's loss with respect to all its weights, in float64."""
    p = {name: weight + rng.normal(0, 0.05, weight.shape) for name, weight in initial_weights(32, rng).items()}
    logits, saved = forward(p, tokens, pattern)
    grad = backward(p, tokens, loss(logits, targets)[1], saved)
    return relative_error(lambda moved: loss(forward(moved, tokens, pattern)[0], targets)[0], p, grad, rng)


def time_step(p: Arrays, pattern: Pattern, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Milliseconds of one step (forward, loss, backward) and of its attention calls alone."""

    def step() -> list:
        logits, saved = forward(p, tokens, pattern)
        backward(p, tokens, loss(logits, targets)[1], saved)
        return saved

    saved = step()[0][3]
    q, k, v = saved["query"], saved["key"], saved["value"]

    def attention() -> None:
        out, saved = combiner.attention_forward(q, k, v, pattern, is_causal=True)
        combiner.attention_backward(out, saved)

    return 1e3 * fastest(step, 5), DEPTH * 1e3 * fastest(attention, 5)


def draw(p: Arrays, pattern: combiner.Fixed, span: int, tokens: np.ndarray, path: Path) -> None:
    """Save the effective attention on tokens [L]: of the last block's head that uses its regions most evenly."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    attention = forward(p, tokens[None], pattern)[1][DEPTH - 1][3]
    weights = combiner.attention_weights(attention["query"][0], attention["key"][0], pattern, is_causal=True)
    L = len(tokens)
    query, key = np.indices((L, L))
    is_direct = query // span == key // span
    share = np.where(is_direct, 0, weights)[:, span:].sum(axis=-1).mean(axis=-1)
    head = int(np.abs(share - 0.5).argmin())

    figure = Figure(figsize=(10, 8), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.95")
    in_corner = {"ha": "right", "transform": axes.transAxes, "fontsize": 12}
    for part, colours, height, name, meaning in (
        (is_direct, "Oranges", 0.95, "direct", "its own span, key by key"),
        (~is_direct, "Blues", 0.91, "regions", "each earlier span, through a summary"),
    ):
        image = np.ma.masked_where(~part | (key > query), np.maximum(weights[head], 1e-4))
        shown = axes.imshow(image, cmap=colours, norm=LogNorm(1e-4, 1), extent=(0, L, L, 0), interpolation="nearest")
        figure.colorbar(shown, ax=axes, label=f"weight, {name}", shrink=0.8, pad=0.01)
        axes.text(0.97, height, f"{name}: {meaning}", color=shown.cmap(0.8), weight="bold", **in_corner)
    axes.text(0.97, 0.87, f"every row sums to 1; {share[head]:.0%} through summaries", **in_corner)
    ticks = np.arange(0, L + 1, span)
    axes.hlines(ticks, 0, ticks, "white", linewidth=1)
    axes.vlines(ticks, ticks, L, "white", linewidth=1)
    axes.set(xticks=ticks, yticks=ticks, xlabel="key position", ylabel="query position")
    axes.set_title(f"Effective attention on held-out bytes: {pattern}, block {DEPTH}, head {head + 1}")
    figure.savefig(path)


# ---- the job -----------------------------------------------------------------------------------------


def hidden_mark(args: argparse.Namespace, text: Text) -> None:
    """Train twins to name the mark that is hidden in a text, and print the share of right answers."""
    rng, length = np.random.default_rng(args.seed), 8 * args.span
    pattern = combiner.Fixed(args.span)
    first = initial_weights(args.dim, rng)
    first["head"] = rng.normal(0, args.dim**-0.5, first["head"].shape).astype(np.float32)  # of zeros it learns late
    twins = {
        "Combiner-Fixed": Twin(first, pattern),
        "sparse Fixed": Twin(first, pattern.sparse()),
        f"window of {args.span}": Twin(first, combiner.Window(args.span)),
    }
    count = max(1, 2 * ROWS_PER_STEP // length)
    train(twins, lambda: hidden_marks(text.train, count, length, rng), min(args.steps, MARK_STEPS))
    asked = hidden_marks(text.held_out, 64, length, np.random.default_rng(0))
    print(f"one of {len(MARKS)} marks is hidden in {length} bytes of text, and asked for far behind; right answers:")
    for name, twin in twins.items():
        print(f"  {name:<16}{share_right(twin.p, twin.pattern, *asked):7.0%}")
    print(f"  {'guessing':<16}{1 / len(MARKS):7.0%}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="combiner demo",
        description=str(__doc__).partition("\n\n")[0],
        epilog="example:\n  combiner demo --length 4096 --out attention.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=2000, help="steps of training on the text (default %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="positions of one window (default %(default)s)")
    parser.add_argument("--span", type=int, default=16, help="span of the Fixed pattern (default %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="width of the model (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and sample (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="the picture (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few seconds, for tests: every part, nothing learned")
    args = parser.parse_args(arguments)
    if args.quick:
        args.steps, args.length, args.dim = 3, 256, 32
    if args.dim % HEADS:
        parser.error(f"--dim must be a multiple of {HEADS}, got {args.dim}")
    if args.span < 1:
        parser.error(f"--span must be at least 1, got {args.span}")
    if args.length <= args.span:
        parser.error(f"--length must be greater than --span, got {args.length} and {args.span}")
    started = time.perf_counter()
    length, pattern = args.length, combiner.Fixed(args.span)
    rng = np.random.default_rng(args.seed)
    print(f"combiner {combiner.__version__}: {combiner.info()}")

    text = read_text()
    if min(len(text.train), len(text.held_out)) <= length:
        sys.exit(f"the standard library's sources are not here, or shorter than --length {length}")
    digest = hashlib.sha256(text.train.astype(np.uint8)).hexdigest()[:12]
    print(
        f"text: Python {sys.version.split()[0]} standard library, {text.files[0]} files, {len(text.train):,} bytes to"
        f" train on (sha256 {digest}); {text.files[1]} files, {len(text.held_out):,} bytes held out"
    )
    count = 2 if args.quick else max(1, 2**17 // length)
    held_out = windows(text.held_out, np.linspace(0, len(text.held_out) - length - 1, count).astype(int), length)

    hidden_mark(args, text)

    first = initial_weights(args.dim, rng)
    size = sum(weight.size for weight in first.values())
    print(f"model: {DEPTH} blocks of width {args.dim}, {HEADS} heads, {size:,} weights; length {length}, {pattern}")

    error_attention = check_attention(combiner.Fixed(16), rng)
    error_model = check_model(combiner.Fixed(16), *(part[:1, :128] for part in held_out), rng)
    print(
        "gradients against finite differences in float64, relative error:"
        f" attention {error_attention:.1e}, whole model {error_model:.1e}"
    )
    if max(error_attention, error_model) > 1e-6:
        sys.exit("the gradients are wrong")

    patterns = {"Combiner-Fixed": pattern, "sparse Fixed": pattern.sparse(), "dense": combiner.Dense()}
    twins = {name: Twin(first, patterns[name]) for name in ("Combiner-Fixed", "sparse Fixed")}
    batch = max(1, ROWS_PER_STEP // length)
    train(twins, lambda: windows(text.train, rng.integers(0, len(text.train) - length, batch), length), args.steps)
    bits = dict(zip(("unigram", "bigram"), count_models(text.train, *held_out), strict=True))
    bits |= {name: evaluate(twin.p, twin.pattern, *held_out) for name, twin in twins.items()}
    print(f"held-out bits per byte, after {args.steps} steps of {batch} x {length} bytes:")
    for name, value in bits.items():
        print(f"  {name:<16}{value:7.3f}")

    p = twins["Combiner-Fixed"].p
    print(f"milliseconds per step at length {length}:  whole step   attention alone")
    for name, other in patterns.items():
        step, attention = time_step(p, other, *(part[:batch] for part in held_out))
        print(f"  {name:<34}{step:12.1f}{attention:15.1f}")

    prompt = text.held_out[: min(length, 8 * args.span)]
    drawn = sample(p, pattern, prompt, 8 if args.quick else 200, rng)
    shown = (bytes(prompt[-60:].tolist()) + b" >>> " + drawn).decode("utf-8", "replace")
    print(f"sample, after {len(prompt)} held-out bytes:")
    print("  " + shown.replace("\n", "\n  "))

    if importlib.util.find_spec("matplotlib"):
        draw(p, pattern, args.span, prompt, args.out)
        print(f"picture: {args.out}")
    else:
        print("picture: none, since it needs matplotlib: pip install 'combiner-attention[plot]'")
    print(f"total: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
