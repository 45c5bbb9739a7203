"""What several makers of views do to images and draws: checks, range, normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import require, require_tensor
from ..geometry.action import _to_device
from .photometric import Photometric, check_generator
from .stages import range_remedy

__all__ = [
    "Drawn",
    "Normalize",
    "check_colours",
    "check_draw",
    "check_images",
    "check_normalize",
    "check_range",
    "check_size",
    "identity_drawn",
    "in_range",
    "limits",
    "normalized",
    "photometrics",
    "rows",
]

Drawn = dict[str, Tensor]
Normalize = tuple[Sequence[float], Sequence[float]]


def check_size(call: str, maker: str, size: object) -> None:
    """Raise unless a view's side is a whole number of pixels."""
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    require(whole, call, f"size={size!r}", "a whole number of pixels, one for both sides", f"{maker}(size=224)")


def check_draw(call: str, n: int, size: tuple[int, int], generator: torch.Generator | None) -> None:
    """Raise unless there is something to draw for, and a generator to draw with that reads the same anywhere."""
    given, expected = f"n={_told(n)}, size={_told(size)}", "a number of images and their (height, width) in pixels"
    fine = isinstance(n, int) and n >= 0 and isinstance(size, (tuple, list)) and len(size) == 2 and min(size) >= 1
    require(fine, call, given, expected, "draw(len(images), images.shape[-2:])")
    check_generator(call, generator)


def _told(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_images(call: str, images: Tensor, unit: bool, expected: int | None = None) -> None:
    """Raise unless images are a floating point batch, as many as were drawn for, in [0, 1] where that matters."""
    require_tensor(call, images)
    given = f"images {tuple(images.shape)}"
    require(images.ndim == 4, call, given, "a batch (B, C, H, W)", "make_views(images[None])")
    remedy = "make_views(images.float() / 255)"
    require(images.is_floating_point(), call, f"images of {images.dtype}", "floating point numbers", remedy)
    if expected is not None:
        remedy = "make_views.render(images, make_views.draw(len(images), images.shape[-2:]))"
        require(len(images) == expected, call, given, f"the {expected} images of the plan", remedy)
    pixels = not len(images) or images.numel() > 0
    require(pixels, call, given, "images with channels and pixels", "make_views(torch.rand(4, 3, 256, 256))")
    if unit:
        check_range(call, images, 1)


def check_range(call: str, images: Tensor, room: float) -> None:
    """Raise on values further than this from [0, 1], of images on a CPU: elsewhere the host would wait."""
    if images.device.type == "cpu" and images.numel():
        low, high = (end.item() for end in images.aminmax())
        given = f"images with values from {low:.4g} to {high:.4g}"
        require(low > -room and high < 1 + room, call, given, "values in [0, 1]", range_remedy("make_views", low, high))


def check_colours(call: str, images: Tensor, photometric: bool, normalize: Normalize | None) -> None:
    """Raise unless images have the channels and the range of a `Photometric`, and the channels of `normalize`."""
    channels = images.shape[1]
    given = f"images {tuple(images.shape)}"
    if photometric:
        remedy = f"make_views(images{'.expand(-1, 3, -1, -1)' if channels == 1 else '[:, :3]'})"
        require(channels == 3, call, given, "red, green and blue, whose colours can be changed", remedy)
        check_range(call, images, 0.5 / 255)
    if normalize is not None:
        n = len(normalize[0])
        remedy = "a mean and a deviation for each channel in normalize=(mean, std)"
        require(channels == n, call, given, f"the {n} channels of normalize=", remedy)


def check_normalize(call: str, normalize: Normalize | None) -> None:
    """Raise unless this is a mean and a positive deviation for each channel, or nothing."""
    if normalize is None:
        return
    try:
        mean, std = (torch.as_tensor(values, dtype=torch.float64) for values in normalize)
        fine = mean.ndim == 1 and mean.shape == std.shape and bool((std > 0).all() and mean.isfinite().all())
    except (TypeError, ValueError, RuntimeError):
        fine = False
    expected = "(mean, standard deviation), each a list with a number for each channel"
    require(fine, call, f"normalize={normalize!r}", expected, "normalize=IMAGENET  # from ser_reg import IMAGENET")


def limits(images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, 1, 1) twice: the range that each image came with, or [0, 1] where that is wider.

    What resamples clamps to it, as bicubic weights overshoot. It is an image's own, whatever else is in the batch, and
    nothing waits for the device.
    """
    low, high = images.flatten(1).aminmax(dim=1)
    return low.clamp(max=0)[:, None, None, None], high.clamp(min=1)[:, None, None, None]


def in_range(resampled: Tensor, images: Tensor) -> Tensor:
    """Resampled images in the `limits` of those that they were made of."""
    return resampled.clamp(*limits(images))


def normalized(images: Tensor, normalize: Normalize | None) -> Tensor:
    """Images less the mean of their channels, in deviations; as they are without both."""
    if normalize is None:
        return images
    mean, std = (_to_device(torch.as_tensor(values, dtype=images.dtype), images.device) for values in normalize)
    return (images - mean[:, None, None]) / std[:, None, None]


def photometrics(
    call: str, photometric: Photometric | Sequence[Photometric | None] | None, views: int
) -> tuple[Photometric | None, ...]:
    """One photometric part a view."""
    parts = tuple(photometric) if isinstance(photometric, (tuple, list)) else (photometric,) * views
    fine = all(part is None or isinstance(part, Photometric) for part in parts)
    kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
    remedy = "photometric=Photometric()  # recorded(transform) takes a torchvision pipeline"
    require(fine, call, f"a photometric part of {kinds}", "a Photometric, or one a view", remedy)
    expected = "one for all, or one for each view that is augmented"
    require(len(parts) == views, call, f"{len(parts)} photometric parts for {views} views", expected, remedy)
    return parts  # type: ignore[return-value]


def identity_drawn(n: int) -> Drawn:
    """What a `Photometric` draws for n images that it leaves as they are."""
    never = Photometric(jitter=0, grey=0, blur=0, solarize=0)
    return never.draw(n, torch.Generator())  # of its own: the global state is left alone


def rows(drawn: Drawn, index: int | slice | Tensor | list[int], n: int) -> Drawn:
    """The draws of some of n images; a single number gives those of one."""
    if isinstance(index, int):
        index = [range(n)[index]]
    return {name: values[index] for name, values in drawn.items()}
