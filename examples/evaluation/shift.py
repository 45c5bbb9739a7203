"""Images of the same classes from elsewhere: other photographs, renditions, sketches, renderings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from pretraining.folders import is_image
from results import atomically
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.datasets.folder import make_dataset

from ser_reg import SERError, read_image

from .classifiers import predict, top
from .encoder import Encoder

__all__ = ["ClassFolders", "LinearClassifier", "accuracies"]


class ClassFolders:
    """FOLDER/CLASS/*, where the classes are some of those that a classifier was trained on.

    Sub-folders are named as the training classes; or numbered, as those of ImageNet-V2 are, by place among these.

    Raises:
        SERError: no such folder, other classes, or a class without an image.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        call = f"evaluate.py shift --folders {folder}"
        if not folder.is_dir():
            raise SERError(call, "a file" if folder.exists() else "no such folder", "FOLDER/CLASS/*.jpg", "ls")
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise SERError(call, "no sub-folder in it", "FOLDER/CLASS/*.jpg", f"ls '{folder}'")
        labels = {name: label for label, name in enumerate(classes)}
        if not set(names) & set(labels) and all(name.isdigit() and int(name) < len(classes) for name in names):
            labels = {name: int(name) for name in names}
        unknown = [name for name in names if name not in labels]
        if unknown:
            given = f"{len(unknown)} of {len(names)} sub-folders that are no class of the classifier: " + _some(unknown)
            expected = f"some of its {len(classes)} classes, such as {_some(classes)}"
            raise SERError(call, given, expected, f"ls '{folder}'")
        self.classes = classes
        try:
            found = make_dataset(folder, {name: labels[name] for name in names}, is_valid_file=is_image)
        except FileNotFoundError as error:  # classes without an image
            raise SERError(call, str(error).split(". ")[0], "images", f"find '{folder}' -type d -empty") from error
        self._samples = found

    def __len__(self) -> int:
        return len(self._samples)

    def image(self, i: int) -> Image.Image:
        return read_image(self.name(i))

    def label(self, i: int) -> int:
        return self._samples[i][1]

    def name(self, i: int) -> str:
        return self._samples[i][0]


class LinearClassifier(NamedTuple):
    """What `evaluate.py linear` trained, and on what."""

    layer: nn.Linear
    classes: list[str]
    last: int
    """Blocks whose [CLS] it sees."""

    def save(self, path: Path, encoder: Encoder) -> None:
        tensors = {name: value.detach().cpu() for name, value in self.layer.state_dict().items()}
        metadata = {"classes": json.dumps(self.classes), "last": str(self.last), "encoder": encoder.fingerprint}
        with atomically(path) as part:
            save_file(tensors, part, metadata=metadata | {"size": str(encoder.size)})

    @classmethod
    def load(cls, path: Path, encoder: Encoder) -> LinearClassifier:
        """Raises a SERError if there is none, or if it was trained on another encoder's features."""
        call, remedy = f"evaluate.py shift --classifier {path}", f"evaluate.py linear --model {encoder.name}"
        try:
            with safe_open(path, framework="pt") as file:
                metadata, weight, bias = file.metadata() or {}, file.get_tensor("weight"), file.get_tensor("bias")
                known = {name: metadata[name] for name in ("classes", "last", "encoder", "size")}
        except (SafetensorError, OSError, KeyError) as error:
            given = f"{type(error).__name__}: {error}"
            raise SERError(call, given, "the linear.safetensors that `evaluate.py linear` writes", remedy) from error
        if (known["encoder"], known["size"]) != (encoder.fingerprint, str(encoder.size)):
            given = f"a classifier of the encoder {known['encoder']} at {known['size']} pixels"
            expected = f"of {encoder.fingerprint} at {encoder.size}, which is {encoder.name}"
            raise SERError(call, given, expected, remedy)
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        return cls(layer, json.loads(known["classes"]), int(known["last"]))


def accuracies(layer: nn.Module, features: Tensor, labels: Tensor) -> dict[str, Any]:
    """Top-1 and top-5 among the classes that occur, and among all that the classifier knows.

    The two are the same for ImageNet-V2 and ImageNet-Sketch. For the 200 classes of ImageNet-R its authors restrict
    the choice to these; the paper does not say what it does.
    """
    scores = predict(layer, features)
    present = labels.unique()
    place = torch.full((scores.shape[1],), -1).scatter(0, present, torch.arange(len(present)))
    restricted, restricted_labels = scores[:, present], place[labels]
    return {
        "images": len(labels),
        "classes": len(present),
        "top1": top(restricted, restricted_labels, 1),
        "top5": top(restricted, restricted_labels, 5),
        "top1_among_all": top(scores, labels, 1),
        "top5_among_all": top(scores, labels, 5),
    }


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
