"""A classifier of three layers on frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import Session
from .classifiers import Kind
from .trained import Trained, train_classifier

__all__ = ["Mlp", "mlp"]


@dataclass(frozen=True, kw_only=True)
class Mlp(Trained):
    """A classifier of three layers on the same features.

    Table 3 of the paper, which names three layers and no more. ReLU between them, Adam without decay, cosine.
    """

    hidden: int = 1024
    """Channels between the layers."""
    base_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates to choose from, for any batch."""

    def run(self) -> None:
        session = Session(self)
        _, results = train_classifier(session, self, mlp(self.hidden), self.base_rates, scaled=False)
        session.write(results)


def mlp(hidden: int) -> Kind:
    """Three layers with ReLU between them, Adam without decay.

    The paper names three layers and Garrido et al. (2023), and gives no more; theirs have 1024 channels and Adam.
    """

    def build(channels: int, classes: int) -> nn.Module:
        widths = (channels, hidden), (hidden, hidden)
        layers = [module for width in widths for module in (nn.Linear(*width), nn.ReLU(inplace=True))]
        return nn.Sequential(*layers, nn.Linear(hidden, classes))

    return Kind(
        f"three layers, {hidden} channels, Adam", build, lambda parameters, rate: torch.optim.Adam(parameters, rate)
    )
