# SPDX-License-Identifier: Apache-2.0
"""The command bench: times of this machine, ours beside the dense attention of other libraries."""

from __future__ import annotations

import importlib.util
import os
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import Array
from ..functional import attention, attention_backward, attention_forward
from ..patterns import Dense, Fixed, LogSparse
from ..process import get_num_threads
from ..stopwatch import fastest
from ..tables import in_seconds, text_table
from .progress import progress

DEFAULT = (Dense(), Fixed(128), LogSparse())
BUSY = 1.5  # processes for each processor; our own timings are one
SETTLE_SECONDS = 0.02  # before each timing: threads of the library timed before may still spin on a processor


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds by name and length, and what was timed."""

    setting: dict[str, Any]
    ours: dict[str, dict[int, float]]
    peers: dict[str, dict[int, float]]  # dense attention

    @property
    def crossover(self) -> dict[str, int | None]:
        """The length from which on each pattern is at least as fast as every peer, or without peers as Dense(); None if
        never."""
        found: dict[str, int | None] = {}
        for name, seconds in self.ours.items():
            others = [self.peers[each] for each in self.peers] or [self.ours.get(repr(Dense()), {})]
            found[name] = None
            for length in sorted(seconds, reverse=True):
                if not all(length in other and seconds[length] <= other[length] for other in others):
                    break
                found[name] = length
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"setting": self.setting, "ours": self.ours, "peers": self.peers, "crossover": self.crossover}

    def __str__(self) -> str:
        lengths = sorted({length for seconds in self.ours.values() for length in seconds})
        rows = [
            (name, *(in_seconds(seconds[length]) for length in lengths))
            for name, seconds in [*self.ours.items(), *self.peers.items()]
        ]
        against = ", ".join(self.peers) or "Dense(); no peer is installed"
        lines = [
            ", ".join(f"{name} {value}" for name, value in self.setting.items()),
            text_table(("", *(f"L {length:,}" for length in lengths)), rows),
            f"at least as fast as dense attention ({against}):",
        ]
        for name, length in self.crossover.items():
            lines.append(f"  {name}: {'not at these lengths' if length is None else f'from L {length:,} on'}")
        if self.setting.get("load", 0) > BUSY:
            lines.append("The machine is busy: times are too long, most of all those of libraries on OpenMP.")
        return "\n".join(lines)


def run_bench(args: Namespace) -> Timings:
    """The command `bench`."""
    peers = {name: make for name, (package, make) in PEERS.items() if importlib.util.find_spec(package)}
    chosen = (*(args.patterns or DEFAULT), *(() if peers else (Dense(),)))
    patterns = {repr(pattern): pattern for pattern in chosen}
    ours: dict[str, dict[int, float]] = {name: {} for name in patterns}
    theirs: dict[str, dict[int, float]] = {name: {} for name in peers}
    cells = [(length, name) for length in sorted(set(args.lengths)) for name in (*patterns, *peers)]
    for length, name in progress(cells, "timing", "call"):
        arrays = list(np.random.default_rng(0).standard_normal((4, args.heads, length, args.dim), np.float32))
        if name in patterns:
            call = _ours(arrays, patterns[name], args.causal, args.backward)
        else:
            call = peers[name](arrays, args.causal, args.backward)
        time.sleep(SETTLE_SECONDS)
        (ours if name in patterns else theirs)[name][length] = fastest(call, args.repeats)
    setting = {
        "passes": "forward + backward" if args.backward else "forward",
        "heads": args.heads,
        "dim": args.dim,
        "kind": "causal" if args.causal else "bidirectional",
        "dtype": "float32",
        "threads": get_num_threads(),
        "load": _load(),
    }
    return Timings(setting, ours, theirs)


def _load() -> float:
    """The processes that want a processor, for each processor: the mean of the last minute; 0 where none tells."""
    if not hasattr(os, "getloadavg"):
        return 0.0
    return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)


def _ours(arrays: list[Array], pattern: Any, is_causal: bool, backward: bool) -> Callable[[], object]:
    query, key, value, grad_out = arrays
    if not backward:
        return lambda: attention(query, key, value, pattern, is_causal=is_causal)
    return lambda: attention_backward(grad_out, attention_forward(query, key, value, pattern, is_causal=is_causal)[1])


def _torch(arrays: list[Array], is_causal: bool, backward: bool) -> Callable[[], object]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(get_num_threads())
    query, key, value, grad_out = (torch.from_numpy(x)[None] for x in arrays)

    def forward() -> object:
        with torch.no_grad():
            return scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    def both() -> object:
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal).backward(grad_out)

    return both if backward else forward


def _jax(arrays: list[Array], is_causal: bool, backward: bool) -> Callable[[], object]:
    os.environ.setdefault("NPROC", str(get_num_threads()))  # read when JAX's backend starts
    import jax

    cpu = jax.devices("cpu")[0]
    *inputs, grad_out = (jax.device_put(x.swapaxes(0, 1)[None], cpu) for x in arrays)  # heads after positions

    def dense(query: Any, key: Any, value: Any) -> Any:
        return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)

    def both(query: Any, key: Any, value: Any, grad: Any) -> Any:
        out, pullback = jax.vjp(dense, query, key, value)
        return out, pullback(grad)

    if backward:
        compiled = jax.jit(both)
        return lambda: jax.block_until_ready(compiled(*inputs, grad_out))
    compiled = jax.jit(dense)
    return lambda: jax.block_until_ready(compiled(*inputs))


# Dense attention of other libraries: the package, and a call from arrays [H, L, D].
PEERS: dict[str, tuple[str, Callable[[list[Array], bool, bool], Callable[[], object]]]] = {
    "PyTorch SDPA": ("torch", _torch),
    "JAX dot_product_attention": ("jax", _jax),
}
