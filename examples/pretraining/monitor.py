"""How the training goes, while it goes: k-NN on held-out images, and a warning when features collapse."""

from __future__ import annotations

import warnings

import torch
from accelerate import Accelerator
from data import Source
from data.labelled import NO_LABEL, LabelledDataset, collate_labelled
from data.recipe import evaluation_transform, normalise
from evaluation.accuracy import knn_accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

__all__ = ["Collapse", "embeddings", "knn"]


@torch.no_grad()
def embeddings(
    encoder: nn.Module, source: Source, size: int, accelerator: Accelerator, workers: int
) -> tuple[Tensor, Tensor]:
    """(N, D) embeddings and (N,) labels of all images of a source, computed by all processes, on the CPU of each.

    Images that cannot be read are left out, with a warning that names them.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    data = LabelledDataset(source, evaluation_transform(size))
    # All processes have equally many rows, as a gather and the forwards of a sharded encoder want; those that came
    # round to the first images again count for nothing.
    rows = range(rank, -(-len(data) // world_size) * world_size, world_size)
    subset = Subset(data, [i % len(data) for i in rows])
    training = encoder.training
    encoder.eval()
    features, labels = [], []
    for batch in DataLoader(subset, batch_size=256, num_workers=workers, collate_fn=collate_labelled):
        for name, why in batch.unreadable:
            warnings.warn(f"unreadable, left out: {name} ({why})", stacklevel=2)
        with accelerator.autocast():
            features.append(encoder(normalise(batch.images.to(accelerator.device))).float())
        labels.append(batch.labels.to(accelerator.device))
    encoder.train(training)
    own = torch.cat(labels)
    own[torch.tensor(rows, device=own.device) >= len(data)] = NO_LABEL
    found, known = accelerator.gather(torch.cat(features)).cpu(), accelerator.gather(own).cpu()
    return found[known != NO_LABEL], known[known != NO_LABEL]


def knn(
    encoder: nn.Module, train: Source, held_out: Source, size: int, accelerator: Accelerator, workers: int
) -> float:
    """20-NN accuracy on the held-out images, a part of 1."""
    bank = embeddings(encoder, train, size, accelerator, workers)
    queries = embeddings(encoder, held_out, size, accelerator, workers)
    return knn_accuracy(*bank, *queries, device=accelerator.device)


class Collapse:
    """Warns, once, when the embeddings of all images have become nearly the same.

    Args:
        threshold: spread (1: directions evenly over all dimensions, 0: all the same) below which they have.
        patience: steps in a row.
    """

    def __init__(self, threshold: float = 0.02, patience: int = 50) -> None:
        self.threshold = threshold
        self.patience = patience
        self.low = 0
        self.warned = False

    def warning(self, spreads: list[float]) -> str | None:
        """What to print after these steps, if anything.

        Args:
            spreads: `embedding_std` of each step.
        """
        for spread in spreads:
            self.low = self.low + 1 if spread < self.threshold else 0
        if self.warned or self.low < self.patience:
            return None
        self.warned = True
        return (
            f"The embeddings of all images are nearly the same: spread {spreads[-1]:.4f} of 1 for {self.low} steps. "
            "The features have collapsed, and a low loss means nothing. Usual remedies: a lower --learning-rate, a "
            "larger --batch-size, longer --warmup-epochs, a lower --term.weight."
        )
