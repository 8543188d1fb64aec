# SPDX-License-Identifier: Apache-2.0
"""Patterns that are made of jax.Arrays, which may be traced."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from .. import composed
from ..composed import block_bounds
from ..patterns import Factorization, Plans
from .arrays import Array, Shape


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["regions"], meta_fields=["pattern", "block", "open", "rest"]
)
@dataclass(frozen=True, eq=False)
class Selected:
    """`combiner.Selected` of an array, which may be traced: a compiled function opens other regions in each call.

    A pytree, so that it may be an argument of jax.jit. No gradient flows through the choice of regions; given the
    choice, gradients are exact.

    Parameters
    ----------
    pattern : as in `combiner.Selected`; static: the clusters of a `Routing` are not traced.
    regions : integers `[k]`, `[T, k]` or `[..., Hk, T, k]`, as `select` returns them, of packed sequences too, with
        the leading axes of query.
    block, open, rest : as in `combiner.Selected`; static.

    Raises
    ------
    TypeError, ValueError : when it is used, for regions of another kind or shape, and as `combiner.Selected`; for
        traced regions that the pattern does not have, XLA's error when the function runs.
    """

    pattern: Factorization
    regions: Array
    block: int = field(default=64, kw_only=True)
    open: bool = field(default=True, kw_only=True)
    rest: bool = field(default=True, kw_only=True)

    def sparse(self) -> Selected:
        """The same without the regions that are not listed."""
        return replace(self, rest=False)

    def plan(self, length: int, is_causal: bool = False) -> Plans:
        """The plan of regions that are not traced, or a tuple of plans, one for each batch entry and key head."""
        return self._of(np.asarray(self.regions)).plan(length, is_causal)

    def of_none(self) -> composed.Selected:
        """The pattern of `combiner` that lists no region: its plan has the regions that any choice has."""
        return self._of(np.zeros(0, np.int64))

    def _of(self, regions: Array) -> composed.Selected:
        return composed.Selected(self.pattern, regions, block=self.block, open=self.open, rest=self.rest)


def whole_regions(pattern: Selected, key: jax.Array, heads_last: bool, cu_seqlens: tuple[int, ...] = ()) -> jax.Array:
    """The regions as int32 `[..., Hk, T, k]`, or `[T, k]` for a key `[L, D]`; `cu_seqlens`: of packed sequences."""
    *heads, length = (*key.shape[:-3], key.shape[-2], key.shape[-3]) if heads_last else key.shape[:-1]
    regions = pattern.regions
    if not isinstance(regions, jax.Array | np.ndarray) or not jnp.issubdtype(regions.dtype, jnp.integer):
        got = getattr(regions, "dtype", type(regions).__name__)
        raise TypeError(f"regions must be a jax.Array or a NumPy array of integers, got {got}")
    blocks, k = block_bounds(cu_seqlens or (0, length), pattern.block)[-1], regions.shape[-1] if regions.ndim else 0
    shapes: list[Shape] = [(k,), (blocks, k), (*heads, blocks, k)]
    if regions.shape not in shapes:
        expected = " or ".join(f"({', '.join([*map(str, shape[:-1]), 'k'])})" for shape in dict.fromkeys(shapes))
        raise ValueError(
            f"regions must have shape {expected} with blocks of {pattern.block} queries, got {regions.shape}"
        )
    return jnp.broadcast_to(jax.lax.stop_gradient(jnp.asarray(regions)).astype(jnp.int32), (*heads, blocks, k))
