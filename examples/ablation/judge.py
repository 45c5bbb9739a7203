"""What a trained encoder is worth: accuracy on held-out images, equivariance, matching, and orientation read off."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from data import open_source
from data.base import Source
from data.recipe import evaluation_transform, normalise
from evaluation.accuracy import accuracies, linear_accuracy
from evaluation.features import embeddings
from torch import Tensor, nn

from ser_reg import equivariance_score, load_encoder, matching_score
from ser_reg.backbones import backbone
from ser_reg.report.probes import mean_tokens

__all__ = ["judge"]

EARLY = 2  # layer of the small preset's term: looked at in every run, whatever the run's own term
EQUIVARIANCE_IMAGES = 480
ORIENTATION_IMAGES = 480  # of each split, each in all ways


def judge(folder: Path, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """k-NN and linear accuracy (parts of 1), equivariance and matching scores, and how well turns and flips are read
    off, of the encoder in a run's folder.

    Scores are read with the plain action, and beside it with that of the run's own term where that moves channels.
    Nothing is chosen on the held-out images, and nothing is tuned.

    Args:
        folder: of the run.
        settings: of the run, by group, as settings.json has them.
        seed: of the images that are looked at.
    """
    data, size, term = settings["data"]["data"], settings["encoder"]["image_size"], settings["term"]
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    encoder = load_encoder(str(folder / "encoder")).to(accelerator.device)
    train, held_out = (open_source(data, split, seed) for split in ("train", "val"))
    features = [*embeddings(encoder, train, size, accelerator, 0), *embeddings(encoder, held_out, size, accelerator, 0)]
    generator = torch.Generator().manual_seed(seed)
    images = _some(held_out, EQUIVARIANCE_IMAGES, size, generator).to(accelerator.device)
    result: dict[str, Any] = {"accuracy": accuracies(*features)}
    result["equivariance"] = equivariance_score(encoder, images, generator=generator)
    result["matching"] = matching_score(encoder, images, generator=generator)
    own = {"layer": term.get("layer", EARLY), "channels": term.get("channels")}  # of images, in other terms: a number
    if own["channels"] == "regular":
        own["equivariance"] = equivariance_score(encoder, images, generator=generator, channels="regular")
        own["matching"] = matching_score(encoder, images, generator=generator, channels="regular")
    layers = sorted({EARLY, own["layer"], backbone(encoder).depth})
    seen = _some(train, ORIENTATION_IMAGES, size, generator).to(accelerator.device)
    return result | {"own": own, "orientation": _orientation(encoder, seen, images, layers)}


def _some(source: Source, n: int, size: int, generator: torch.Generator) -> Tensor:
    """At most n images, drawn without replacement, normalised."""
    chosen = torch.randperm(len(source), generator=generator)[:n].tolist()
    transform = evaluation_transform(size)
    return normalise(torch.stack([transform(source.image(i)) for i in chosen]))


def _orientation(encoder: nn.Module, seen: Tensor, images: Tensor, layers: list[int]) -> dict[str, dict[int, float]]:
    """Accuracy of a linear classifier on the mean patch token: which quarter turn (chance 1/4), flipped or not (1/2).

    Trained on some images, each in all ways, and judged on others.
    """
    encoder.eval()
    train, test = (mean_tokens(encoder, x, layers) for x in (seen, images))

    def accuracy(task: str, layer: int) -> float:
        sets = []
        for means in (train[task][layer], test[task][layer]):
            sets += [means.flatten(0, 1), torch.arange(means.shape[1]).repeat(len(means))]
        return linear_accuracy(*sets)

    return {task: {layer: accuracy(task, layer) for layer in layers} for task in train}
