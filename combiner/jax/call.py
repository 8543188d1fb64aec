# SPDX-License-Identifier: Apache-2.0
"""A call of the library without its arrays; which arrays it reads and writes, their axes and shapes."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..problem import ATTEND, BOTH, SUMMARIZE
from .arrays import Arrays, Shape


@dataclass(frozen=True)
class Call:
    """A call of the library without its arrays."""

    stages: int
    wanted: tuple[str, ...]  # results that are returned, and differentiated
    plans: tuple[int, ...]  # numbers of `plans.number_of`, of one component after the other
    components: int
    weighted: bool  # whether some plans have weighted keys
    regions: int  # R
    scale: float
    softcap: float  # 0: none
    segments: tuple[int, ...]  # empty for one sequence
    dropout_p: float
    heads_last: bool  # positions are [..., L, heads, features]
    offset: int  # the position of the first query, where query and its results have fewer rows than key; -1: none
    selection: tuple[int, ...] = ()  # block, open, rest where queries open regions of the plans


# The arrays of a custom call, in the order of their numbers in binding/xla.c, and the axes of each after the leading
# ones: H heads, L positions (before H where `heads_last`), R regions, D features, S the two numbers of each softmax's
# state, W the words of a seed, O the one number of a head, T
# blocks of queries, K regions that a block lists. `component_out` has the features of each component, side by
# side.
AXES = {
    "query": "HLD", "key": "HLD", "value": "HLD", "key_mask": "L", "seed": "W", "region_query": "HRD",
    "region_key": "HRD", "summary_key": "HRD", "summary_value": "HRD", "summary_softmax": "HRS", "out": "HLD",
    "softmax": "HLS", "grad_out": "HLD", "grad_lse": "HL", "grad_summary_key": "HRD", "grad_summary_value": "HRD",
    "grad_query": "HLD", "grad_key": "HLD", "grad_value": "HLD", "grad_region_query": "HRD", "grad_region_key": "HRD",
    "lse": "HL", "summary_lse": "HR", "component_out": "HLD", "key_bias": "HL", "region_bias": "HR", "sink": "HO",
    "summary_bias": "HR", "grad_key_bias": "HL", "grad_region_bias": "HR", "grad_sink": "HO", "grad_summary_bias": "HR",
    "selected": "HTK",
}  # fmt: skip
NUMBERS = {name: number for number, name in enumerate(AXES)}


def results_of(call: Call, for_backward: bool, arrays: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays that a forward call writes."""
    query, value = arrays["query"], arrays["value"]
    (*lead, Hq, L), Dv, R = by_heads(call, query.shape)[:-1], value.shape[-1], call.regions
    key_heads = by_heads(call, arrays["key"].shape)[-3]
    if "region_key" in arrays:
        key_heads = arrays["region_key"].shape[-3]
    elif call.weighted:
        key_heads = Hq
    shapes: dict[str, tuple[int, ...]] = {}
    if call.stages & ATTEND:
        shapes["out"] = (*query.shape[:-1], Dv)
        if "lse" in call.wanted:
            shapes["lse"] = (*lead, Hq, L)
        if for_backward:
            shapes["softmax"] = (*lead, Hq, L, 2 * call.components)
        if for_backward and call.components > 1:
            shapes["component_out"] = (*query.shape[:-1], call.components * Dv)
    if call.stages == SUMMARIZE or (call.stages == BOTH and for_backward and call.weighted):
        shapes["summary_key"] = (*lead, key_heads, R, query.shape[-1])
    is_biased = "key_bias" in arrays or "region_bias" in arrays
    if is_biased and "summary_key" in shapes:
        given = arrays["region_bias" if "region_bias" in arrays else "key_bias"]
        bias_heads = Hq if call.weighted and "region_bias" not in arrays else given.shape[-2]
        shapes["summary_bias"] = (*lead, bias_heads, R)
    if call.stages == SUMMARIZE:
        shapes["summary_lse"] = (*lead, Hq, R)
    if call.stages == SUMMARIZE or (call.stages == BOTH and for_backward):
        shapes["summary_value"] = (*lead, Hq, R, Dv)
    if call.stages & SUMMARIZE and for_backward:
        shapes["summary_softmax"] = (*lead, Hq, R, 2)
    return {name: _like(query, shape, name.endswith(("lse", "softmax", "bias"))) for name, shape in shapes.items()}


def by_heads(call: Call, shape: Shape) -> Shape:
    """The shape of an array of positions as [..., heads, L, features]."""
    *lead, a, b, features = shape
    return (*lead, b, a, features) if call.heads_last else shape


def _like(x: jax.Array, shape: tuple[int, ...], is_of_softmax: bool) -> jax.ShapeDtypeStruct:
    dtype = jnp.promote_types(x.dtype, jnp.float32) if is_of_softmax else x.dtype
    return jax.ShapeDtypeStruct(shape, dtype)


def own_axes(call: Call, name: str) -> str:
    """The axes of an array after the leading ones, in the call's layout."""
    axes = AXES[name]
    return "LHD" if call.heads_last and axes == "HLD" else axes
