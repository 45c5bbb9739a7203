"""What several makers of views do to images and draws: checks, range, normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import require, require_tensor
from ..geometry.action import _to_device
from .photometric import Photometric, check_generator

__all__ = [
    "Drawn",
    "Normalize",
    "check_draw",
    "check_images",
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
    given, expected = f"n={n}, size={tuple(size)}", "a number of images and their (height, width) in pixels"
    fine = n >= 0 and len(size) == 2 and min(size) >= 1
    require(fine, call, given, expected, "draw(len(images), images.shape[-2:])")
    check_generator(call, generator)


def check_images(call: str, images: Tensor, photometric: bool, expected: int | None = None) -> None:
    """Raise unless images are a floating point batch, as many as were drawn for, in [0, 1] where that matters."""
    require_tensor(call, images)
    given = f"images {tuple(images.shape)}"
    require(images.ndim == 4, call, given, "a batch (B, C, H, W)", "make_views(images[None])")
    remedy = "make_views(images.float() / 255)"
    require(images.is_floating_point(), call, f"images of {images.dtype}", "floating point numbers", remedy)
    if expected is not None:
        remedy = "make_views.render(images, make_views.draw(len(images), images.shape[-2:]))"
        require(len(images) == expected, call, given, f"the {expected} images of the plan", remedy)
    if photometric and images.device.type == "cpu" and images.numel():  # elsewhere the host would wait
        low, high = (end.item() for end in images.aminmax())
        given = f"images with values from {low:.4g} to {high:.4g}"
        require(low > -1 and high < 2, call, given, "values in [0, 1]", "make_views(images / 255)")


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
    mean, std = (_to_device(torch.tensor(values, dtype=images.dtype), images.device) for values in normalize)
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
