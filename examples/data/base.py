"""What a source of images is: all that trainings and evaluations ask of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from PIL import Image

__all__ = ["Reduction", "Source", "Subset", "random_subset"]

# Told an image's upright (width, height), it says by how much the image may be smaller: 1, 2, 4 or 8.
Reduction = Callable[[tuple[int, int]], int]


class Source(Protocol):
    """Images by number. A source pickles, so that workers of any kind can read from it."""

    classes: list[str]
    """Names of the labels; empty if the images have none."""

    def __len__(self) -> int: ...

    def image(self, i: int, reduction: Reduction | None = None) -> Image.Image:
        """Upright, RGB. Raises a SERError that names the image if it cannot be read.

        Args:
            i: which.
            reduction: for `ser_reg.images.read_image`, which then decodes a JPEG scaled down; whoever reads no files
                leaves it alone.
        """

    def label(self, i: int) -> int:
        """Index into `classes`; -1 if the images have none."""

    def name(self, i: int) -> str:
        """Path, or another name to find it by."""


class Subset:
    """Some images of a source, as a source.

    Args:
        source: of all of them.
        indices: which, in the order that they are to have.
    """

    def __init__(self, source: Source, indices: list[int]) -> None:
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, i: int, reduction: Reduction | None = None) -> Image.Image:
        return self.source.image(self.indices[i], reduction)

    def label(self, i: int) -> int:
        return self.source.label(self.indices[i])

    def name(self, i: int) -> str:
        return self.source.name(self.indices[i])


def random_subset(source: Source, n: int, seed: int) -> Subset:
    """At most n images of a source, drawn without replacement, in its order."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    return Subset(source, order[:n].sort().values.tolist())
