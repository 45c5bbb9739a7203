"""Embeddings of some classes in the plane: coordinates and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional as F

from ser_reg.errors import require
from ser_reg.records import atomically
from ser_reg.report.style import COLOURS, MARKERS, STYLE

from .base import Judgement, Session

__all__ = ["Tsne", "draw", "embed_in_plane", "some_classes"]


@dataclass(frozen=True, kw_only=True)
class Tsne(Judgement):
    """Embeddings of test images of some classes in the plane, as a picture and as coordinates.

    Figure 4 of the paper: 20 random classes. t-SNE of the directions of the embeddings, begun from their principal
    components.
    """

    classes: int = 20
    """Random ones."""
    per_class: int = 50
    """Random images of each, at most."""
    perplexity: float = 30.0

    def run(self) -> None:
        session = Session(self)
        features = session.embeddings("val")
        results: dict[str, Any] = {}
        if session.main:
            chosen = some_classes(features.labels, self.classes, self.per_class, self.seed)
            plane = embed_in_plane(features["pooled"][chosen], self.perplexity, self.seed)
            labels = features.labels[chosen]
            picture = self.output_dir / "tsne.png"
            with atomically(picture) as draft:
                draw(draft, plane, labels, features.classes, f"{self.model}: {len(chosen)} images")
            results = {
                "picture": str(picture),
                "images": features.indices[chosen].tolist(),
                "classes": [features.classes[label] for label in labels.tolist()],
                "coordinates": plane.tolist(),
                "perplexity": possible_perplexity(self.perplexity, len(chosen)),
            }
            session.note(f"{picture}")
        session.write(results)


def some_classes(labels: Tensor, classes: int, per_class: int, seed: int) -> Tensor:
    """Indices of at most `per_class` images of `classes` random classes, of those that have images."""
    generator = torch.Generator().manual_seed(seed)
    present = labels.unique()
    most = len(COLOURS) * len(MARKERS)
    require(2 <= classes <= most, "evaluate.py tsne", f"--classes {classes}", f"2 to {most}", "--classes 20")
    chosen = present[torch.randperm(len(present), generator=generator)[:classes]]
    indices = []
    for label in chosen.sort().values:
        mine = torch.where(labels == label)[0]
        indices.append(mine[torch.randperm(len(mine), generator=generator)[:per_class]])
    return torch.cat(indices)


def embed_in_plane(features: Tensor, perplexity: float, seed: int) -> np.ndarray:
    """(N, 2) coordinates by t-SNE of the directions of (N, D) features."""
    n, directions, call = len(features), F.normalize(features, dim=1), "evaluate.py tsne"
    require(n >= 4, call, f"{n} images", "four at least", "--per-class 50")
    alike = (directions - directions[0]).abs().max() < 1e-6
    given = f"embeddings of {n} images that are all the same"
    require(not alike, call, given, "some that differ: this encoder sees nothing", "evaluate.py equivariance")
    tsne = TSNE(perplexity=possible_perplexity(perplexity, n), init="pca", random_state=seed)
    return tsne.fit_transform(directions.numpy())


def possible_perplexity(perplexity: float, n: int) -> float:
    """What was asked for, or a third of n images, as far as there are neighbours."""
    return min(perplexity, (n - 1) / 3)


def draw(path: Path, plane: np.ndarray, labels: Tensor, classes: Sequence[str], title: str) -> None:
    """A picture of the coordinates, a colour and marker a class."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        axes = figure.subplots()
        for number, label in enumerate(labels.unique().tolist()):
            here = (labels == label).numpy()
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number // len(COLOURS)]}
            name = classes[label] if len(classes[label]) <= 24 else classes[label][:23] + "…"
            axes.scatter(*plane[here].T, s=16, alpha=0.8, linewidths=0, label=name, **style)
        axes.set(title=title, xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
        figure.legend(loc="outside right upper", fontsize=8, markerscale=1.4, frameon=False)
        figure.savefig(path, dpi=150)
