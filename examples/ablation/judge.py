"""What a trained encoder is worth: accuracy on held-out images, and equivariance by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from data import open_source
from data.recipe import evaluation_transform, normalise
from evaluation.accuracy import accuracies
from evaluation.features import embeddings

from ser_reg import equivariance_score, load_encoder

__all__ = ["judge"]

EQUIVARIANCE_IMAGES = 480


def judge(folder: Path, data: str, size: int, seed: int) -> dict[str, Any]:
    """k-NN and linear accuracy (parts of 1) and the equivariance score of the encoder in a run's folder.

    Nothing is chosen on the held-out images, and nothing is tuned.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    encoder = load_encoder(str(folder / "encoder")).to(accelerator.device)
    train, held_out = (open_source(data, split, seed) for split in ("train", "val"))
    features = [*embeddings(encoder, train, size, accelerator, 0), *embeddings(encoder, held_out, size, accelerator, 0)]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(held_out), generator=generator)[:EQUIVARIANCE_IMAGES].tolist()
    transform = evaluation_transform(size)
    images = normalise(torch.stack([transform(held_out.image(i)) for i in chosen])).to(accelerator.device)
    scores = equivariance_score(encoder, images, generator=generator)
    return {"accuracy": accuracies(*features), "equivariance": scores}
