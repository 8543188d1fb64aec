# SPDX-License-Identifier: Apache-2.0
"""Clusters for `Routing`: spherical k-means (Roy et al., TACL 2021), one `[L, D]` at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..arguments import Array


def cluster(x: Array, n: int, *, iterations: int = 10, balanced: bool = False, seed: int = 0) -> Array:
    """Clusters `[..., L]` of the rows of x `[..., L, D]`."""
    return assign_clusters(x, fit_centroids(x, n, iterations=iterations, seed=seed), balanced=balanced)


def fit_centroids(x: Array, n: int, *, iterations: int = 10, seed: int = 0) -> Array:
    """Centroids `[..., n, D]`: k-means++, then rounds of assigning rows and moving centroids to them."""
    centroids = _for_each(lambda u: _plus_plus(u, n, seed), (n, np.shape(x)[-1]), (directions(x), 2))
    for _ in range(iterations):
        centroids = update_centroids(centroids, x, assign_clusters(x, centroids), decay=0)
    return centroids


def assign_clusters(x: Array, centroids: Array, *, balanced: bool = False) -> Array:
    """The most similar centroid of each row; balanced, the most similar one with room left at the row's turn."""
    similarity = directions(x) @ directions(centroids).swapaxes(-1, -2)
    if balanced:
        return _for_each(_balance, similarity.shape[-2:-1], (similarity, 2)).astype(np.int64)
    most_similar: Array = similarity.argmax(-1)
    return most_similar


def update_centroids(centroids: Array, x: Array, clusters: Array, *, decay: float = 0.999) -> Array:
    """The direction of decay * centroid + (1 - decay) * the mean direction of the cluster's rows."""

    def move(centroids: Array, u: Array, clusters: Array) -> Array:
        moved = centroids.copy()
        for c in range(len(centroids)):
            rows = u[(clusters == c) & u.any(-1)]
            if len(rows):
                direction = directions(decay * centroids[c] + (1 - decay) * rows.mean(0))
                moved[c] = direction if direction.any() else centroids[c]
        return moved

    centroids = np.asarray(centroids, np.float64)
    return _for_each(move, centroids.shape[-2:], (centroids, 2), (directions(x), 2), (np.asarray(clusters), 1))


def directions(x: Array) -> Array:
    """Rows scaled to unit length; zeros for a row of zeros, or with a NaN or Inf."""
    x = np.asarray(x, np.float64)
    top = np.abs(x).max(-1, keepdims=True)  # NaN for a row with a NaN
    has_direction = np.isfinite(top) & (top > 0)
    x = np.where(has_direction, x, 0) / np.where(has_direction, top, 1)  # so that squares stay in range
    return x / np.where(has_direction, np.linalg.norm(x, axis=-1, keepdims=True), 1)


def _for_each(function: Callable[..., Array], tail: tuple[int, ...], *arrays: tuple[Array, int]) -> Array:
    """The function of the last axes of each array, as many as stand beside it, for every leading index. A result has
    the shape `tail`.
    """
    lead = arrays[0][0].shape[: -arrays[0][1]]
    flat = [x.reshape(math.prod(lead), *x.shape[x.ndim - own :]) for x, own in arrays]
    results = [function(*parts) for parts in zip(*flat, strict=True)]
    return np.array(results, np.float64).reshape(*lead, *tail)


def _plus_plus(u: Array, n: int, seed: int) -> Array:
    """k-means++ (Arthur and Vassilvitskii, SODA 2007) among a sample of at most 16 n rows that have a direction."""
    L, live = len(u), np.flatnonzero(u.any(-1))
    size = min(len(live), 16 * n)
    sample: list[int] = []
    for left, i in zip(range(len(live), 0, -1), live.tolist(), strict=True):  # Knuth, TAOCP 2, 3.4.2, algorithm S
        if (_draw(seed, i) >> 32) * left >> 32 < size - len(sample):
            sample.append(i)
    u, centroids = u[sample], np.zeros((n, u.shape[1]))
    weight = np.full(size, 2.0)
    for c in range(n if size else 0):
        total = weight.cumsum()
        ahead = np.flatnonzero(total > (_draw(seed, L + c) >> 11) * 2.0**-53 * total[-1])
        chosen = ahead[0] if len(ahead) else 0
        centroids[c] = u[chosen]
        weight = np.minimum(weight, np.maximum(1 - u @ u[chosen], 0))
        weight[chosen] = 0
    return centroids


def _draw(seed: int, counter: int) -> int:
    """64 random bits: splitmix64 (Steele, Lea and Flood, OOPSLA 2014) by counter."""

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    step = 0x9E3779B97F4A7C15
    return mix((mix((seed + step) % 2**64) + (counter + 1) * step) % 2**64)


def _balance(similarity: Array) -> Array:
    """Rows choose in the order of their margin between the two most similar centroids. A cluster takes L // n rows, the
    first L % n clusters to fill up take one more."""
    L, n = similarity.shape
    best = np.sort(similarity, axis=-1)
    margin = best[:, -1] - best[:, -2] if n > 1 else np.zeros(L)
    size, extra = np.zeros(n, int), L % n
    clusters = np.zeros(L, int)
    for i in np.argsort(-margin, kind="stable").tolist():
        open_ = size < L // n + (extra > 0)
        c = clusters[i] = np.where(open_, similarity[i], -np.inf).argmax()
        extra -= int(size[c] == L // n)
        size[c] += 1
    return clusters
