# SPDX-License-Identifier: Apache-2.0
"""Clusters for `Routing`: spherical k-means, and its online step.

The Routing Transformer (Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", TACL 2021)
assigns positions to clusters by k-means on the unit sphere, and moves the centroids a little with every training batch.
Letters: L rows, D features, n clusters. Common to all functions:

- x is `[..., L, D]`, of a dtype that `attention` takes. Every `[L, D]` in it is clustered alone. A view with any
  strides is read without a copy if its last axis is contiguous. A 16-bit dtype is copied as float32, and its centroids
  are float32. Inputs are never written.
- The direction of a row is the row at unit length. A row of zeros, or with a NaN or Inf, has no direction: its
  similarity to every centroid is 0, and it moves no centroid. The similarity of a row and a centroid is the dot product
  of their directions.
- k-means and balanced assignments look at all rows, so a row's cluster depends on later rows. A causal model must not
  see these: it uses `assign_clusters`, not balanced, with centroids from elsewhere, which assigns each row alone.
- Ctrl-C, threads, bits and errors are as in `combiner.attention`: the same bits for any number of threads, leading axes
  and memory layout.
"""

from __future__ import annotations

from . import _core
from .arguments import Array, as_integer, is_real, widened
from .interchange import any_library


@any_library
def cluster(x: Array, n: int, *, iterations: int = 10, balanced: bool = False, seed: int = 0) -> Array:
    """The clusters of the rows of x by spherical k-means, for `Routing`.

    The same as ``assign_clusters(x, fit_centroids(x, n, iterations=iterations, seed=seed), balanced=balanced)``, to the
    bit. The Routing Transformer clusters queries and keys together: put both into one array for that.

    Parameters
    ----------
    x : `[..., L, D]`, of a dtype that `attention` takes; 1 <= D <= 1024.
    n : the number of clusters, from 1 to L (any number if L is 0). Some may stay empty unless `balanced`.
    iterations : the most rounds of k-means, 0 or more. A round that changes nothing is the last.
    balanced : whether sizes may differ by at most one.
    seed : the seed of k-means++, 0 or more.

    Returns
    -------
    clusters : `[..., L]`, int64, from 0 to n - 1

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError : an argument is of the wrong kind, shape or range.

    Notes
    -----
    Time O(iterations L n D). Memory beyond the arrays O(L D + n D) for each `[L, D]` that is clustered at the same
    time: at most one for each thread, and only as many as fit into 12 MB.
    """
    numbers = as_integer("n", n, 1), as_integer("iterations", iterations, 0), as_integer("seed", seed, 0)
    return _core.cluster(_wide(x), *numbers, balanced, False)


@any_library
def fit_centroids(x: Array, n: int, *, iterations: int = 10, seed: int = 0) -> Array:
    """The centroids of spherical k-means: unit vectors, each the direction of the sum of its rows' directions.

    The first centroids are rows, chosen by k-means++ (Arthur and Vassilvitskii, SODA 2007) with distances 1 -
    similarity among a sample of at most 16 n rows. Each round assigns rows as `assign_clusters` does, and then moves
    the centroids as `update_centroids` does with decay 0. The mean similarity of rows to their centroids never falls.
    If fewer than n rows have a direction, centroids repeat; if none has, centroids are zeros.

    Parameters
    ----------
    x, n, iterations, seed : as in `cluster`.

    Returns
    -------
    centroids : `[..., n, D]`, the dtype of x, or float32

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError : an argument is of the wrong kind, shape or range.

    Notes
    -----
    Time and memory as `cluster`.
    """
    numbers = as_integer("n", n, 1), as_integer("iterations", iterations, 0), as_integer("seed", seed, 0)
    return _core.cluster(_wide(x), *numbers, False, True)


@any_library
def assign_clusters(x: Array, centroids: Array, *, balanced: bool = False) -> Array:
    """The cluster of each row: the number of the most similar centroid; of equal ones, the first.

    Balanced: every cluster has room for L // n rows, and the first L % n clusters to fill up have room for one more.
    Rows are taken in descending margin, the best similarity minus the second best; of equal margins, the first row is
    first. Each joins the most similar centroid that has room left. This is greedy, and need not be the best assignment.

    Parameters
    ----------
    x : `[..., L, D]`, of a dtype that `attention` takes; 1 <= D <= 1024.
    centroids : `[..., n, D]`, with x's leading axes and dtype (or float32); the rows may have any length. For one set
        of centroids for a whole batch, pass a view made by ``numpy.broadcast_to``.
    balanced : whether sizes may differ by at most one.

    Returns
    -------
    clusters : `[..., L]`, int64, from 0 to n - 1

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError : an argument is of the wrong kind, shape or range.

    Notes
    -----
    Time O(L n D), about twice that if balanced. Memory as `cluster`.
    """
    return _core.assign(_wide(x), _wide(centroids), balanced)


@any_library
def update_centroids(centroids: Array, x: Array, clusters: Array, *, decay: float = 0.999) -> Array:
    """The centroids after one step of online k-means, as the Routing Transformer trains them.

    A centroid becomes the direction of ``decay * centroid + (1 - decay) * mean``, where mean is the mean of the
    directions of its cluster's rows. Roy et al. add the sum of the directions; with the mean, a step in a small cluster
    is as large as in a large one. A centroid without rows, or whose new value has no direction, stays as it is.

    Parameters
    ----------
    centroids : `[..., n, D]`, with x's leading axes and dtype (or float32); unit vectors, as `fit_centroids` and this
        function return them.
    x : `[..., L, D]`, of a dtype that `attention` takes; 1 <= D <= 1024. To move one set of centroids with the rows of
        a whole batch, reshape x to `[rows, D]`.
    clusters : `[..., L]`, integers from 0 to n - 1, as `assign_clusters` makes them.
    decay : the share of the old centroid, from 0 to 1.

    Returns
    -------
    centroids : `[..., n, D]`, a new array

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError : an argument is of the wrong kind, shape or range.

    Notes
    -----
    Time and memory beyond the arrays O(L D + n D).
    """
    return _core.update_centroids(_wide(centroids), _wide(x), clusters, decay)


def _wide(x: Array) -> Array:
    return widened(x) if is_real(x) else x  # the core raises the error for other objects
