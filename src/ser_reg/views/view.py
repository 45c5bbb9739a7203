"""A view: images, how they were moved, and what was drawn to change them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import require
from ..geometry import Affine, GroupElement

__all__ = ["View", "relation"]


class View(NamedTuple):
    """One view of a batch of images, which knows how it was made.

    Example:
        >>> view = View(torch.rand(4, 3, 8, 8), GroupElement.turn(1, n=4), {})
        >>> view[1:3].images.shape, len(view[0].relation)
        (torch.Size([2, 3, 8, 8]), 1)
    """

    images: Tensor
    """(B, C, H, W)."""
    relation: GroupElement | Affine
    """B elements (or affine maps, where something was cut off) that take whole images to this view; or one for all."""
    drawn: dict[str, Tensor]
    """What the photometric part drew, by name, (B,) or (B, k); empty where it does not say."""

    def to(self, device: torch.device | str) -> View:
        """The same view with images and draws on another device; relations stay where they are, on the CPU."""
        return View(
            self.images.to(device), self.relation, {name: values.to(device) for name, values in self.drawn.items()}
        )

    def __getitem__(self, index: int | slice | Tensor | list[int]) -> View:  # type: ignore[override]
        """The view of some of the images; a single number gives a batch of one."""
        if isinstance(index, int):
            index = [range(len(self.images))[index]]
        one = len(self.relation) == 1 < len(self.images)  # for all images
        return View(
            self.images[index],
            self.relation if one else self.relation[index],
            {name: values[index] for name, values in self.drawn.items()},
        )


def relation(view1: View, view2: View) -> GroupElement | Affine:
    """What takes the geometry of view 1 to that of view 2: ``view2.relation @ ~view1.relation``.

    A GroupElement if both relations are; else an Affine, from one crop of an image to another.

    Raises:
        SERError: what is given are no views, or views of different numbers of images.

    Source: g = g2 g1^-1 in Section 3.2 of the paper.

    Example:
        >>> x = torch.rand(1, 3, 8, 8)
        >>> upright, turned = View(x, GroupElement.identity(1), {}), View(x, GroupElement.turn(1), {})
        >>> relation(upright, turned) == GroupElement.turn(1)
        True
    """
    for name, view in (("view1", view1), ("view2", view2)):
        require(
            isinstance(view, View),
            "relation(view1, view2)",
            f"{name} is a {type(view).__name__}",
            "two views, as makers give them",
            "view1, view2 = EquivariantViews(patch_size=16)(images)",
        )
    there, back = view2.relation, view1.relation.__invert__()
    if isinstance(there, GroupElement) and isinstance(back, GroupElement):
        return there.__matmul__(back)  # there @ back, as torch.compile of torch 2.6 can trace it
    return there @ back
