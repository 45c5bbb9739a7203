"""A timm model by name."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from ..errors import SERError

__all__ = ["create"]


def create(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """A timm model by name, without a classifier, that takes images of any size if its kind can.

    Raises:
        SERError: there is no such model, or its weights cannot be had.

    Example:
        >>> type(create("convnext_atto")).__name__
        'ConvNeXt'
    """
    call = f"create({name!r}, pretrained={pretrained})"
    try:
        try:
            return timm.create_model(
                name, pretrained=pretrained, num_classes=0, **({"dynamic_img_size": True} | arguments)
            )
        except TypeError:  # has no such argument: what it is used for says so better than its constructor
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except (RuntimeError, OSError, ValueError) as error:  # a hub that cannot be reached raises errors of many kinds
        stem = name.split(".")[0]
        if pretrained and timm.is_model(stem):
            remedy = f"create({name!r}, pretrained=False)  # random weights"
            raise SERError(call, str(error).split("\n")[0], "weights that can be downloaded", remedy) from error
        remedy = f"timm.list_models('*{stem.split('_')[0]}*')"
        raise SERError(call, str(error), "the name of a timm model", remedy) from error
