"""What features tell, layer by layer, of how an image was turned or flipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from data import open_source
from data.base import random_subset
from torch import Tensor

from ser_reg.errors import require
from ser_reg.geometry import GroupElement, act

from .accuracy import linear_accuracy
from .base import Judgement, Session, folder_name, percent
from .encoder import Encoder
from .features import Extraction, Features

__all__ = ["ELEMENTS", "TASKS", "Probe", "accuracy_by_layer", "layers_of", "turned_tokens"]

# What is done to an upright image, and which of these a classifier tells apart.
ELEMENTS = {
    "upright": GroupElement.identity(1),
    "turn1": GroupElement.turn(1),
    "turn2": GroupElement.turn(2),
    "turn3": GroupElement.turn(3),
    "flip": GroupElement.mirror(),
}
TASKS = {"rotation": ("upright", "turn1", "turn2", "turn3"), "flip": ("upright", "flip")}
CHANCE = {task: 1 / len(elements) for task, elements in TASKS.items()}

PAPER_LAYERS, PAPER_DEPTH = (1, 3, 6, 9, 12), 12  # Table 7


@dataclass(frozen=True, kw_only=True)
class Probe(Judgement):
    """Can a linear classifier read off features, layer by layer, how an image was turned, and whether it was flipped?

    Table 7 of the paper: layers 1, 3, 6, 9 and 12 (of other depths: as far into the model). It gives neither tokens
    nor classifier: here it is logistic regression on the mean patch token of one image, upright images of the
    training split to train on and of the test split to judge. Chance is 25 % and 50 %.
    """

    layers: tuple[int, ...] = ()
    """Numbers of blocks already run; by default those of the paper."""
    train_images: int = 5000
    """Random ones, each in all ways."""
    test_images: int = 2000
    """Random ones, each in all ways."""

    def run(self) -> None:
        session = Session(self)
        layers = layers_of(session.encoder, self.layers)
        train = self._features(session, "train", self.train_images, layers)
        test = self._features(session, "val", self.test_images, layers)
        results: dict[str, Any] = {"train_images": len(train.indices), "test_images": len(test.indices)}
        results["chance"] = CHANCE
        if session.main:
            results["accuracy"] = accuracy_by_layer(train, test, layers)
            for task, by_layer in results["accuracy"].items():
                found = ", ".join(f"layer {layer} {percent(accuracy)}" for layer, accuracy in by_layer.items())
                session.note(f"{task}: {found}; chance {percent(CHANCE[task])}")
        session.write(results)

    def _features(self, session: Session, split: Literal["train", "val"], n: int, layers: list[int]) -> Features:
        images = random_subset(open_source(self.data, split, self.seed), n, self.seed)
        where = f"{folder_name(self.data)}-{split}-{len(images)}-{self.seed}"
        return session.features(images, where, turned_tokens(layers))


def layers_of(encoder: Encoder, layers: Sequence[int] | None) -> list[int]:
    """The layers asked for, or those of Table 7 as fractions of this model's depth."""
    call = "evaluate.py probe"
    depth = encoder.layered(call).depth
    chosen = layers or [max(1, round(layer * depth / PAPER_DEPTH)) for layer in PAPER_LAYERS]
    inside = min(chosen) >= 1 and max(chosen) <= depth
    require(inside, call, f"--layers {' '.join(map(str, chosen))}", f"from 1 to {depth}", f"--layers 1 {depth}")
    return sorted(set(chosen))


def turned_tokens(layers: Sequence[int]) -> Extraction:
    """Mean patch token after each of the layers, of each image upright, turned three ways and flipped.

    Patch tokens, as in early layers a late [CLS] has not seen the image yet.
    """

    def compute(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        model, found = encoder.layered("evaluate.py probe"), {}
        for name, g in ELEMENTS.items():
            maps = model.maps(encoder.normalise(act(g, images)), layers)
            found |= {f"{layer}/{name}": maps[layer].flatten(2).transpose(1, 2).mean(1) for layer in layers}
        return found

    return Extraction("turned" + "".join(f"-{layer}" for layer in layers), compute)


def accuracy_by_layer(
    train: Mapping[str, Tensor] | Features, test: Mapping[str, Tensor] | Features, layers: Sequence[int]
) -> dict[str, dict[int, float]]:
    """Accuracy on test images of telling four quarter turns apart, and flipped from not, by task and layer.

    A linear classifier on the features of one image, upright as stored or transformed; every image is seen in all
    ways, so that chance is 1/4 and 1/2. The paper (Table 7, Appendix A.2) says that it is classification accuracy on
    frozen features, and neither which tokens nor which classifier.
    """
    found: dict[str, dict[int, float]] = {}
    for task, elements in TASKS.items():
        found[task] = {}
        for layer in layers:
            sets = []
            for features in (train, test):
                kinds = [features[f"{layer}/{element}"] for element in elements]
                sets += [torch.cat(kinds), torch.arange(len(kinds)).repeat_interleave(len(kinds[0]))]
            found[task][layer] = linear_accuracy(*sets)
    return found
