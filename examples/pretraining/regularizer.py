"""What stands in the slot beside the base method: a loss on tokens of both views, and how the views relate."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ser_reg import SERLoss, ViewPair

__all__ = ["Regularization", "Regularizer", "SoftEquivariance"]


class Regularization(NamedTuple):
    """A loss to be weighed by lambda, and detached scalars to be logged."""

    loss: Tensor
    logs: dict[str, Tensor]


class Regularizer(Protocol):
    """Knows nothing of the base method, as that knows nothing of it.

    Attributes:
        layers: blocks that run before the tokens it wants.
    """

    layers: tuple[int, ...]

    def __call__(self, tokens1: dict[int, Tensor], tokens2: dict[int, Tensor], pair: ViewPair) -> Regularization:
        """Args:
        tokens1, tokens2: by layer, (B, D, h, w) of the two views.
        pair: the views themselves, (B, 3, H, W), and their elements.
        """


class SoftEquivariance(nn.Module):
    """SER at one layer, or at several with a projector for each and their mean (Table 10).

    Args:
        dim: D of the tokens.
        layers: blocks that run before the tokens.
        projection_dim: width of the projector.
        temperature: of the contrast.
    """

    def __init__(self, dim: int, layers: tuple[int, ...], projection_dim: int, temperature: float) -> None:
        super().__init__()
        self.layers = layers
        self.losses = nn.ModuleList(SERLoss(dim, projection_dim, temperature) for _ in layers)

    def forward(self, tokens1: dict[int, Tensor], tokens2: dict[int, Tensor], pair: ViewPair) -> Regularization:
        relative = pair.relative
        outs = [ser(tokens1[k], tokens2[k], relative) for ser, k in zip(self.losses, self.layers, strict=True)]

        def mean(name: str) -> Tensor:
            return torch.stack([getattr(out, name) for out in outs]).mean()

        logs = {f"ser_{name}": mean(name) for name in ("chance", "accuracy", "feature_std")}
        return Regularization(mean("loss"), logs)
