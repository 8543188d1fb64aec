# SPDX-License-Identifier: Apache-2.0
"""Clusters for `Routing` in JAX: the functions of `combiner.clustering`, of jax.Arrays, under jit and vmap too.

Arguments and costs are those of `combiner.clustering`. Concrete arrays are read in place, and argument errors are
raised at once. Traced arrays go through jax.pure_callback, and errors are XLA's. There are no gradients, as under
jax.lax.stop_gradient. Clusters are int64, or int32 where JAX has no 64-bit types. A `Routing` takes concrete clusters,
outside of jit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import clustering
from ..arguments import as_integer
from ..foreign_names import explains_foreign_names
from .arrays import Array, Shape
from .host import compute, integers


@explains_foreign_names
def cluster(x: Array, n: int, *, iterations: int = 10, balanced: bool = False, seed: int = 0) -> jax.Array:
    """`combiner.cluster`: the clusters of the rows of x, `[..., L, D]`, by spherical k-means: `[..., L]`."""
    call = functools.partial(clustering.cluster, n=n, iterations=iterations, balanced=balanced, seed=seed)
    return compute(call, _rows_like, {"x": x})


@explains_foreign_names
def fit_centroids(x: Array, n: int, *, iterations: int = 10, seed: int = 0) -> jax.Array:
    """`combiner.fit_centroids`: the centroids of spherical k-means of x, `[..., L, D]`: `[..., n, D]`."""
    count = as_integer("n", n, 1)
    call = functools.partial(clustering.fit_centroids, n=count, iterations=iterations, seed=seed)

    def result(x: jax.Array) -> jax.ShapeDtypeStruct:
        return _like((*x.shape[:-2], count, x.shape[-1]), jnp.promote_types(x.dtype, jnp.float32))

    return compute(call, result, {"x": x})


@explains_foreign_names
def assign_clusters(x: Array, centroids: Array, *, balanced: bool = False) -> jax.Array:
    """`combiner.assign_clusters`: the most similar centroid of each row of x, `[..., L, D]`: `[..., L]`."""
    call = functools.partial(clustering.assign_clusters, balanced=balanced)
    return compute(call, lambda x, _: _rows_like(x), {"x": x, "centroids": centroids})


@explains_foreign_names
def update_centroids(centroids: Array, x: Array, clusters: Array, *, decay: float = 0.999) -> jax.Array:
    """`combiner.update_centroids`: the centroids, `[..., n, D]`, one step of online k-means later."""
    call = functools.partial(clustering.update_centroids, decay=decay)

    def result(centroids: jax.Array, *_: jax.Array) -> jax.ShapeDtypeStruct:
        return _like(centroids.shape, jnp.promote_types(centroids.dtype, jnp.float32))

    return compute(call, result, {"centroids": centroids, "x": x, "clusters": clusters})


def _rows_like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return integers(x.shape[:-1])


def _like(shape: Shape, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
