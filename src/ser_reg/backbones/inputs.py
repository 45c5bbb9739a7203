"""Inputs of a model: whether these are images that it can be called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SERError

__all__ = ["check_tensor", "first_convolution"]


def first_convolution(module: nn.Module) -> nn.Conv2d | None:
    """The first convolution inside a module, which may be that module."""
    return next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)


def check_tensor(call: str, images: Any, embedding: nn.Module, channels: int) -> None:
    """Raise unless images are a tensor (B, C, H, W) of the type and on the device of a model's first weights.

    Args:
        call: what the user typed.
        images: what the user gave.
        embedding: the module that is called with them.
        channels: C. Not checked if the embedding has no convolution, since then nothing but the model knows it.
    """
    if not isinstance(images, Tensor):
        raise SERError(call, _named(images), "a tensor (B, C, H, W)", _as_tensor(images))
    shape = f"images of shape {tuple(images.shape)}"
    if images.ndim != 4:
        raise SERError(call, shape, "(B, C, H, W)", "images[None]" if images.ndim == 3 else "images.flatten(0, -4)")
    if first_convolution(embedding) is not None and images.shape[1] != channels:
        remedy = f"timm.create_model(..., in_chans={images.shape[1]})"
        raise SERError(call, shape, f"(B, {channels}, H, W), as the model was built for", remedy)
    given = f"images of {images.dtype}"
    if not images.is_floating_point():
        raise SERError(call, given, "floating point, normalised as for the model", "images.float() / 255")
    weight = next(embedding.parameters())
    dtype, device = weight.dtype, weight.device
    if images.device != device and device.type != "meta":  # offloaded weights arrive during the forward
        raise SERError(call, f"images on {images.device}", f"{device}, as the model", f'images.to("{device}")')
    if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
        raise SERError(call, given, f"{dtype}, as the model", f"images.to({dtype})")


def _package(thing: Any) -> str:
    return type(thing).__module__.split(".")[0]


def _named(images: Any) -> str:
    """What it is, and of a list what is in it."""
    kind = type(images).__name__
    if isinstance(images, (list, tuple)) and images:
        return f"a {kind} of {type(images[0]).__name__}"
    return f"a {kind}"


def _as_tensor(images: Any) -> str:
    """The line that makes a tensor of what is at hand."""
    to_tensor = "torchvision.transforms.functional.to_tensor"
    if isinstance(images, (list, tuple)) and images:
        first: Any = images[0]
        if isinstance(first, Tensor):
            return "images[0]  # of (images, labels)" if first.ndim == 4 else "torch.stack(list(images))"
        if _package(first) == "PIL":
            return f"torch.stack([{to_tensor}(image) for image in images])"
        return "torch.stack([torch.as_tensor(image) for image in images])"
    if _package(images) == "PIL":
        return f"{to_tensor}(images)[None]"
    if _package(images) == "numpy":
        last = getattr(images, "ndim", 0) == 4 and images.shape[-1] in (1, 3)  # channels last, as images are stored
        return "torch.from_numpy(images)" + (".permute(0, 3, 1, 2)" if last else "")
    return "torch.stack(list(images))"
