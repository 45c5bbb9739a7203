"""Folders of images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import make_dataset

from ser_reg.errors import SERError, require
from ser_reg.images import IMAGE_ENDINGS, read_image

from .base import Reduction

__all__ = ["ImageFolder", "is_image"]

LAYOUT = "FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg (without labels: FOLDER/*.jpg, to train on alone)"


class ImageFolder:
    """A folder in ImageNet's layout, or one of unlabelled images to train on.

    The classes are the sub-folders of ``train``, in alphabetical order, for both splits. Links are followed; hidden
    files and files of other endings are passed over.

    Args:
        folder: one with ``train/CLASS/*`` and ``val/CLASS/*``; or with images in ``train`` or in itself, unlabelled.
        split: "train" or "val".

    Raises:
        SERError: another layout, an empty class, or a class of ``val`` that ``train`` does not have.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._call = f"open_source({str(folder)!r}, {split!r})"
        folder = folder.expanduser()
        given = "a file" if folder.exists() else "no such folder"
        remedy = "--data FOLDER  # or embedded, hf:NAME, wds:FOLDER/{split}-{0000..0146}.tar"
        self._require(folder.is_dir(), given, remedy)
        train = folder / "train" if (folder / "train").is_dir() else folder
        self.classes, flat = _content(train)
        self._check(folder, train, flat)
        root = folder / split if self.classes else train
        self._root = str(root)
        samples = self._labelled(root) if self.classes else self._unlabelled(flat, split, folder)
        # One block of bytes instead of a million strings: light, and shared by forked workers for good.
        self._paths = np.array([os.fsencode(path) for path, _ in samples])
        self._labels = np.array([label for _, label in samples], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, i: int, reduction: Reduction | None = None) -> Image.Image:
        return read_image(self.name(i), reduction=reduction)

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def name(self, i: int) -> str:
        return os.path.join(self._root, os.fsdecode(self._paths[i]))

    def _check(self, folder: Path, train: Path, flat: list[str]) -> None:
        """Raise unless the training images lie in classes alone, or in no class at all."""
        first, itself = next(iter(self.classes), ""), f"--data '{folder.parent}'"
        given = f"no train/ in it, but {len(self.classes)} sub-folders such as {first!r}"
        remedy = f"mkdir '{folder}.new' && mv '{folder}' '{folder}.new/train' && mv '{folder}.new' '{folder}'"
        self._require(train is not folder or not self.classes, given, itself if folder.name == "train" else remedy)
        given = f"{len(flat)} images in {str(train)!r} beside the classes {', '.join(self.classes[:3])}"
        ending = Path(next(iter(flat), "")).suffix
        remedy = f"mkdir '{train}/CLASS' && mv '{train}'/*{ending} '{train}/CLASS'"
        self._require(not (flat and self.classes), given, remedy)
        given = f"no image in {str(train)!r} (endings: {' '.join(IMAGE_ENDINGS)})"
        self._require(flat or self.classes, given, f"ls '{train}'")

    def _labelled(self, root: Path) -> list[tuple[str, int]]:
        """(path under the root, label) of each image."""
        self._require(root.is_dir(), f"no {root.name}/ in it", f"ls '{root.parent}'")
        classes, flat = _content(root)
        strangers = sorted(set(classes) - set(self.classes))
        remedy = f"ls '{root.parent / 'train'}' '{root}'"
        self._require(not flat, f"{len(flat)} images in {str(root)!r} outside of classes", remedy)
        given = f"classes of {root.name}/ that train/ does not have: {', '.join(strangers[:3])}"
        self._require(not strangers, given, remedy)
        self._require(classes, f"no class in {str(root)!r}", remedy)
        labels = {name: label for label, name in enumerate(self.classes) if name in classes}
        try:
            found = make_dataset(root, labels, is_valid_file=is_image)
        except FileNotFoundError as error:  # classes without an image
            remedy = f"find '{root}' -type d -empty"
            raise SERError(self._call, str(error).split(". ")[0], LAYOUT, remedy) from error
        return [(path.removeprefix(f"{root}{os.sep}"), label) for path, label in found]

    def _unlabelled(self, flat: list[str], split: str, folder: Path) -> list[tuple[str, int]]:
        given, remedy = "images without classes, to train on alone", f"ls '{folder}/train' '{folder}/val'"
        self._require(split != "val", given, remedy)
        return [(name, -1) for name in flat]

    def _require(self, condition: object, given: str, remedy: str) -> None:
        require(condition, self._call, given, LAYOUT, remedy)


def is_image(path: str) -> bool:
    """Whether a file counts as an image, by its ending; hidden ones do not."""
    name = os.path.basename(path)
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")


def _content(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the sub-folders and of the images that lie in the folder itself, sorted."""
    with os.scandir(folder) as scan:
        entries = [(entry.name, entry.is_dir()) for entry in scan if not entry.name.startswith(".")]
    return (
        sorted(name for name, is_folder in entries if is_folder),
        sorted(name for name, is_folder in entries if not is_folder and is_image(name)),
    )
