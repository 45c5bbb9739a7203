"""What a section of the report is: it measures one model after the other, draws all of them, captions, and finds.

A new section is a file beside this one with a subclass of `Section`, and a line in `sections.py`. It writes `measure`,
`draw` and `caption`; all else has a default.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones import backbone
from ..geometry import GroupElement
from ..metrics import transformations
from .photographs import whole

__all__ = ["Column", "Picture", "Record", "Records", "Section", "Subject", "early_layer"]

EARLY = 3 / 12  # of the depth: where the paper found accuracy highest

Record = Mapping[str, Any]
"""What sections measured of one model, as in report.json, with layers as whole numbers."""
Records = Mapping[str, Record]
"""By the name of the model."""


class Picture(NamedTuple):
    """A file beside the page, and what it shows, for who cannot see it."""

    path: Path
    alternative: str


class Column(NamedTuple):
    """Of the table of every figure, which has a row a layer."""

    heading: str
    values: Mapping[int, float]


@dataclass(frozen=True)
class Subject:
    """One model, and what it is asked about."""

    name: str
    model: nn.Module
    """In evaluation mode, on its device; nobody needs it afterwards."""
    photographs: list[Tensor]
    """(3, H, W) each, of any size, as `collect` gives them."""
    size: tuple[int, int]
    """(height, width) in pixels of images as the model gets them."""
    layers: list[int]
    """Numbers of layers already run."""
    seed: int
    stem: Path
    """How the paths of pictures of this model alone begin."""

    @cached_property
    def images(self) -> list[Tensor]:
        """The photographs as the model gets them, (3, height, width), values in [0, 1]."""
        return [whole(photograph, self.size) for photograph in self.photographs]

    @cached_property
    def pixels(self) -> Tensor:
        """`images`, normalised for the model, (N, 3, height, width) on its device."""
        return self.normalised(self.images)

    @cached_property
    def elements(self) -> dict[str, list[GroupElement]]:
        """What such images can be scored with, by the name of the transformation."""
        return transformations(self.model, self.pixels)

    def normalised(self, images: list[Tensor]) -> Tensor:
        """Images with values in [0, 1] as a batch for the model."""
        trunk = backbone(self.model)
        mean, std = (torch.tensor(values)[:, None, None] for values in (trunk.mean, trunk.std))
        return ((torch.stack(images) - mean) / std).to(next(self.model.parameters()))

    def generator(self) -> torch.Generator:
        """A new source of random numbers: what one section draws does not depend on others."""
        return torch.Generator().manual_seed(self.seed)


class Section(ABC):
    """One question to all models. The page shows heading, caption and pictures; what it finds stands at the top."""

    heading: str

    @abstractmethod
    def measure(self, subject: Subject) -> dict[str, Any]:
        """The entries of report.json that this section adds to a model: numbers, text, and dictionaries of them."""

    @abstractmethod
    def draw(self, folder: Path, records: Records) -> list[Picture]:
        """Save pictures of all models in `folder`; without any, the page leaves the section out."""

    @abstractmethod
    def caption(self, records: Records) -> str:
        """How to read the pictures, as HTML."""

    def find(self, record: Record) -> list[str]:
        """What the numbers of one model say, in sentences."""
        return []

    def left_out(self, subject: Subject) -> list[str]:
        """What could not be asked of a model, and why."""
        return []

    def columns(self, record: Record) -> list[Column]:
        """Its columns in the table of every figure of one model."""
        return []

    def forwards(self, subject: Subject) -> int:
        """About how many images `measure` runs through the model: where the end of the progress bar is."""
        return 0


def early_layer(depth: int) -> int:
    """The layer that one would regularize first: a quarter of the depth.

    Source: Figure 3 of the paper, layer 3 of 12.

    Example:
        >>> early_layer(12), early_layer(24), early_layer(2)
        (3, 6, 1)
    """
    return max(1, round(EARLY * depth))
