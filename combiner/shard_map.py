# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism within `jax.shard_map`: the public name of `combiner.sharding.devices`."""

try:
    import jax  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("combiner.shard_map needs JAX: pip install 'combiner-attention[jax]'") from error

from .sharding.devices import attention

__all__ = ["attention"]
