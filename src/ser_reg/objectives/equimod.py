"""EquiMod: foresee, from the original and what was done to it, the features of a crop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import require
from ..losses.ntxent import contrast
from ..views.view import View
from .base import Objective, Output, check_number, check_size
from .heads import MLP, pooled
from .measures import feature_std
from .reading import crops_of, drawn_of

__all__ = ["EquiMod"]

DRAWN = ("jitter", "order", "brightness", "contrast", "saturation", "hue", "grey", "blur", "sigma", "solarize")
NAMES = (
    *("top", "left", "height", "width", "flip", "jitter", "order 1", "order 2", "order 3", "order 4"),
    *("brightness", "contrast", "saturation", "hue", "grey", "blur", "sigma", "solarize"),
)
DRAWS, SIDE = 100_000, 256  # of a maker, of square images of this side
# Mean and deviation of each, as CroppedViews(original=True, photometric=Photometric()) draws them.
MEAN = (
    *(0.1649, 0.1649, 0.6703, 0.6703, 0.5, 0.8, 1.2, 1.4, 1.6, 1.8),
    *(1.0, 1.0, 1.0, 0.0, 0.2, 0.5, 0.525, 0.0),
)
DEVIATION = (
    *(0.1457, 0.1457, 0.1893, 0.1893, 0.5, 0.4, 1.1662, 1.0198, 1.0198, 1.1662),
    *(0.2066, 0.2066, 0.1033, 0.0516, 0.4, 0.5, 0.6527, 1.0),
)


class EquiMod(Objective):
    """Predicts the features of a crop from those of the original image and the parameters of what made the crop.

    y = P(features) of the original and of both crops, P an MLP D-`hidden`-`hidden`-`width` whose last batch norm has no
    scale and shift; features that are maps are averaged over their places. p_t = BN(Linear(parameters of view t)), and
    ŷ_t = BN(Linear([y_0; p_t])), the last one without scale and shift; no linear map has a bias, batch norm is over all
    ranks. The loss is NT-Xent over the pairs (y_t, ŷ_t), t = 1, 2, of all images of all ranks, with gradient through
    y_0, y_t and ŷ_t.

    ==========  =======================================================================================
    parameters  of view t, 18 numbers
    ==========  =======================================================================================
    crop        top, left, height, width, in parts of the image; flip
    colour      jitter applied, order of the four operations (4 numbers), brightness, contrast, saturation, hue; grey
    blur        applied, sigma in pixels; solarize applied
    ==========  =======================================================================================

    Where an operation was not applied its numbers are those of the identity. All are standardised by mean and deviation
    of the policy, which the source lists for its own; here they are those of 100,000 draws of the maker.

    Logs: ``accuracy``, how often a crop's prediction is its best match (of at most 256 crops of this rank);
    ``chance``, log of the number of candidates, the loss when nothing is told apart; ``feature_std``, the standard
    deviation of the directions of the y_t, 0 when all are one.

    Args:
        dim: D, channels of the features.
        temperature: of the NT-Xent.
        hidden: width of both hidden layers of the projector P.
        width: of what is compared.
        maker: the maker of the views; by default ``CroppedViews(original=True, photometric=Photometric())``.

    Raises:
        SERError: a size is no positive whole number, or the temperature is not positive.

    Source: Devillers and Lefort, EquiMod: An Equivariance Module to Improve Visual Instance Discrimination, ICLR 2023,
    and its public code (the form beside SimCLR). The mean over places instead of pooled features of a CNN is a decision
    of this library.

    Example:
        >>> from ser_reg.views import CroppedViews, Photometric
        >>> views = CroppedViews(size=24, photometric=Photometric(), original=True)(torch.rand(4, 3, 32, 32))
        >>> z = [torch.randn(4, 64, 6, 6, requires_grad=True) for view in views]
        >>> out = EquiMod(dim=64)(z, views)
        >>> out.loss.shape, out.logs["chance"]        # log(1 + 2 (8 - 1))
        (torch.Size([]), tensor(2.7081))
    """

    wants = "views = CroppedViews(size=224, photometric=Photometric(), original=True)(images)"
    policy = "original"
    encoded = 3
    dense = False
    mean: Tensor
    deviation: Tensor

    def __init__(
        self, dim: int, temperature: float = 0.2, hidden: int = 2048, width: int = 128, *, maker: object = None
    ) -> None:
        super().__init__(dim, maker=maker)
        check_size("EquiMod(dim, hidden)", "hidden", hidden, "EquiMod(vit.embed_dim)")
        check_size("EquiMod(dim, width)", "width", width, "EquiMod(vit.embed_dim)")
        call, remedy = "EquiMod(dim, temperature)", "EquiMod(dim, temperature=0.2)"
        check_number(call, "temperature", temperature, remedy, positive=True)
        self.temperature = temperature
        self.keys_width = width
        mean, deviation = (torch.tensor(MEAN), torch.tensor(DEVIATION)) if maker is None else self._moments(maker)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.projector = MLP([dim, hidden, hidden, width], last_norm="plain")
        self.parameters_head = MLP([len(NAMES), width], last_norm="affine")
        self.predictor = MLP([2 * width, width], last_norm="plain")

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def compare(self, features: list[Tensor], views: list[View], group: dist.ProcessGroup | None) -> Output:
        call = "EquiMod(...)(features, views)"
        n = len(features[0])
        self._check_original(call, views[0], n)
        drawn = torch.cat([self._describe(call, view, n) for view in views[1:3]])
        self.image_counts(call, features, group)
        standard = (drawn.to(features[0].device, non_blocking=True) - self.mean) / self.deviation
        y = self.projector(torch.cat([pooled(z) for z in features]), group)
        original, moved = y[:n], y[n:]
        p = self.parameters_head(standard.to(y.dtype), group)
        foreseen = self.predictor(torch.cat([torch.cat([original, original]), p], 1), group)
        loss, chance, accuracy = contrast(moved[:, None], foreseen[:, None], self.temperature, group)
        return Output(loss, {"accuracy": accuracy, "chance": chance, "feature_std": feature_std(moved)})

    def _check_original(self, call: str, view: View, n: int) -> None:
        """Whether the first view is what its crops are compared with: neither flipped nor turned, its middle theirs."""
        if not hasattr(type(view.relation), "box"):  # a whole image
            fine = not (view.relation.flip | (view.relation.turns != 0)).any()
        else:
            relation = crops_of(call, view, n, self.wants)
            top, left, height, width = relation.box.unbind(-1)
            centred = ((top + height / 2 - 0.5).abs() < 0.05) & ((left + width / 2 - 0.5).abs() < 0.05)
            fine = (centred & ~relation.flip & (relation.turns == 0)).all()
        require(fine, call, "a first view that is no original", "the original ahead of two crops", self.wants)

    def _describe(self, call: str, view: View, n: int) -> Tensor:
        """(n, 18) of the images of a view, float32, on the device of what was drawn."""
        return parameters(crops_of(call, view, n, self.wants), drawn_of(call, view, DRAWN, n, self.wants))

    def _moments(self, maker: object) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each parameter, over both crops; 1 where it does not vary."""
        call = "EquiMod(dim, maker=make_views)"
        given = f"a {type(maker).__name__} without the original"
        wants = "make_views = CroppedViews(size=224, photometric=Photometric(), original=True)"
        require(getattr(maker, "original", False), call, given, "crops, and the original ahead of them", wants)
        drawing: Any = maker
        given = f"a maker of {drawing.views} crop"
        require(drawing.views >= 2, call, given, "two crops, and the original ahead of them", wants)
        plan = drawing.draw(DRAWS, (SIDE, SIDE), torch.Generator().manual_seed(0))
        empty = torch.empty(DRAWS, 0)
        views = [View(empty, relation, drawn) for relation, drawn in zip(plan.relations, plan.drawn, strict=True)]
        drawn = torch.cat([self._describe(call, view, DRAWS) for view in views[-2:]]).double()
        deviation = drawn.std(0, correction=0)
        return drawn.mean(0).float(), torch.where(deviation > 1e-6, deviation, 1.0).float()


def parameters(relation: Any, drawn: dict[str, Tensor]) -> Tensor:
    """(n, 18) numbers, of `NAMES`, float32: what was done to each image."""
    device = drawn["order"].device
    columns = [relation.box, relation.flip[:, None]]
    columns = [values.to(torch.float32).to(device, non_blocking=True) for values in columns]
    for name in DRAWN:
        values = drawn[name].to(torch.float32)
        columns.append(values if values.ndim == 2 else values[:, None])
    return torch.cat(columns, 1)
