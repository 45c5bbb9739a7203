"""Inputs of a model: whether these are images that it can be called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import SERError, require_tensor

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
    require_tensor(call, images)
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
