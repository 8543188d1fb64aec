# SPDX-License-Identifier: Apache-2.0
"""Functions of NumPy arrays that make integers or centroids, as functions of jax.Arrays without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from .arrays import Array, Shape


def compute(
    call: Callable[..., npt.NDArray[Any]], result: Callable[..., jax.ShapeDtypeStruct], given: dict[str, Array]
) -> jax.Array:
    """`call` of concrete arrays at once, of traced ones by jax.pure_callback.

    Parameters
    ----------
    result : the shape and dtype that `call` of these arrays returns.
    given : arrays by name, in the order of the parameters of `call` and `result`.
    """
    for name, x in given.items():
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(f"{name} must be a jax.Array or a NumPy array, got {type(x).__name__}")
    if not any(isinstance(x, jax.core.Tracer) for x in given.values()):
        return jnp.asarray(call(*map(np.asarray, given.values())))
    for name, x in given.items():
        if x.ndim < 2 - (name in ("clusters", "key_mask")):
            raise ValueError(f"{name} must have a shape of at least two axes, got {x.shape}")
    arrays = [jax.lax.stop_gradient(jnp.asarray(x)) for x in given.values()]

    def on_host(*arrays: Any) -> npt.NDArray[Any]:
        return call(*map(np.asarray, arrays)).astype(like.dtype, copy=False)

    like = result(*arrays)
    return jax.pure_callback(on_host, like, *arrays, vmap_method="broadcast_all")


def integers(shape: Shape) -> jax.ShapeDtypeStruct:
    """int64 of this shape, or int32 where JAX has no 64-bit types."""
    return jax.ShapeDtypeStruct(shape, jnp.asarray(0).dtype)
