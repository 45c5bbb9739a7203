"""Where the images of a training come from."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from ser_reg import SERError

from .folders import ImageFolder
from .hugging_face import HuggingFaceDataset
from .shards import Shards

__all__ = ["EmbeddedPatches", "Source", "open_source"]

PATCH_SIZE = 64
PER_PHOTO = (96, 48)


class Source(Protocol):
    """Images by number. A source pickles, so that workers of any kind can read from it."""

    classes: list[str]
    """Names of the labels; empty if the images have none."""

    def __len__(self) -> int: ...

    def image(self, i: int) -> Image.Image:
        """Upright, RGB. Raises a SERError that names the image if it cannot be read."""

    def label(self, i: int) -> int:
        """Index into `classes`; -1 if the images have none."""

    def name(self, i: int) -> str:
        """Path, or another name to find it by."""


def open_source(data: str, split: Literal["train", "val"], seed: int = 0) -> Source:
    """The images of a split.

    Args:
        data: "embedded" for patches of the photographs inside scikit-image and scikit-learn; a folder in ImageNet's
            layout (FOLDER/train/CLASS/*, FOLDER/val/CLASS/*), or of images alone, to train on without labels;
            "hf:NAME", "hf:FOLDER" or "hf:FOLDER/{split}-*.parquet" for what `datasets` loads;
            "wds:FOLDER/{split}-{0000..0146}.tar" for WebDataset shards.
        split: "train", or "val" for what is held out.
        seed: of the embedded patches.

    Raises:
        SERError: it is not there, or not as described.
    """
    if split not in ("train", "val"):
        call = f"open_source({data!r}, {split!r})"
        raise SERError(call, f"split={split!r}", "train or val", f"open_source({data!r}, 'val')")
    if data == "embedded":
        return EmbeddedPatches(split, seed)
    if data.startswith("hf:"):
        return HuggingFaceDataset(data.removeprefix("hf:"), split)
    if data.startswith("wds:"):
        return Shards(data.removeprefix("wds:"), split)
    return ImageFolder(Path(data), split)


class EmbeddedPatches:
    """Patches of 64 pixels from twenty photographs, labelled by photograph: 96 each to train on, 48 held out.

    Held-out patches share no pixel with the training patches. See photo_patches.py.
    """

    def __init__(self, split: Literal["train", "val"], seed: int = 0) -> None:
        patches, labels, self.classes = _patches(seed)[split]
        self._patches, self._labels, self._split = patches, labels, split

    def __len__(self) -> int:
        return len(self._patches)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self._patches[i])

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def name(self, i: int) -> str:
        return f"embedded {self._split}[{i}], a patch of {self.classes[self.label(i)]}"


@lru_cache(maxsize=1)
def _patches(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """(N, S, S, 3) uint8, labels and classes of both splits, which come out of one computation."""
    from photo_patches import load_patches  # here, as other sources do without its packages

    def bytes_of(images: Tensor) -> np.ndarray:
        return rearrange((images * 255).round().byte(), "n c h w -> n h w c").contiguous().numpy()

    found = load_patches(None, PATCH_SIZE, PER_PHOTO, seed)
    return {
        "train": (bytes_of(found.train), found.train_labels.numpy(), found.names),
        "val": (bytes_of(found.test), found.test_labels.numpy(), found.names),
    }
