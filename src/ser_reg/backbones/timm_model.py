"""What all timm models tell alike: normalisation, native size, channels, classifier."""

from __future__ import annotations

from typing import Any, cast

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from .base import Backbone
from .inputs import first_convolution

__all__ = ["TimmModel"]


class TimmModel(Backbone):
    """A timm model of any family."""

    @property
    def _pixels(self) -> dict[str, Any]:
        """What timm knows of its images; a class that was called by itself has nothing."""
        return dict(getattr(self.model, "pretrained_cfg", None) or {})

    @property
    def mean(self) -> tuple[float, float, float]:
        r, g, b = self._pixels.get("mean") or IMAGENET_DEFAULT_MEAN
        return float(r), float(g), float(b)

    @property
    def std(self) -> tuple[float, float, float]:
        r, g, b = self._pixels.get("std") or IMAGENET_DEFAULT_STD
        return float(r), float(g), float(b)

    @property
    def channels(self) -> int:
        convolution = first_convolution(self.embedding)
        return 3 if convolution is None else convolution.in_channels

    def classifier(self, classes: int) -> nn.Module:
        self.model.reset_classifier(classes)
        return cast(nn.Module, self.model.get_classifier())
