"""Can a turn or a flip be read off frozen features? Linear probes on images that they have not seen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from .actions import act
from .groups import GroupElement
from .vit import layer_tokens

__all__ = ["Accuracy", "mean_tokens", "probe"]

# No, one, two and three quarter turns; a flip.
ELEMENTS = GroupElement(
    torch.tensor([0, 1, 2, 3, 0]), torch.tensor([False] * 4 + [True]), torch.ones(5, 2, dtype=torch.float64)
)
CLASSES = {"rotation": [0, 1, 2, 3], "flip": [0, 4]}  # which of these a probe tells apart
FOLDS = 5
BATCH = 64  # views at a time


class Accuracy(NamedTuple):
    """Part of the held-out views whose element was told, its standard error over images, and what guessing gives."""

    accuracy: float
    standard_error: float
    chance: float


@torch.no_grad()
def mean_tokens(vit: nn.Module, views: Tensor, layers: list[int]) -> dict[str, dict[int, Tensor]]:
    """The mean patch token of every view under the elements of each transformation, by transformation and layer.

    Args:
        vit: in evaluation mode.
        views: (N, C, H, W). Turned rectangles have another shape, which says more than the features: no "rotation".
        layers: numbers of blocks already run.

    Returns:
        (N, elements, D) each, on the CPU.
    """
    asked = {name: classes for name, classes in CLASSES.items() if name == "flip" or views.shape[-1] == views.shape[-2]}
    means: dict[tuple[int, int], list[Tensor]] = {}
    for part in views.split(BATCH):
        for element in sorted({element for classes in asked.values() for element in classes}):
            for layer, maps in layer_tokens(vit, act(ELEMENTS[element], part), layers).items():
                means.setdefault((layer, element), []).append(maps.float().mean((-2, -1)).cpu())
    return {
        name: {layer: torch.stack([torch.cat(means[layer, element]) for element in classes], 1) for layer in layers}
        for name, classes in asked.items()
    }


def probe(features: Tensor, images: list[int]) -> Accuracy:
    """How well a linear classifier tells, from one view's feature, which element was applied to it.

    Logistic regression on standardised features, by cross-validation over images: in each of up to five rounds, the
    views of some images are held out, and the classifier is trained on the views of the others. Every image is held
    out once. Nothing is tuned.

    Args:
        features: (N, elements, D), of N views.
        images: of which image each view is a part, N numbers, at least two different ones.

    Source: Table 7 of the paper (transformation prediction).

    Example:
        >>> told = torch.eye(4).expand(10, 4, 4)                # the feature says the element
        >>> probe(told, images=list(range(10)))
        Accuracy(accuracy=1.0, standard_error=0.0, chance=0.25)
    """
    n, elements, _ = features.shape
    groups = np.repeat(np.asarray(images), elements)
    labels = np.tile(np.arange(elements), n)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-3, max_iter=10_000))
    folds = GroupKFold(min(FOLDS, len(set(images))))
    with threadpool_limits(1, user_api="blas"):  # small: threads would wait for each other
        told = cross_val_predict(classifier, features.flatten(0, 1).numpy(), labels, groups=groups, cv=folds)
    right: NDArray[np.float64] = np.asarray([(told == labels)[groups == image].mean() for image in np.unique(groups)])
    # Images weigh alike, and are what varies: views of one image are told or not told together.
    return Accuracy(float(right.mean()), float(right.std(ddof=1) / len(right) ** 0.5), 1 / elements)
