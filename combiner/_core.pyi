# SPDX-License-Identifier: Apache-2.0
"""The C library, as Python sees it: private, but for the attributes of Plan."""

from typing import Any, Self

import numpy.typing as npt
from typing_extensions import disjoint_base

_Array = npt.NDArray[Any]
_Lists = tuple[npt.ArrayLike, npt.ArrayLike]

VERSION: str
COMPILER: str
NUMPY: str

@disjoint_base
class Plan:
    @property
    def length(self) -> int: ...
    @property
    def region_count(self) -> int: ...
    @property
    def scratch_count(self) -> int: ...
    @property
    def is_causal(self) -> bool: ...
    @property
    def size_bias(self) -> bool: ...
    @property
    def weighted(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def arrays(self) -> dict[str, _Array]: ...
    @property
    def _pooling(self) -> int: ...
    @classmethod
    def _build(
        cls,
        name: str,
        length: int,
        first: int,
        second: int,
        is_causal: bool,
        sparse: bool,
        pooling: int,
        size_bias: bool,
        /,
    ) -> Self: ...
    @classmethod
    def _routing(
        cls, clusters: npt.ArrayLike, is_causal: bool, sparse: bool, pooling: int, size_bias: bool, /
    ) -> Self: ...
    @classmethod
    def _from_parts(
        cls,
        length: int,
        direct: _Lists,
        regions: _Lists,
        members: _Lists,
        cover: int,
        is_causal: bool,
        pooling: int,
        size_bias: bool,
        /,
    ) -> Self: ...
    @classmethod
    def _from_arrays(
        cls,
        wave: npt.ArrayLike,
        task: npt.ArrayLike,
        pool: npt.ArrayLike,
        tile: npt.ArrayLike,
        run: npt.ArrayLike,
        index: npt.ArrayLike,
        mask: npt.ArrayLike,
        length: int,
        regions: int,
        scratch: int,
        is_causal: bool,
        pooling: int,
        size_bias: bool,
        weighted: bool,
        /,
    ) -> Self: ...
    def _measure(self) -> tuple[int, int, int, bool, bool]: ...

def check(
    stages: int,
    query: _Array,
    key: _Array,
    value: _Array,
    pattern: object,
    is_causal: bool,
    scale: float | None,
    key_mask: _Array | None,
    cu_seqlens: _Array | None,
    region_query: _Array | None,
    region_key: _Array | None,
    dropout: tuple[float, int, _Array | None] | None,
    region_value: _Array | None,
    /,
) -> tuple[Plan | tuple[Plan, ...], float, int]: ...
def forward(
    stages: int,
    query: _Array,
    key: _Array,
    value: _Array,
    pattern: object,
    is_causal: bool,
    scale: float | None,
    key_mask: _Array | None,
    cu_seqlens: _Array | None,
    region_query: _Array | None,
    region_key: _Array | None,
    dropout: tuple[float, int, _Array | None] | None,
    region_value: _Array | None,
    out: _Array | None,
    adds: bool,
    for_backward: bool,
    /,
) -> tuple[Any, Any, Any, Any, Any, Plan | tuple[Plan, ...], float]: ...
def workspace_bytes(
    query: _Array,
    key: _Array,
    value: _Array,
    pattern: object,
    is_causal: bool,
    scale: float | None,
    key_mask: _Array | None,
    cu_seqlens: _Array | None,
    region_query: _Array | None,
    region_key: _Array | None,
    dropout: tuple[float, int, _Array | None] | None,
    adds: bool,
    backward: bool,
    /,
) -> int: ...
def backward(
    stages: int,
    query: _Array,
    key: _Array,
    value: _Array,
    plan: Plan | tuple[Plan, ...],
    scale: float,
    key_mask: _Array | None,
    cu_seqlens: _Array | None,
    region_query: _Array | None,
    region_key: _Array | None,
    dropout: tuple[float, int, _Array | None] | None,
    summary_key: _Array | None,
    summary_value: _Array,
    summary_lse: _Array | None,
    out: _Array | None,
    lse: _Array | None,
    grad_out: _Array | None,
    grad_lse: _Array | None,
    grad_summary_key: _Array | None,
    grad_summary_value: _Array | None,
    sums: tuple[_Array, _Array, _Array] | None,
    /,
) -> tuple[_Array, _Array, _Array, Any, Any, Any, Any]: ...
def cluster(x: _Array, n: int, iterations: int, seed: int, balanced: bool, centroids: bool, /) -> _Array: ...
def assign(x: _Array, centroids: _Array, balanced: bool, /) -> _Array: ...
def update_centroids(centroids: _Array, x: _Array, clusters: _Array, decay: float, /) -> _Array: ...
def set_num_threads(count: int, /) -> None: ...
def get_num_threads() -> int: ...
def stop_threads() -> None: ...
def release_memory() -> None: ...
def set_isa(name: str, /) -> None: ...
def get_isa() -> str: ...
def isas() -> tuple[str, ...]: ...
def xla_targets() -> dict[str, object]: ...
def xla_keep_plan(digest: int, plan: Plan, /) -> None: ...
def _fail_allocation(count: int, keep_failing: bool = False, /) -> None: ...
def _live_bytes() -> int: ...
def _peak_bytes() -> int: ...
