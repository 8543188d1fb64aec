# SPDX-License-Identifier: Apache-2.0
"""The C library, as Python sees it: private, but for the attributes of Plan."""

from typing import Any, Final, Self, final

import numpy.typing as npt
from _typeshed import structseq
from typing_extensions import disjoint_base

_Array = npt.NDArray[Any]
_Lists = tuple[npt.ArrayLike, npt.ArrayLike]

VERSION: str
COMPILER: str
NUMPY: str

@final
class Decoder:
    def __new__(
        cls,
        pattern: tuple[int, int, int, int, bool, bool, bool, int, int, bool],
        query: _Array,
        key: _Array,
        value: _Array,
        scale: float | None,
        softcap: float | None,
        rollback: int,
        select: int,
        key_bias: _Array | None,
        sink: _Array | None,
        /,
    ) -> Self: ...
    def step(
        self, query: _Array, key: _Array, value: _Array, lengths: _Array | None, key_bias: _Array | None, /
    ) -> _Array: ...
    def rollback(self, n: _Array, /) -> None: ...
    def __deepcopy__(self, memo: object, /) -> Self: ...
    def take(self, chosen: _Array, /) -> Self: ...
    @property
    def lengths(self) -> npt.NDArray[Any]: ...
    @property
    def nbytes(self) -> int: ...

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
    def _dense(cls, length: int, is_causal: bool, sparse: bool, pooling: int, size_bias: bool, /) -> Self: ...
    @classmethod
    def _fixed(
        cls, length: int, span: int, window: int, is_causal: bool, sparse: bool, pooling: int, size_bias: bool, /
    ) -> Self: ...
    @classmethod
    def _logsparse(
        cls, length: int, hierarchical: bool, is_causal: bool, sparse: bool, pooling: int, size_bias: bool, /
    ) -> Self: ...
    @classmethod
    def _axial(
        cls,
        length: int,
        width: int,
        order: int,
        weighted: bool,
        is_causal: bool,
        sparse: bool,
        pooling: int,
        size_bias: bool,
        /,
    ) -> Self: ...
    @classmethod
    def _axial_mixture(
        cls, length: int, width: int, is_causal: bool, sparse: bool, pooling: int, size_bias: bool, /
    ) -> Self: ...
    @classmethod
    def _tree(
        cls, length: int, branching: int, levels: int, is_causal: bool, sparse: bool, pooling: int, size_bias: bool, /
    ) -> Self: ...
    @classmethod
    def _routing(
        cls, clusters: npt.ArrayLike, is_causal: bool, sparse: bool, pooling: int, size_bias: bool, /
    ) -> Self: ...
    @classmethod
    def _window(
        cls, length: int, size: int, is_causal: bool, sparse: bool, pooling: int, size_bias: bool, /
    ) -> Self: ...
    @classmethod
    def _selected(
        cls, base: Plan, regions: npt.ArrayLike, count: int, block: int, open: bool, rest: bool, /
    ) -> Self: ...
    @classmethod
    def _heavily_compressed(
        cls, length: int, rate: int, window: int, is_causal: bool, sparse: bool, pooling: int, size_bias: bool, /
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

_Dropout = tuple[float, int]

@final
class Results(structseq[Any], tuple[Any, Any, Any, Any, Any, Any, Any, Any]):
    __match_args__: Final = (
        "out",
        "lse",
        "softmax",
        "summary_key",
        "summary_value",
        "summary_lse",
        "summary_softmax",
        "summary_bias",
        "component_out",
    )

    @property
    def out(self) -> Any: ...
    @property
    def lse(self) -> Any: ...
    @property
    def softmax(self) -> Any: ...
    @property
    def summary_key(self) -> Any: ...
    @property
    def summary_value(self) -> Any: ...
    @property
    def summary_lse(self) -> Any: ...
    @property
    def summary_softmax(self) -> Any: ...
    @property
    def summary_bias(self) -> Any: ...
    @property
    def component_out(self) -> Any: ...

@final
class Problem:
    def __new__(
        cls,
        stages: int,
        query: _Array,
        key: _Array,
        value: _Array,
        plan: Any,
        is_causal: bool = False,
        scale: float | None = None,
        key_mask: _Array | None = None,
        cu_seqlens: _Array | None = None,
        region_query: _Array | None = None,
        region_key: _Array | None = None,
        region_value: _Array | None = None,
        dropout: _Dropout | None = None,
        softcap: float | None = None,
        key_bias: _Array | None = None,
        region_bias: _Array | None = None,
        sink: _Array | None = None,
        is_mixture: bool = False,
        offset: int | None = None,
    ) -> Self: ...
    @property
    def stages(self) -> int: ...
    @property
    def query(self) -> _Array: ...
    @property
    def key(self) -> _Array: ...
    @property
    def value(self) -> _Array: ...
    @property
    def plan(self) -> Any: ...  # Plan or a tuple of them; of a mixture a tuple of those
    @property
    def is_mixture(self) -> bool: ...
    @property
    def scale(self) -> float: ...
    @property
    def key_mask(self) -> _Array | None: ...
    @property
    def cu_seqlens(self) -> _Array | None: ...
    @property
    def region_query(self) -> _Array | None: ...
    @property
    def region_key(self) -> _Array | None: ...
    @property
    def region_value(self) -> _Array | None: ...
    @property
    def dropout(self) -> _Dropout | None: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def key_bias(self) -> _Array | None: ...
    @property
    def region_bias(self) -> _Array | None: ...
    @property
    def sink(self) -> _Array | None: ...
    @property
    def offset(self) -> int | None: ...
    @property
    def region_count(self) -> int: ...
    def forward(self, out: _Array | None = None, wants_lse: bool = True, keep: int = 0) -> Results: ...
    def summarize(self) -> Results: ...
    def backward(
        self,
        results: Results,
        grad_out: _Array | None = None,
        grad_lse: _Array | None = None,
        grad_summary_key: _Array | None = None,
        grad_summary_value: _Array | None = None,
        grad_summary_bias: _Array | None = None,
    ) -> tuple[Any, Any, Any, Any, Any, Any, Any, Any, Any]: ...
    def workspace_bytes(self, backward: bool = False) -> int: ...

def select(
    query: _Array,
    key: _Array,
    region_key: _Array,
    plan: Plan | tuple[Plan, ...] | None,
    is_causal: bool,
    scale: float | None,
    key_mask: _Array | None,
    block: int,
    k: int,
    score: int,
    by_first_query: bool,
    /,
) -> _Array: ...
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
