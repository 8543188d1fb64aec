# SPDX-License-Identifier: Apache-2.0
"""Clusters for `Routing`: spherical k-means, and its online step.

The Routing Transformer (Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", TACL 2021,
section 4.1) assigns positions to clusters by k-means on the unit sphere, and moves the centroids a little with every
batch that it trains on. Letters: L rows, D features, n clusters. What every function here has in common:

- x is `[..., L, D]`, of a dtype that `attention` takes, and every `[L, D]` in it is clustered alone. A view with any
  strides is taken without a copy as long as its last axis is contiguous; a 16-bit dtype is copied as float32, which its
  centroids are too. Inputs are never written.
- A row's direction is the row at unit length. A row of zeros, or with a NaN or Inf, has none: it is as similar, 0, to
  every centroid, and moves none. The similarity of a row and a centroid is the dot product of their directions.
- What k-means or a balanced assignment makes of a row depends on all rows. A causal model, which must not see what
  follows, wants `assign_clusters`, not balanced, with centroids from elsewhere: each row is then assigned alone.
- Ctrl-C, threads, bits and errors as in `combiner.attention`: the same bits for any number of threads, leading axes
  and memory layout.
"""

from __future__ import annotations

from . import _core
from .interchange import any_library
from .plan import Array, as_integer, is_real, widened


@any_library
def cluster(x: Array, n: int, *, iterations: int = 10, balanced: bool = False, seed: int = 0) -> Array:
    """The clusters of the rows of x by spherical k-means: what `Routing` takes.

    The same as ``assign_clusters(x, fit_centroids(x, n, iterations=iterations, seed=seed), balanced=balanced)``, to the
    bit. To cluster queries and keys alike, as the Routing Transformer does, they must be one array.

    Parameters
    ----------
    x : `[..., L, D]`, of a dtype that `attention` takes; 1 <= D <= 1024.
    n : clusters, from 1 to L (any number where L is 0); some may stay empty unless `balanced`.
    iterations : rounds of k-means, 0 or more; none is made after one that changes nothing.
    balanced : whether sizes may differ by at most one.
    seed : of k-means++, 0 or more.

    Returns
    -------
    clusters : `[..., L]`, int64, from 0 to n - 1

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError : an argument, named, of the wrong kind, shape or range.

    Notes
    -----
    Time O(iterations L n D); memory beyond the arrays O(L D + n D) for each `[L, D]` in flight, of which there are as
    many as threads, or as fit 12 MB.
    """
    numbers = as_integer("n", n, 1), as_integer("iterations", iterations, 0), as_integer("seed", seed, 0)
    return _core.cluster(_wide(x), *numbers, balanced, False)


@any_library
def fit_centroids(x: Array, n: int, *, iterations: int = 10, seed: int = 0) -> Array:
    """The centroids of spherical k-means: unit vectors, each the direction of the sum of its rows' directions.

    They begin as rows, chosen by k-means++ (Arthur and Vassilvitskii, SODA 2007) with distances 1 - similarity among a
    sample of at most 16 n rows. Each round then assigns rows as `assign_clusters` does and moves the centroids as
    `update_centroids` does with decay 0: one without rows stays. The mean similarity of rows to their centroids never
    falls. Where fewer than n rows have a direction, centroids repeat, and are zeros where none has.

    Parameters
    ----------
    x, n, iterations, seed : as in `cluster`.

    Returns
    -------
    centroids : `[..., n, D]`, the dtype of x, or float32

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError : an argument, named, of the wrong kind, shape or range.

    Notes
    -----
    Time and memory as `cluster`.
    """
    numbers = as_integer("n", n, 1), as_integer("iterations", iterations, 0), as_integer("seed", seed, 0)
    return _core.cluster(_wide(x), *numbers, False, True)


@any_library
def assign_clusters(x: Array, centroids: Array, *, balanced: bool = False) -> Array:
    """The cluster of each row: that of the most similar centroid, of equals the first.

    Balanced: every cluster has room for L // n rows, and the first L % n clusters to fill up for one more. Rows take
    turns, first those whose most similar centroid is furthest ahead of their next one, of equals the first; each joins
    the most similar centroid, of equals the first, with room left. This is greedy: not the best assignment there is.

    Parameters
    ----------
    x : `[..., L, D]`, of a dtype that `attention` takes; 1 <= D <= 1024.
    centroids : `[..., n, D]`, x's leading axes and dtype (or float32), of any length. One set for all of a batch may be
        a view that ``numpy.broadcast_to`` makes.
    balanced : whether sizes may differ by at most one.

    Returns
    -------
    clusters : `[..., L]`, int64, from 0 to n - 1. `Routing` takes them where n <= L.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError : an argument, named, of the wrong kind, shape or range.

    Notes
    -----
    Time O(L n D), balanced about twice that; memory as `cluster`.
    """
    return _core.assign(_wide(x), _wide(centroids), balanced)


@any_library
def update_centroids(centroids: Array, x: Array, clusters: Array, *, decay: float = 0.999) -> Array:
    """The centroids one step of online k-means later, as the Routing Transformer trains them.

    A centroid becomes the direction of ``decay * centroid + (1 - decay) * mean``, the mean of the directions of its
    cluster's rows (of queries and keys together where x holds both). The paper adds their sum; with the mean a step is
    as large in a small cluster as in a large one. A centroid without rows, or for which nothing with a direction comes
    out, stays as it is.

    Parameters
    ----------
    centroids : `[..., n, D]`, x's leading axes and dtype (or float32); unit vectors, as `fit_centroids` and this
        function return.
    x : `[..., L, D]`, of a dtype that `attention` takes; 1 <= D <= 1024. To move one set with all of a batch, give its
        rows one axis.
    clusters : `[..., L]`, integers from 0 to n - 1, as `assign_clusters` makes them.
    decay : from 0, where the old centroid counts for nothing, to 1.

    Returns
    -------
    centroids : `[..., n, D]`, a new array

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError : an argument, named, of the wrong kind, shape or range.

    Notes
    -----
    Time and memory beyond the arrays O(L D + n D).
    """
    return _core.update_centroids(_wide(centroids), _wide(x), clusters, decay)


def _wide(x: Array) -> Array:
    return widened(x) if is_real(x) else x  # what is none is for the core to refuse
