"""Images of the same classes from elsewhere: other photographs, renditions, sketches, renderings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data.base import Reduction
from data.folders import is_image
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.folder import make_dataset

from ser_reg.errors import SERError, require
from ser_reg.images import read_image

from .base import Judgement, Session, folder_name, percent
from .classifiers import predict, top, top5
from .linear import LinearClassifier

__all__ = ["ClassFolders", "Shift", "shifted_accuracies"]


@dataclass(frozen=True, kw_only=True)
class Shift(Judgement):
    """Judge the classifier of the subcommand linear on other images of the same classes.

    For ImageNet-V2, ImageNet-R and ImageNet-Sketch (Tables 1 and 2 of the paper), and any FOLDER/CLASS/*.jpg whose
    classes are some of the training's. Numbered folders, as ImageNet-V2 has, are places among the training classes.
    Accuracy is given among the classes that occur, and among all.
    """

    folders: tuple[Path, ...]
    """Folders of folders of images."""
    classifier: Path | None = None
    """By default OUTPUT_DIR/linear.safetensors."""

    def run(self) -> None:
        session = Session(self)
        given, remedy = "--folders without a folder", "--folders FOLDER  # FOLDER/CLASS/*.jpg"
        require(self.folders, session.call, given, "one at least", remedy)
        path = self.classifier or self.output_dir / "linear.safetensors"
        classifier = LinearClassifier.load(path, session.encoder)
        classifier.layer.to(session.device)
        extraction, name = session.class_tokens(classifier.last)
        sources = {folder: ClassFolders(folder, classifier.classes) for folder in self.folders}  # all checked first
        results = {}
        for folder, source in sources.items():
            features = session.features(source, folder_name(str(folder)), extraction)
            if session.main:
                found = shifted_accuracies(classifier.layer, features[name], features.labels)
                results[str(folder)] = found
                among = f"among {found['classes']} classes, {percent(found['top1_among_all'])} among all"
                session.note(f"{folder}: {percent(found['top1'])} of {found['images']} images {among}")
            session.write(results)


class ClassFolders:
    """FOLDER/CLASS/*, where the classes are some of those that a classifier was trained on.

    Sub-folders are named as the training classes; or numbered, as those of ImageNet-V2 are, by place among these.

    Raises:
        SERError: no such folder, other classes, or a class without an image.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        call = f"evaluate.py shift --folders {folder}"
        given = "a file" if folder.exists() else "no such folder"
        require(folder.is_dir(), call, given, "FOLDER/CLASS/*.jpg", "ls")
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        require(names, call, "no sub-folder in it", "FOLDER/CLASS/*.jpg", f"ls '{folder}'")
        labels = {name: label for label, name in enumerate(classes)}
        if not set(names) & set(labels) and all(name.isdigit() and int(name) < len(classes) for name in names):
            labels = {name: int(name) for name in names}
        unknown = [name for name in names if name not in labels]
        given = f"{len(unknown)} of {len(names)} sub-folders that are no class of the classifier: {_first(unknown)}"
        expected = f"some of its {len(classes)} classes, such as {_first(classes)}"
        require(not unknown, call, given, expected, f"ls '{folder}'")
        self.classes = classes
        try:
            found = make_dataset(folder, {name: labels[name] for name in names}, is_valid_file=is_image)
        except FileNotFoundError as error:  # classes without an image
            raise SERError(call, str(error).split(". ")[0], "images", f"find '{folder}' -type d -empty") from error
        self._samples = found

    def __len__(self) -> int:
        return len(self._samples)

    def image(self, i: int, reduction: Reduction | None = None) -> Image.Image:
        return read_image(self.name(i), reduction=reduction)

    def label(self, i: int) -> int:
        return self._samples[i][1]

    def name(self, i: int) -> str:
        return self._samples[i][0]


def shifted_accuracies(layer: nn.Module, features: Tensor, labels: Tensor) -> dict[str, Any]:
    """Top-1 and top-5 (None of five classes and fewer) among the classes that occur, and among all.

    The two are the same for ImageNet-V2 and ImageNet-Sketch. For the 200 classes of ImageNet-R its authors restrict
    the choice to these; the paper does not say what it does.
    """
    scores = predict(layer, features)
    present = labels.unique()
    position = torch.full((scores.shape[1],), -1).scatter(0, present, torch.arange(len(present)))
    restricted, restricted_labels = scores[:, present], position[labels]
    return {
        "images": len(labels),
        "classes": len(present),
        "top1": top(restricted, restricted_labels, 1),
        "top5": top5(restricted, restricted_labels),
        "top1_among_all": top(scores, labels, 1),
        "top5_among_all": top5(scores, labels),
    }


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
