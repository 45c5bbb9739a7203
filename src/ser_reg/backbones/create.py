"""A timm model by name."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from ..errors import SERError

__all__ = ["create"]


def create(name: str, pretrained: bool = False, caller: str = "create", **arguments: Any) -> nn.Module:
    """A timm model by name, without a classifier, that takes images of any size if its kind can.

    Args:
        name: of a timm model.
        pretrained: with its published weights, which are downloaded, or with random ones.
        caller: the function that the user called, for errors.
        arguments: what `timm.create_model` takes besides.

    Raises:
        SERError: there is no such model, it does not take the arguments, or its weights cannot be had.

    Example:
        >>> type(create("convnext_atto")).__name__
        'ConvNeXt'
    """
    call = f"{caller}({name!r}, pretrained={pretrained})"
    try:
        try:
            return timm.create_model(
                name, pretrained=pretrained, num_classes=0, **({"dynamic_img_size": True} | arguments)
            )
        except TypeError:  # has no such argument: what it is used for says so better than its constructor
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except Exception as error:  # a hub that cannot be reached and constructors raise errors of many kinds
        stem = name.split(".")[0]
        own = {key: value for key, value in arguments.items() if key != "pretrained_cfg_overlay"}
        if own and timm.is_model(stem) and (not pretrained or isinstance(error, (TypeError, AssertionError))):
            given, expected = f"{own}: {type(error).__name__}: {error}", f"arguments of {stem}"
            remedy = f"timm.create_model({stem!r})  # with the arguments that it takes"
            raise SERError(call, given, expected, remedy) from error
        if pretrained and timm.is_model(stem):
            remedy = f"{caller}({name!r}, pretrained=False)  # random weights"
            raise SERError(call, str(error).split("\n")[0], "weights that can be downloaded", remedy) from error
        remedy = f"timm.list_models('*{stem.split('_')[0]}*')"
        raise SERError(call, str(error), "the name of a timm model", remedy) from error
