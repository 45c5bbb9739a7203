"""Crop and resize: a box of its own for every image, all in one go."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import require, require_tensor
from .action import MODES, _to_device
from .checks import check_box, check_size

__all__ = ["crop_and_resize"]


def crop_and_resize(
    images: Tensor, box: Tensor, size: tuple[int, int], mode: str = "bicubic", antialias: bool = True
) -> Tensor:
    """Cut a box out of each image and resize it to one size, without a loop over images.

    The numbers are those of ``torch.nn.functional.interpolate`` on the pixels cut out, which are also those of
    torchvision's ``resized_crop`` of a floating point tensor: pixels beyond the box have no part in the result, nothing
    is rounded, and bicubic results are not clamped to the range of the images. A box whose edges lie between pixels
    is resampled as it is; the pixels with their centre inside take part.

    Args:
        images: (B, C, H, W), floating point.
        box: (B, 4) float64 on the CPU: top, left, height, width in parts of the image's height and width.
        size: (h, w) of the result.
        mode: "bicubic" or "bilinear".
        antialias: low-pass before shrinking.

    Returns:
        (B, C, h, w), in the dtype of the images (half precision is resampled in float32); differentiable.

    Raises:
        SERError: images, boxes or size of another kind, a number of boxes that does not fit, or a box that reaches
            beyond its image.

    Example:
        >>> images, box = torch.rand(2, 3, 60, 80), torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0, 0.5, 1]]).double()
        >>> crop_and_resize(images, box, (32, 32)).shape
        torch.Size([2, 3, 32, 32])
    """
    _check(images, box, size, mode)
    n, channels, height, width = images.shape
    if not n:
        return images.reshape(0, channels, *size)
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    rows, columns = (
        _operator(box[:, axis::2] * old, old, new, mode, antialias, dtype, images.device)
        for axis, (old, new) in enumerate(zip((height, width), size, strict=True))
    )
    with torch.autocast(images.device.type, enabled=False):
        # Each product has its channels beside the axis that is not summed, so that none is copied on the way.
        half = columns @ images.to(dtype).reshape(n, channels * height, width).mT
        whole = half.view(n, size[1] * channels, height) @ rows.mT
    return whole.view(n, size[1], channels, size[0]).permute(0, 2, 3, 1).to(images.dtype).contiguous()


def _check(images: Tensor, box: Tensor, size: tuple[int, int], mode: str) -> None:
    call = "crop_and_resize(images, box, size)"
    require_tensor(call, images)
    given = f"images {tuple(images.shape)}"
    require(images.ndim == 4 and min(images.shape[-2:]) > 0, call, given, "a batch (B, C, H, W)", "images[None]")
    given, remedy = f"images of {images.dtype}", "crop_and_resize(images.float() / 255, box, size)"
    require(images.is_floating_point(), call, given, "floating point numbers, to be resampled", remedy)
    check_box(call, box)
    given = f"{len(box)} boxes for {len(images)} images"
    require(len(box) == len(images), call, given, "a box for each image", f"box.expand({len(images)}, 4)")
    inside = bool((box[:, :2] > -1e-9).all() and (box[:, :2] + box[:, 2:] < 1 + 1e-9).all())
    expected, remedy = "boxes inside of their images", "Affine.crop(box).warp(images, size)"
    require(inside, call, lambda: f"boxes from {box.amin(0).tolist()} to {box.amax(0).tolist()}", expected, remedy)
    check_size(call, size, "size=(224, 224)")
    require(mode in MODES, call, f"mode={mode!r}", f"one of {MODES}", "mode='bicubic'")


def _operator(
    side: Tensor, old: int, new: int, mode: str, antialias: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(B, new, old): how each image's pixels along one axis make the new ones, from sides (B, 2): start, length.

    Weights are found in float64 on the CPU, a few for each new pixel, and put in their places on the device.
    """
    start, length = side.unbind(1)
    scale = length / new
    stretch = scale.clamp(min=1) if antialias else torch.ones_like(scale)
    reach = (2 if mode == "bicubic" else 1) * stretch
    centre = start[:, None] + scale[:, None] * (torch.arange(new, dtype=torch.float64) + 0.5)
    taps = torch.arange(2 * math.ceil(float(reach.max())) + 1)
    pixel = (centre - reach[:, None]).floor().long()[..., None] + taps
    weight = _kernel((pixel + 0.5 - centre[..., None]) / stretch[:, None, None], mode, antialias)
    first = (
        (start + 0.5 - 1e-6).floor().long().clamp(0, old - 1)
    )  # whose centre is the first one inside, or the nearest
    last = (start + length - 0.5 + 1e-6).floor().long().clamp(0, old - 1)
    inside = pixel.maximum(first[:, None, None]).minimum(last[:, None, None])
    if antialias:  # what lies beyond is left out; without a low-pass it is the pixel at the edge
        weight = torch.where(inside == pixel, weight, 0.0)
        weight = weight / weight.sum(-1, keepdim=True)
    where, weight = _to_device(inside, device), _to_device(weight.to(dtype), device)
    return torch.zeros(len(start), new, old, dtype=dtype, device=device).scatter_add_(-1, where, weight)


def _kernel(x: Tensor, mode: str, antialias: bool) -> Tensor:
    """The weight of a pixel at this distance; torch's cubic is Keys' with a = -0.5 where it has a low-pass."""
    x = x.abs()
    if mode == "bilinear":
        return (1 - x).clamp(min=0)
    a = -0.5 if antialias else -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
