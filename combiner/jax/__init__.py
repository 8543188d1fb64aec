# SPDX-License-Identifier: Apache-2.0
"""Combiner attention in JAX, on CPUs: the functions of `combiner` under the same names, for jit, grad and vmap.

Ren et al., NeurIPS 2021 (arXiv 2107.05768). Letters: Hq query heads, Hk key / value heads, L positions, D features of
query and key, Dv of value, R regions of the plan. All functions here have in common:

- Arrays are jax.Arrays or NumPy arrays, with shapes and dtypes as in `combiner`: `[..., heads, L, features]` or
  `[L, features]`; with ``layout="BLHD"`` heads come after positions or regions, and no array of positions is copied.
  Arguments that are no arrays are static: fixed when a function is traced. Patterns hash by value (`Routing` by
  identity), so that they may be static arguments of jax.jit, or be closed over, without tracing again. `Selected` holds
  an array that may be traced: a compiled function opens other regions in each call.
- There are first derivatives in reverse mode: jax.grad, jax.vjp, jax.jacrev, jax.checkpoint. Forward mode (jax.jvp,
  jax.jacfwd, jax.linearize) raises TypeError, a second derivative (jax.hessian) NotImplementedError.
- XLA calls the C library on its own buffers, without a copy, and lends it the threads of its pool, at most
  ``combiner.get_num_threads()``.
- jax.vmap computes each entry as if alone, dropout included, in one call of all entries.
- Arrays that are divided over a mesh of devices along leading axes or heads stay divided, forward and backward, with
  jit and without. Each device computes the part that it holds. Bits are those of the undivided call, dropout's
  included, except in gradients of a key head that several devices hold, which are summed over devices. Gathered first
  are positions, regions and features; leading axes and heads where each has its own plan (`Routing`); heads that the
  devices do not divide evenly; and, with dropout, leading axes after the first.
- jax.shard_map divides a call by hand, over batch and heads (before JAX 0.10 with check_vma=False). Each device numbers
  its batch entries and heads from 0: fold jax.lax.axis_index into dropout's key.
- jax.export asks for ``disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("combiner_forward")]``, with
  gradients for "combiner_backward" too, and cannot call what it made of functions of divided arrays.
- TypeError and ValueError are raised as in `combiner`, when a function is traced. Memory that runs out later is an
  error of XLA, a JaxRuntimeError or ValueError that begins with RESOURCE_EXHAUSTED.
- A traced plan is kept for the rest of the process, since a compiled function may run again: one plan for each pattern,
  length and direction. Compiled functions know it by a hash of its contents. A function of another process, from
  jax.export or a cache on disk, runs once the same attention has been traced in this process; before, it is an error.
"""

try:
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("combiner.jax needs JAX: pip install 'combiner-attention[jax]'") from error

from .clustering import assign_clusters, cluster, fit_centroids, update_centroids
from .flax import attention_fn
from .functional import Summary, attend, attention, attention_weights, merge, summarize, workspace_bytes
from .patterns import Selected
from .selection import select

__all__ = [
    "Selected", "Summary", "assign_clusters", "attend", "attention", "attention_fn", "attention_weights", "cluster",
    "fit_centroids", "merge", "select", "summarize", "update_centroids", "workspace_bytes",
]  # fmt: skip
