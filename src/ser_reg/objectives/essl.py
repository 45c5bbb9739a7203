"""E-SSL: tell by which quarter turn a small crop was turned."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from ..views.view import View
from .base import Objective, Output, check_size, mean_over_ranks
from .heads import pooled
from .measures import feature_std

__all__ = ["ESSL"]


class ESSL(Objective):
    """Predicts the quarter turn of a view that shows each image in all four.

    The features (the mean over places, if they are maps) go through (Linear, LayerNorm, ReLU) twice, Linear, LayerNorm,
    Linear, of widths D-D-D-`hidden`-4; the loss is the cross-entropy of the view's own turn, averaged over all images
    of all ranks. One view of 4B images is enough, a small one of little cost.

    =========  ====================================  =============
    head       target                                loss
    =========  ====================================  =============
    turn, 4    ``views[0].relation.turns``           cross-entropy
    =========  ====================================  =============

    Logs: ``accuracy``, how often the turn is found, of this rank's images (chance 1/4); ``chance``, log 4, the loss
    when nothing is told; ``feature_std``, the standard deviation of the directions of the features, 0 when all are one.

    Weights of the source: 0.08 beside SimSiam, 0.4 SimCLR, 8 Barlow Twins; it leaves open that beside MoCo-v3 and DINO,
    where 0.4 is taken here.

    Args:
        dim: D, channels of the features.
        hidden: width of the last hidden layer; the source takes 256, and 128 beside SimCLR.
        maker: of no meaning here: turns are read from the views.

    Raises:
        SERError: a size is no positive whole number.

    Source: Dangovski et al., Equivariant Contrastive Learning, ICLR 2022, and its public code. The mean over places
    instead of pooled features of a CNN is a decision of this library.

    Example:
        >>> from ser_reg import GroupElement, View
        >>> turns = GroupElement(torch.arange(4).repeat_interleave(2), torch.zeros(8).bool(), torch.ones(8, 2).double())
        >>> view = View(torch.rand(8, 3, 24, 24), turns, {})
        >>> out = ESSL(dim=64)([torch.randn(8, 64, 6, 6, requires_grad=True)], [view])
        >>> out.loss.shape, out.logs["chance"]
        (torch.Size([]), tensor(1.3863))
    """

    wants = 'views = CroppedViews(size=96, area=(0.05, 0.14), views=1, turned="all", photometric=Photometric())(images)'
    policy = "turned"
    encoded = 1
    dense = False
    default_weight = 0.4

    def __init__(self, dim: int, hidden: int = 256, *, maker: object = None) -> None:
        super().__init__(dim, maker=maker)
        check_size("ESSL(dim, hidden)", "hidden", hidden, "ESSL(vit.embed_dim)")
        self.head = nn.Sequential(
            nn.Linear(dim, dim),
            nn.LayerNorm(dim),
            nn.ReLU(),
            nn.Linear(dim, dim),
            nn.LayerNorm(dim),
            nn.ReLU(),
            nn.Linear(dim, hidden),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 4),
        )

    def compare(self, features: list[Tensor], views: list[View], group: dist.ProcessGroup | None) -> Output:
        call = "ESSL(...)(features, views)"
        y = pooled(features[0])
        turns = self._turns(call, views[0], len(y)).to(y.device, non_blocking=True)
        counts = self.image_counts(call, features, group, least=1)
        predicted = self.head(y)
        loss = mean_over_ranks(F.cross_entropy(predicted, turns, reduction="none"), counts, group)
        logs = {
            "accuracy": (predicted.detach().argmax(1) == turns).float().mean(),
            "chance": loss.new_full((), math.log(4)),
            "feature_std": feature_std(y),
        }
        return Output(loss, logs)

    def _turns(self, call: str, view: View, n: int) -> Tensor:
        """(n,) of the images, on the CPU."""
        turns = view.relation.turns.expand(n)
        often = torch.bincount(turns, minlength=4).tolist()
        given = f"views of which {often} are turned by 0, 1, 2, 3 quarters"
        require(len(set(often)) == 1, call, given, "every image turned all four ways", self.wants)
        return turns
