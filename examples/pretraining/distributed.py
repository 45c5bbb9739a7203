"""What base methods exchange between processes: keys, and sums that gradients cross."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ser_reg.distributed import all_gather_single, rank_and_world_size

__all__ = ["all_gather", "all_reduce"]


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """(B, D) of all ranks in rank order, (W·B, D); without gradient, and B the same on each."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return x.detach()
    gathered = x.new_empty(world_size * len(x), *x.shape[1:])
    all_gather_single(gathered, x.detach().contiguous())
    return gathered


def all_reduce(x: Tensor) -> Tensor:
    """The sum over ranks, differentiable.

    Each rank then computes the same loss from it, and the sum of the ranks' gradients for its own x comes back:
    under DDP's mean over ranks that is the gradient of one process with the whole batch.
    """
    return x if rank_and_world_size()[1] == 1 else _AllReduce.apply(x)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        summed = x.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        summed = grad.clone()
        dist.all_reduce(summed)
        return summed
