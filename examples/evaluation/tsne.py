"""Embeddings of some classes in the plane: coordinates and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional as F

from ser_reg import SERError

__all__ = ["draw", "embed_in_plane", "some_classes"]

# Okabe and Ito's colours, which people with any colour vision tell apart (without the yellow, too pale on white, and
# with grey for black); a marker tells classes of one colour apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F")
MARKERS = "o^sDv*PX<>"


def some_classes(labels: Tensor, classes: int, per_class: int, seed: int) -> Tensor:
    """Places of at most `per_class` images of `classes` random classes, of those that have images."""
    generator = torch.Generator().manual_seed(seed)
    present = labels.unique()
    most = len(COLOURS) * len(MARKERS)
    if not 2 <= classes <= most:
        raise SERError("evaluate.py tsne", f"--classes {classes}", f"2 to {most}", "--classes 20")
    chosen = present[torch.randperm(len(present), generator=generator)[:classes]]
    places = []
    for label in chosen.sort().values:
        mine = torch.where(labels == label)[0]
        places.append(mine[torch.randperm(len(mine), generator=generator)[:per_class]])
    return torch.cat(places)


def embed_in_plane(features: Tensor, perplexity: float, seed: int) -> np.ndarray:
    """(N, 2) coordinates by t-SNE of the directions of (N, D) features."""
    n = len(features)
    if n < 4:
        raise SERError("evaluate.py tsne", f"{n} images", "four at least", "--per-class 50")
    tsne = TSNE(perplexity=min(perplexity, (n - 1) / 3), init="pca", random_state=seed)
    return tsne.fit_transform(F.normalize(features, dim=1).numpy())


def draw(path: Path, plane: np.ndarray, labels: Tensor, classes: Sequence[str], title: str) -> None:
    """A picture of the coordinates, a colour and marker a class."""
    figure, axes = plt.subplots(figsize=(9, 6.5), layout="constrained")
    for number, label in enumerate(labels.unique().tolist()):
        here = (labels == label).numpy()
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number // len(COLOURS)]}
        name = classes[label] if len(classes[label]) <= 24 else classes[label][:23] + "…"
        axes.scatter(*plane[here].T, s=16, alpha=0.8, linewidths=0, label=name, **style)
    axes.set(title=title, xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    figure.legend(loc="outside right upper", fontsize=8, markerscale=1.4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
