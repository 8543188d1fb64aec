# SPDX-License-Identifier: Apache-2.0
"""Tensors as NumPy arrays and arrays as tensors, which share memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import Array

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_array(x: Tensor | None) -> Any:
    """The array over a tensor's memory; bfloat16 is the dtype of the package ml_dtypes."""
    if x is None:
        return None
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.detach().view(torch.int16).numpy(force=True).view(ml_dtypes.bfloat16)
    return x.numpy(force=True)


def as_tensor(x: Array) -> Tensor:
    """The tensor over an array's memory."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
