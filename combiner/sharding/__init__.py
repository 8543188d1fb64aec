# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: a sequence whose positions P ranks hold, n = L / P consecutive ones each, a shard.

Shards must be whole spans, rows or nodes of the pattern. A query then attends its own shard as if the shard were the
whole sequence, and of the other shards summaries, the same ones for all queries of its shard (in the row-major order:
of a column of its shard). Which ones, is the pattern again, with ranks for positions: for `LogSparse` and `Tree`,
blocks of shards are regions of ranks.

    rank 0             rank 1             rank 2             rank 3
    near: own shard    near               near               near          every query attends its own shard
    own: summaries --> gathered by all ranks                               k_R, h_R (and q_R) of spans, rows, nodes
    coarse                                                                 blocks of shards, from those summaries
    far                far                far                far           every query attends them, as the pattern
    merge              merge              merge              merge         ... of ranks says: one softmax over both

- `rank`: the plans of one rank, near, own, coarse and far.
- `plans`: how these plans are made, where no pattern makes them.
- `regions`: which regions of the whole sequence the regions of these plans are, for biases that are given to regions.
- `processes`: attention between the processes of a torch.distributed group; its public name is combiner.distributed.
- `devices`: attention within jax.shard_map; its public name is combiner.shard_map.
- `traffic`: the bytes that ranks send.
"""

from .rank import RankPlans, plans_of_rank
from .traffic import Traffic, ring_traffic, traffic

__all__ = ["RankPlans", "Traffic", "plans_of_rank", "ring_traffic", "traffic"]
