# SPDX-License-Identifier: Apache-2.0
"""The library of PyTorch operators `combiner::..`, and operators without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tensors import as_array, as_tensor

# `torch.library.custom_op` does the same, with wrappers that cost every call some microseconds.
library = torch.library.Library("combiner", "FRAGMENT")


def define(schema: str, compute: Callable[..., Any], fake: Callable[..., Tensor], *, breaks_graph: bool = False) -> Any:
    """An operator of this schema without gradients. `compute` works on arrays, `fake` makes the result's shape and
    dtype for tracing. vmap calls it once for each entry.

    breaks_graph : whether the result's shape may depend on numbers. torch.compile calls such an operator between two
        graphs, and would compile the Python of `compute` too.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    operator = getattr(torch.ops.combiner, name)

    def run(*given: Any) -> Tensor:
        return as_tensor(compute(*(as_array(x) if isinstance(x, Tensor) else x for x in given)))

    def mapped(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
        entries = (
            operator(*(x if dim is None else x.select(dim, n) for x, dim in zip(given, in_dims, strict=True)))
            for n in range(info.batch_size)
        )
        return torch.stack(list(entries)), 0

    library.impl(name, torch.compiler.disable(run) if breaks_graph else run, "CPU")
    torch.library.register_fake(f"combiner::{name}", fake, lib=library)
    torch.library.register_vmap(f"combiner::{name}", mapped, lib=library)
    return operator
