"""Pretrain a ViT with DINO and an added term, by default soft equivariance (SER).

    python examples/dino.py                                                # minutes on a CPU, embedded photographs
    accelerate launch examples/dino.py --preset paper --data /data/imagenet
    python examples/dino.py ser --term.weight 0                            # the control, b2 kept (Table 5)
    python examples/dino.py equimod --term.layer 3                         # another term: --help lists them
    python examples/dino.py none                                           # plain DINO

Source of the base method: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021
(arXiv 2104.14294), and the recipe of its official release, written anew. Where the paper on SER, the official release
and the released code of SER disagree, the setting says so, and the preset "released" has the last's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pretraining  # noqa: F401  (ahead of torch: how its threads wait)
import torch
import tyro
from data.batch import Group
from data.recipe import BICUBIC, Recipe
from data.recipe import recipes as standard_recipes
from pretraining.base import BaseMethod, BaseOutput, Encode, global_views
from pretraining.distributed import all_reduce
from pretraining.encoder import build_encoder, follow, momentum_copy
from pretraining.loop import main
from pretraining.positive import require_positive
from pretraining.schedules import Moment, cosine, ramp
from pretraining.settings import SMALL, Settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from ser_reg.backbones import backbone
from ser_reg.distributed import rank_and_world_size

__all__ = ["DINO", "PRESETS", "DINOHead", "DINOSettings", "MethodSettings", "build", "distillation_loss", "recipes"]


@dataclass(frozen=True)
class MethodSettings:
    """DINO."""

    hidden: int = 2048
    """Width inside the head."""
    bottleneck: int = 256
    """Width ahead of the last layer."""
    prototypes: int = 65536
    """Width of the last layer."""
    norm_last_layer: bool = True
    """Keep the last layer's rows at length 1. The released code of SER lets them grow."""
    student_temperature: float = 0.1
    """Of the student's softmax."""
    teacher_temperature: float = 0.04
    """At the end of its warm-up. The released code of SER sets 0.07."""
    first_teacher_temperature: float = 0.04
    """At the start."""
    teacher_warmup_epochs: int = 0
    """The released code of SER sets 10."""
    center_momentum: float = 0.9
    """Of the mean of the teacher's outputs, which is taken off them."""
    momentum: float = 0.996
    """Of the teacher at the start; it goes along a cosine to 1. The released code of SER sets 0.982."""
    frozen_last_layer_epochs: int = 1
    """The last layer learns only after these."""

    def check(self, script: str) -> None:
        """Raise a SERError for widths that are none."""
        require_positive(script, self, hidden=2048, bottleneck=256, prototypes=65536)


@dataclass(frozen=True)
class DINOSettings(Settings):
    """Pretrain a ViT with DINO, with an added term or without."""

    method: tyro.conf.OmitArgPrefixes[MethodSettings] = field(default_factory=MethodSettings)


# Section 4.1: ViT-S/16, 100 epochs of batch 2048, 10 of them warm-up, 2 views; all else as the official release has it.
PAPER = DINOSettings("paper").but(
    data="data/imagenet",
    precision="fp16",
    output_dir=Path("out/dino"),
    drop_path=0.1,
    learning_rate=5e-4,
    final_learning_rate=1e-6,
    weight_decay=0.04,
    final_weight_decay=0.4,
    decay_vectors=False,
    clip=3.0,
    term={"temperature": 0.5},
)
PRESETS = {
    "paper": PAPER,
    "released": PAPER.but(
        preset="released",
        learning_rate=1e-4,
        final_learning_rate=1e-5,
        momentum=0.982,
        teacher_temperature=0.07,
        teacher_warmup_epochs=10,
        clip=0.3,
        crop_min=0.25,
        norm_last_layer=False,
        term={"weight": 0.3, "temperature": 0.4, "target": "momentum"},
    ),
    "small": PAPER.but(
        **SMALL | {"learning_rate": 2e-3},
        output_dir=Path("out/dino_small"),
        hidden=256,
        bottleneck=64,
        prototypes=1024,
        momentum=0.99,
    ),
}


class DINO(BaseMethod):
    """A student and the teacher that follows it, each an encoder with a head.

    Args:
        encoder: images to (B, D) embeddings; the student's, copied for the teacher.
        head: (B, D) to (B, K) logits; copied for the teacher.
        settings: temperatures, momenta and epochs.
    """

    def __init__(self, encoder: nn.Module, head: DINOHead, settings: MethodSettings) -> None:
        super().__init__(encoder)
        self.settings = settings
        self.head = head
        self.target = momentum_copy(encoder)
        self.target_head = momentum_copy(head)
        self.teacher_temperature = settings.first_teacher_temperature
        self.register_buffer("center", torch.zeros(1, settings.prototypes))

    @property
    def exported(self) -> nn.Module:
        return self.target  # the teacher is what DINO evaluates

    def forward(self, groups: Sequence[Group], encode: Encode) -> BaseOutput:
        trained = encode(self.encoder, groups)
        with torch.no_grad():
            momentum = encode(self.target, global_views(groups))
        return BaseOutput(self.loss(trained.embeddings, momentum.embeddings), trained, momentum)

    def loss(self, embeddings: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Each view of the student learns what the teacher says of the other global views.

        Args:
            embeddings: (B, D) of the student, global views first.
            targets: (B, D) of the teacher, of the two global views.
        """
        students = [self.head(e) for e in embeddings]
        with torch.no_grad():
            teachers = [self.target_head(t) for t in targets]
        losses = [
            distillation_loss(
                student, teacher, self.center, self.settings.student_temperature, self.teacher_temperature
            )
            for j, teacher in enumerate(teachers)
            for i, student in enumerate(students)
            if i != j
        ]
        self._move_center(teachers)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _move_center(self, teachers: list[Tensor]) -> None:
        """After use: this step's loss had the center of the steps before."""
        mean = all_reduce(torch.stack([t.float().mean(0) for t in teachers]).mean(0, keepdim=True))
        mean = mean / rank_and_world_size()[1]
        self.center.lerp_(mean, 1 - self.settings.center_momentum)

    def before_step(self, moment: Moment) -> None:
        """The teacher's temperature is that of the epoch."""
        s = self.settings
        self.teacher_temperature = ramp(
            moment.epoch, s.teacher_warmup_epochs, s.first_teacher_temperature, s.teacher_temperature
        )

    def before_update(self, moment: Moment) -> None:
        """The last layer does not learn in the first epochs."""
        if moment.epoch < self.settings.frozen_last_layer_epochs:
            for parameter in self.head.last.parameters():
                parameter.grad = None

    def after_update(self, moment: Moment) -> None:
        """The teacher follows, with a momentum from its start along a cosine to 1."""
        self.follow(cosine(moment.progress, self.settings.momentum, 1.0))

    def follow(self, momentum: float) -> None:
        """Move the teacher towards the student."""
        follow(self.target, self.encoder, momentum)
        follow(self.target_head, self.head, momentum)


class DINOHead(nn.Module):
    """Three linear layers with GELU between them, a unit vector, and the similarity to each prototype.

    Args:
        dim: D of the embeddings.
        hidden, bottleneck: widths of the layers.
        prototypes: K.
        norm_last_layer: prototypes stay unit vectors.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int, norm_last_layer: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        last = nn.Linear(bottleneck, prototypes, bias=False)
        for layer in (*self.mlp[::2], last):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        for layer in self.mlp[::2]:
            nn.init.zeros_(layer.bias)
        self.last = weight_norm(last)
        length = self.last.parametrizations.weight.original0
        nn.init.ones_(length)
        length.requires_grad_(not norm_last_layer)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(embeddings), dim=-1))


def distillation_loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross-entropy of softmax((t - c) / T_t) against log softmax(s / T_s), in single precision; the batch's mean."""
    target = F.softmax((teacher.float() - center) / teacher_temperature, dim=-1)
    return -(target * F.log_softmax(student.float() / student_temperature, dim=-1)).sum(-1).mean()


def recipes(settings: DINOSettings) -> tuple[list[Recipe], list[Recipe]]:
    """Views of the official release, whose areas depend on whether there are local ones. These are SER's 2+4 views,
    smaller than DINO's own (.05, .4)."""
    data = settings.data
    area = data.area or ((0.4, 1) if data.local_views else (0.14, 1))
    size = settings.encoder.image_size
    return standard_recipes(size, area, BICUBIC, data.local_size, data.local_views, (0.05, 0.25), data.blur)


def build(settings: DINOSettings) -> DINO:
    """The base method around a new encoder."""
    encoder, own = build_encoder(settings.encoder, settings.late_layer), settings.method
    dim = backbone(encoder).width()
    head = DINOHead(dim, own.hidden, own.bottleneck, own.prototypes, own.norm_last_layer)
    return DINO(encoder, head, own)


if __name__ == "__main__":
    main("dino", PRESETS, build, recipes)
