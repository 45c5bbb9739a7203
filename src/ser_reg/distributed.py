"""Tokens of all processes: ranks agree on what they share, then gather uneven shards, differentiably."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import SERError

__all__ = ["agree", "gather", "place", "share"]


def place(group: "dist.ProcessGroup | None" = None) -> tuple[int, int]:
    """(rank, world size) of this process in `group`, by default among all processes.

    Raises:
        SERError: this process is not in `group`.

    Example:
        >>> place()  # nothing is distributed here
        (0, 1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise SERError(
            "patch_ntxent(z1, z2, group=group)",
            f"a group without this process (rank {dist.get_rank()} of {dist.get_world_size()})",
            "a group that this process belongs to",
            "group=None  # all processes",
        )
    return rank, dist.get_world_size(group)


def agree(
    call: str,
    error: SERError | None,
    counts: tuple[int, ...],
    shared: dict[str, tuple[float, str]],
    device: torch.device,
    group: "dist.ProcessGroup | None" = None,
) -> list[tuple[int, ...]]:
    """The counts of all ranks, in rank order, or one error on all of them: nobody waits for a rank that gave up.

    Lengths have to be on the host before anything uneven can be gathered. This small exchange is the one wait of
    a distributed loss, and not for the GPU if the group has a CPU backend (`init_process_group()` without a name
    starts both; "cpu:gloo,cuda:nccl"): the numbers then never leave the host. NCCL alone costs one GPU
    synchronisation.

    Args:
        call: what the user called, for the message.
        error: why this rank cannot take part, if it cannot.
        counts: whole numbers in which ranks may differ; equally many on each.
        shared: name -> (value, what to type when the ranks' values differ); the same names on each.
        device: of the tensors that will be gathered.
        group: the processes that take part, by default all.

    Raises:
        SERError: on every rank, with the first error that a rank reports, or with the first name on whose value
            they differ.
    """
    device = _meeting_place(device, group)
    header = [float(error is None), *counts, *(value for value, _ in shared.values())]
    mine = torch.tensor(header, dtype=torch.float64, device=device)
    everyone = mine.new_empty(dist.get_world_size(group) * len(header))
    dist.all_gather_into_tensor(everyone, mine, group)
    headers: list[list[float]] = everyone.view(-1, len(header)).tolist()

    if not all(valid for valid, *_ in headers):
        errors: list[SERError | None] = [None] * len(headers)
        dist.all_gather_object(errors, error, group)
        rank, cause = next((rank, e) for rank, e in enumerate(errors) if e)
        raise SERError(f"{cause.call}, on rank {rank}", cause.given, cause.expected, cause.remedy)
    for (name, (_, remedy)), *values in zip(shared.items(), *(h[1 + len(counts) :] for h in headers), strict=True):
        for rank, value in enumerate(values):
            if value != values[0]:
                given = f"{name} {values[0]:g} on rank 0, {value:g} on rank {rank}"
                raise SERError(call, given, "the same on every rank", remedy)
    return [tuple(int(count) for count in h[1 : 1 + len(counts)]) for h in headers]


def _meeting_place(device: torch.device, group: "dist.ProcessGroup | None") -> torch.device:
    """Where a few numbers are exchanged: on the host if the processes can."""
    return torch.device("cpu") if "cpu" in dist.distributed_c10d.get_backend_config(group) else device


def share(values: Tensor, device: torch.device) -> Tensor:
    """The first rank's values on all ranks, on the CPU; nothing happens where one process is alone.

    Args:
        values: the same shape and dtype on each rank.
        device: of the tensors at hand, which the processes can exchange.
    """
    if place()[1] == 1:
        return values
    shared = values.to(_meeting_place(device, None))
    dist.broadcast(shared, 0)
    return shared.cpu()


def gather(x: Tensor, lengths: list[int], group: "dist.ProcessGroup | None" = None) -> tuple[Tensor, ...]:
    """The shards of all ranks, in rank order, differentiable.

    Args:
        x: (n, D), the shard of this rank. n may differ between ranks and be 0; D and dtype may not.
        lengths: n of every rank.
        group: the processes that take part, by default all.

    Returns:
        An (n, D) tensor per rank. Backward is the transpose of the gather: each rank receives the **sum**, over
        ranks, of the gradients for its shard. That is a collective too: every rank has to go backward, or none.
    """
    shards: tuple[Tensor, ...] = _Gather.apply(x, lengths, group)
    return shards


class _Gather(torch.autograd.Function):
    # Padded to the longest shard: gloo takes even ones only, and NCCL turns uneven ones into broadcasts.

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], group: "dist.ProcessGroup | None") -> tuple[Tensor, ...]:
        ctx.lengths, ctx.group = lengths, group
        padded = x.new_zeros(max(lengths), x.shape[1])
        padded[: len(x)] = x
        everyone = x.new_empty(len(lengths), *padded.shape)
        dist.all_gather_into_tensor(everyone.flatten(0, 1), padded, group)
        return tuple(shard[:n] for shard, n in zip(everyone, lengths, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        padded = grads[0].new_zeros(len(grads), max(ctx.lengths), grads[0].shape[1])
        for shard, grad in zip(padded, grads, strict=True):
            shard[: len(grad)] = grad
        mine = torch.empty_like(padded[0])
        dist.reduce_scatter_tensor(mine, padded.flatten(0, 1), group=ctx.group)
        return mine[: ctx.lengths[dist.get_rank(ctx.group)]], None, None
