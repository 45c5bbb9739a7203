"""The families of models that are known, and the one of a model."""

from __future__ import annotations

from torch import nn

from ..errors import SERError
from .base import Backbone
from .timm_stages import TimmConvNeXt, TimmResNet, TimmSwin
from .timm_vit import TimmViT

__all__ = ["FAMILIES", "backbone", "unknown"]

FAMILIES: list[type[Backbone]] = [
    TimmViT,
    TimmSwin,
    TimmConvNeXt,
    TimmResNet,
]
"""A new family is a line here."""


def backbone(model: nn.Module, call: str = "backbone(model)") -> Backbone:
    """What can be asked of a model: `Backbone`.

    Args:
        model: of a family in FAMILIES, the model itself and not a wrapper around it.
        call: what the user typed, for errors.

    Raises:
        SERError: the model is of another family, wrapped (DDP, torch.compile, ...), or one that the installed timm
            runs wrongly.

    Example:
        >>> import timm
        >>> pyramid = backbone(timm.create_model("resnet10t", pretrained=False))
        >>> pyramid.depth, pyramid.width(2), pyramid.stride(2), pyramid.grid((96, 64), layer=2)
        (4, 128, 8, (12, 8))
    """
    for family in FAMILIES:
        if family.knows(model):
            known = family(model)
            known.check_model(call)
            return known
    inner, path = model, "model"
    while isinstance(inner, nn.Module):
        name = next((name for name in ("_orig_mod", "module") if isinstance(getattr(inner, name, None), nn.Module)), "")
        if not name:
            break
        inner, path = getattr(inner, name), f"{path}.{name}"
        if any(family.knows(inner) for family in FAMILIES):
            given = f"{type(model).__name__}, a wrapper around the model"
            raise SERError(call, given, "the model itself", call.replace("(model", f"({path}", 1))
    own = [names for family in FAMILIES if (names := family.overridden(type(model)))]
    given = type(model).__name__ + (f" with its own {', '.join(own[0])}" if own else "")
    raise unknown(call, given, FAMILIES)


def unknown(call: str, given: str, families: list[type[Backbone]]) -> SERError:
    """The error for a model that is of none of these families."""
    expected = ", ".join(family.described for family in families)
    return SERError(call, given, expected, 'timm.create_model("vit_small_patch16_224", dynamic_img_size=True)')
