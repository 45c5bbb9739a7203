"""A batch: groups of images with their views, made by a dataset of which every sample is a function of its request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ser_reg.errors import SERError
from ser_reg.geometry import GroupElement
from ser_reg.views import View

from .base import Source
from .recipe import Recipe

__all__ = ["Batch", "Group", "Request", "Sample", "ViewDataset", "collate"]

UNREADABLE_IN_A_ROW = 100


class Request(NamedTuple):
    """What is wanted of an image."""

    index: int
    whole: bool
    """Whether it is in b2: seen whole, to be moved by elements of the group; otherwise cropped."""
    seed: int
    """Of its views."""


class Sample(NamedTuple):
    """The views of one image."""

    images: list[Tensor]
    """One a view, uint8, global views first: (3, S, S) for each of these, then (3, s, s) for each local one."""
    whole: bool
    index: int
    """Of the image that is seen, in case that the one asked for is unreadable."""
    unreadable: list[str]
    """Names of images that could not be read on the way to this one."""


class Group(NamedTuple):
    """n images with their views. It may have no images: its tensors then have no rows."""

    images: list[Tensor]
    """One a view, global views first: (n, 3, S, S) for each of these, then (n, 3, s, s) for each local one."""
    relations: list[GroupElement] | None = None
    """One a view, from the whole image to it; None where crops were drawn and not recorded."""

    @property
    def views(self) -> list[View]:
        """The global ones first; those that belong together are [0:2], [2:4], and so on."""
        relations = self.relations or [None] * len(self.images)
        return [View(images, relation, {}) for images, relation in zip(self.images, relations, strict=True)]


class Batch(NamedTuple):
    """What a step of the training sees, before the geometry of T_eq."""

    crops: Group
    """b1: images that are cropped, uint8."""
    whole: Group
    """b2: images that are seen whole, uint8."""
    indices: Tensor
    """(n2 + n1,) int64 of the images, b2 first."""
    unreadable: list[str]
    """Names of images that could not be read and had others in their place."""


class ViewDataset(Dataset[Sample]):
    """All views of an image, a pure function of the request: whatever the process, whatever was drawn before.

    An image that cannot be read is replaced by the next one that can, and named in the sample. The state of torch's
    global generator is left alone.

    Args:
        source: where the images come from.
        views: recipes of the global views.
        local_views: recipes of the local views.

    Raises:
        SERError: from a request, after 100 unreadable images in a row.
    """

    def __init__(self, source: Source, views: Sequence[Recipe], local_views: Sequence[Recipe] = ()) -> None:
        self.source = source
        self.recipes = [*views, *local_views]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, request: Request) -> Sample:
        image, index, unreadable = self._readable(request.index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(request.seed)  # torch.manual_seed would reach for the GPU's as well
            images = [recipe.whole(image) if request.whole else recipe.crops(image) for recipe in self.recipes]
        return Sample(images, request.whole, index, unreadable)

    def _readable(self, start: int) -> tuple[Image.Image, int, list[str]]:
        """The first readable image from `start` on, its index, and the names of those passed over."""
        unreadable: list[str] = []
        for step in range(min(UNREADABLE_IN_A_ROW, len(self.source))):
            index = (start + step) % len(self.source)
            try:
                return self.source.image(index), index, unreadable
            except SERError as error:
                unreadable.append(self.source.name(index))
                last = error
        given = f"{len(unreadable)} unreadable images in a row, from {unreadable[0]}"
        raise SERError(f"ViewDataset(source)[{start}]", given, last.expected, last.remedy) from last


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples as a batch, b2 first."""
    crops, whole = ([sample for sample in samples if sample.whole == kind] for kind in (False, True))

    def group(chosen: list[Sample]) -> Group:
        if not chosen:
            return Group([image.new_empty(0, *image.shape) for image in samples[0].images])
        return Group([torch.stack(images) for images in zip(*(sample.images for sample in chosen), strict=True)])

    return Batch(
        crops=group(crops),
        whole=group(whole),
        indices=torch.tensor([sample.index for sample in whole + crops]),
        unreadable=[name for sample in samples for name in sample.unreadable],
    )
