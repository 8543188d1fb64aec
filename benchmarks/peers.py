# SPDX-License-Identifier: Apache-2.0
"""The peers on the same arrays: dense attention, and Combiner written well in PyTorch and in JAX.

Combiner-Fixed, -LogSparse and -Axial "rowmajor", causal, with max pooling, are written as matrix products over all
spans, chunks or rows at once, and one softmax over direct keys and regions together. Lengths are multiples of the span
(LogSparse: powers of two). Each is written once, with the few functions that the two libraries name differently, and
takes query, key and value `[..., L, D]`. A peer whose library is not installed is left out.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import Case

from combiner import Axial, Fixed, LogSparse

Arrays = list[np.ndarray]
Call = Callable[[], Arrays]


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """The functions that the two libraries name differently."""

    arange: Callable[..., Any]
    where: Callable[..., Any]
    concat: Callable[..., Any]
    amax: Callable[..., Any]  # over the axis
    softmax: Callable[..., Any]  # over the axis


def fixed(xp: Namespace, query: Any, key: Any, value: Any, span: int) -> Any:
    """Combiner-Fixed: spans `[..., n, s, D]`. A query has s direct keys and n regions, under a mask."""
    *lead, L, D = query.shape
    s, n = span, L // span
    q, k, v = (x.reshape(*lead, n, s, D) for x in (query * D**-0.5, key, value))
    region_key, region_value = xp.amax(k, -2), local_expectations(xp, xp.amax(q, -2), k, v)
    within, spans = xp.arange(s), xp.arange(n)
    direct = xp.where(within[:, None] >= within, q @ k.mT, -math.inf)
    regions = (q.reshape(*lead, L, D) @ region_key.mT).reshape(*lead, n, s, n)
    regions = xp.where((spans[:, None] > spans)[:, None], regions, -math.inf)
    p = xp.softmax(xp.concat([direct, regions], -1), -1)
    summarized = p[..., s:].reshape(*lead, L, n) @ region_value
    return (p[..., :s] @ v).reshape(*lead, L, D) + summarized


def logsparse(xp: Namespace, query: Any, key: Any, value: Any) -> Any:
    """Combiner-Logsparse by matrix products: a query sees one left sibling block of each level that its bits name.

    n chunks of s, both about sqrt(L): blocks of less than s lie in the query's own chunk, s - 1 of them left siblings,
    and n - 1 of the larger ones are, so that a query's logits are a row of 1 + (s - 1) + (n - 1).
    """
    *lead, L, D = query.shape
    levels = L.bit_length() - 1
    low = levels // 2
    s, n = 1 << low, L >> low
    query = query * D**-0.5
    keys, values = [key[..., ::2, :]], [value[..., ::2, :]]  # level 0: a position is its own summary
    q, k = query, key
    for level in range(1, levels):
        q, k = (xp.amax(x.reshape(*lead, L >> level, 2, D), -2) for x in (q, k))
        members = (x.reshape(*lead, L >> level + 1, 2, 1 << level, D)[..., 0, :, :] for x in (key, value))
        keys.append(k[..., ::2, :])
        values.append(local_expectations(xp, q[..., ::2, :], *members))

    def seen(count: int) -> Any:
        """Which left siblings of each level, `[count - 1]`, each of `count` leaves sees."""
        i = xp.arange(count)
        by_level = [
            (i[:, None] >> level) == 2 * xp.arange(count >> level + 1) + 1 for level in range(count.bit_length() - 1)
        ]
        return xp.concat(by_level, -1)

    def in_chunks(blocks: list[Any]) -> Any:
        return xp.concat([x.reshape(*lead, n, x.shape[-2] // n, D) for x in blocks[:low]], -2)

    chunks = query.reshape(*lead, n, s, D)
    own = (query * key).sum(-1).reshape(*lead, n, s, 1)
    near = xp.where(seen(s), chunks @ in_chunks(keys).mT, -math.inf)
    far = (query @ xp.concat(keys[low:], -2).mT).reshape(*lead, n, s, n - 1)
    far = xp.where(seen(n)[:, None], far, -math.inf)
    p = xp.softmax(xp.concat([own, near, far], -1), -1)
    out = p[..., :1] * value.reshape(*lead, n, s, D) + p[..., 1:s] @ in_chunks(values)
    return out.reshape(*lead, L, D) + p[..., s:].reshape(*lead, L, n - 1) @ xp.concat(values[low:], -2)


def rowmajor(xp: Namespace, query: Any, key: Any, value: Any, width: int) -> Any:
    """Combiner-Axial "rowmajor": rows `[..., n, m, D]`; the local expectations are attention within whole rows."""
    *lead, L, D = query.shape
    m, n = width, L // width
    q, k, v = (x.reshape(*lead, n, m, D) for x in (query * D**-0.5, key, value))
    within = q @ k.mT
    h = xp.softmax(within, -1) @ v
    columns, rows = xp.arange(m), xp.arange(n)
    direct = xp.where(columns[:, None] >= columns, within, -math.inf)
    q, k, h = (x.swapaxes(-3, -2) for x in (q, k, h))
    regions = xp.where(rows[:, None] > rows, q @ k.mT, -math.inf)
    p = xp.softmax(xp.concat([direct, regions.swapaxes(-3, -2)], -1), -1)
    summarized = (p[..., m:].swapaxes(-3, -2) @ h).swapaxes(-3, -2)
    return (p[..., :m] @ v + summarized).reshape(*lead, L, D)


def local_expectations(xp: Namespace, region_query: Any, key: Any, value: Any) -> Any:
    """h_R `[..., R, D]` of regions with as many members each, `[..., R, members, D]`."""
    return (xp.softmax(region_query[..., None, :] @ key.mT, -1) @ value)[..., 0, :]


def written(xp: Namespace, case: Case) -> Callable[[Any, Any, Any], Any]:
    """The function of query, key and value that computes the case's pattern."""
    match case.pattern:
        case Fixed(span=int(span)):
            return lambda query, key, value: fixed(xp, query, key, value, span)
        case LogSparse(hierarchical=False):
            return lambda query, key, value: logsparse(xp, query, key, value)
        case Axial(width=int(width), order="rowmajor"):
            return lambda query, key, value: rowmajor(xp, query, key, value, width)
    raise ValueError(f"pattern must be one that the peers know, got {case.pattern}")


def torch_call(case: Case, arrays: Arrays, attention: Callable[[Any, Any, Any], Any]) -> Call:
    """A call of attention: the forward without autograd, or the forward and the backward with it."""
    import torch

    torch.set_num_threads(case.threads)
    half = case.dtype == "bfloat16"  # handed over as the integers of its bits
    bits = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(x) for x in arrays)
    *tensors, grad_out = bits

    def array(tensor: Any) -> np.ndarray:
        numbers: np.ndarray = tensor.view(torch.int16).numpy().view(case.dtype) if half else tensor.numpy()
        return numbers

    def forward() -> Arrays:
        with torch.no_grad():
            return [array(attention(*tensors))]

    def both() -> Arrays:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = attention(*leaves)
        out.backward(grad_out)
        return [array(out.detach()), *(array(leaf.grad) for leaf in leaves)]

    return both if case.backward else forward


def torch_namespace() -> Namespace:
    """The functions of PyTorch."""
    import torch

    return Namespace(
        arange=torch.arange, where=torch.where, concat=torch.cat, amax=torch.amax, softmax=torch.nn.functional.softmax
    )


def sdpa(case: Case, arrays: Arrays) -> Call:
    """PyTorch's scaled_dot_product_attention: dense, whatever the pattern is."""
    import torch

    attention = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        is_causal=case.is_causal,
        enable_gqa=case.key_heads is not None,
    )
    return torch_call(case, arrays, attention)


def torch_eager(case: Case, arrays: Arrays) -> Call:
    """The pattern in PyTorch."""
    return torch_call(case, arrays, written(torch_namespace(), case))


def torch_compiled(case: Case, arrays: Arrays) -> Call:
    """The pattern in PyTorch, through torch.compile."""
    import torch

    torch.compiler.reset()
    return torch_call(case, arrays, torch.compile(written(torch_namespace(), case), dynamic=False))


def torch_masked(case: Case, arrays: Arrays) -> Call:
    """Combiner-Fixed with PyTorch's scaled_dot_product_attention: each span's keys, then all regions, under a mask."""
    import torch

    assert isinstance(case.pattern, Fixed) and case.pattern.span
    s, n = case.pattern.span, case.length // case.pattern.span
    xp = torch_namespace()
    mask = torch.cat([torch.ones(s, s).tril().expand(n, s, s), torch.ones(n, n).tril(-1)[:, None].expand(n, s, n)], -1)

    def attention(query: Any, key: Any, value: Any) -> Any:
        q, k, v = (x.reshape(-1, n, s, x.shape[-1]) for x in (query * case.dim**-0.5, key, value))
        region_key, region_value = k.amax(-2), local_expectations(xp, q.amax(-2), k, v)
        k, v = (torch.cat([x, r[:, None].expand(-1, n, -1, -1)], -2) for x, r in ((k, region_key), (v, region_value)))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask > 0, scale=1.0)
        return out.reshape(query.shape)

    return torch_call(case, arrays, attention)


def jax_jit(case: Case, arrays: Arrays) -> Call:
    """The pattern in JAX, jitted; with the backward as one function."""
    os.environ.setdefault("NPROC", str(case.threads))  # as many threads, read when the backend starts
    import jax
    import jax.numpy as jnp

    xp = Namespace(arange=jnp.arange, where=jnp.where, concat=jnp.concatenate, amax=jnp.max, softmax=jax.nn.softmax)
    attention = written(xp, case)
    given = [jnp.asarray(array) for array in arrays]

    @jax.jit
    def forward(query: Any, key: Any, value: Any, grad_out: Any) -> list[Any]:
        return [attention(query, key, value)]

    @jax.jit
    def both(query: Any, key: Any, value: Any, grad_out: Any) -> list[Any]:
        out, pullback = jax.vjp(attention, query, key, value)
        return [out, *pullback(grad_out)]

    function = both if case.backward else forward
    return lambda: [np.asarray(result) for result in function(*given)]  # waits


@dataclass(frozen=True)
class Peer:
    """Another way to compute a case, by a library that may be missing."""

    title: str
    make: Callable[[Case, Arrays], Call]
    package: str
    is_dense: bool = False  # computes dense attention; otherwise the same function as ours, which is checked
    program: str | None = None  # a program that it also needs

    @property
    def is_there(self) -> bool:
        """Whether the package, and the program, are installed."""
        return bool(importlib.util.find_spec(self.package)) and (
            self.program is None or bool(shutil.which(self.program))
        )


PEERS = {
    "sdpa": Peer("PyTorch SDPA (dense)", sdpa, "torch", is_dense=True),
    "torch": Peer("PyTorch", torch_eager, "torch"),
    "torch-compiled": Peer("PyTorch, compiled", torch_compiled, "torch", program=os.environ.get("CXX", "g++")),
    "torch-masked": Peer("PyTorch, SDPA with a mask", torch_masked, "torch"),
    "jax": Peer("JAX, jitted", jax_jit, "jax"),
}
