"""Classifiers on frozen features, linear and not: trained, and their learning rate chosen, without the test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from data.labelled import NO_LABEL
from pretraining.schedules import cosine
from torch import Tensor, nn
from torch.nn import functional as F

from ser_reg.errors import require

from .checkpoint import EpochCheckpoint

__all__ = ["Batches", "CachedBatches", "Kind", "choose_rate", "fit", "predict", "split", "top", "top5", "usual_batch"]

HELD_OUT = 0.1  # share of the training images on which a learning rate is chosen ...
HELD_OUT_MOST = 50_000  # ... and no more than these


class Kind(NamedTuple):
    """A classifier, untrained, and how it is trained at a learning rate."""

    name: str
    """With all that tells it from another of its file."""
    build: Callable[[int, int], nn.Module]
    """Of channels and classes."""
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]


class Batches(Protocol):
    """What a classifier is trained on: features and labels, drawn anew in every epoch; a label may be NO_LABEL."""

    steps: int
    """In an epoch."""

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(B, D) features and (B,) labels, on the device to train on."""
        ...


class CachedBatches:
    """Batches of features that are at hand; a last batch that is not full waits for another epoch.

    Args:
        features: (N, D), which may take gigabytes: nothing of it is copied but batches.
        labels: (N,).
        batch_size: images.
        seed: of their order.
        device: where batches go.
        indices: of the images to use; all by default.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int,
        device: torch.device,
        indices: Tensor | None = None,
    ) -> None:
        self.features, self.labels, self.seed, self.device = features, labels, seed, device
        self.indices = torch.arange(len(labels)) if indices is None else indices
        self.batch_size = min(batch_size, len(self.indices))
        self.steps = len(self.indices) // self.batch_size

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.indices), generator=torch.Generator().manual_seed(self.seed + 1000 * epoch))
        for batch in self.indices[order].split(self.batch_size)[: self.steps]:
            yield self.features[batch].to(self.device), self.labels[batch].to(self.device)


def split(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of n training images: those to train on, and those held out to choose the learning rate."""
    require(n >= 2, "evaluate.py", f"{n} training images", "two at least: one is held out", "--data FOLDER")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = min(HELD_OUT_MOST, max(1, round(HELD_OUT * n)))
    return order[held:].sort().values, order[:held].sort().values


def fit(
    kind: Kind,
    channels: int,
    classes: int,
    rates: Sequence[float],
    batches: Batches,
    epochs: int,
    seed: int,
    device: torch.device,
    checkpoint: EpochCheckpoint | None = None,
    show: Callable[[int], object] = lambda epoch: None,
) -> list[nn.Module]:
    """One classifier for each learning rate, all on the same batches; each rate falls along a cosine to 0.

    They start from the same weights. What is returned is the end of the training, not its best epoch. With `checkpoint`
    it goes on after the last whole epoch, if it was stopped.
    """
    heads = []
    for _ in rates:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads.append(kind.build(channels, classes).to(device))
    optimizers = [kind.optimizer(head.parameters(), rate) for head, rate in zip(heads, rates, strict=True)]
    state = (checkpoint and checkpoint.load()) or {"epochs": 0}
    if state["epochs"]:
        for trained, states in ((heads, state["heads"]), (optimizers, state["optimizers"])):
            for stateful, values in zip(trained, states, strict=True):
                stateful.load_state_dict(values)
    for epoch in range(state["epochs"], epochs):
        for step, (features, labels) in enumerate(batches(epoch)):
            done = (epoch + step / batches.steps) / epochs
            for head, optimizer, rate in zip(heads, optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = cosine(done, rate, 0.0)
                # A sum over the labels there are: a batch without any would have a mean of nan.
                lost = F.cross_entropy(head(features), labels, reduction="sum", ignore_index=NO_LABEL)
                loss = lost / (labels != NO_LABEL).sum().clamp(min=1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if checkpoint:
            states = {"heads": [head.state_dict() for head in heads]}
            states["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            checkpoint.save({"epochs": epoch + 1} | states)
        show(epoch)
    return [head.eval() for head in heads]


def choose_rate(
    heads: Sequence[nn.Module], rates: Sequence[float], features: Tensor, labels: Tensor
) -> dict[float, float]:
    """Accuracy of each learning rate on held-out training images, the best first; a diverged one has 0."""
    found = {}
    for head, rate in zip(heads, rates, strict=True):
        scores = predict(head, features)
        found[rate] = top(scores, labels, 1) if scores.isfinite().all() else 0.0
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


@torch.inference_mode()
def predict(head: nn.Module, features: Tensor) -> Tensor:
    """(N, classes) logits on the CPU."""
    device = next(head.parameters()).device
    return torch.cat([head(chunk.to(device)).cpu() for chunk in features.split(8192)])


def top(scores: Tensor, labels: Tensor, k: int, call: str = "evaluate.py linear") -> float:
    """How often the label is among the k highest scores, as a fraction of 1.

    Raises:
        SERError: scores that are not finite, of which some class or other would come out highest.
    """
    given, remedy = "a classifier that diverged", f"{call} --base-rates 0.0001 0.001  # lower ones"
    require(scores.isfinite().all(), call, given, "finite scores", remedy)
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).double().mean().item()


def top5(scores: Tensor, labels: Tensor, call: str = "evaluate.py linear") -> float | None:
    """The same for k = 5; None for five classes and fewer, of which five are always right."""
    return top(scores, labels, 5, call) if scores.shape[1] > 5 else None


def usual_batch(images: int) -> int:
    """1024, or the power of two that gives at least 16 steps an epoch; 16 at the least."""
    batch = 1024
    while batch > 16 and 16 * batch > images:
        batch //= 2
    return batch
