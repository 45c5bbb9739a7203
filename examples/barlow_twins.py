"""Pretrain a ViT with Barlow Twins and an added term, by default soft equivariance (SER).

    python examples/barlow_twins.py                                        # minutes on a CPU, embedded photographs
    accelerate launch examples/barlow_twins.py --preset paper --data /data/imagenet
    python examples/barlow_twins.py ser --term.weight 0                    # the control, b2 kept (Table 5)
    python examples/barlow_twins.py equimod --term.layer 3                 # another term: --help lists them
    python examples/barlow_twins.py none                                   # plain Barlow Twins

Source of the base method: Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021
(arXiv 2103.03230), and the recipe of its official release, written anew. That is a recipe for ResNet-50: the paper on
SER trains ViT-S/16 with AdamW, and the numbers for it are those of its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import pretraining  # noqa: F401  (ahead of torch: how its threads wait)
import torch
import tyro
from data.batch import Group
from data.recipe import BICUBIC, Recipe
from data.recipe import recipes as standard_recipes
from pretraining.base import BaseMethod, BaseOutput, Encode
from pretraining.distributed import all_reduce
from pretraining.encoder import build_encoder
from pretraining.loop import main
from pretraining.positive import require_positive
from pretraining.settings import SMALL, Settings
from torch import Tensor, nn

from ser_reg.backbones import backbone
from ser_reg.distributed import rank_and_world_size

__all__ = ["PRESETS", "BarlowSettings", "BarlowTwins", "MethodSettings", "build", "recipes", "redundancy_loss"]


@dataclass(frozen=True)
class MethodSettings:
    """Barlow Twins."""

    hidden: int = 8192
    """Width of all three layers of the projector."""
    off_diagonal: float = 0.0051
    """Weight of correlations between different components."""

    def check(self, script: str) -> None:
        """Raise a SERError for a width that is none."""
        require_positive(script, self, hidden=8192)


@dataclass(frozen=True)
class BarlowSettings(Settings):
    """Pretrain a ViT with Barlow Twins, with an added term or without."""

    suited: ClassVar[dict[str, dict[str, Any]]] = {"essl": {"weight": 8.0}}  # as its authors set it for this base

    method: tyro.conf.OmitArgPrefixes[MethodSettings] = field(default_factory=MethodSettings)


# Section 4.1: ViT-S/16, 100 epochs of batch 2048, 10 of them warm-up, AdamW.
PAPER = BarlowSettings("paper").but(
    data="data/imagenet",
    precision="fp16",
    output_dir=Path("out/barlow_twins"),
    learning_rate=1e-4,
    final_learning_rate=8e-7,  # a thousandth of the highest
    clip=0.3,  # as released; there, gradients do not cross the sum over processes, and are smaller by their number
)
PRESETS = {
    "paper": PAPER,
    "released": PAPER.but(preset="released", term={"weight": 1.0, "temperature": 0.4}),
    # The official recipe of the base, which is one for ResNet-50.
    "official": PAPER.but(
        preset="official",
        optimizer="lars",
        learning_rate=0.2,
        final_learning_rate=1.6e-3,
        weight_decay=1e-6,
        clip=None,
        epochs=1000,
    ),
    "small": PAPER.but(**SMALL, output_dir=Path("out/barlow_twins_small"), hidden=512, final_learning_rate=1e-6),
}


class BarlowTwins(BaseMethod):
    """One branch; the cross-correlation of two views' projections should be the identity.

    Args:
        encoder: images to (B, D) embeddings.
        dim: D.
        hidden: width of the projector's three layers.
        off_diagonal: weight of redundancy.
    """

    def __init__(self, encoder: nn.Module, dim: int, hidden: int = 8192, off_diagonal: float = 0.0051) -> None:
        super().__init__(encoder)
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

    def forward(self, groups: Sequence[Group], encode: Encode) -> BaseOutput:
        trained = encode(self.encoder, groups)
        return BaseOutput(self.loss(trained.embeddings), trained)

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        """The mean over pairs of views of which one is global.

        Args:
            embeddings: (B, D) of every view, global ones first.
        """
        projections = [self.norm(self.projector(e)) for e in embeddings]
        pairs = [(z1, z2) for (i, z1), (_, z2) in combinations(enumerate(projections), 2) if i < 2]
        return torch.stack([redundancy_loss(z1, z2, self.off_diagonal) for z1, z2 in pairs]).mean()


def redundancy_loss(z1: Tensor, z2: Tensor, off_diagonal: float) -> Tensor:
    """Σ_i (C_ii - 1)² + off_diagonal · Σ_(i≠j) C_ij², C the cross-correlation over the images of all processes.

    In single precision, and with a sum over processes that gradients cross: official Barlow Twins stops them there, so
    that its gradient is 1 / (number of processes) of that of one process.

    Args:
        z1, z2: (B, K), normalised over the batch.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = z1.float(), z2.float()
        correlation = all_reduce(z1.T @ z2) / (len(z1) * rank_and_world_size()[1])
        diagonal = correlation.diagonal()
        redundancy = correlation.square().sum() - diagonal.square().sum()
        return (diagonal - 1).square().sum() + off_diagonal * redundancy


def recipes(settings: BarlowSettings) -> tuple[list[Recipe], list[Recipe]]:
    """Views of the official release; local ones, which it does not have, are SER's 2+4 views."""
    data = settings.data
    area = data.area or (0.08, 1)
    size = settings.encoder.image_size
    return standard_recipes(size, area, BICUBIC, data.local_size, data.local_views, (0.05, 0.25), data.blur)


def build(settings: BarlowSettings) -> BarlowTwins:
    """The base method around a new encoder."""
    encoder, own = build_encoder(settings.encoder, settings.late_layer), settings.method
    return BarlowTwins(encoder, backbone(encoder).width(), own.hidden, own.off_diagonal)


if __name__ == "__main__":
    main("barlow_twins", PRESETS, build, recipes)
