# SPDX-License-Identifier: Apache-2.0
"""What functions of attention take by name and what they return, in NumPy and in each adapter."""

from __future__ import annotations

from typing import Generic, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar

import numpy.typing as npt

from .arguments import Array

Layout: TypeAlias = Literal["BHLD", "BLHD"]
A = TypeVar("A")  # a library's array
S = TypeVar("S")  # what it takes for a seed


class SharedOptions(TypedDict, Generic[A, S], total=False):
    """The keyword arguments that `attend` and `attention` share; their signatures have the defaults."""

    is_causal: bool
    scale: float | None
    key_mask: A | None
    cu_seqlens: npt.ArrayLike | A | None
    layout: Layout
    dropout_p: float
    seed: S | None
    softcap: float | None
    key_bias: A | None
    region_bias: A | None
    sink: A | None


class AttendOptions(SharedOptions[A, S], total=False):
    """The keyword arguments of `attend`."""

    offset: int | None


class AttentionOptions(SharedOptions[A, S], total=False):
    """The keyword arguments of `attention`."""

    region_query: A | None
    region_key: A | None


class Terms(NamedTuple, Generic[A]):
    """The terms of a logit beside the scaled product, as `attention` takes them; None for what there is not."""

    softcap: float | None = None
    key_bias: A | None = None
    region_bias: A | None = None
    sink: A | None = None


class Gradients(NamedTuple):
    """Gradients of one scalar, each of the shape of its input. Those after the first three are None unless these inputs
    were given."""

    query: Array
    key: Array
    value: Array
    region_query: Array | None
    region_key: Array | None
    key_bias: Array | None = None
    region_bias: Array | None = None
    sink: Array | None = None


class AttendGradients(NamedTuple):
    """Gradients of one scalar through stage 2 alone, each of the shape of its input; the last three are None unless
    these inputs were given."""

    query: Array
    key: Array
    value: Array
    region_key: Array
    region_value: Array
    key_bias: Array | None = None
    region_bias: Array | None = None
    sink: Array | None = None


class Summary(NamedTuple):
    """The summaries of a plan's regions, from stage 1. Rows of regions that no query attends are zero, their lse -inf.

    key: k_R `[..., Hk, R, D]`, or `[..., Hq, R, D]` where it differs between query heads.
    value: h_R `[..., Hq, R, Dv]`, the local expectations.
    lse: `[..., Hq, R]`, the log of each local softmax's normaliser.
    bias: b_R `[..., Hk or Hq, R]`, for the `region_bias` of `attend`; None where regions have no bias.
    """

    key: Array
    value: Array
    lse: Array
    bias: Array | None = None
