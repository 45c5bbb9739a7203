"""A recipe makes one view of one image: crop, flip and photometric part, as the official repositories have them.

All work on PIL images with Pillow's arithmetic, as those do, and give uint8 tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ser_reg.errors import require
from ser_reg.images import IMAGENET

__all__ = [
    "BICUBIC",
    "BILINEAR",
    "GaussianBlur",
    "Recipe",
    "evaluation_transform",
    "normalise",
    "photometric",
    "recipes",
    "training_crop",
]

BILINEAR, BICUBIC = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC


@dataclass(frozen=True)
class Recipe:
    """One view: of an image that is cropped (T, for b1), or of the whole image (T_eq, for b2).

    The flip comes before the photometric part, as in DINO and Barlow Twins. MoCo-v3 flips last, which gives the same
    views: a left-right flip commutes bitwise with every photometric operation used here.
    """

    crop: v2.RandomResizedCrop
    flip: v2.RandomHorizontalFlip
    photometric: v2.Compose
    """PIL to PIL; keeps the size."""

    def crops(self, image: Image.Image) -> Tensor:
        """T: random crop, flip, photometric part. (3, S, S) uint8."""
        return F.pil_to_tensor(self.photometric(self.flip(self.crop(image))))

    def whole(self, image: Image.Image) -> Tensor:
        """The half of T_eq that comes before its geometry: the whole image resized, and the same photometric part.

        Scaling, flips and turns follow on the batch, by `ser_reg.EquivariantViews`. The resize is bicubic with
        antialiasing, as theirs is, whatever T's is: one operator for images and elements. (3, S, S) uint8.

        Source: Section 3.2 and Algorithm 1 of the paper. Its released code differs: both views there are made of one
        random resized crop, resized again without antialiasing.
        """
        return F.pil_to_tensor(self.photometric(F.resize(image, self.crop.size, BICUBIC, antialias=True)))


class GaussianBlur(v2.Transform):
    """Pillow's Gaussian blur of a radius (its sigma, in pixels) drawn uniformly from `sigma`."""

    _transformed_types = (Image.Image,)

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0)) -> None:
        super().__init__()
        self.sigma = sigma

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"radius": torch.empty(1).uniform_(*self.sigma).item()}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return inpt.filter(ImageFilter.GaussianBlur(**params))


def photometric(blur: float, solarize: float = 0.0) -> v2.Compose:
    """Colour jitter (.4, .4, .2, .1) in 80 % of the views, greyscale in 20 %, then blur and solarization from 128.

    Args:
        blur: how often. With 0 there is none, and nothing is drawn for it.
        solarize: likewise.

    Source: the official MoCo-v3, DINO and Barlow Twins, to which the paper's Section 4.1 refers. SER's released code
    departs from them: kornia's jitter adds brightness and multiplies contrast about 0, and its solarization draws the
    threshold. None of that is done here.
    """
    changes: list[v2.Transform] = [
        v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
    ]
    if blur:
        changes.append(v2.RandomApply([GaussianBlur()], p=blur))
    if solarize:
        changes.append(v2.RandomSolarize(threshold=128, p=solarize))
    return v2.Compose(changes)


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
        crop = v2.RandomResizedCrop(side, scale=area, interpolation=interpolation, antialias=True)
        return Recipe(crop, v2.RandomHorizontalFlip(), photometric(blurred if blur else 0.0, solarized))

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
