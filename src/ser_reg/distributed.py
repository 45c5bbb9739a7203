"""Tensors of all ranks: counts and errors are exchanged first; uneven shards and sums have gradients."""

import math
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import SERError, require

__all__ = [
    "all_gather",
    "all_gather_counts",
    "all_gather_single",
    "all_reduce",
    "broadcast",
    "mark_as_raised_on_all_ranks",
    "raise_on_all_ranks",
    "rank_and_world_size",
]

# Since torch 2.14 these have new names, and the old ones warn.
all_gather_single: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))

HEADER = 16  # numbers that a rank sends before it gathers: whether it can take part, counts, what all must have alike
_RAISED = "raised_on_all_ranks"  # attribute of an error that every rank has raised already


def rank_and_world_size(group: "dist.ProcessGroup | None" = None) -> tuple[int, int]:
    """Rank of this process and number of processes in `group`, by default among all processes.

    Raises:
        SERError: this process is not in `group`.

    Example:
        >>> rank_and_world_size()  # nothing is distributed here
        (0, 1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    require(
        rank >= 0,
        "patch_ntxent(z1, z2, group=group)",
        f"a group without this process (rank {dist.get_rank()} of {dist.get_world_size()})",
        "a group that this process belongs to",
        "group=None  # all processes",
    )
    return rank, dist.get_world_size(group)


def all_gather_counts(
    call: str,
    error: SERError | None,
    counts: tuple[int, ...],
    alike: dict[str, tuple[float, str]],
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
        alike: name -> (value, what to type when the ranks' values differ); the same names on each.
        device: of the tensors that will be gathered.
        group: the processes that take part, by default all.

    Raises:
        SERError: on every rank, with the first error that a rank reports, or with the first name on whose value
            they differ.
    """
    header = [float(error is None), *counts, *(value for value, _ in alike.values())]
    device = _exchange_device(device, group)
    mine = torch.tensor(header + [0.0] * (HEADER - len(header)), dtype=torch.float64, device=device)
    gathered = mine.new_empty(dist.get_world_size(group) * HEADER)
    all_gather_single(gathered, mine, group)
    headers: list[list[float]] = gathered.view(-1, HEADER).tolist()

    if not all(fine for fine, *_ in headers):
        errors: list[SERError | None] = [None] * len(headers)
        dist.all_gather_object(errors, error, group)
        rank, cause = next((rank, e) for rank, e in enumerate(errors) if e)
        raise mark_as_raised_on_all_ranks(
            SERError(f"{cause.call}, on rank {rank}", cause.given, cause.expected, cause.remedy)
        )
    for i, (name, (_, remedy)) in enumerate(alike.items(), start=1 + len(counts)):
        for rank, row in enumerate(headers):
            if not math.isclose(row[i], headers[0][i], rel_tol=1e-6):  # sums differ in their last digits
                given = f"{name} {headers[0][i]:g} on rank 0, {row[i]:g} on rank {rank}"
                raise mark_as_raised_on_all_ranks(SERError(call, given, "the same on every rank", remedy))
    return [tuple(int(count) for count in row[1 : 1 + len(counts)]) for row in headers]


def raise_on_all_ranks(error: SERError, device: torch.device, group: "dist.ProcessGroup | None" = None) -> NoReturn:
    """Raise the error here, and on the ranks that wait for this one in `all_gather_counts`.

    Args:
        error: why this rank gives up ahead of the exchange in which the others are.
        device: of the tensors that would have been gathered.
        group: the processes that wait.
    """
    if rank_and_world_size(group)[1] > 1 and not getattr(error, _RAISED, False):
        all_gather_counts(error.call, error, (), {}, device, group)
    raise error


def mark_as_raised_on_all_ranks(error: SERError) -> SERError:
    """The same error, of which `raise_on_all_ranks` then knows that every rank finds it by itself."""
    setattr(error, _RAISED, True)
    return error


def _exchange_device(device: torch.device, group: "dist.ProcessGroup | None") -> torch.device:
    """Where a few numbers are exchanged: on the host if the processes can."""
    return torch.device("cpu") if "cpu" in dist.distributed_c10d.get_backend_config(group) else device


def broadcast(values: Tensor, device: torch.device) -> Tensor:
    """The first rank's values on all ranks, on the CPU; nothing happens where one process is alone.

    Args:
        values: the same shape and dtype on each rank.
        device: of the tensors at hand, which the processes can exchange.
    """
    if rank_and_world_size()[1] == 1:
        return values
    first = values.to(_exchange_device(device, None))
    dist.broadcast(first, 0)
    return first.cpu()


def all_gather(x: Tensor, lengths: list[int], group: "dist.ProcessGroup | None" = None) -> tuple[Tensor, ...]:
    """The shards of all ranks, in rank order, differentiable.

    Args:
        x: (n, D), the shard of this rank. n may differ between ranks and be 0; D and dtype may not.
        lengths: n of every rank.
        group: the processes that take part, by default all.

    Returns:
        An (n, D) tensor per rank. Backward is the transpose of the gather: each rank receives the **sum**, over
        ranks, of the gradients for its shard. That is a collective too: every rank has to go backward, or none.
    """
    shards: tuple[Tensor, ...] = _AllGather.apply(x, lengths, group)
    return shards


class _AllGather(torch.autograd.Function):
    # Padded to the longest shard: gloo takes even ones only, and NCCL turns uneven ones into broadcasts.

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], group: "dist.ProcessGroup | None") -> tuple[Tensor, ...]:
        ctx.lengths, ctx.group = lengths, group
        padded = x.new_zeros(max(1, *lengths), x.shape[1])  # not every backend sends nothing
        padded[: len(x)] = x
        gathered = x.new_empty(len(lengths), *padded.shape)
        all_gather_single(gathered.flatten(0, 1), padded, group)
        return tuple(shard[:n] for shard, n in zip(gathered, lengths, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        padded = grads[0].new_zeros(len(grads), max(1, *ctx.lengths), grads[0].shape[1])
        for shard, grad in zip(padded, grads, strict=True):
            shard[: len(grad)] = grad
        mine = torch.empty_like(padded[0])
        reduce_scatter_single(mine, padded.flatten(0, 1), group=ctx.group)
        return mine[: ctx.lengths[dist.get_rank(ctx.group)]], None, None


def all_reduce(x: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """The sum over all ranks, on each of them, differentiable; `x` itself where one process is alone.

    Args:
        x: the same shape and dtype on each rank.
        group: the processes that take part, by default all.

    Returns:
        A tensor like `x`. Backward is the transpose of the sum: each rank receives the **sum**, over ranks, of the
        gradients for the result. That is a collective too: every rank has to go backward, or none.

    Example:
        >>> all_reduce(torch.ones(2))  # nothing is distributed here
        tensor([1., 1.])
    """
    if rank_and_world_size(group)[1] == 1:
        return x
    total: Tensor = _AllReduce.apply(x, group)
    return total


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


def _sum(x: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)  # which the collective writes into
    dist.all_reduce(total, group=group)
    return total
