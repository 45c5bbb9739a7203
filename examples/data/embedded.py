"""Patches of the photographs that come inside scikit-image and scikit-learn: nothing to download."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from ser_reg.images import load_patches

from .base import Reduction

__all__ = ["EmbeddedPatches"]

PATCH_SIZE = 64
PER_PHOTO = (96, 48)


class EmbeddedPatches:
    """Patches of 64 pixels from twenty photographs, labelled by photograph: 96 each to train on, 48 held out.

    Held-out patches share no pixel with the training patches. See `ser_reg.images.load_patches`.
    """

    def __init__(self, split: Literal["train", "val"], seed: int = 0) -> None:
        patches, labels, self.classes = _patches(seed)[split]
        self._patches, self._labels, self._split = patches, labels, split

    def __len__(self) -> int:
        return len(self._patches)

    def image(self, i: int, reduction: Reduction | None = None) -> Image.Image:
        return Image.fromarray(self._patches[i])

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def name(self, i: int) -> str:
        return f"embedded {self._split}[{i}], a patch of {self.classes[self.label(i)]}"


@lru_cache(maxsize=1)
def _patches(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """(N, S, S, 3) uint8, labels and classes of both splits, which come out of one computation."""

    def bytes_of(images: Tensor) -> np.ndarray:
        return rearrange((images * 255).round().byte(), "n c h w -> n h w c").contiguous().numpy()

    found = load_patches(None, PATCH_SIZE, PER_PHOTO, seed)
    return {
        "train": (bytes_of(found.train), found.train_labels.numpy(), found.names),
        "val": (bytes_of(found.test), found.test_labels.numpy(), found.names),
    }
