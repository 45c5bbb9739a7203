"""Images and labels for evaluations, and what becomes of an image that cannot be read.

There is one rule: it has no stand-in, which would count as another. It is black, has no label, and is named with the
reason; whoever computes leaves its row out, reports its name, and counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ser_reg.errors import SERError

from .base import Source

__all__ = ["NO_LABEL", "LabelledBatch", "LabelledDataset", "LabelledImage", "collate_labelled"]

NO_LABEL = -1


class LabelledImage(NamedTuple):
    """One image of a source."""

    index: int
    image: Tensor
    """(3, S, S) uint8; black if it could not be read."""
    label: int
    """Index into the classes; NO_LABEL if it has none, or if it could not be read."""
    unreadable: tuple[str, str] | None
    """Its name, and why it could not be read."""


class LabelledBatch(NamedTuple):
    """B images of a source."""

    indices: Tensor
    """(B,) int64."""
    images: Tensor
    """(B, 3, S, S) uint8, black where one could not be read."""
    labels: Tensor
    """(B,) int64."""
    readable: Tensor
    """(B,) bool."""
    unreadable: list[tuple[str, str]]
    """(name, why) of each that could not be read."""


class LabelledDataset(Dataset[LabelledImage]):
    """Images by number, or by number and seed. The state of torch's global generator is left alone.

    Args:
        source: where the images come from.
        transform: PIL to (3, S, S) uint8. One that draws is asked with a seed, on which alone the image then depends.
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, request: int | tuple[int, int]) -> LabelledImage:
        index, seed = request if isinstance(request, tuple) else (request, None)
        try:
            image, label, unreadable = self.source.image(index), self.source.label(index), None
        except SERError as error:
            image, label, unreadable = Image.new("RGB", (64, 64)), NO_LABEL, (self.source.name(index), error.given)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:  # the CPU's generator alone, where images are cropped
                torch.default_generator.manual_seed(hash((seed, index)) % 2**63)
            return LabelledImage(index, self.transform(image), label, unreadable)


def collate_labelled(samples: Sequence[LabelledImage]) -> LabelledBatch:
    """Samples as a batch."""
    indices, images, labels, unreadable = zip(*samples, strict=True)
    return LabelledBatch(
        torch.tensor(indices),
        torch.stack(images),
        torch.tensor(labels),
        torch.tensor([failed is None for failed in unreadable]),
        [failed for failed in unreadable if failed is not None],
    )
