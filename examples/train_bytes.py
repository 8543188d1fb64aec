# SPDX-License-Identifier: Apache-2.0
"""Train a small byte-level language model on the Python standard library's own sources, with NumPy and combiner alone.

The model is a plain transformer: embedding, then blocks of attention and MLP, then a softmax over the next byte;
`forward` and `backward` spell out both directions pass by pass. It is trained twice from the same weights on the same
batches: once with Combiner-Fixed, whose queries see their own span and a summary of every earlier one, once with the
sparse pattern it replaces. The score is the number of bits per byte on files that the training never saw.

    python examples/train_bytes.py                  # about a minute and a half
    python examples/train_bytes.py --length 4096    # longer context; dense attention falls behind further

Letters: B batch, L positions, N = B * L rows, E model width, H heads, D = E / H head size.
"""

import argparse
import hashlib
import math
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import combiner

BYTES = 256
DEPTH = 2
HEADS = 4
ROWS_PER_STEP = 4096
LEARNING_RATE = 6e-3

Arrays = dict[str, np.ndarray]
Pattern = combiner.Fixed | combiner.Dense


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


def count_models(train: np.ndarray, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Bits per byte of `targets` under the training text's unigram and bigram counts, one added to each."""
    ones = np.bincount(train, minlength=BYTES) + 1.0
    pairs = np.bincount(train[:-1] * BYTES + train[1:], minlength=BYTES * BYTES).reshape(BYTES, BYTES) + 1.0
    unigram = np.log2(ones / ones.sum())
    bigram = np.log2(pairs / pairs.sum(axis=1, keepdims=True))
    return -float(unigram[targets].mean()), -float(bigram[tokens, targets].mean())


# ---- the model ---------------------------------------------------------------------------------------


def shapes(dim: int) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape; matrices map rows by `rows @ matrix`."""
    layer = {
        "norm_attention": (dim,),
        "qkv": (dim, 3 * dim),
        "project": (dim, dim),
        "norm_mlp": (dim,),
        "up": (dim, 4 * dim),
        "down": (4 * dim, dim),
    }
    layers = {f"{name}{n}": shape for n in range(DEPTH) for name, shape in layer.items()}
    return {"embedding": (BYTES, dim), **layers, "norm_out": (dim,), "head": (dim, BYTES)}


def views(flat: np.ndarray, dim: int) -> Arrays:
    """The parameters by name, as views of one vector: the optimiser and the checks see only the vector."""
    named, start = {}, 0
    for name, shape in shapes(dim).items():
        named[name] = flat[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return named


def initial_weights(dim: int, rng: np.random.Generator) -> np.ndarray:
    """One vector of parameters. What writes into the residual stream starts at zero, so a block starts as identity."""
    flat = np.zeros(sum(math.prod(shape) for shape in shapes(dim).values()), np.float32)
    for name, weight in views(flat, dim).items():
        if name.startswith("norm"):
            weight[...] = 1
        elif name.startswith(("embedding", "qkv", "up")):
            weight[...] = rng.normal(0, dim**-0.5, weight.shape)
    return flat


def normalise(x: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RMSNorm of the rows of x [N, E]: (gain * x * r, r) with r = 1 / rms(x) [N, 1]."""
    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * r * gain, r


def normalise_backward(grad: np.ndarray, x: np.ndarray, gain: np.ndarray, r: np.ndarray, grad_gain: np.ndarray):
    """Gradient with respect to x; that of the gain goes into grad_gain."""
    unit = x * r
    grad_gain[...] = np.sum(grad * unit, axis=0)
    grad_unit = grad * gain
    return r * (grad_unit - unit * np.mean(grad_unit * unit, axis=-1, keepdims=True))


def rotation(length: int, size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [L, D/2] of rotary positions. The later half of the frequencies is zero: features without a
    position, whose maximum over a span says what is in the span and not where."""
    pairs = size // 2
    turning = np.arange(pairs) < (pairs + 1) // 2
    frequency = np.where(turning, 500.0 ** (-2 * np.arange(pairs) / pairs), 0)
    angle = np.arange(length)[:, None] * frequency
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def rotate(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """Turn the feature pairs (d, d + D/2) of x [B, H, L, D]; the inverse, and the gradient, is the turn by -sine."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cosine - b * sine, a * sine + b * cosine], axis=-1)


def forward(p: Arrays, tokens: np.ndarray, pattern: Pattern) -> tuple[np.ndarray, list]:
    """Logits [N, 256] of the byte after each of tokens [B, L], and what `backward` needs."""
    (B, L), E = tokens.shape, p["embedding"].shape[1]
    D = E // HEADS
    cosine, sine = rotation(L, D, p["embedding"].dtype)
    saved: list = []
    x = p["embedding"][tokens.ravel()]
    for n in range(DEPTH):
        # pass 1: normalise
        x_attention = x
        a, r_attention = normalise(x, p[f"norm_attention{n}"])
        # pass 2: queries, keys and values, [B, H, L, D] each: views of one product
        q, k, v = (a @ p[f"qkv{n}"]).reshape(B, L, 3, HEADS, D).transpose(2, 0, 3, 1, 4)
        # pass 3: positions
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        # pass 4: attention
        out, attention = combiner.attention_forward(q, k, v, pattern, is_causal=True)
        # pass 5: join the heads and add
        heads = out.swapaxes(1, 2).reshape(B * L, E)
        x = x + heads @ p[f"project{n}"]
        # pass 6: normalise
        x_mlp = x
        b, r_mlp = normalise(x, p[f"norm_mlp{n}"])
        # pass 7: MLP with squared ReLU, and add
        u = np.maximum(b @ p[f"up{n}"], 0)
        x = x + (u * u) @ p[f"down{n}"]
        saved.append((x_attention, a, r_attention, q, k, attention, heads, x_mlp, b, r_mlp, u))
    # pass 8: logits
    c, r_out = normalise(x, p["norm_out"])
    saved.append((x, c, r_out))
    return c @ p["head"], saved


def loss(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean bits per byte of targets [B, L] under logits [N, 256], and its gradient."""
    rows = np.arange(targets.size), targets.ravel()
    shifted = logits - logits.max(axis=-1, keepdims=True)
    p = np.exp(shifted)
    total = p.sum(axis=-1, keepdims=True)
    bits = float(np.mean(np.log(total[:, 0]) - shifted[rows])) / math.log(2)
    p /= total
    p[rows] -= 1
    p /= targets.size * math.log(2)
    return bits, p


def backward(p: Arrays, g: Arrays, tokens: np.ndarray, grad_logits: np.ndarray, saved: list) -> None:
    """Gradients of the loss with respect to every parameter, into g: the passes of `forward`, last to first."""
    (B, L), E = tokens.shape, p["embedding"].shape[1]
    D = E // HEADS
    cosine, sine = rotation(L, D, p["embedding"].dtype)
    # pass 8: c @ head
    x, c, r_out = saved[DEPTH]
    g["head"][...] = c.T @ grad_logits
    dx = normalise_backward(grad_logits @ p["head"].T, x, p["norm_out"], r_out, g["norm_out"])
    for n in reversed(range(DEPTH)):
        x_attention, a, r_attention, _, _, attention, heads, x_mlp, b, r_mlp, u = saved[n]
        # pass 7: x + (u * u) @ down
        g[f"down{n}"][...] = (u * u).T @ dx
        du = (dx @ p[f"down{n}"].T) * (2 * u)
        g[f"up{n}"][...] = b.T @ du
        # pass 6: normalise
        dx = dx + normalise_backward(du @ p[f"up{n}"].T, x_mlp, p[f"norm_mlp{n}"], r_mlp, g[f"norm_mlp{n}"])
        # pass 5: x + heads @ project
        g[f"project{n}"][...] = heads.T @ dx
        dout = (dx @ p[f"project{n}"].T).reshape(B, L, HEADS, D).swapaxes(1, 2)
        # pass 4: attention
        dq, dk, dv, *_ = combiner.attention_backward(dout, attention)
        # pass 3: positions
        dq, dk = rotate(dq, cosine, -sine), rotate(dk, cosine, -sine)
        # pass 2: a @ qkv
        dqkv = np.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4).reshape(B * L, 3 * E)
        g[f"qkv{n}"][...] = a.T @ dqkv
        # pass 1: normalise
        da = dqkv @ p[f"qkv{n}"].T
        dx = dx + normalise_backward(da, x_attention, p[f"norm_attention{n}"], r_attention, g[f"norm_attention{n}"])
    # the embedding's rows add up where a byte occurs more than once
    g["embedding"][...] = np.eye(BYTES, dtype=dx.dtype)[tokens.ravel()].T @ dx


# ---- training and scoring ----------------------------------------------------------------------------


def train(
    weights: np.ndarray, dim: int, pattern: Pattern, text: Text, length: int, steps: int, seed: int, name: str
) -> np.ndarray:
    """The weights after `steps` steps of Adam. Batches depend on the seed alone, so twins see the same ones."""
    rng = np.random.default_rng(seed)
    weights, grad = weights.copy(), np.zeros_like(weights)
    p, g = views(weights, dim), views(grad, dim)
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    on_terminal = sys.stderr.isatty()
    bar = tqdm(range(steps), desc=name, unit="step", ascii=not on_terminal, mininterval=0.1 if on_terminal else 10)
    for step in bar:
        starts = rng.integers(0, len(text.train) - length, max(1, ROWS_PER_STEP // length))
        tokens, targets = windows(text.train, starts, length)
        logits, saved = forward(p, tokens, pattern)
        bits, grad_logits = loss(logits, targets)
        backward(p, g, tokens, grad_logits, saved)
        mean += 0.1 * (grad - mean)
        square += 0.02 * (grad * grad - square)
        corrected = mean / (1 - 0.9 ** (step + 1))
        rate = LEARNING_RATE * min(1, (step + 1) / (0.1 * steps), (steps - step) / (0.6 * steps))
        weights -= rate * corrected / (np.sqrt(square / (1 - 0.98 ** (step + 1))) + 1e-8)
        bar.set_postfix_str(f"{bits:.2f} bits/byte", refresh=False)
    return weights


def evaluate(p: Arrays, pattern: Pattern, tokens: np.ndarray, targets: np.ndarray) -> float:
    """Mean bits per byte of targets [B, L], window by window."""
    return float(
        np.mean([loss(forward(p, t[None], pattern)[0], y[None])[0] for t, y in zip(tokens, targets, strict=True)])
    )


def sample(p: Arrays, pattern: Pattern, prompt: np.ndarray, count: int, rng: np.random.Generator) -> bytes:
    """`count` bytes drawn from the model at temperature 0.7; each reads a window as long as the prompt."""
    window, drawn = prompt.copy(), []
    for _ in range(count):
        logits = forward(p, window[None], pattern)[0][-1].astype(np.float64) / 0.7
        weights = np.exp(logits - logits.max())
        drawn.append(int(rng.choice(BYTES, p=weights / weights.sum())))
        window = np.append(window[1:], drawn[-1])
    return bytes(drawn)


# ---- checks, times, picture --------------------------------------------------------------------------


def check_attention(pattern: Pattern, rng: np.random.Generator) -> float:
    """Relative error of dq, dk, dv against central differences along a random direction each, in float64."""
    inputs = [rng.normal(size=(1, 2, 200, 16)) for _ in range(3)]
    weight = rng.normal(size=(1, 2, 200, 16))
    _, saved = combiner.attention_forward(*inputs, pattern, is_causal=True)
    worst = 0.0
    for n, grad in enumerate(combiner.attention_backward(weight, saved)[:3]):
        direction, step = rng.normal(size=grad.shape), 1e-6
        ends = []
        for sign in (1, -1):
            moved = [x + sign * step * direction if m == n else x for m, x in enumerate(inputs)]
            ends.append(np.sum(weight * combiner.attention(*moved, pattern, is_causal=True)))
        numeric, exact = (ends[0] - ends[1]) / (2 * step), np.sum(grad * direction)
        worst = max(worst, abs(numeric - exact) / abs(exact))
    return float(worst)


def check_model(dim: int, pattern: Pattern, tokens: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> float:
    """The same for the whole model's loss and a random direction in the space of its weights."""
    weights = initial_weights(dim, rng).astype(np.float64) + rng.normal(
        0, 0.05, sum(map(math.prod, shapes(dim).values()))
    )
    grad, direction, step = np.zeros_like(weights), rng.normal(size=weights.shape), 1e-6
    logits, saved = forward(views(weights, dim), tokens, pattern)
    backward(views(weights, dim), views(grad, dim), tokens, loss(logits, targets)[1], saved)
    ends = [
        loss(forward(views(weights + sign * step * direction, dim), tokens, pattern)[0], targets)[0] for sign in (1, -1)
    ]
    numeric, exact = (ends[0] - ends[1]) / (2 * step), np.sum(grad * direction)
    return float(abs(numeric - exact) / abs(exact))


def best_time(call, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def time_step(
    p: Arrays, pattern: Pattern, tokens: np.ndarray, targets: np.ndarray, repeats: int
) -> tuple[float, float]:
    """Seconds of one step (forward, loss, backward) and of its attention calls alone."""
    g = {name: np.empty_like(weight) for name, weight in p.items()}

    def step() -> list:
        logits, saved = forward(p, tokens, pattern)
        backward(p, g, tokens, loss(logits, targets)[1], saved)
        return saved

    _, _, _, q, k, *_ = step()[0]

    def attention() -> None:
        out, saved = combiner.attention_forward(q, k, k, pattern, is_causal=True)
        combiner.attention_backward(out, saved)

    return best_time(step, repeats), DEPTH * best_time(attention, repeats)


def draw(p: Arrays, pattern: combiner.Fixed, span: int, tokens: np.ndarray, path: Path) -> None:
    """Save the effective attention of the last block's head that gives its regions the most weight, on tokens [L]."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    _, _, _, q, k, *_ = forward(p, tokens[None], pattern)[1][DEPTH - 1]
    weights = combiner.attention_weights(q[0], k[0], pattern, is_causal=True)
    position = np.arange(len(tokens))
    is_direct = position[:, None] // span == position // span
    share = np.where(is_direct, 0, weights).sum(axis=-1).mean(axis=-1)
    head = int(share.argmax())

    figure = Figure(figsize=(9, 8.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    norm = LogNorm(1e-4, 1)
    extent = (-0.5, len(tokens) - 0.5, len(tokens) - 0.5, -0.5)
    for part, colours, name in (
        (is_direct, "Oranges", "own span, key by key"),
        (~is_direct, "Blues", "earlier spans, through a summary"),
    ):
        image = np.ma.masked_where(~part | (position[:, None] < position), np.maximum(weights[head], 1e-4))
        shown = axes.imshow(image, cmap=colours, norm=norm, extent=extent, interpolation="nearest")
        figure.colorbar(shown, ax=axes, label=f"{name}: weight", shrink=0.8, pad=0.01)
    ticks = np.arange(0, len(tokens) + 1, span) - 0.5
    axes.set_xticks(ticks, [f"{t + 0.5:.0f}" for t in ticks])
    axes.set_yticks(ticks, [f"{t + 0.5:.0f}" for t in ticks])
    axes.set(xlabel="key position", ylabel="query position")
    axes.set_title(f"Effective attention of one trained head: {pattern}, block {DEPTH}, head {head + 1}")
    figure.supxlabel(
        "Each row sums to 1 and covers every earlier position: full attention.\n"
        f"On average {share[head]:.0%} of this head's weight goes through summaries. Held-out bytes, log colour scale.",
        fontsize=9,
    )
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="training steps of each twin (default %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="positions of one window (default %(default)s)")
    parser.add_argument("--span", type=int, default=64, help="span of the Fixed pattern (default %(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="width of the model (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and sample (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="the picture (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few seconds, for tests: every part, nothing learned")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.length, args.span, args.dim = 3, 256, 16, 32
    if args.length % args.span or args.dim % (4 * HEADS):
        parser.error(f"--length must be a multiple of --span, --dim of {4 * HEADS}")
    started = time.perf_counter()
    dim, length, pattern = args.dim, args.length, combiner.Fixed(args.span)
    rng = np.random.default_rng(args.seed)
    print(f"combiner {combiner.__version__}: {combiner.info()}")

    text = read_text()
    digest = hashlib.sha256(text.train.astype(np.uint8)).hexdigest()[:12]
    print(
        f"text: Python {sys.version.split()[0]} standard library, {text.files[0]} files, {len(text.train):,} bytes to"
        f" train on (sha256 {digest}); {text.files[1]} files, {len(text.held_out):,} bytes held out"
    )
    if min(len(text.train), len(text.held_out)) <= length:
        sys.exit(f"the standard library's sources are not here, or shorter than --length {length}")

    first = initial_weights(dim, rng)
    print(f"model: {DEPTH} blocks of width {dim}, {HEADS} heads, {len(first):,} weights; length {length}, {pattern}")
    count = 2 if args.quick else 2**17 // length
    held_out = windows(text.held_out, np.linspace(0, len(text.held_out) - length - 1, count).astype(int), length)

    error_attention = check_attention(combiner.Fixed(16), rng)
    error_model = check_model(32, combiner.Fixed(16), *(part[:1, :128] for part in held_out), rng)
    print(
        "gradients against finite differences in float64, relative error:"
        f" attention {error_attention:.1e}, whole model {error_model:.1e}"
    )
    if max(error_attention, error_model) > 1e-6:
        sys.exit("the gradients are wrong")

    twins = {"Combiner-Fixed": pattern, "sparse Fixed": pattern.sparse()}
    bits = dict(zip(("unigram", "bigram"), count_models(text.train, *held_out), strict=True))
    models = {}
    for name, twin in twins.items():
        weights = train(first, dim, twin, text, length, args.steps, args.seed, name)
        models[name] = views(weights, dim)
        bits[name] = evaluate(models[name], twin, *held_out)
    print(f"held-out bits per byte, {args.steps} steps of {max(1, ROWS_PER_STEP // length)} x {length} bytes:")
    for name, value in bits.items():
        print(f"  {name:<16}{value:7.3f}")

    p = models["Combiner-Fixed"]
    batch = tuple(part[: max(1, ROWS_PER_STEP // length)] for part in held_out)
    print(f"milliseconds per step at length {length}:  whole step   attention alone")
    for name, other in {**twins, "dense": combiner.Dense()}.items():
        step, attention = time_step(p, other, *batch, repeats=2)
        print(f"  {name:<34}{1e3 * step:12.1f}{1e3 * attention:15.1f}")

    crop = min(length, 4 * args.span)
    prompt = text.held_out[:crop]
    print(f"sample, after {crop} held-out bytes:")
    drawn = sample(p, pattern, prompt, 8 if args.quick else 200, rng)
    print(
        "  "
        + (bytes(prompt[-60:].astype(np.uint8)) + b" >>> " + drawn).decode("utf-8", "replace").replace("\n", "\n  ")
    )

    draw(p, pattern, args.span, text.held_out[:crop], args.out)
    print(f"picture: {args.out}")
    print(f"total: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
