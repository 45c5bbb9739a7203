"""Can a turn or a flip be read off frozen features? Linear probes on images that they have not seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ..backbones import patch_tokens
from ..geometry import GroupElement, act
from .base import Column, Picture, Record, Records, Section, Subject
from .photographs import cuts
from .style import FLOOR, GREY, SCORE, finish, marks, panels, transformations_in

__all__ = ["Accuracy", "Probes", "mean_tokens", "probe"]

# No, one, two and three quarter turns; a flip.
ELEMENTS = GroupElement(
    torch.tensor([0, 1, 2, 3, 0]), torch.tensor([False] * 4 + [True]), torch.ones(5, 2, dtype=torch.float64)
)
CLASSES = {"rotation": [0, 1, 2, 3], "flip": [0, 4]}  # which of these a probe tells apart
CUTS = 120  # that probes see, about or more: several of each image where there are fewer images
FOLDS = 5
BATCH = 64  # cuts at a time

CAPTION = (
    "Logistic regression on the mean patch token of frozen features tells which quarter turn, or whether a flip, was "
    "applied (the paper's Table 7). Every image is held out once while the probe is trained on others; bars are the "
    "standard error over images. Of a strictly equivariant model the mean token does not change under turns and "
    "flips, and the probe is at chance."
)


class Accuracy(NamedTuple):
    """Share of the held-out cuts whose element was found, its standard error over images, and what guessing gives."""

    accuracy: float
    standard_error: float
    chance: float


class Probes(Section):
    heading = "Transformations read off frozen features"

    def measure(self, subject: Subject) -> dict[str, Any]:
        draw, each = subject.generator(), _cuts_each(subject)
        drawn = [cut for image in subject.photographs for cut in cuts(image, subject.size, each, draw)]
        image_of_cut = [image for image in range(len(subject.photographs)) for _ in range(each)]
        features = mean_tokens(subject.model, subject.normalised(drawn), subject.layers)
        found = {
            name: {layer: probe(by_layer[layer], image_of_cut)._asdict() for layer in subject.layers}
            for name, by_layer in features.items()
        }
        return {"probes": found, "probe_views": len(drawn)}

    def forwards(self, subject: Subject) -> int:
        elements = {element for classes in _classes(subject.size).values() for element in classes}
        return len(subject.photographs) * _cuts_each(subject) * len(elements)

    def left_out(self, subject: Subject) -> list[str]:
        if "rotation" in _classes(subject.size):
            return []
        shape = "images of {} x {} pixels have another shape once they are turned".format(*subject.size)
        return [f"no rotation probe: {shape}, which would tell the turn"]

    def draw(self, folder: Path, records: Records) -> list[Picture]:
        """Accuracy by layer, with the standard error over images, beside chance."""
        columns = transformations_in(records, "probes")
        figure, (row,) = panels(1, columns, shared_axis=False)
        for panel, column in zip(row, columns, strict=True):
            for i, record in enumerate(records.values()):
                found = record["probes"].get(column, {})
                percent = [[100 * found[layer][key] for layer in found] for key in ("accuracy", "standard_error")]
                if found:
                    panel.errorbar(list(found), percent[0], percent[1], ls=SCORE, lw=1.6, capsize=2, **marks(i))
                    chance = next(iter(found.values()))["chance"]
            panel.axhline(100 * chance, color=GREY, ls=FLOOR, lw=1.6)
            panel.set(title=f"{column}: {round(1 / chance)} classes", ylim=(0, 103))
        row[0].set_ylabel("held-out accuracy (%)")
        path = folder / "probes.png"
        finish(figure, path, list(records), row, {"chance": FLOOR})
        return [Picture(path, f"Accuracy of probes on {', '.join(records)} by layer")]

    def caption(self, records: Records) -> str:
        counts = sorted({record["probe_views"] for record in records.values()})
        return f"{CAPTION} Probes saw {' or '.join(map(str, counts))} cuts of the images."

    def find(self, record: Record) -> list[str]:
        return [_best(name, layers) for name, layers in record["probes"].items()]

    def columns(self, record: Record) -> list[Column]:
        return [
            Column(f"{name} probe", {layer: found["accuracy"] for layer, found in layers.items()})
            for name, layers in record["probes"].items()
        ]


def _cuts_each(subject: Subject) -> int:
    return max(1, round(CUTS / len(subject.photographs)))


def _classes(size: tuple[int, int]) -> dict[str, list[int]]:
    """Turned rectangles have another shape, which says more than the features: no "rotation"."""
    return {name: classes for name, classes in CLASSES.items() if name == "flip" or size[0] == size[1]}


def _best(name: str, layers: Mapping[int, Mapping[str, float]]) -> str:
    layer = max(layers, key=lambda layer: layers[layer]["accuracy"])
    found = layers[layer]
    return (
        f"A linear probe on the mean patch token tells the {name} best at layer {layer}: "
        f"{100 * found['accuracy']:.0f} ± {100 * found['standard_error']:.0f} % (chance {100 * found['chance']:.0f} %)."
    )


@torch.no_grad()
def mean_tokens(model: nn.Module, images: Tensor, layers: list[int]) -> dict[str, dict[int, Tensor]]:
    """The mean patch token of every image under the elements of each transformation, by transformation and layer.

    Args:
        model: in evaluation mode.
        images: (N, C, H, W), normalised; rectangles are not asked for "rotation".
        layers: numbers of layers already run.

    Returns:
        (N, elements, D) each, on the CPU.
    """
    asked = _classes((images.shape[-2], images.shape[-1]))
    means: dict[tuple[int, int], list[Tensor]] = {}
    for batch in images.split(BATCH):
        for element in sorted({element for classes in asked.values() for element in classes}):
            for layer, maps in patch_tokens(model, act(ELEMENTS[element], batch), layers).items():
                means.setdefault((layer, element), []).append(maps.float().mean((-2, -1)).cpu())
    return {
        name: {layer: torch.stack([torch.cat(means[layer, element]) for element in classes], 1) for layer in layers}
        for name, classes in asked.items()
    }


def probe(features: Tensor, images: list[int]) -> Accuracy:
    """How well a linear classifier tells, from the feature of one cut, which element was applied to it.

    Logistic regression on standardised features, by cross-validation over images: in each of up to five rounds, the
    cuts of some images are held out, and the classifier is trained on those of the others. Every image is held out
    once. Nothing is tuned.

    Args:
        features: (N, elements, D), of N cuts.
        images: from which image each is cut, N numbers, at least two different ones.

    Source: Table 7 of the paper (transformation prediction).

    Example:
        >>> obvious = torch.eye(4).expand(10, 4, 4)             # the feature says the element
        >>> probe(obvious, images=list(range(10)))
        Accuracy(accuracy=1.0, standard_error=0.0, chance=0.25)
    """
    n, elements, _ = features.shape
    groups = np.repeat(np.asarray(images), elements)
    labels = np.tile(np.arange(elements), n)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-3, max_iter=10_000))
    folds = GroupKFold(min(FOLDS, len(set(images))))
    with threadpool_limits(1, user_api="blas"):  # small: threads would wait for each other
        guessed = cross_val_predict(classifier, features.flatten(0, 1).numpy(), labels, groups=groups, cv=folds)
    right: NDArray[np.float64] = np.asarray(
        [(guessed == labels)[groups == image].mean() for image in np.unique(groups)]
    )
    # Images weigh alike, and are what varies: cuts of one image are right or wrong together.
    return Accuracy(float(right.mean()), float(right.std(ddof=1) / len(right) ** 0.5), 1 / elements)
