"""Photographs as a model takes them: whole, and random cuts of them for the probes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import require
from ..images import cut, embedded_photographs, read_folder

__all__ = ["collect", "cuts", "whole"]

SIDES = (0.5, 1.0)  # of a cut, over the largest one of its shape that the image holds


def collect(
    images: Mapping[str, Tensor] | Iterable[Tensor] | str | Path | None, limit: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Images by name, each (3, H, W), and those that could not be read with the reason.

    They stay uint8 where they are: large photographs take a quarter of the memory. Use `whole` and `cuts` on them.

    Args:
        images: by name or not, each (3, H, W), uint8 or floating point in [0, 1]; a folder; or None for the embedded
            photographs.
        limit: how many at most, drawn at random where there are more.
        seed: of the draw.

    Raises:
        SERError: fewer than two images, others than these, or a folder without any.
    """
    call, expected = "report(models, images)", "at least two: another image is the floor of the score"
    unreadable: dict[str, str] = {}
    remedy = "report(models, images, max_images=64)  # --max-images 64"
    require(limit >= 2, call, f"max_images={limit}", expected, remedy)
    if isinstance(images, (str, Path)):
        remedy = "report(models, 'FOLDER')  # --images FOLDER, with FOLDER/*.jpg or in folders inside"
        images, unreadable = read_folder(images, limit, seed, call=f"report(models, {str(images)!r})", remedy=remedy)
    elif images is None:
        images = embedded_photographs()
    elif not isinstance(images, Mapping):
        given, kinds = f"images={images!r}"[:80], "images, a folder or None"
        require(isinstance(images, Iterable), call, given, kinds, "report(models)  # embedded photographs")
        images = {f"image {i}": image for i, image in enumerate(images)}
    remedy = "report(models)  # the photographs that come with scikit-image"
    require(len(images) >= 2, call, f"{len(images)} images", expected, remedy)
    names = list(images)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [names[index] for index in sorted(order[:limit])]
    return {name: _checked(name, images[name]) for name in chosen}, unreadable


def _checked(name: str, image: Tensor) -> Tensor:
    call = "report(models, images)"
    to_tensor = "torchvision.transforms.functional.to_tensor"
    require(
        isinstance(image, Tensor),
        call,
        f"{name}: a {type(image).__name__}",
        "tensors (3, height, width)",
        f"report(models, [{to_tensor}(image) for image in images])",
    )
    require(
        image.ndim == 3 and image.shape[0] == 3 and 0 not in image.shape,
        call,
        f"{name} of shape {tuple(image.shape)}",
        "(3, height, width)",
        "image.expand(3, -1, -1)" if image.ndim == 3 else "image[0]",
    )
    if image.dtype == torch.uint8:
        return image.cpu()
    require(
        image.is_floating_point() and bool(((image >= 0) & (image <= 1)).all()),
        call,
        lambda: f"{name} of {image.dtype} from {image.min().item():g} to {image.max().item():g}",
        "uint8, or floating point in [0, 1]: each model has a normalisation of its own, applied here",
        "image * std[:, None, None] + mean[:, None, None]",
    )
    return image.float().cpu()


def whole(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, height, width), values in [0, 1]: the largest centred part of this shape, resized."""
    return cut(image, size)


def cuts(image: Tensor, size: tuple[int, int], count: int, generator: torch.Generator) -> list[Tensor]:
    """Cuts of random side and position, each (3, height, width); the whole image where only one is asked for."""
    if count == 1:
        return [whole(image, size)]
    draws = torch.rand(count, 3, generator=generator).tolist()
    return [cut(image, size, SIDES[0] + u * (SIDES[1] - SIDES[0]), top, left) for u, top, left in draws]
