"""Views to check with: of the term's own maker, or of the kind that its policy names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..objectives import Objective
from ..views import CroppedViews, EquivariantViews, PathViews, Photometric, View
from ..views.pixels import normalized

__all__ = ["draw_views", "maker_for"]

SMALL = 96 / 224  # side of the crop that is turned all four ways, in parts of the images'
SMALL_AREA = (0.05, 0.14)


def maker_for(trunk: Backbone, policy: str, size: tuple[int, int], layer: int) -> Any:
    """What makes views of a policy, of images (height, width) that the model takes.

    Colours are changed where images have three channels; of whole images geometry is all that is done.
    """
    patch = trunk.stride(layer)
    if policy == "equivariant":
        return EquivariantViews(patch) if trunk.any_size else EquivariantViews(patch, scale=(1, 1), ratio=(1, 1))
    side = min(size)
    side = max(patch, side // patch * patch) if trunk.any_size else side
    photometric = Photometric() if trunk.channels == 3 else None
    if policy == "path":
        return PathViews("se2", size=side, photometric=photometric)
    if policy == "turned":
        small = max(patch, round(SMALL * side / patch) * patch) if trunk.any_size else side
        return CroppedViews(small, SMALL_AREA, views=1, photometric=photometric, turned="all")
    return CroppedViews(side, photometric=photometric, original=policy == "original", paired=policy == "paired")


def draw_views(maker: Any, term: Objective, images: Tensor, draws: int) -> list[tuple[View, ...]]:
    """Several draws of the views of images that were normalised, encoded views again so, and targets in [0, 1].

    Makers take pixels in [0, 1]. By which mean and deviation images were normalised only a maker that normalises
    knows; else the range that they came with will do.
    """
    normalize = getattr(maker, "normalize", None)
    channels = images.shape[1]
    low, high = (end.item() for end in images.aminmax())
    width = high - low or 1.0
    mean, std = normalize or ((-low / width,) * channels, (1 / width,) * channels)
    shift, scale = (torch.tensor(values).to(images)[:, None, None] for values in (mean, std))
    pixels = (images * scale + shift).clamp(0, 1)
    found = []
    for seed in range(draws):
        views = maker(pixels, torch.Generator().manual_seed(seed))
        encoded = [
            view if normalize else view._replace(images=normalized(view.images, (mean, std)))
            for view in views[: term.encoded]
        ]
        found.append((*encoded, *views[term.encoded :]))
    return found
