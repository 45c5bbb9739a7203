"""Pretrain a ViT with MoCo-v3 and soft equivariance (SER).

    python examples/moco_v3.py                                             # minutes on a CPU, embedded photographs
    accelerate launch examples/moco_v3.py --preset paper --data /data/imagenet
    python examples/moco_v3.py --ser-lambda 0                              # the control, b2 kept (Table 5)
    python examples/moco_v3.py --partition-ratio 0                         # plain MoCo-v3

Source of the base method: Chen, Xie & He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV
2021 (arXiv 2104.02057), and the recipe of its official release, written anew. Where the paper on SER, the official
release and the released code of SER disagree, the setting says so, and the preset "released" has the last's values.
"""

from __future__ import annotations

import os

# Set ahead of torch: threads that spin while they wait stall each other when the machine is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from pretraining.distributed import everyone, place
from pretraining.encoder import build_encoder, momentum_copy
from pretraining.loop import train
from pretraining.schedules import Moment, cosine
from pretraining.settings import SMALL, Settings, parse
from torch import Tensor, nn
from torch.nn import functional as F

from ser_reg import SERError

__all__ = ["PRESETS", "MoCoSettings", "MoCoV3", "build", "contrastive_loss"]


@dataclass(frozen=True)
class MoCoSettings(Settings):
    """Pretrain a ViT with MoCo-v3, with soft equivariance (SER) or without."""

    hidden: int = 4096
    """Width inside projector and predictor."""
    out: int = 256
    """Width of what is compared."""
    temperature: float = 0.2
    """Of the contrast between images."""
    momentum: float = 0.99
    """At the start; it goes along a cosine to 1."""


# Section 4.1: ViT-S/16, 100 epochs of batch 2048, 10 of them warm-up; all else as the official release has it.
PAPER = MoCoSettings(
    preset="paper",
    data="data/imagenet",
    precision="fp16",
    output_dir=Path("out/moco_v3"),
    heads=12,
    initialisation="moco",
    positions="sincos",
    patch_projection="fixed",
)
PRESETS = {
    "paper": PAPER,
    "released": replace(
        PAPER,
        preset="released",
        heads=None,
        positions="learned",
        patch_projection="fixed-default",
        learning_rate=3e-4,
        ser_lambda=1.0,
        ser_temperature=0.5,
        ser_target="momentum",
    ),
    "small": replace(
        PAPER,
        **SMALL,
        output_dir=Path("out/moco_v3_small"),
        hidden=512,
        out=128,
    ),
}


class MoCoV3(nn.Module):
    """A trained branch with projector and predictor, a momentum branch without predictor.

    Args:
        encoder: images to (B, D) embeddings; copied for the momentum branch.
        dim: D.
        hidden: width inside both heads.
        out: width of what is compared.
        temperature: of the loss.
        momentum: of the momentum branch, at the start.
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        hidden: int = 4096,
        out: int = 256,
        temperature: float = 0.2,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(dim, hidden, hidden, out)
        self.predictor = mlp(out, hidden, out)
        self.temperature = temperature
        self.momentum = momentum
        self.target = momentum_copy(encoder)
        self.target_projector = momentum_copy(self.projector)

    @property
    def exported(self) -> nn.Module:
        return self.encoder

    def forward(self, embeddings: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Each view finds the image's other global view: for two views the sum of both directions, for more the mean
        over pairs, times two, so that λ keeps its meaning.

        Args:
            embeddings: (B, D) of the trained encoder, global views first.
            targets: (B, D) of the momentum encoder, of the two global views.
        """
        queries = [self.predictor(self.projector(e)) for e in embeddings]
        with torch.no_grad():
            keys = [self.target_projector(t) for t in targets]
        losses = [
            contrastive_loss(query, key, self.temperature)
            for i, query in enumerate(queries)
            for j, key in enumerate(keys)
            if i != j
        ]
        return 2 * torch.stack(losses).mean()

    def before_step(self, moment: Moment) -> None:
        """The momentum branch moves ahead of making its keys, m from its start along a cosine to 1.

        Parameters only: each branch keeps its own batch statistics.
        """
        self.follow(cosine(moment.progress, self.momentum, 1.0))

    def before_update(self, moment: Moment) -> None:
        """Gradients stay as they are."""

    def after_update(self, moment: Moment) -> None:
        """Nothing follows."""

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the momentum branch towards the trained one."""
        for slow, fast in ((self.target, self.encoder), (self.target_projector, self.projector)):
            for target, source in zip(slow.parameters(), fast.parameters(), strict=True):
                target.lerp_(source, 1 - momentum)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """2τ · cross-entropy of query i finding key i among the keys of all processes (Algorithm 1, `ctr`),
    in single precision."""
    rank, _ = place()
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
        logits = queries @ everyone(keys).T / temperature
        right = torch.arange(len(queries), device=logits.device) + rank * len(queries)
        return 2 * temperature * F.cross_entropy(logits, right)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers without bias, batch norm and ReLU between them, batch norm without scale and shift at the end."""
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(pairwise(widths), start=1):
        last = i == len(widths) - 1
        layers += [nn.Linear(width_in, width_out, bias=False), nn.BatchNorm1d(width_out, affine=not last)]
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def build(settings: MoCoSettings) -> MoCoV3:
    """The base method around a new encoder."""
    encoder = build_encoder(settings)
    return MoCoV3(encoder, encoder.num_features, settings.hidden, settings.out, settings.temperature, settings.momentum)


if __name__ == "__main__":
    try:
        train("moco_v3", parse(PRESETS, "moco_v3.py"), build)
    except SERError as error:
        sys.exit(str(error))
