"""Folders of images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import make_dataset

from ser_reg.errors import SERError
from ser_reg.images import IMAGE_ENDINGS, read_image

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
        if not folder.is_dir():
            given = "a file" if folder.exists() else "no such folder"
            raise self._error(given, "--data FOLDER  # or embedded, hf:NAME, wds:FOLDER/{split}-{0000..0146}.tar")
        train = folder / "train" if (folder / "train").is_dir() else folder
        self.classes, flat = _content(train)
        if train is folder and self.classes:
            given = f"no train/ in it, but {len(self.classes)} sub-folders such as {self.classes[0]!r}"
            raise self._error(
                given,
                f"--data '{folder.parent}'"
                if folder.name == "train"
                else f"mkdir '{folder}.new' && mv '{folder}' '{folder}.new/train' && mv '{folder}.new' '{folder}'",
            )
        if flat and self.classes:
            given = f"{len(flat)} images in {str(train)!r} beside the classes {', '.join(self.classes[:3])}"
            ending = Path(flat[0]).suffix
            raise self._error(given, f"mkdir '{train}/CLASS' && mv '{train}'/*{ending} '{train}/CLASS'")
        if not flat and not self.classes:
            raise self._error(f"no image in {str(train)!r} (endings: {' '.join(IMAGE_ENDINGS)})", f"ls '{train}'")
        part = folder / split if self.classes else train
        self._root = str(part)
        samples = self._labelled(part) if self.classes else self._unlabelled(flat, split, folder)
        # One block of bytes instead of a million strings: light, and shared by forked workers for good.
        self._paths = np.array([os.fsencode(path) for path, _ in samples])
        self._labels = np.array([label for _, label in samples], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, i: int) -> Image.Image:
        return read_image(self.name(i))

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def name(self, i: int) -> str:
        return os.path.join(self._root, os.fsdecode(self._paths[i]))

    def _labelled(self, part: Path) -> list[tuple[str, int]]:
        """(path under the part, label) of each image."""
        if not part.is_dir():
            raise self._error(f"no {part.name}/ in it", f"ls '{part.parent}'")
        classes, flat = _content(part)
        strangers = sorted(set(classes) - set(self.classes))
        if flat or strangers or not classes:
            given = (
                f"{len(flat)} images in {str(part)!r} outside of classes"
                if flat
                else f"classes of {part.name}/ that train/ does not have: {', '.join(strangers[:3])}"
                if strangers
                else f"no class in {str(part)!r}"
            )
            raise self._error(given, f"ls '{part.parent / 'train'}' '{part}'")
        labels = {name: label for label, name in enumerate(self.classes) if name in classes}
        try:
            found = make_dataset(part, labels, is_valid_file=is_image)
        except FileNotFoundError as error:  # classes without an image
            raise self._error(str(error).split(". ")[0], f"find '{part}' -type d -empty") from error
        return [(path.removeprefix(f"{part}{os.sep}"), label) for path, label in found]

    def _unlabelled(self, flat: list[str], split: str, folder: Path) -> list[tuple[str, int]]:
        if split == "val":
            raise self._error("images without classes, to train on alone", f"ls '{folder}/train' '{folder}/val'")
        return [(name, -1) for name in flat]

    def _error(self, given: str, remedy: str) -> SERError:
        return SERError(self._call, given, LAYOUT, remedy)


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
