"""What are frozen features good for? k-NN and linear accuracy."""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["accuracies", "embed", "knn_accuracy", "linear_accuracy"]


@torch.no_grad()
def embed(vit: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """(N, D) embeddings on the CPU, in evaluation mode."""
    training, device = vit.training, next(vit.parameters()).device
    vit.eval()
    features = torch.cat([vit(part.to(device)).float().cpu() for part in images.split(batch_size)])
    vit.train(training)
    return features


def accuracies(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """k-NN and linear accuracy of (N, D) features, as parts of 1."""
    return {
        "knn": knn_accuracy(train, train_labels, test, test_labels),
        "linear": linear_accuracy(train, train_labels, test, test_labels),
    }


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Vote of the k nearest by cosine, each with weight exp(cosine / temperature), as in DINO's evaluation."""
    cosine = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    nearest, index = cosine.topk(min(k, len(train)), dim=1)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[index], (nearest / temperature).exp())
    return (votes.argmax(1) == test_labels).double().mean().item()


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Logistic regression on standardised features, run until its gradient is below 1e-3. Nothing is tuned."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-3, max_iter=10_000))
    probe.fit(train.numpy(), train_labels.numpy())
    return float(probe.score(test.numpy(), test_labels.numpy()))
