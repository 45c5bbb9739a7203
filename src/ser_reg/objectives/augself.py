"""AugSelf: tell from two crops how differently they were made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from ..views.view import View
from .base import Objective, Output, check_number, check_size, mean_over_ranks
from .heads import MLP, pooled
from .measures import explained, feature_std
from .reading import crops_of, drawn_of

__all__ = ["AugSelf"]

FACTORS = ("brightness", "contrast", "saturation", "hue")
RANGES = (0.4, 0.4, 0.2, 0.1)  # half ranges of a Photometric, unless told


class _Head(NamedTuple):
    """One thing to tell: how many numbers, and (n,) losses of what is predicted (n, numbers) and the target."""

    numbers: int
    losses: Callable[[Tensor, Tensor], Tensor]


def _squares(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).square().mean(1)


def _binary(predicted: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(predicted, target, reduction="none").mean(1)


def _classes(predicted: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(predicted, target, reduction="none")


HEADS = {
    "crop": _Head(4, _squares),
    "colour": _Head(4, _squares),
    "flip": _Head(1, _binary),
    "turn": _Head(4, _classes),
    "blur": _Head(1, _squares),
    "solarize": _Head(1, _squares),
}


class AugSelf(Objective):
    """Predicts, from the features of two crops, the difference between the augmentations that made them.

    A head for each thing to tell, on the concatenated features of views (a, b), for both orders (1, 2) and (2, 1):
    MLP 2D-`width`-`width`-n, whose linear maps have no bias but the last, with batch norm over all ranks. Features that
    are maps are averaged over their places. The loss is the sum over heads of weight times the mean over both orders
    and all images of all ranks. A head of weight 0 is not built.

    ========  =  =====================================================================================  =============
    head      n  target                                                                                 loss
    ========  =  =====================================================================================  =============
    crop      4  centre (y, x), height, width of b's crop minus a's, in parts of the image; x mirrored  MSE of tanh
                 where that view is flipped, each view by its own flip
    colour    4  difference, b minus a, of (factor - 1) / half range of brightness, contrast,           MSE
                 saturation, and of hue / half range; 0 where not applied
    flip      1  flip of a xor flip of b                                                                cross-entropy
    turn      4  quarter turns of b minus those of a, modulo 4                                          cross-entropy
    blur      1  difference of sigma, b minus a, in pixels                                              MSE
    solarize  1  difference of applied (0 or 1)                                                         MSE
    ========  =  =====================================================================================  =============

    Logs: ``r2`` (the share of the targets' variance that is explained, of this rank's images) or, for flip and turn,
    ``accuracy``; with several heads the same by name, as ``r2_crop``, those without a name being the first head's;
    ``chance``, the loss when nothing is told; ``feature_std``, the standard deviation of the directions of the
    features, 0 when all are one.

    Args:
        dim: D, channels of the features.
        crop: weight of telling by how much the crops differ in place and size.
        colour: weight of telling by how much colours were changed.
        flip: weight of telling whether one of the two is flipped.
        turn: weight of telling by how many quarters one is turned against the other.
        blur: weight of telling by how much more one is blurred.
        solarize: weight of telling which one is solarised.
        width: of both hidden layers of a head.
        maker: the maker of the views, whose half ranges of colours divide the targets (the larger, where its two
            views have different ones); by default those of ``Photometric()``.

    Raises:
        SERError: a weight is negative, or all are 0; the maker draws nothing of what a head should tell.

    Source: Lee et al., Improving Transferability of Representations via Augmentation-Aware Self-Supervision, NeurIPS
    2021, and its public code, with two corrections: there the crop of view 2 is mirrored by the flip of view 1, and
    tanh bounds what is predicted of colours, whose differences reach 2. The mean over places instead of pooled
    features of a CNN is a decision of this library.

    Example:
        >>> from ser_reg.views import CroppedViews, Photometric
        >>> make_views = CroppedViews(size=24, photometric=Photometric())
        >>> views = make_views(torch.rand(4, 3, 32, 32))
        >>> z = [torch.randn(4, 64, 6, 6, requires_grad=True) for view in views]
        >>> sorted(AugSelf(dim=64, maker=make_views)(z, views).logs)
        ['chance', 'feature_std', 'r2', 'r2_colour', 'r2_crop']
    """

    wants = "views = CroppedViews(size=224, photometric=Photometric())(images)"
    policy = "cropped"
    dense = False

    def __init__(
        self,
        dim: int,
        crop: float = 0.5,
        colour: float = 0.5,
        flip: float = 0.0,
        turn: float = 0.0,
        blur: float = 0.0,
        solarize: float = 0.0,
        width: int = 512,
        *,
        maker: object = None,
    ) -> None:
        super().__init__(dim, maker=maker)
        check_size("AugSelf(dim, width)", "width", width, "AugSelf(vit.embed_dim)")
        weights = dict(zip(HEADS, (crop, colour, flip, turn, blur, solarize), strict=True))
        for name, weight in weights.items():
            check_number(f"AugSelf(dim, {name})", name, weight, f"AugSelf(dim, {name}=0.5)")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight > 0}
        require(self.weights, "AugSelf(dim)", "no head with a weight", "at least one", "AugSelf(dim, crop=0.5)")
        self.ranges = self._read(maker)
        self.heads = nn.ModuleDict(
            {name: MLP([2 * dim, width, width, HEADS[name].numbers], last_bias=True) for name in self.weights}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())

    def _read(self, maker: object) -> tuple[float, ...]:
        """Half ranges of colours, once it is clear that the maker draws what heads should tell."""
        if maker is None:
            return RANGES
        photometric: Any = getattr(maker, "photometric", None)
        policies = photometric if isinstance(photometric, (tuple, list)) else [photometric]
        ranges = tuple(max(float(getattr(policy, name, 0) or 0) for policy in policies) for name in FACTORS)

        def chance(name: str) -> bool:
            return any((getattr(policy, name, 0) or 0) > 0 for policy in policies)

        area = getattr(maker, "area", (1.0, 1.0))
        draws = {
            "crop": min(area) < 1,
            "colour": any(ranges) and chance("jitter"),
            "flip": getattr(maker, "flip", 1) > 0,
            "turn": bool(getattr(maker, "turned", True)),
            "blur": chance("blur"),
            "solarize": chance("solarize"),
        }
        for name in self.weights:
            given = f"a maker that draws no {name}"
            drawing = {"turn": "CroppedViews(turned=True)", "solarize": "Photometric(solarize=0.2)"}
            drawn = drawing.get(name, "CroppedViews(photometric=Photometric())")
            remedy = f"AugSelf(dim, {name}=0)  # or a maker with {drawn}"
            call = f"AugSelf(dim, maker=make_views, {name}={self.weights[name]:g})"
            require(draws[name], call, given, f"views that differ in {name}", remedy)
        return ranges

    def compare(self, features: list[Tensor], views: list[View], group: dist.ProcessGroup | None) -> Output:
        call = "AugSelf(...)(features, views)"
        y1, y2 = (pooled(z) for z in features)
        described = [self._describe(call, view, y1) for view in views[:2]]
        counts = self.image_counts(call, features, group)
        pairs = torch.cat([torch.cat([y1, y2], 1), torch.cat([y2, y1], 1)])
        loss, chance = 0.0 * pairs.sum(), pairs.new_zeros(())
        found: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            a, b = (side[name] for side in described)
            target = torch.cat([_difference(name, a, b), _difference(name, b, a)])
            predicted = self.heads[name](pairs, group)
            predicted = predicted.tanh() if name == "crop" else predicted
            losses = HEADS[name].losses(predicted, target)
            loss = loss + weight * mean_over_ranks(losses, [2 * n for n in counts], group)
            measure, value, guess = _measure(name, predicted.detach(), target)
            chance = chance + weight * guess
            if not found:
                found[measure] = value
            if len(self.weights) > 1:
                found[f"{measure}_{name}"] = value
        return Output(loss, {**found, "chance": chance, "feature_std": feature_std(torch.cat([y1, y2]))})

    def _describe(self, call: str, view: View, y: Tensor) -> dict[str, Tensor]:
        """What the heads tell of one view, (n, numbers) of each, on the device of the features."""
        n = len(y)
        told: dict[str, Tensor] = {}
        if "crop" in self.weights:
            relation = crops_of(call, view, n, self.wants)
            top, left, height, width = relation.box.unbind(-1)
            x = left + width / 2
            told["crop"] = torch.stack([top + height / 2, torch.where(relation.flip, 1 - x, x), height, width], -1)
        if "colour" in self.weights:
            drawn = drawn_of(call, view, FACTORS, n, self.wants)
            offsets = [drawn[name] - float(name != "hue") for name in FACTORS]
            told["colour"] = torch.stack([x / (half or 1.0) for x, half in zip(offsets, self.ranges, strict=True)], -1)
        for name, values in (("flip", view.relation.flip), ("turn", view.relation.turns)):
            if name in self.weights:
                told[name] = values.expand(n)
        for name, drawn_name in (("blur", "sigma"), ("solarize", "solarize")):
            if name in self.weights:
                told[name] = drawn_of(call, view, [drawn_name], n, self.wants)[drawn_name][:, None]
        return {
            name: values.to(torch.int64 if name == "turn" else y.dtype).to(y.device, non_blocking=True)
            for name, values in told.items()
        }


def _difference(name: str, a: Tensor, b: Tensor) -> Tensor:
    if name == "turn":
        return (b - a).remainder(4)
    return (b - a).abs()[:, None] if name == "flip" else b - a


def _measure(name: str, predicted: Tensor, target: Tensor) -> tuple[str, Tensor, Tensor]:
    """How well a head tells it, by name, and the loss of a head that cannot."""
    if name == "turn":
        return "accuracy", (predicted.argmax(1) == target).float().mean(), predicted.new_full((), math.log(4))
    if name == "flip":
        return "accuracy", ((predicted > 0) == (target > 0.5)).float().mean(), predicted.new_full((), math.log(2))
    return "r2", *explained(predicted, target)
