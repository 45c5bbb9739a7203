"""What base methods exchange between processes: keys, and sums that gradients cross."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["everyone", "place", "total"]


def place() -> tuple[int, int]:
    """(rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def everyone(x: Tensor) -> Tensor:
    """(B, D) of all ranks in rank order, (W·B, D); without gradient, and B the same on each."""
    if place()[1] == 1:
        return x.detach()
    gathered = x.new_empty(place()[1] * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.detach().contiguous())
    return gathered


def total(x: Tensor) -> Tensor:
    """The sum over ranks, differentiable.

    Each rank then computes the same loss from it, and the sum of the ranks' gradients for its own part comes back:
    under DDP's mean over ranks that is the gradient of one process with the whole batch.
    """
    return x if place()[1] == 1 else _Total.apply(x)


class _Total(torch.autograd.Function):
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
