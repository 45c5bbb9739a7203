"""Layers of heads: batch norm over all ranks, and perceptrons with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import all_gather, rank_and_world_size
from ..errors import require

__all__ = ["MLP", "BatchNorm", "pooled"]

MOMENTUM, EPS = 0.1, 1e-5  # of torch.nn.BatchNorm1d


class BatchNorm(nn.Module):
    """Batch norm whose statistics are those of the rows of all ranks, on a CPU and a GPU.

    On one process it is `torch.nn.BatchNorm1d` (of maps: `BatchNorm2d`); on several, value, gradient and running
    statistics are those of one process with all rows, however these are split; a rank may have none. In evaluation it
    takes the running statistics. `torch.nn.SyncBatchNorm` does not run on a CPU, nor with the ranks of a group that
    comes with the call.

    Args:
        width: d, channels.
        affine: whether a scale and a shift of each channel are learned.

    Example:
        >>> x = torch.randn(8, 4)
        >>> torch.allclose(BatchNorm(4)(x), torch.nn.BatchNorm1d(4)(x))
        True
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def extra_repr(self) -> str:
        return f"{self.width}, affine={self.weight is not None}"

    def forward(self, x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """The rows, each channel with mean 0 and variance 1 over all of them, then scaled and shifted.

        Args:
            x: (n, d) or (n, d, ...), where every place is a row.
            group: the processes whose rows are one batch. All have to call, and to go backward if one does.

        Raises:
            SERError: one row in training. Of several ranks nobody counts here: `Objective.image_counts` does.
        """
        _, world_size = rank_and_world_size(group)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, EPS)
        if world_size > 1:
            return self._over_ranks(x, world_size, group)
        require(
            x.numel() // self.width > 1,
            f"BatchNorm({self.width})(x)",
            f"x {tuple(x.shape)}, one row or none",
            "at least two rows in training",
            "term.eval()  # or a batch of at least 2 images",
        )
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, MOMENTUM, EPS)

    def _over_ranks(self, x: Tensor, world_size: int, group: dist.ProcessGroup | None) -> Tensor:
        """Counts, means and sums of squares of all ranks, put together as Chan, Golub and LeVeque (1983) do."""
        rows = [0, *range(2, x.ndim)]
        count = x.numel() // self.width
        mean = x.sum(rows) / max(1, count)
        squares = (x - self._wide(mean, x)).square().sum(rows)
        mine = torch.cat([mean.new_full((1,), count), mean, squares])[None]
        counts, means, sums = torch.cat(all_gather(mine, [1] * world_size, group)).split([1, self.width, self.width], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        squares = (sums + counts * (means - mean).square()).sum(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), MOMENTUM)
            self.running_var.lerp_((squares / (total - 1)).to(self.running_var), MOMENTUM)
        scale = (squares / total + EPS).rsqrt()
        shift = -mean * scale
        if self.weight is not None and self.bias is not None:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return x * self._wide(scale, x) + self._wide(shift, x)

    @staticmethod
    def _wide(values: Tensor, x: Tensor) -> Tensor:
        return values.view(1, -1, *[1] * (x.ndim - 2))


class MLP(nn.Module):
    """Perceptron: a linear map without bias, batch norm and ReLU for each hidden width, and a linear map at the end.

    Args:
        widths: of the input, of hidden layers, of the output.
        last_norm: batch norm behind the last linear map: None, "affine", or "plain" without scale and shift.
        last_bias: whether the last linear map has a bias.

    Example:
        >>> MLP([8, 16, 4], last_norm="plain")(torch.randn(6, 8)).shape
        torch.Size([6, 4])
    """

    def __init__(self, widths: Sequence[int], last_norm: str | None = None, last_bias: bool = False) -> None:
        super().__init__()
        last = len(widths) - 2
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=last_bias and i == last) for i, (a, b) in enumerate(pairs))
        self.norms = nn.ModuleList(BatchNorm(width) for width in widths[1:-1])
        self.last_norm = None if last_norm is None else BatchNorm(widths[-1], affine=last_norm == "affine")

    def forward(self, x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """(n, last width) of rows (n, first width); `group` as of `BatchNorm`."""
        for linear, norm in zip(self.linears, self.norms, strict=False):
            x = F.relu(norm(linear(x), group))
        x = self.linears[-1](x)
        return x if self.last_norm is None else self.last_norm(x, group)


def pooled(z: Tensor) -> Tensor:
    """The mean over the places of maps (B, D, h, w); vectors (B, D) as they are."""
    return z.mean((-2, -1)) if z.ndim == 4 else z
