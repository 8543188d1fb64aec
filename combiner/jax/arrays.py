# SPDX-License-Identifier: Apache-2.0
"""JAX's arrays, and stand-ins for them where only shape and dtype count."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

Array: TypeAlias = jax.Array | npt.NDArray[Any]
Arrays: TypeAlias = dict[str, jax.Array]
Shape: TypeAlias = tuple[int, ...]


def as_array(name: str, x: object) -> jax.Array:
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be a jax.Array or a NumPy array, got {type(x).__name__}")
    return jnp.asarray(x)


def stand_in(x: jax.Array, swapped: bool) -> npt.NDArray[Any]:
    """An array of the same shape and dtype that takes no memory."""
    like = np.broadcast_to(np.zeros(x.shape[-1:], x.dtype), x.shape)
    return like.swapaxes(-2, -3) if swapped and x.ndim > 2 else like
