"""STL: learn what was done to an image from two views of it, so that it foresees what the same does to another."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import require
from ..losses.ntxent import contrast
from ..views.view import View
from .base import Objective, Output, check_number, check_size
from .heads import MLP, pooled
from .measures import feature_std
from .reading import crops_of

__all__ = ["STL"]

ALIGNED = ("jitter", "order", "brightness", "contrast", "saturation", "hue", "grey")  # what the two of a pair share
CODE = 128  # width of the code of a transformation


class STL(Objective):
    """A code for the transformation between two views, by which the features of another image are transformed.

    Images come in pairs (2i, 2i+1), neighbours on one rank, whose views were made by the same crop, colours and
    greyscale. With y_1, y_2 the features of the two views (averaged over places, if they are maps), the code is
    t_12 = MLP 2D-128-128 of [y_1; y_2], and view 1 is foreseen from view 2 by the code of the *partner*,
    ŷ_1 = W(t_21 of the partner) y_2, where W = Linear(128, D·D) gives a matrix of each code; likewise ŷ_2. All MLPs
    have linear maps without bias, batch norm over all ranks and ReLU, and end in a linear map. The loss is the
    weighted sum of three NT-Xent over the images of all ranks:

    ==============  ======================================================  =============  ======
    head            what is compared                                        projected by   weight
    ==============  ======================================================  =============  ======
    equivariance    [y_1; y_2] with [ŷ_1; ŷ_2]                              D-512-128      1
    transformation  [t_12; t_21] of even images with those of odd partners  128-128-128    0.1
    invariance      y_1 with y_2                                            D-512-128      0
    ==============  ======================================================  =============  ======

    A head of weight 0 is not built. The source has invariance 1; here it is 0, because the base method already asks
    for it. W has D·D·128 weights, 18.9 million at D = 384; ``rank=8`` makes it the product of two matrices D x 8 of
    each code, with 2·D·8·128 weights (a decision of this library, off by default). The D x D matrices themselves are
    never made.

    Logs: ``accuracy``, how often the positive of the first head that is built is the best match (of at most 256 images
    of this rank), and with several heads also by name, as ``accuracy_transformation``; ``chance``, the loss when
    nothing is told apart; ``feature_std``, the standard deviation of the directions of the features, 0 when all are
    one.

    Projectors see y and ŷ one after the other, as in the source, each batch normalised by its own statistics. In
    evaluation both take the running ones, which fit neither: read the loss and the logs of training mode.

    Args:
        dim: D, channels of the features.
        equivariance: weight of foreseeing one view from the other.
        transformation: weight of telling the transformation, whatever the image.
        invariance: weight of telling the image, whatever the transformation.
        temperature: of all three.
        rank: of W's matrices; None: full.
        maker: of no meaning here: pairs are neighbours.

    Raises:
        SERError: a size is no positive whole number, a weight is negative or all are 0, or the temperature is not
            positive.

    Source: Yu et al., Self-supervised Transformation Learning for Equivariant Representations, NeurIPS 2024, and its
    public code. The mean over places instead of pooled features of a CNN is a decision of this library.

    Example:
        >>> from ser_reg.views import CroppedViews, Photometric
        >>> views = CroppedViews(size=24, photometric=Photometric(), paired=True)(torch.rand(6, 3, 32, 32))
        >>> z = [torch.randn(6, 64, 6, 6, requires_grad=True) for view in views]
        >>> out = STL(dim=64, rank=8)(z, views)
        >>> out.loss.shape, [name for name in out.logs if "accuracy" in name]
        (torch.Size([]), ['accuracy', 'accuracy_equivariance', 'accuracy_transformation'])
    """

    wants = "views = CroppedViews(size=224, photometric=Photometric(), paired=True)(images)"
    policy = "paired"
    dense = False

    def __init__(
        self,
        dim: int,
        equivariance: float = 1.0,
        transformation: float = 0.1,
        invariance: float = 0.0,
        temperature: float = 0.2,
        rank: int | None = None,
        *,
        maker: object = None,
    ) -> None:
        super().__init__(dim, maker=maker)
        call = "STL(dim, temperature)"
        check_number(call, "temperature", temperature, "STL(dim, temperature=0.2)", positive=True)
        weights = {"equivariance": equivariance, "transformation": transformation, "invariance": invariance}
        for name, weight in weights.items():
            check_number(f"STL(dim, {name})", name, weight, f"STL(dim, {name}=0.1)")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight > 0}
        require(self.weights, "STL(dim)", "no loss with a weight", "at least one", "STL(dim, equivariance=1)")
        if rank is not None:
            check_size("STL(dim, rank)", "rank", rank, "STL(dim, rank=8)")
        self.temperature = temperature
        self.rank = rank
        self.keys_width = CODE
        self.code = MLP([2 * dim, CODE, CODE]) if {"equivariance", "transformation"} & set(self.weights) else None
        self.transform = _Transform(dim, rank) if "equivariance" in self.weights else None
        widths = {name: [CODE, CODE, CODE] if name == "transformation" else [dim, 512, CODE] for name in self.weights}
        self.projectors = nn.ModuleDict({name: MLP(widths[name]) for name in self.weights})

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        return f"{weights}, temperature={self.temperature}"

    def compare(self, features: list[Tensor], views: list[View], group: dist.ProcessGroup | None) -> Output:
        call = "STL(...)(features, views)"
        for view in views[:2]:
            self._check_pairs(call, view, len(features[0]))
        self.image_counts(call, features, group)
        y1, y2 = (pooled(z) for z in features)
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        if self.code is not None:
            t12, t21 = (self.code(torch.cat(y, 1), group) for y in ((y1, y2), (y2, y1)))
            if self.transform is not None:
                project = self.projectors["equivariance"]
                foreseen = self.transform(y2, _partners(t21)), self.transform(y1, _partners(t12))
                sides = [torch.cat([project(y, group) for y in side]) for side in ((y1, y2), foreseen)]
                pairs["equivariance"] = sides[0], sides[1]
            if "transformation" in self.weights:
                project = self.projectors["transformation"]
                even, odd = (project(torch.cat([t12[i::2], t21[i::2]]), group) for i in (0, 1))
                pairs["transformation"] = even, odd
        if "invariance" in self.weights:
            project = self.projectors["invariance"]
            pairs["invariance"] = project(y1, group), project(y2, group)
        return self._contrasts(pairs, torch.cat([y1, y2]), group)

    def _contrasts(self, pairs: dict[str, tuple[Tensor, Tensor]], y: Tensor, group: dist.ProcessGroup | None) -> Output:
        loss, chance = 0.0 * y.sum(), y.new_zeros(())
        logs: dict[str, Tensor] = {}
        for name, (z1, z2) in pairs.items():
            found = contrast(z1[:, None], z2[:, None], self.temperature, group)
            loss = loss + self.weights[name] * found.loss
            chance = chance + self.weights[name] * found.chance
            if not logs:
                logs["accuracy"] = found.accuracy
            if len(pairs) > 1:
                logs[f"accuracy_{name}"] = found.accuracy
        return Output(loss, {**logs, "chance": chance, "feature_std": feature_std(y)})

    def _check_pairs(self, call: str, view: View, n: int) -> None:
        """Whether images 2i and 2i+1 of a view were changed alike, as far as the CPU knows."""
        require(n % 2 == 0, call, f"{n} images", "an even number: images 2i and 2i+1 are a pair", self.wants)
        drawn = [name for name in ALIGNED if name in view.drawn]
        shared = {name: view.drawn[name] for name in drawn if view.drawn[name].device.type == "cpu"}
        if not drawn:  # no colours: the crop alone is shared
            shared = {"box": crops_of(call, view, n, self.wants).box}
        for name, values in shared.items():
            require(len(values) == n, call, f"{len(values)} values of {name} for {n} images", "one each", self.wants)
            alike = torch.allclose(values[::2].double(), values[1::2].double(), rtol=0, atol=1e-6)
            require(alike, call, f"images 2i and 2i+1 of different {name}", "images in pairs", self.wants)


def _partners(rows: Tensor) -> Tensor:
    """Rows 2i and 2i+1 exchanged."""
    pairs: Tensor = rows.view(len(rows) // 2, 2, rows.shape[1])
    return pairs.flip(1).flatten(0, 1)


class _Transform(nn.Module):
    """W(t) y, linear in the code t and in the features y."""

    def __init__(self, dim: int, rank: int | None) -> None:
        super().__init__()
        self.dim, self.rank = dim, rank
        sizes = [dim * dim] if rank is None else [dim * rank, dim * rank]
        self.matrices = nn.ModuleList(nn.Linear(CODE, size, bias=False) for size in sizes)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        moved: Tensor
        if self.rank is None:
            # (W(t) y)_o = sum over i, k of weight[o, i, k] y_i t_k: the products y_i t_k take less than matrices W(t).
            (weight,) = self.parameters()
            moved = (y[:, :, None] * t[:, None, :]).flatten(1) @ weight.view(self.dim, -1).mT
        else:
            left, right = (matrix(t).view(len(t), self.dim, self.rank) for matrix in self.matrices)
            moved = (left @ (right.mT @ y[:, :, None]))[:, :, 0]
        return moved
