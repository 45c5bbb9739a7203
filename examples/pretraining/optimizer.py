"""The optimiser: its settings, its two groups of parameters, and what is done to gradients and rates at each step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from timm.optim import Lars
from torch import nn

from ser_reg.errors import require

from .schedules import Moment, cosine, warm_cosine

__all__ = ["OptimizerSettings", "build_optimizer", "clip", "set_rates"]

# Official Barlow Twins under LARS: the rate of biases and normalisation over that of weights (0.0048 / 0.2).
LARS_VECTORS = 0.024


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser and its schedules."""

    optimizer: Literal["adamw", "lars"] = "adamw"
    """The paper trains all three with AdamW; official Barlow Twins uses LARS."""
    learning_rate: float = 1.5e-4
    """Highest one, for 256 images; it grows with the batch."""
    final_learning_rate: float = 0.0
    """Last one; it does not grow with the batch."""
    warmup_epochs: float = 10
    """Linear, from 0 (Section 4.1)."""
    weight_decay: float = 0.1
    """At the start."""
    final_weight_decay: float | None = None
    """At the end of a cosine; by default as at the start."""
    decay_vectors: bool = True
    """Weight decay on biases and normalisation as well."""
    clip: float | None = None
    """Highest norm of each parameter's gradient by itself."""

    def check(self, script: str) -> None:
        """Raise a SERError for a warm-up that ends before it begins."""
        given = f"warmup_epochs={self.warmup_epochs}"
        require(self.warmup_epochs >= 0, script, given, "0 or more", f"python examples/{script} --warmup-epochs 10")


def build_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW or LARS over all trained parameters, in two groups: matrices, and biases and normalisation."""
    trained = [p for p in module.parameters() if p.requires_grad]
    lars = settings.optimizer == "lars"
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "decays": True, "factor": 1.0},
        {
            "params": [p for p in trained if p.ndim <= 1],
            "decays": settings.decay_vectors and not lars,  # timm's LARS adapts only what decays
            "factor": LARS_VECTORS if lars else 1.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if lars:
        return Lars(groups, lr=0.0, momentum=0.9, weight_decay=settings.weight_decay, trust_coeff=0.001)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), weight_decay=settings.weight_decay)


def set_rates(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, batch_size: int, moment: Moment) -> float:
    """Learning rate and weight decay of the step to come; returns the rate."""
    peak = settings.learning_rate * batch_size / 256
    rate = warm_cosine(moment, settings.warmup_epochs, peak, settings.final_learning_rate)
    final = settings.weight_decay if settings.final_weight_decay is None else settings.final_weight_decay
    decay = cosine(moment.progress, settings.weight_decay, final)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
        group["weight_decay"] = decay if group["decays"] else 0.0
    return rate


def clip(parameters: Iterable[nn.Parameter], norm: float) -> None:
    """Shorten each parameter's gradient by itself, as DINO does."""
    for parameter in parameters:
        if parameter.grad is not None:
            nn.utils.clip_grad_norm_(parameter, norm)
