"""How tokens follow when an image is turned, flipped or scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from data import open_source
from data.base import random_subset
from torch import Tensor

from ser_reg.errors import require
from ser_reg.metrics import equivariance_score

from .base import Judgement, Session
from .encoder import Encoder
from .features import read

__all__ = ["Equivariance", "mean_scores"]

BATCH = 64  # images whose maps are compared at a time


@dataclass(frozen=True, kw_only=True)
class Equivariance(Judgement):
    """How far do tokens move as the image does? Raw and spatial cosines of test images, beside their floors.

    The raw reading is the paper's (Appendix A.2, Table 4); see ser_reg.equivariance_score for the others.
    """

    layers: tuple[int, ...] = ()
    """Numbers of blocks already run; by default all."""
    images: int = 512
    """Random test images."""

    def run(self) -> None:
        session = Session(self)
        layers = layers_of(session.encoder, self.layers, session.call)
        chosen = random_subset(open_source(self.data, "val", self.seed), self.images, self.seed)
        results: dict[str, Any] = {}
        if session.main:
            images, unreadable = read(chosen, session.encoder.size, self.workers)
            session.leave_out("val", unreadable)
            remedy = f"file '{unreadable[0][0]}'" if unreadable else f"{session.call} --images 512"
            given, expected = f"{len(images)} test images that can be read", "two at least: another image is the floor"
            require(len(images) >= 2, session.call, given, expected, remedy)
            scores = mean_scores(session.encoder, images, layers, self.seed, session.device)
            results = {"images": len(images), "scores": scores}
            for name, by_layer in scores.items():
                last = max(by_layer)
                cells = ", ".join(f"{reading} {value:.3f}" for reading, value in by_layer[last].items())
                session.note(f"{name}, layer {last}: {cells}")
        session.write(results)


def layers_of(encoder: Encoder, layers: Sequence[int], call: str) -> list[int]:
    """The layers asked for, or all."""
    depth = encoder.layered(call).depth
    inside = all(layer <= depth for layer in layers)
    require(inside, call, f"--layers {' '.join(map(str, layers))}", f"from 0 to {depth}", f"--layers 1 {depth}")
    return sorted(set(layers)) or list(range(1, depth + 1))


def mean_scores(encoder: Encoder, images: Tensor, layers: Sequence[int], seed: int, device: torch.device) -> Any:
    """`equivariance_score` of (N, 3, S, S) uint8 images, some at a time: maps of all layers need memory."""
    mean: dict[str, dict[int, dict[str, float]]] = {}
    for number, batch in enumerate(images.tensor_split(max(1, len(images) // BATCH))):
        generator = torch.Generator().manual_seed(seed + number)
        scores = equivariance_score(encoder.model, encoder.normalise(batch.to(device)), layers, generator)
        for transformation, by_layer in scores.items():
            for layer, readings in by_layer.items():
                into = mean.setdefault(transformation, {}).setdefault(layer, dict.fromkeys(readings, 0.0))
                for reading, value in readings.items():
                    into[reading] += value * len(batch) / len(images)
    return mean
