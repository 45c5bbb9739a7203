"""Views of a source's images, as batches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ser_reg import SERError

from .policies import Policy
from .sources import Source

__all__ = ["Batch", "LabelledDataset", "Request", "Sample", "ViewDataset", "collate", "cores"]

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

    views: list[Tensor]
    """(3, S, S) uint8 for each global view."""
    local_views: list[Tensor]
    """(3, s, s) uint8 for each local view."""
    whole: bool
    index: int
    """Of the image that is seen, in case that the one asked for is unreadable."""
    unreadable: list[str]
    """Names of images that could not be read on the way to this one."""


class Batch(NamedTuple):
    """Views of n1 images that are cropped (b1) and of n2 that are seen whole (b2). Either part may have no rows."""

    crops: list[Tensor]
    """(n1, 3, S, S) uint8 for each global view."""
    local_crops: list[Tensor]
    """(n1, 3, s, s) uint8 for each local view."""
    whole: list[Tensor]
    """(n2, 3, S, S) uint8 for each global view, before the geometry of T_eq."""
    local_whole: list[Tensor]
    """(n2, 3, s, s) uint8 for each local view, before the geometry of T_eq."""
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
        views: policies of the global views.
        locals: policies of the local views.

    Raises:
        SERError: from a request, after 100 unreadable images in a row.
    """

    def __init__(self, source: Source, views: Sequence[Policy], locals: Sequence[Policy] = ()) -> None:
        self.source = source
        self.views = list(views)
        self.locals = list(locals)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, request: Request) -> Sample:
        image, index, unreadable = self._readable(request.index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(request.seed)  # torch.manual_seed would reach for the GPU's as well
            views, local_views = (
                [policy.whole(image) if request.whole else policy.crops(image) for policy in policies]
                for policies in (self.views, self.locals)
            )
        return Sample(views, local_views, request.whole, index, unreadable)

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
    parts = {whole: [sample for sample in samples if sample.whole == whole] for whole in (False, True)}

    def stacked(whole: bool, name: str) -> list[Tensor]:
        of_views = zip(*(getattr(sample, name) for sample in parts[whole]), strict=True)
        if parts[whole]:
            return [torch.stack(view) for view in of_views]
        return [view.new_empty(0, *view.shape) for view in getattr(samples[0], name)]

    return Batch(
        crops=stacked(False, "views"),
        local_crops=stacked(False, "local_views"),
        whole=stacked(True, "views"),
        local_whole=stacked(True, "local_views"),
        indices=torch.tensor([sample.index for whole in (True, False) for sample in parts[whole]]),
        unreadable=[name for sample in samples for name in sample.unreadable],
    )


def cores() -> int:
    """Cores that this process may use, which are fewer than the machine's in many containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LabelledDataset(Dataset[tuple[Tensor, int]]):
    """Images and labels for evaluation.

    An image that cannot be read has no stand-in here, which would count as another: it is black, has label -1, and a
    warning names it. Leave out and count what has label -1.

    Args:
        source: where the images come from.
        transform: PIL to (3, S, S) uint8; draws from torch's global generator, if from any.

    Raises:
        SERError: the source has no labels.
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor]) -> None:
        if not source.classes:
            given = f"unlabelled images such as {source.name(0)}"
            raise SERError("LabelledDataset(source, transform)", given, "labels", "open_source('embedded', 'val')")
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.transform(self.source.image(index)), self.source.label(index)
        except SERError as error:
            warnings.warn(f"unreadable, label -1: {self.source.name(index)} ({error.given})", stacklevel=2)
            return self.transform(Image.new("RGB", (64, 64))), -1
