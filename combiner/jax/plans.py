# SPDX-License-Identifier: Apache-2.0
"""Plans by number: compiled functions hold numbers and find the plans by them, in this process and in another."""

from __future__ import annotations

import hashlib
import weakref

from .. import _core
from ..plan import Plan

kept: set[int] = set()  # numbers of the plans that custom calls find
_numbers: weakref.WeakKeyDictionary[Plan, int] = weakref.WeakKeyDictionary()  # each computed once


def number_of(plan: Plan) -> int:
    """The plan's number, a hash of its contents. Custom calls find the plan by it for the rest of the process."""
    if plan not in _numbers:
        _numbers[plan] = number = _hash(plan)
        if number not in kept:
            _core.xla_keep_plan(number, plan)
            kept.add(number)
    return _numbers[plan]


def _hash(plan: Plan) -> int:
    """64 bits of BLAKE2b over the plan's flags, shapes and arrays, as a signed integer. O(plan.nbytes)."""
    arrays = plan.arrays
    names = "length", "region_count", "scratch_count", "is_causal", "size_bias", "weighted", "pooling"
    flags = [getattr(plan, name) for name in names]
    digest = hashlib.blake2b(repr((flags, [x.shape for x in arrays.values()])).encode(), digest_size=8)
    for x in arrays.values():
        digest.update(x.tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
