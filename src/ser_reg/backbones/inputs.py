"""Inputs of a model: whether these are images that it can be called with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SERError, require_tensor

__all__ = ["check_tensor", "first_convolution", "warn_if_far"]

FAR = 20.0  # no normalisation in use gives such values for pixels of [0, 1]


def first_convolution(module: nn.Module) -> nn.Conv2d | None:
    """The first convolution inside a module, which may be that module."""
    for part in module.modules():  # no next(..., None): torch.compile of torch 2.6 cannot trace that
        if isinstance(part, nn.Conv2d):
            return part
    return None


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


def warn_if_far(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Warn of values far outside those of normalised pixels; of a CPU's only, as a GPU would have to be waited for."""
    # Other types than a plain tensor (fake ones, batched ones of vmap) have no values to look at.
    if images.device.type != "cpu" or torch.compiler.is_compiling() or type(images) is not Tensor or not images.numel():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(images):
        return
    low, high = (end.item() for end in images.detach().aminmax())
    if max(-low, high) > FAR:
        remedy = f"torchvision.transforms.functional.normalize(images / 255, {tuple(mean)}, {tuple(std)})"
        warnings.warn(
            f"images with values from {low:.4g} to {high:.4g}, far outside the model's normalisation: if these are "
            f"pixels of 0 to 255, features mean little. Type: {remedy}",
            stacklevel=_levels_inside(),
        )


def _levels_inside() -> int:
    """How many calls up the user's line is: where the warning is shown, and once for each such line."""
    package, levels, frame = __name__.split(".")[0], 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (package, "torch", "timm"):
        levels, frame = levels + 1, frame.f_back
    return levels
