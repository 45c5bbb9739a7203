"""The arithmetic of photometric changes: Pillow's, on images (n, 3, H, W) of float32 whole numbers from 0 to 255.

Each operation changes its images in place where it can and gives images of the same kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "box_reach", "box_taps"]

RED, GREEN, BLUE = 19595, 38470, 7471  # ITU-R 601-2 in parts of 65536, as Pillow's conversion to "L"


def luminance(x: Tensor) -> Tensor:
    """(n, 1, H, W): Pillow's "L". All products and sums are whole numbers below 2^24, exact in float32."""
    red, green, blue = x.split(1, 1)
    grey: Tensor = (red * RED).add_(green, alpha=GREEN).add_(blue, alpha=BLUE)
    return grey.add_(0x8000).div_(0x10000).floor_()


def _blend(x: Tensor, degenerate: Tensor, factor: Tensor) -> Tensor:
    """degenerate + factor · (x - degenerate), cut off below the point and to 0..255, as ``Image.blend`` does."""
    return x.sub_(degenerate).mul_(_wide(factor)).add_(degenerate).floor_().clamp_(0, 255)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Black is the image without brightness."""
    return x.mul_(_wide(factor)).floor_().clamp_(max=255)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """The rounded mean of the grey image is the image without contrast."""
    grey = luminance(x)
    # Sums of a row are whole numbers below 2^24 and exact; those of an image may not be.
    total = grey.sum(-1, keepdim=True).long().sum(-2, keepdim=True)
    pixels = grey.shape[-2] * grey.shape[-1]
    mean = torch.div(2 * total + pixels, 2 * pixels, rounding_mode="floor")
    return _blend(x, mean.to(x.dtype), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """The grey image is the image without colour."""
    return _blend(x, luminance(x), factor)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Hue, saturation and value in 256 steps, as Pillow's "HSV"; hue moved by a part of a turn.

    Multiplied by comparisons in place of `where`, which takes several times as long on a CPU.
    """
    red, green, blue = x.split(1, 1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Which sixth of a turn, in parts of chroma: from blue at the top, corrected where green or red is.
    sixth = (red - green).add_(chroma, alpha=4)
    sixth.addcmul_(_is(green, value), (blue - red).add_(chroma, alpha=2).sub_(sixth))
    sixth.addcmul_(_is(red, value), (green - blue).sub_(sixth))
    sixth.addcmul_(sixth.clone().lt_(0), chroma, value=6)
    angle = sixth.mul_(255 / 6).div_(chroma.clamp(min=1)).floor_().add_(_wide(shift * 255).trunc())
    # Steps wrap at 256, as Pillow's bytes do, although a turn has 255.
    angle = angle.sub_(angle.div(256).floor_(), alpha=256).mul_(6 / 255)
    chroma = chroma.div_(value.clamp(min=1)).mul_(255).floor_().div_(255).mul_(value)
    low = value - chroma
    red = (angle - 3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)
    green, blue = (value - (angle - at).abs_().sub_(1).clamp_(0, 1).mul_(chroma) for at in (2, 4))
    return torch.cat([red, green, blue], 1).round_()


def _wide(values: Tensor) -> Tensor:
    """The first of each image's values, against its pixels."""
    return values[:, :1, None, None]


def _is(x: Tensor, y: Tensor) -> Tensor:
    """1 where they are equal, else 0."""
    return x.clone().eq_(y)


def grey(x: Tensor, _: Tensor) -> Tensor:
    """The grey image in three channels."""
    return x.copy_(luminance(x))


def solarize(x: Tensor, _: Tensor) -> Tensor:
    """What is 128 or more is inverted."""
    return torch.minimum(x, 255 - x)


def box_reach(sigma: float) -> int:
    """How many pixels away a blur of this deviation looks."""
    return 3 * (int((math.sqrt(4 * sigma**2 + 1) - 1) / 2) + 1)


def box_taps(sigma: Tensor, reach: int) -> Tensor:
    """(n, reach + 1): weights of a pixel and of those 1, 2, … away, of three box blurs that make up a Gaussian.

    Source: Gwosdek et al., Theoretical foundations of Gaussian convolution by extended box filtering, 2011, which
    Pillow implements.
    """
    third = sigma**2 / 3
    half = ((12 * third + 1).sqrt() - 1).div(2).floor()
    edge = (2 * half + 1) * (half * (half + 1) - 3 * third) / (6 * (third - (half + 1) ** 2))
    radius = (half + edge)[:, None]
    away = torch.arange(-reach, reach + 1, device=sigma.device).abs()
    box = (radius + 1 - away).clamp(0, 1) / (2 * radius + 1)
    taps = box
    for _ in range(2):
        padded, taps = F.pad(taps, (reach, reach)), torch.zeros_like(taps)
        for i in range(2 * reach + 1):  # in this order whatever the reach: what lies farther adds 0
            taps = taps + box[:, i : i + 1] * padded[:, i : i + 2 * reach + 1]
    return taps[:, reach:]


def blur(x: Tensor, taps: Tensor) -> Tensor:
    """Rows, then columns, by the same weights; pixels beyond the edge are those at it."""
    reach = taps.shape[1] - 1
    weights = taps[..., None, None, None].unbind(1)
    for axis, pad in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
        size = x.shape[axis]
        padded = F.pad(x, pad, mode="replicate")
        x = padded.narrow(axis, reach, size) * weights[0]
        for away in range(1, reach + 1):
            for start in (reach - away, reach + away):
                x.addcmul_(padded.narrow(axis, start, size), weights[away])
    return x.round_()


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
    "grey": grey,
    "blur": blur,
    "solarize": solarize,
}
