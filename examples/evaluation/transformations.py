"""What features tell of how an image was turned or flipped, by layer, and how they follow when it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from probes import linear_accuracy
from torch import Tensor

from ser_reg import GroupElement, SERError, act, equivariance_score

from .encoder import Encoder
from .features import Features, Recipe

__all__ = ["TASKS", "layers_of", "mean_scores", "probe", "turned_tokens"]

# What is done to an upright image, and which of these a probe tells apart.
ELEMENTS = {"upright": (0, False), "turn1": (1, False), "turn2": (2, False), "turn3": (3, False), "flip": (0, True)}
TASKS = {"rotation": ("upright", "turn1", "turn2", "turn3"), "flip": ("upright", "flip")}

PAPER_LAYERS, PAPER_DEPTH = (1, 3, 6, 9, 12), 12  # Table 7
BATCH = 64  # images whose maps are compared at a time


def layers_of(encoder: Encoder, layers: Sequence[int] | None) -> list[int]:
    """The layers asked for, or those of Table 7 as parts of this model's depth."""
    call = "evaluate.py probe"
    encoder.need_blocks(call, "evaluate.py knn  # which any timm model can be asked")
    depth = len(encoder.vit.blocks)
    chosen = layers or [max(1, round(layer * depth / PAPER_DEPTH)) for layer in PAPER_LAYERS]
    if min(chosen) < 1 or max(chosen) > depth:
        raise SERError(call, f"layers {chosen}", f"from 1 to {depth}", f"--layers 1 {depth}")
    return sorted(set(chosen))


def turned_tokens(layers: Sequence[int]) -> Recipe:
    """Mean patch token after each of the layers, of each image upright, turned three ways and flipped.

    Patch tokens, as in early layers a late [CLS] has not seen the image yet.
    """

    def compute(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, (turns, flip) in ELEMENTS.items():
            g = GroupElement(torch.tensor([turns]), torch.tensor([flip]), torch.ones(1, 2, dtype=torch.float64))
            maps = encoder.vit.forward_intermediates(
                encoder.normalise(act(g, images)),
                indices=[layer - 1 for layer in layers],
                output_fmt="NLC",
                intermediates_only=True,
                stop_early=True,
            )
            found |= {f"{layer}/{name}": tokens.mean(1) for layer, tokens in zip(layers, maps, strict=True)}
        return found

    return Recipe("turned" + "".join(f"-{layer}" for layer in layers), compute)


def probe(train: Features, test: Features, layers: Sequence[int]) -> dict[str, dict[int, float]]:
    """Accuracy on test images of telling four quarter turns apart, and flipped from not, by task and layer.

    A linear probe on the features of one image, upright as stored or transformed; every image is seen in all ways, so
    that chance is 1/4 and 1/2. The paper (Table 7, Appendix A.2) says that it is classification accuracy on frozen
    features, and neither which tokens nor which classifier.
    """
    found: dict[str, dict[int, float]] = {}
    for task, elements in TASKS.items():
        found[task] = {}
        for layer in layers:
            sets = []
            for features in (train, test):
                parts = [features[f"{layer}/{element}"] for element in elements]
                sets += [torch.cat(parts), torch.arange(len(parts)).repeat_interleave(len(parts[0]))]
            found[task][layer] = linear_accuracy(*sets)
    return found


def mean_scores(encoder: Encoder, images: Tensor, layers: Sequence[int] | None, seed: int, device: torch.device) -> Any:
    """`equivariance_score` of (N, 3, S, S) uint8 images, some at a time: maps of all layers need memory."""
    encoder.need_blocks("evaluate.py equivariance", "evaluate.py knn  # which any timm model can be asked")
    total: dict[str, dict[int, dict[str, float]]] = {}
    parts = images.tensor_split(max(1, len(images) // BATCH))
    for number, part in enumerate(parts):
        generator = torch.Generator().manual_seed(seed + number)
        scores = equivariance_score(encoder.vit, encoder.normalise(part.to(device)), layers, generator)
        for transformation, by_layer in scores.items():
            for layer, readings in by_layer.items():
                into = total.setdefault(transformation, {}).setdefault(layer, dict.fromkeys(readings, 0.0))
                for reading, value in readings.items():
                    into[reading] += value * len(part) / len(images)
    return total
