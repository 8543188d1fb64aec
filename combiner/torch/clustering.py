# SPDX-License-Identifier: Apache-2.0
"""Clusters for `Routing`: the functions of `combiner.clustering`, of tensors, as operators without gradients.

Parameters, errors and costs are those of `combiner.clustering`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import clustering
from ..arguments import as_integer
from ..foreign_names import explains_foreign_names
from .arguments import check_is_tensor
from .library import define
from .tensors import at_least_float32

_cluster = define(
    "cluster(Tensor x, int n, int iterations, bool balanced, int seed) -> Tensor",
    lambda x, n, iterations, balanced, seed: clustering.cluster(
        x, n, iterations=iterations, balanced=balanced, seed=seed
    ),
    lambda x, *_: x.new_empty(x.shape[:-1], dtype=torch.int64),
)
_fit_centroids = define(
    "fit_centroids(Tensor x, int n, int iterations, int seed) -> Tensor",
    lambda x, n, iterations, seed: clustering.fit_centroids(x, n, iterations=iterations, seed=seed),
    lambda x, n, *_: x.new_empty((*x.shape[:-2], n, x.shape[-1]), dtype=at_least_float32(x.dtype)),
)
_assign_clusters = define(
    "assign_clusters(Tensor x, Tensor centroids, bool balanced) -> Tensor",
    lambda x, centroids, balanced: clustering.assign_clusters(x, centroids, balanced=balanced),
    lambda x, *_: x.new_empty(x.shape[:-1], dtype=torch.int64),
)
_update_centroids = define(
    "update_centroids(Tensor centroids, Tensor x, Tensor clusters, float decay) -> Tensor",
    lambda centroids, x, clusters, decay: clustering.update_centroids(centroids, x, clusters, decay=decay),
    lambda centroids, *_: centroids.new_empty(centroids.shape, dtype=at_least_float32(centroids.dtype)),
)


@explains_foreign_names
def cluster(x: Tensor, n: int, *, iterations: int = 10, balanced: bool = False, seed: int = 0) -> Tensor:
    """`combiner.cluster` of tensors: `[..., L]` int64, what `Routing` takes; no gradients."""
    clusters: Tensor = _cluster(*_points(x=x), *_counts(n=n, iterations=iterations), balanced, *_counts(seed=seed))
    return clusters


@explains_foreign_names
def fit_centroids(x: Tensor, n: int, *, iterations: int = 10, seed: int = 0) -> Tensor:
    """`combiner.fit_centroids` of tensors: `[..., n, D]`, of x's dtype but float32 at least; no gradients."""
    centroids: Tensor = _fit_centroids(*_points(x=x), *_counts(n=n, iterations=iterations, seed=seed))
    return centroids


def assign_clusters(x: Tensor, centroids: Tensor, *, balanced: bool = False) -> Tensor:
    """`combiner.assign_clusters` of tensors: `[..., L]` int64, what `Routing` takes; no gradients."""
    clusters: Tensor = _assign_clusters(*_points(x=x, centroids=centroids), balanced)
    return clusters


def update_centroids(centroids: Tensor, x: Tensor, clusters: Tensor, *, decay: float = 0.999) -> Tensor:
    """`combiner.update_centroids` of tensors: `[..., n, D]`, a new tensor; no gradients."""
    moved: Tensor = _update_centroids(*_points(centroids=centroids, x=x, clusters=clusters), decay)
    return moved


def _points(**given: Tensor) -> list[Tensor]:
    """The tensors, checked and detached from their gradients."""
    for name, x in given.items():
        check_is_tensor(name, x)
    return [x.detach() for x in given.values()]


def _counts(**given: int) -> list[int]:
    """The integers, checked; in compiled code, where they may be symbolic, unchecked."""
    if torch.compiler.is_compiling():
        return list(given.values())
    return [as_integer(name, x, 1 if name == "n" else 0) for name, x in given.items()]
