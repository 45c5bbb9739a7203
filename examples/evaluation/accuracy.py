"""What frozen features are good for: k-NN and linear accuracy."""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

__all__ = ["accuracies", "knn_accuracy", "linear_accuracy"]

# Features compared at a time, so that 50,000 against 1,281,167 need a few hundred MB beside the features.
QUERIES, BANK = 4096, 2**14


def accuracies(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """k-NN and linear accuracy of (N, D) features, as fractions of 1."""
    return {
        "knn": knn_accuracy(train, train_labels, test, test_labels),
        "linear": linear_accuracy(train, train_labels, test, test_labels),
    }


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | None = None,
) -> float:
    """Vote of the k nearest by cosine, each with weight exp(cosine / temperature), as in DINO's evaluation.

    The features stay where they are; some of them at a time are compared on `device`, by default there as well.
    """
    device = train.device if device is None else device
    classes = int(train_labels.max()) + 1
    right = 0.0
    for queries, labels in zip(test.split(QUERIES), test_labels.split(QUERIES), strict=True):
        cosine, index = _nearest(F.normalize(queries.to(device), dim=1), train, k)
        votes = torch.zeros(len(queries), classes, device=device)
        # From the nearest one's on: of a vote only ratios count, and exp(1 / 0.01) is no float32.
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        votes.scatter_add_(1, train_labels.to(device)[index], weights)
        right += (votes.argmax(1) == labels.to(device)).double().sum().item()
    return right / len(test)


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Logistic regression on standardised features, run until its gradient is below 1e-3. Nothing is tuned."""
    regression = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-3, max_iter=10_000))
    regression.fit(train.numpy(), train_labels.numpy())
    return float(regression.score(test.numpy(), test_labels.numpy()))


def _nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine and index of the k nearest in the bank, (M, k) each, for (M, D) normalised queries."""
    cosines, indices = [], []
    for start in range(0, len(bank), BANK):
        chunk = F.normalize(bank[start : start + BANK].to(queries.device), dim=1)
        cosine, index = (queries @ chunk.T).topk(min(k, len(chunk)), dim=1)
        cosines.append(cosine)
        indices.append(index + start)
    if len(cosines) == 1:
        return cosines[0], indices[0]
    cosine, chosen = torch.cat(cosines, dim=1).topk(min(k, len(bank)), dim=1)
    return cosine, torch.cat(indices, dim=1).gather(1, chosen)
