"""How the training goes, while it goes: k-NN on held-out images, and a warning when features collapse."""

from __future__ import annotations

from accelerate import Accelerator
from data import Source
from evaluation.accuracy import knn_accuracy
from evaluation.features import embeddings
from torch import nn

__all__ = ["Collapse", "knn"]


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
