# SPDX-License-Identifier: Apache-2.0
"""A training step of an attention layer, its sequence spread over two processes.

Each process holds half of the positions and all weights. For attention they send each other summaries only, where ring
attention sends all keys and values. The gradients of the weights are summed over the processes. The result is compared
with the same step in one process on the whole sequence.

    python examples/sequence_parallel.py            # half a minute; needs torch
    python examples/sequence_parallel.py --ranks 4 --length 16384

Letters: L positions, H heads, D features of each, E = H * D.
"""

import argparse
import tempfile

import torch
import torch.distributed as dist
from torch import nn

import combiner
from combiner import Axial, Fixed, LogSparse, Tree, distributed

HEADS, D = 8, 64
E = HEADS * D
PATTERNS = (Fixed(64), Tree(8, 3), LogSparse(), LogSparse(hierarchical=True), Axial(64, "rowmajor"))


class Layer(nn.Module):
    """x `[1, n, E]` -> `[1, n, E]`: causal attention of a sequence; each rank of the group holds n of its positions."""

    def __init__(self, pattern, group):
        super().__init__()
        self.pattern, self.group = pattern, group
        self.inward, self.outward = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x):
        q, k, v = self.inward(x).unflatten(-1, (3, HEADS, D)).movedim(-2, 1).unbind(-2)  # [1, H, n, D]
        out = distributed.attention(q, k, v, self.pattern, is_causal=True, group=self.group)
        return x + self.outward(out.movedim(1, -2).flatten(-2))


def step(pattern, group, x, target):
    """The loss and the gradient of all weights, of the whole sequence; x and target are this rank's positions."""
    torch.manual_seed(1)  # the same weights everywhere
    layer = Layer(pattern, group)
    loss = nn.functional.mse_loss(layer(x), target) / dist.get_world_size(group)
    loss.backward()
    found = torch.cat([loss.detach().view(1), *(weight.grad.flatten() for weight in layer.parameters())])
    dist.all_reduce(found, group=group)
    return found[0].item(), found[1:]


def run(rank, ranks, length, folder):
    torch.set_num_threads(1)
    combiner.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    alone = dist.new_group([0])
    x, target = torch.randn(2, 1, length, E, generator=torch.Generator().manual_seed(0))
    mine = slice(rank * length // ranks, (rank + 1) * length // ranks)
    for pattern in PATTERNS:
        loss, gradient = step(pattern, None, x[:, mine], target[:, mine])
        if rank == 0:
            expected_loss, expected = step(pattern, alone, x, target)
            difference = (gradient - expected).abs().max() / expected.abs().max()
            assert abs(loss - expected_loss) < 1e-5 and difference < 1e-5
            sent = sum(distributed.traffic(pattern, length, ranks, heads=HEADS, dim=D))
            ring = sum(distributed.ring_traffic(length, ranks, heads=HEADS, dim=D))
            print(f"{pattern!r}: loss {loss:.6f}, in one process {expected_loss:.6f}; ", end="")
            print(f"gradients within {difference:.0e} of the largest; ", end="")
            print(f"each rank sends {sent / 1e6:.2f} MB, by ring attention {ring / 1e6:.2f} MB", flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (arguments.ranks, arguments.length, folder), nprocs=arguments.ranks)
