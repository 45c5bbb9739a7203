"""The augmentation policies of MoCo-v3, DINO and Barlow Twins, and those of evaluation.

All work on PIL images with Pillow's arithmetic, as the official repositories do, and give uint8 tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ser_reg import SERError

__all__ = ["GaussianBlur", "Policy", "evaluation", "normalise", "policies", "training_crop"]

Method = Literal["moco_v3", "dino", "barlow_twins"]
BILINEAR, BICUBIC = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


class Base(NamedTuple):
    """What the three methods do not share; areas are parts of the image's."""

    interpolation: v2.InterpolationMode
    area: tuple[float, float]
    area_beside_locals: tuple[float, float]
    local_area: tuple[float, float]


# Official repositories. MoCo-v3 and Barlow Twins know no local views; theirs are SER's (2+4 views), of smaller area
# than DINO's.
BASES: dict[Method, Base] = {
    "moco_v3": Base(BILINEAR, (0.08, 1), (0.08, 1), (0.05, 0.25)),
    "dino": Base(BICUBIC, (0.14, 1), (0.4, 1), (0.05, 0.4)),
    "barlow_twins": Base(BICUBIC, (0.08, 1), (0.08, 1), (0.05, 0.25)),
}


@dataclass(frozen=True)
class Policy:
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


def policies(
    method: Method,
    size: int,
    area: tuple[float, float] | None = None,
    local_size: int | None = None,
    local_views: int = 0,
    local_area: tuple[float, float] | None = None,
    blur: bool = True,
) -> tuple[list[Policy], list[Policy]]:
    """The policies of the two global views and of the local ones.

    All three methods share the photometric part: colour jitter (.4, .4, .2, .1) in 80 % of the views, greyscale in
    20 %, then blur, always in view 1 and in 10 % of view 2, half of the time in local views, and in 20 % of view 2
    solarization of values from 128. They differ in area and interpolation (MoCo-v3 bilinear, the others bicubic).

    Args:
        method: whose.
        size: pixels a side of a global view.
        area: range of the area of a global crop, as a part of the image. Official and default: MoCo-v3 (for ViTs; its
            ResNets have .2) and Barlow Twins (.08, 1), DINO (.4, 1) beside local views and (.14, 1) without. SER's
            released code trains DINO with (.25, 1).
        local_size: pixels a side of a local view, 96 by default.
        local_views: number of local views; DINO's default is 8, SER's 2+4 views have 4.
        local_area: range of the area of a local crop. Default: DINO (.05, .4), the others (.05, .25), as SER's
            released code has in its 2+4 views (on its branch "augself": (.05, .14)). Local views are interpolated as
            global ones.
        blur: False for images below 64 pixels, of which a radius of up to 2 pixels leaves nothing.

    Raises:
        SERError: another method, or local views that are not smaller than the global ones.

    Source: the official repositories, to which the paper's Section 4.1 refers. SER's released code departs from them:
    kornia's jitter adds brightness and multiplies contrast about 0, its solarization draws the threshold, and in 2+4
    views all whole images of b2 get the photometric part of local views. None of that is done here.
    """
    call = f"policies({method!r}, size={size}, local_size={local_size}, local_views={local_views})"
    if method not in BASES:
        raise SERError(call, f"method={method!r}", f"one of {', '.join(BASES)}", "policies('moco_v3', size=224)")
    local_size = 96 if local_size is None else local_size
    if local_views and local_size >= size:
        remedy = f"policies({method!r}, {size}, local_size={max(1, size * 96 // 224)}, local_views={local_views})"
        raise SERError(call, f"local views of {local_size} pixels", f"fewer than the {size} of global ones", remedy)
    base = BASES[method]
    area = area or (base.area_beside_locals if local_views else base.area)

    def policy(
        side: int, part: tuple[float, float], blur_probability: float, solarize_probability: float = 0.0
    ) -> Policy:
        photometric = [
            v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
        ]
        if blur:
            photometric.append(v2.RandomApply([GaussianBlur()], p=blur_probability))
        if solarize_probability:
            photometric.append(v2.RandomSolarize(threshold=128, p=solarize_probability))
        crop = v2.RandomResizedCrop(side, scale=part, interpolation=base.interpolation, antialias=True)
        return Policy(crop, v2.RandomHorizontalFlip(), v2.Compose(photometric))

    views = [policy(size, area, 1.0), policy(size, area, 0.1, 0.2)]
    return views, [policy(local_size, local_area or base.local_area, 0.5) for _ in range(local_views)]


def evaluation(size: int) -> v2.Compose:
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
    mean, std = (torch.tensor(values, dtype=dtype, device=device)[:, None, None] for values in (MEAN, STD))
    return mean, std
