"""A batch: groups of images with their views, made by a dataset of which every sample is a function of its request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ser_reg.errors import SERError
from ser_reg.geometry import Affine, GroupElement
from ser_reg.views import View

from .base import Source
from .recipe import BICUBIC, DRAWS, Crop, Recipe

__all__ = ["Batch", "Group", "Request", "Sample", "ViewDataset", "collate"]

UNREADABLE_IN_A_ROW = 100


class Request(NamedTuple):
    """What is wanted of an image."""

    index: int
    term: bool
    """Whether it is one of those that the added term reads."""
    seed: int
    """Of its views."""
    position: int = 0
    """Its place in the global batch."""
    pair: int | None = None
    """Of the boxes that it shares with its neighbour; None: it shares none."""


class Sample(NamedTuple):
    """The views of one image."""

    images: list[Tensor]
    """One a view, uint8: global views (3, S, S), then local ones (3, s, s)."""
    extra: list[Tensor]
    """Likewise of the views that the term alone wants; of an image that it does not read each is (0, 3, s, s)."""
    relations: np.ndarray
    """(views, 5) float64, those of `images` and then of `extra`: top, left, height and width in parts of the image, and
    whether it is flipped after that."""
    request: Request
    index: int
    """Of the image that is seen, in case that the one asked for is unreadable."""
    unreadable: list[str]
    """Names of images that could not be read on the way to this one."""


class Group(NamedTuple):
    """n images with their views. It may have no images: its tensors then have no rows."""

    images: list[Tensor]
    """One a view, global views first: (n, 3, S, S) for each of these, then (n, 3, s, s) for each local one."""
    relations: list[Affine | GroupElement] | None = None
    """One a view, from the whole image to it; None where they are not known."""
    drawn: Sequence[dict[str, Tensor]] = ()
    """One a view, what the photometric part drew; empty: nothing was drawn."""
    extra: Sequence[View] = ()
    """Views that the added term alone wants: the base method sees none of them."""

    @property
    def views(self) -> list[View]:
        """The global ones first; those that belong together are [0:2], [2:4], and so on."""
        n = len(self.images)
        parts = self.images, self.relations or [None] * n, self.drawn or [{} for _ in range(n)]
        return [View(*view) for view in zip(*parts, strict=True)]


class Batch(NamedTuple):
    """What a step of the training sees, before what is done on the device. From the loader: uint8, on the CPU."""

    plain: Group
    """Images that the added term does not read, cropped (b1 in the paper's words)."""
    term: Group
    """Images that it reads: seen whole (b2), or cropped as the others are, with the extra views that it wants."""
    positions: Tensor
    """(n,) int64, the place of each image in the global batch, the term's first."""
    indices: Tensor
    """(n,) int64 of the images, the term's first."""
    unreadable: list[str]
    """Names of images that could not be read and had others in their place."""


class ViewDataset(Dataset[Sample]):
    """All views of an image, a pure function of the request: whatever the process, whatever was drawn before.

    Box and flip of a view depend on the request's seed, the size of the image, the view's place and its recipe: not on
    what else is made of the image. An image that cannot be read is replaced by the next one that can, and named in the
    sample. No global random numbers are drawn.

    Args:
        source: where the images come from.
        views: recipes of the global views.
        local_views: recipes of the local views.
        extra_views: recipes of what is made of the term's images besides.
        whole: whether the term's images are seen whole, to be moved by elements of the group; else they are cropped.

    Raises:
        SERError: from a request, after 100 unreadable images in a row.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[Recipe],
        local_views: Sequence[Recipe] = (),
        extra_views: Sequence[Recipe] = (),
        whole: bool = True,
    ) -> None:
        self.source = source
        self.recipes, self.extra_views = [*views, *local_views], list(extra_views)
        self.whole = whole

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, request: Request) -> Sample:
        whole = self.recipes if request.term and self.whole else []
        cropped = [] if whole else self.recipes
        cuts = _Cuts(request, whole, cropped + self.extra_views if request.term else cropped)
        image, index, unreadable = self._readable(request.index, cuts)
        images, n = cuts.of(image), len(self.recipes)
        none = [torch.empty(0, 3, recipe.size, recipe.size, dtype=torch.uint8) for recipe in self.extra_views]
        return Sample(images[:n], images[n:] or none, cuts.relations(), request, index, unreadable)

    def _readable(self, start: int, cuts: _Cuts) -> tuple[Image.Image, int, list[str]]:
        """The first readable image from `start` on, its index, and the names of those passed over."""
        unreadable: list[str] = []
        for step in range(min(UNREADABLE_IN_A_ROW, len(self.source))):
            index = (start + step) % len(self.source)
            cuts.size = None
            try:
                return self.source.image(index, cuts.reduction), index, unreadable
            except SERError as error:
                unreadable.append(self.source.name(index))
                last = error
        given = f"{len(unreadable)} unreadable images in a row, from {unreadable[0]}"
        raise SERError(f"ViewDataset(source)[{start}]", given, last.expected, last.remedy) from last


class _Cuts:
    """What a request cuts out of an image: drawn when the image's size is known, which is before it is decoded.

    Args:
        request: whose seeds draw.
        whole: recipes of the views that see all of the image; they come first.
        cropped: recipes of the others.
    """

    def __init__(self, request: Request, whole: list[Recipe], cropped: list[Recipe]) -> None:
        self.recipes, self.whole = [*whole, *cropped], len(whole)
        self.draws, self.paired = (
            [None] * len(self.recipes)
            if seed is None
            else np.random.default_rng(seed).random((len(self.recipes), DRAWS)).tolist()
            for seed in (request.seed, request.pair)
        )
        self.size: tuple[int, int] | None = None
        self.crops: list[Crop] = []

    def reduction(self, size: tuple[int, int]) -> int:
        """By how much an image of this (width, height) may be smaller when it is decoded: 1, 2, 4 or 8."""
        self.size, n = size, self.whole
        self.crops = [Crop(0, 0, size[1], size[0])] * n
        for recipe, draws, paired in zip(self.recipes[n:], self.draws[n:], self.paired[n:], strict=True):
            self.crops.append(recipe.crop(size, draws, paired))
        return min(crop.reduction(recipe.size) for crop, recipe in zip(self.crops, self.recipes, strict=True))

    def of(self, image: Image.Image) -> list[Tensor]:
        """One view after another, (3, S, S) uint8 each."""
        if self.size is None:  # the source did not ask, and gives all pixels
            self.reduction(image.size)
        pixels, reduction = np.asarray(image), next(k for k in (1, 2, 4, 8) if -(-self.size[0] // k) == image.width)
        images: list[Tensor] = []
        for view, (crop, recipe) in enumerate(zip(self.crops, self.recipes, strict=True)):
            if 0 < view < self.whole and recipe.size == self.recipes[view - 1].size:
                images.append(images[-1])
            else:
                how = BICUBIC if view < self.whole else recipe.interpolation
                images.append(crop.cut(pixels, recipe.size, how, reduction))
        return images

    def relations(self) -> np.ndarray:
        """As in a `Sample`."""
        width, height = self.size
        return np.array(self.crops, dtype=np.float64) / (height, width, height, width, 1)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples as a batch, the term's first."""
    plain, term = ([sample for sample in samples if sample.request.term == kind] for kind in (False, True))
    ordered = term + plain
    return Batch(
        plain=_group(plain, like=samples[0]),
        term=_group(term, like=samples[0], extra=True),
        positions=torch.tensor([sample.request.position for sample in ordered]),
        indices=torch.tensor([sample.index for sample in ordered]),
        unreadable=[name for sample in samples for name in sample.unreadable],
    )


def _group(samples: list[Sample], like: Sample, extra: bool = False) -> Group:
    """A group of these images; if there are none, its views have the sizes of another's."""

    def stacked(views: list[list[Tensor]], shapes: list[Tensor]) -> list[Tensor]:
        if not views:
            return [image.new_empty(0, *image.shape[-3:]) for image in shapes]
        return [default_collate(images) for images in zip(*views, strict=True)]  # in memory that workers share

    images = stacked([sample.images for sample in samples], like.images)
    extras = stacked([sample.extra for sample in samples], like.extra) if extra else []
    views = len(images) + len(extras)
    found = torch.from_numpy(np.array([sample.relations for sample in samples]).reshape(len(samples), views, 5))
    relations = [_affine(view) for view in found.unbind(1)]
    there = relations[len(images) :]
    return Group(images, relations[: len(images)], extra=[View(x, r, {}) for x, r in zip(extras, there, strict=True)])


def _affine(rows: Tensor) -> Affine:
    """(n, 5) rows of `Sample.relations` as maps of the plane."""
    n = len(rows)
    flip = GroupElement(torch.zeros(n, dtype=torch.int64), rows[:, 4] > 0, torch.ones(n, 2, dtype=torch.float64))
    return flip @ Affine.crop(rows[:, :4])
