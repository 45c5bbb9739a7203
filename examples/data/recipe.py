"""A recipe says what one view of one image is: which part of it, how that is resized and flipped, and what changes it.

Crops are cut, resized and flipped where the image is loaded. The photometric part is only carried here: it is applied
to whole batches, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from ser_reg.errors import require
from ser_reg.images import IMAGENET
from ser_reg.views import Photometric

__all__ = [
    "BICUBIC",
    "BILINEAR",
    "DRAWS",
    "Crop",
    "Recipe",
    "evaluation_transform",
    "normalise",
    "original",
    "photometric",
    "recipes",
    "training_crop",
]

BILINEAR, BICUBIC = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC
ATTEMPTS = 10  # torchvision's: then the middle of the image is taken
DRAWS = 2 * ATTEMPTS + 3  # uniform numbers that a crop is made of, however many of them are used
UNIT = 2**24  # pixels a side of the square in which pairs draw their boxes
REDUCTIONS = (8, 4, 2)  # by which a JPEG can be scaled while it is decoded
SPARE = 2  # pixels of a scaled JPEG to a view's, at least: as Pillow's thumbnails have them


class Crop(NamedTuple):
    """Whole pixels of an image, and whether they are flipped left-right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False

    def reduction(self, size: int) -> int:
        """By how much the image may be smaller, 1, 2, 4 or 8: the crop still has whole pixels, and twice the view's.

        With twice as many, crops of scaled JPEGs differ from those of whole ones by 0.1 to 0.7 of 256 steps, the mean
        over forty crops of each of nine photographs, and by 1.5 at most in one crop.

        Args:
            size: S, pixels a side of the view.
        """
        whole = (k for k in REDUCTIONS if not any(value % k for value in self[:4]))
        return next((k for k in whole if min(self.height, self.width) >= SPARE * k * size), 1)

    def cut(self, pixels: np.ndarray, size: int, interpolation: v2.InterpolationMode, reduction: int = 1) -> Tensor:
        """The view: (3, S, S) uint8, within one of 256 steps of what Pillow makes of the crop (bilinear).

        Args:
            pixels: (H, W, 3) uint8, of the image or of one that is smaller by the reduction.
            size: S.
            interpolation: with antialiasing.
            reduction: one that divides `self.reduction(size)`.
        """
        top, left, height, width = (value // reduction for value in self[:4])
        part = pixels[top : top + height, left : left + width].copy()
        view = F.interpolate(
            torch.from_numpy(part).permute(2, 0, 1)[None], (size, size), mode=interpolation.value, antialias=True
        )[0]
        return view.flip(-1) if self.flip else view


@dataclass(frozen=True)
class Recipe:
    """One view.

    The flip comes before the photometric part, as in DINO and Barlow Twins. MoCo-v3 flips last, which gives the same
    views: a left-right flip commutes with every photometric operation used here.
    """

    size: int
    """S, pixels a side."""
    area: tuple[float, float] | None
    """Range of the crop's area, as a part of the image. None: nothing is drawn, it is the middle of the image."""
    interpolation: v2.InterpolationMode
    """Of crops. Whole images are resized bicubically, as elements of the group do it, whatever it is for crops."""
    flip: float = 0.5
    """How often the crop is flipped left-right."""
    photometric: Photometric | None = None
    """What is applied on the device; None: nothing."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of width over height, in pixels."""

    def crop(self, size: tuple[int, int], draws: Sequence[float], paired: Sequence[float] | None = None) -> Crop:
        """T's geometry for an image: torchvision's law of `RandomResizedCrop`, and a flip.

        Where a crop has four times a view's pixels a side and more, its edges lie on every second, fourth or eighth
        pixel: so it has whole pixels of a JPEG as well that is scaled by as much while it is decoded.

        Args:
            size: (width, height) of the image.
            draws: `DRAWS` numbers, uniform in [0, 1).
            paired: others, of which the box is made instead: the same part of any image, drawn as in a square one and
                rounded to the image's pixels.
        """
        width, height = size
        if self.area is None:
            side = max(1, round(min(size) * self.size / round(self.size * 256 / 224)))
            return self._on_grid(Crop((height - side) // 2, (width - side) // 2, side, side))
        if paired is None:
            top, left, rows, columns = self._box(width, height, draws)
        else:
            top, left, rows, columns = self._box(UNIT, UNIT, paired)
            top, rows = _in_pixels(top, rows, height)
            left, columns = _in_pixels(left, columns, width)
        return self._on_grid(Crop(top, left, rows, columns, draws[-1] < self.flip))

    def _on_grid(self, crop: Crop) -> Crop:
        """The same but for up to seven pixels, so that it can be reduced."""
        k = next((k for k in REDUCTIONS if min(crop.height, crop.width) >= SPARE * k * self.size), 1)
        return Crop(*(value - value % k for value in crop[:4]), crop.flip)

    def _box(self, width: int, height: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random crop, drawn as torchvision draws it."""
        (low, high), (narrow, wide) = self.area, (math.log(ratio) for ratio in self.ratio)
        for attempt in range(ATTEMPTS):
            area = width * height * (low + (high - low) * draws[2 * attempt])
            ratio = math.exp(narrow + (wide - narrow) * draws[2 * attempt + 1])
            columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < columns <= width and 0 < rows <= height:
                top, left = (
                    int(u * (n + 1)) for u, n in zip(draws[-3:-1], (height - rows, width - columns), strict=True)
                )
                return top, left, rows, columns
        columns, rows = width, height  # as much as possible of the middle
        if width / height < self.ratio[0]:
            rows = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            columns = round(height * self.ratio[1])
        return (height - rows) // 2, (width - columns) // 2, rows, columns


def _in_pixels(start: int, length: int, side: int) -> tuple[int, int]:
    """Start and length of a part of `UNIT` in a side of so many pixels, at least one."""
    first = min(round(start * side / UNIT), side - 1)
    return first, max(1, round((start + length) * side / UNIT) - first)


def photometric(blur: float, solarize: float = 0.0) -> Photometric:
    """Colour jitter (.4, .4, .2, .1) in 80 % of the views, greyscale in 20 %, then blur and solarization from 128.

    Args:
        blur: how often.
        solarize: likewise.

    Source: the official MoCo-v3, DINO and Barlow Twins, to which the paper's Section 4.1 refers. SER's released code
    departs from them: kornia's jitter adds brightness and multiplies contrast about 0, and its solarization draws the
    threshold. None of that is done here.
    """
    return Photometric(
        brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter=0.8, grey=0.2, blur=blur, solarize=solarize
    )


def original(size: int) -> Recipe:
    """The middle of an image as evaluations see it, its shorter side at 256/224 of the size, not changed in any way."""
    return Recipe(size, None, BICUBIC, flip=0.0)


def recipes(
    size: int,
    area: tuple[float, float],
    interpolation: v2.InterpolationMode,
    local_size: int = 96,
    local_views: int = 0,
    local_area: tuple[float, float] = (0.05, 0.25),
    blur: bool = True,
) -> tuple[list[Recipe], list[Recipe]]:
    """The two global views and the local ones, with the photometric part that all base methods here share.

    Blur always in view 1 and in 10 % of view 2, half of the time in local views; solarization in 20 % of view 2.

    Args:
        size: pixels a side of a global view.
        area: range of the area of a global crop, as a part of the image.
        interpolation: of all crops.
        local_size: pixels a side of a local view.
        local_views: number of local views; DINO's default is 8, SER's 2+4 views have 4.
        local_area: range of the area of a local crop. Default: that of SER's released code in its 2+4 views (on its
            branch "augself": (.05, .14)).
        blur: False for images below 64 pixels, of which a radius of up to 2 pixels leaves nothing.

    Returns:
        Recipes of the global views, and of the local ones.

    Raises:
        SERError: local views that are not smaller than the global ones.

    Source: as for `photometric`. In the released 2+4 views all whole images of b2 get the photometric part of local
    views, which is not done here.
    """
    require(
        not local_views or local_size < size,
        f"recipes(size={size}, local_size={local_size}, local_views={local_views})",
        f"local views of {local_size} pixels",
        f"fewer than the {size} of global ones",
        f"--local-size {max(1, size * 96 // 224)}",
    )

    def recipe(side: int, area: tuple[float, float], blurred: float, solarized: float = 0.0) -> Recipe:
        return Recipe(side, area, interpolation, photometric=photometric(blurred if blur else 0.0, solarized))

    views = [recipe(size, area, 1.0), recipe(size, area, 0.1, 0.2)]
    return views, [recipe(local_size, local_area, 0.5) for _ in range(local_views)]


def evaluation_transform(size: int) -> v2.Compose:
    """The middle of the image: the shorter side to 256/224 of the size (bicubic), then a centre crop. PIL to uint8."""
    return v2.Compose([v2.Resize(round(size * 256 / 224), BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])


def training_crop(size: int) -> v2.Compose:
    """Linear evaluation's augmentation: random resized crop (area .08 to 1, bilinear) and flip. PIL to uint8.

    Source: linear evaluation of the official MoCo-v3, DINO and Barlow Twins.
    """
    return v2.Compose([v2.RandomResizedCrop(size, interpolation=BILINEAR), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def normalise(images: Tensor) -> Tensor:
    """(..., 3, H, W), uint8 or floating point from 0 to 1, to floating point of ImageNet's mean and deviation."""
    images = images if images.is_floating_point() else images.float() / 255
    mean, std = _mean_and_std(images.device, images.dtype)
    return (images - mean) / std


@lru_cache(8)  # a copy to a GPU is a wait for it
def _mean_and_std(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=dtype, device=device)[:, None, None] for values in IMAGENET)
    return mean, std
