"""Images to check with: the user's own, of a folder, or noise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backbones import Backbone
from ..errors import require
from ..images import cut, read_folder

__all__ = ["images_for"]

CALL = "check(model, images)"
FEWEST, MOST = 3, 8


def images_for(
    trunk: Backbone, images: Tensor | str | Path | None, layer: int, image_size: int | tuple[int, int] | None
) -> Tensor:
    """(B, C, H, W), B from 3 to 8, as the model takes them.

    Args:
        trunk: the model.
        images: tensors as they are, a folder, whose images are normalised for the model, or None: noise.
        layer: of the term.
        image_size: pixels a side, or (height, width), of images of a folder and of noise.

    Raises:
        SERError: too few images, or such as the model does not take.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size or trunk.size
    if images is None:
        images = _noise(trunk, size)
    elif isinstance(images, (str, Path)):
        remedy = "check(model, 'FOLDER')  # --images FOLDER, with FOLDER/*.jpg or in folders inside"
        found, _ = read_folder(images, MOST, fewest=FEWEST, call=f"check(model, {str(images)!r})", remedy=remedy)
        mean, std = (torch.tensor(values)[:, None, None] for values in (trunk.mean, trunk.std))
        batch = torch.stack([(cut(image, size) - mean) / std for image in found.values()])
        images = batch.to(next(trunk.model.parameters()))
    else:
        given, remedy = f"image_size={image_size} and images, which have a size", "check(model, images)"
        require(image_size is None, "check(model, images, image_size=...)", given, "one of the two", remedy)
    trunk.check_tensor(CALL, images)
    given, expected = f"images {tuple(images.shape)}", f"at least {FEWEST} images (B, C, H, W)"
    require(len(images) >= FEWEST, CALL, given, expected, "check(model)  # with noise")
    height, width = images.shape[-2:]
    if not trunk.any_size:
        trunk.check_size(CALL, (height, width), layer)
    return images[:MOST]


def _noise(trunk: Backbone, size: tuple[int, int]) -> Tensor:
    """Smooth images, whose patches tell positions apart."""
    draw = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.randn(4, trunk.channels, 8, 8, generator=draw), size, mode="bicubic")
    return images.to(next(trunk.model.parameters()))
