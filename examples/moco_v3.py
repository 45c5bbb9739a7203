"""Pretrain a ViT with MoCo-v3 and an added term, by default soft equivariance (SER).

    python examples/moco_v3.py                                             # minutes on a CPU, embedded photographs
    accelerate launch examples/moco_v3.py --preset paper --data /data/imagenet
    python examples/moco_v3.py ser --term.weight 0                         # the control, b2 kept (Table 5)
    python examples/moco_v3.py equimod --term.layer 3                      # another term: --help lists them
    python examples/moco_v3.py none                                        # plain MoCo-v3

Source of the base method: Chen, Xie & He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV
2021 (arXiv 2104.02057), and the recipe of its official release, written anew. Where the paper on SER, the official
release and the released code of SER disagree, the setting says so, and the preset "released" has the last's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pretraining  # noqa: F401  (ahead of torch: how its threads wait)
import torch
import tyro
from data.batch import Group
from data.recipe import BILINEAR, Recipe
from data.recipe import recipes as standard_recipes
from pretraining.base import BaseMethod, BaseOutput, Encode, global_views
from pretraining.distributed import all_gather
from pretraining.encoder import build_encoder, follow, momentum_copy
from pretraining.loop import main
from pretraining.positive import require_positive
from pretraining.schedules import Moment, cosine
from pretraining.settings import SMALL, Settings
from torch import Tensor, nn
from torch.nn import functional as F

from ser_reg.backbones import backbone
from ser_reg.distributed import rank_and_world_size

__all__ = ["PRESETS", "MethodSettings", "MoCoSettings", "MoCoV3", "build", "contrastive_loss", "recipes"]


@dataclass(frozen=True)
class MethodSettings:
    """MoCo-v3."""

    hidden: int = 4096
    """Width inside projector and predictor."""
    out: int = 256
    """Width of what is compared."""
    temperature: float = 0.2
    """Of the contrast between images."""
    momentum: float = 0.99
    """At the start; it goes along a cosine to 1."""

    def check(self, script: str) -> None:
        """Raise a SERError for widths that are none."""
        require_positive(script, self, hidden=4096, out=256)


@dataclass(frozen=True)
class MoCoSettings(Settings):
    """Pretrain a ViT with MoCo-v3, with an added term or without."""

    method: tyro.conf.OmitArgPrefixes[MethodSettings] = field(default_factory=MethodSettings)


# Section 4.1: ViT-S/16, 100 epochs of batch 2048, 10 of them warm-up; all else as the official release has it.
PAPER = MoCoSettings("paper").but(
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
    "released": PAPER.but(
        preset="released",
        heads=None,
        positions="learned",
        patch_projection="fixed-default",
        learning_rate=3e-4,
        term={"weight": 1.0, "temperature": 0.5, "target": "momentum"},
    ),
    "small": PAPER.but(**SMALL, output_dir=Path("out/moco_v3_small"), hidden=512, out=128),
}


class MoCoV3(BaseMethod):
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
        super().__init__(encoder)
        self.projector = mlp(dim, hidden, hidden, out)
        self.predictor = mlp(out, hidden, out)
        self.temperature = temperature
        self.momentum = momentum
        self.target = momentum_copy(encoder)
        self.target_projector = momentum_copy(self.projector)

    def forward(self, groups: Sequence[Group], encode: Encode) -> BaseOutput:
        trained = encode(self.encoder, groups)
        with torch.no_grad():
            momentum = encode(self.target, global_views(groups))
        return BaseOutput(self.loss(trained.embeddings, momentum.embeddings), trained, momentum)

    def loss(self, embeddings: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
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

    def follow(self, momentum: float) -> None:
        """Move the momentum branch towards the trained one."""
        follow(self.target, self.encoder, momentum)
        follow(self.target_projector, self.projector, momentum)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """2τ · cross-entropy of query i finding key i among the keys of all processes (Algorithm 1, `ctr`),
    in single precision."""
    rank, _ = rank_and_world_size()
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
        logits = queries @ all_gather(keys).T / temperature
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


def recipes(settings: MoCoSettings) -> tuple[list[Recipe], list[Recipe]]:
    """Views of the official release for ViTs (its ResNets have areas from .2); local ones are SER's 2+4 views."""
    data = settings.data
    area = data.area or (0.08, 1)
    size = settings.encoder.image_size
    return standard_recipes(size, area, BILINEAR, data.local_size, data.local_views, (0.05, 0.25), data.blur)


def build(settings: MoCoSettings) -> MoCoV3:
    """The base method around a new encoder."""
    encoder, own = build_encoder(settings.encoder, settings.late_layer), settings.method
    return MoCoV3(encoder, backbone(encoder).width(), own.hidden, own.out, own.temperature, own.momentum)


if __name__ == "__main__":
    main("moco_v3", PRESETS, build, recipes)
