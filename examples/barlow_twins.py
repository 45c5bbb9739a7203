"""Pretrain a ViT with Barlow Twins and soft equivariance (SER).

    python examples/barlow_twins.py                                        # minutes on a CPU, embedded photographs
    accelerate launch examples/barlow_twins.py --preset paper --data /data/imagenet
    python examples/barlow_twins.py --ser-lambda 0                         # the control, b2 kept (Table 5)
    python examples/barlow_twins.py --partition-ratio 0                    # plain Barlow Twins

Source of the base method: Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021
(arXiv 2103.03230), and the recipe of its official release, written anew. That is a recipe for ResNet-50: the paper on
SER trains ViT-S/16 with AdamW, and the numbers for it are those of its released code.
"""

from __future__ import annotations

import os

# Set ahead of torch: threads that spin while they wait stall each other when the machine is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from pretraining.distributed import place, total
from pretraining.encoder import build_encoder
from pretraining.loop import train
from pretraining.schedules import Moment
from pretraining.settings import SMALL, Settings, parse
from torch import Tensor, nn

from ser_reg import SERError

__all__ = ["PRESETS", "BarlowSettings", "BarlowTwins", "build", "redundancy_loss"]


@dataclass(frozen=True)
class BarlowSettings(Settings):
    """Pretrain a ViT with Barlow Twins, with soft equivariance (SER) or without."""

    hidden: int = 8192
    """Width of all three layers of the projector."""
    off_diagonal: float = 0.0051
    """Weight of correlations between different components."""


# Section 4.1: ViT-S/16, 100 epochs of batch 2048, 10 of them warm-up, AdamW.
PAPER = BarlowSettings(
    preset="paper",
    data="data/imagenet",
    precision="fp16",
    output_dir=Path("out/barlow_twins"),
    learning_rate=1e-4,
    final_learning_rate=8e-7,  # a thousandth of the highest
    clip=0.3,  # as released; there, gradients do not cross the sum over processes, and are smaller by their number
)
PRESETS = {
    "paper": PAPER,
    "released": replace(PAPER, preset="released", ser_lambda=1.0, ser_temperature=0.4),
    # The official recipe of the base, which is one for ResNet-50.
    "official": replace(
        PAPER, preset="official", optimizer="lars", learning_rate=0.2, final_learning_rate=1.6e-3, weight_decay=1e-6,
        clip=None, epochs=1000,
    ),
    "small": replace(
        PAPER,
        **SMALL,
        output_dir=Path("out/barlow_twins_small"),
        hidden=512,
        final_learning_rate=1e-6,
    ),
}  # fmt: skip


class BarlowTwins(nn.Module):
    """One branch; the cross-correlation of two views' projections should be the identity.

    Args:
        encoder: images to (B, D) embeddings.
        dim: D.
        hidden: width of the projector's three layers.
        off_diagonal: weight of redundancy.
    """

    target = None

    def __init__(self, encoder: nn.Module, dim: int, hidden: int = 8192, off_diagonal: float = 0.0051) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False),
        )
        self.norm = nn.BatchNorm1d(hidden, affine=False)
        self.off_diagonal = off_diagonal

    @property
    def exported(self) -> nn.Module:
        return self.encoder

    def forward(self, embeddings: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The mean over pairs of views of which one is global.

        Args:
            embeddings: (B, D) of every view, global ones first.
            targets: none; there is no momentum branch.
        """
        projections = [self.norm(self.projector(e)) for e in embeddings]
        pairs = [(z1, z2) for (i, z1), (_, z2) in combinations(enumerate(projections), 2) if i < 2]
        return torch.stack([redundancy_loss(z1, z2, self.off_diagonal) for z1, z2 in pairs]).mean()

    def before_step(self, moment: Moment) -> None:
        """Nothing moves."""

    def before_update(self, moment: Moment) -> None:
        """Gradients stay as they are."""

    def after_update(self, moment: Moment) -> None:
        """Nothing follows."""


def redundancy_loss(z1: Tensor, z2: Tensor, off_diagonal: float) -> Tensor:
    """Σ_i (C_ii - 1)² + off_diagonal · Σ_(i≠j) C_ij², C the cross-correlation over the images of all processes.

    In single precision, and with a sum over processes that gradients cross: official Barlow Twins stops them there, so
    that its gradient is 1 / (number of processes) of that of one process.

    Args:
        z1, z2: (B, K), normalised over the batch.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = z1.float(), z2.float()
        correlation = total(z1.T @ z2) / (len(z1) * place()[1])
        diagonal = correlation.diagonal()
        redundancy = correlation.square().sum() - diagonal.square().sum()
        return (diagonal - 1).square().sum() + off_diagonal * redundancy


def build(settings: BarlowSettings) -> BarlowTwins:
    """The base method around a new encoder."""
    if settings.ser_target == "momentum":
        expected = "tokens of the trained encoder: Barlow Twins has no momentum encoder"
        remedy = "python examples/barlow_twins.py --ser-target online"
        raise SERError("barlow_twins.py", "ser_target='momentum'", expected, remedy)
    encoder = build_encoder(settings)
    return BarlowTwins(encoder, encoder.num_features, settings.hidden, settings.off_diagonal)


if __name__ == "__main__":
    try:
        train("barlow_twins", parse(PRESETS, "barlow_twins.py"), build)
    except SERError as error:
        sys.exit(str(error))
