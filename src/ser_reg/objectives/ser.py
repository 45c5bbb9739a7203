"""Soft equivariance regularization (SER): act, project, compare."""

from __future__ import annotations

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from ..errors import require
from ..geometry import act
from ..losses.ntxent import contrast
from ..views.view import View, relation
from .base import Objective, Output, check_size, matching

__all__ = ["SERLoss"]


class SERLoss(Objective):
    """Soft equivariance: the tokens of a turned image should be the turned tokens.

    Acts with the relation of the two views on the first map, projects the tokens of both (LayerNorm, then a bias-free
    2-layer MLP with GELU), and compares them by the patch-wise NT-Xent loss. The weight λ belongs to your loop.

    The loss is that of the whole batch, whatever the number of ranks. The gradient should reach the encoder: hand over
    features that were not detached.

    Logs: ``matching``, how often a token's best match among the tokens of its own image in the other view is its own
    place (of at most 8 images; chance 1/N): read this one first, as the others can be perfect without any equivariance;
    ``chance``, log of the number of candidates of an anchor, the loss when nothing is told apart; ``accuracy``,
    how often the positive is the best match (of at most 256 anchors); ``feature_std``, the standard deviation over
    tokens of the unit-length projections, all dimensions together: 1 when directions spread evenly, 0 when all tokens
    have collapsed into one.

    Args:
        dim: D, channels of the token maps (``vit.embed_dim``).
        projection_dim: width of both layers of the projector.
        temperature: τ of the loss; 0.3 for MoCo-v3 and Barlow Twins, 0.5 for DINO.
        maker: of no meaning here: geometry is read from the views.

    Raises:
        SERError: a size is no positive whole number, or the temperature is not positive.

    Source: Equations 2 and 3, Section 3.3, Algorithm 1 (lines 13-19) of the paper; the LayerNorm before the projector
    stands in its released code only.

    Example:
        >>> from ser_reg import EquivariantViews
        >>> views = EquivariantViews(patch_size=4, scale=(1, 1), ratio=(1, 1))(torch.rand(4, 3, 24, 24))
        >>> z = [torch.randn(4, 64, 6, 6, requires_grad=True) for view in views]
        >>> out = SERLoss(dim=64)(z, views)
        >>> out.loss.shape, bool(out.loss > 0.9 * out.logs["chance"])        # unrelated features: near chance
        (torch.Size([]), True)
    """

    wants = "views = EquivariantViews(patch_size=16)(images)"

    def __init__(self, dim: int, projection_dim: int = 512, temperature: float = 0.3, *, maker: object = None) -> None:
        super().__init__(dim, maker=maker)
        check_size("SERLoss(dim, projection_dim)", "projection_dim", projection_dim, "SERLoss(vit.embed_dim)")
        fine = 0 < temperature < float("inf")
        call, remedy = "SERLoss(dim, temperature)", "SERLoss(dim, temperature=0.3)"
        require(fine, call, f"temperature={temperature}", "a positive number", remedy)
        self.temperature = temperature
        self.projector = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, projection_dim, bias=False),
            nn.GELU(),
            nn.Linear(projection_dim, projection_dim, bias=False),
        )
        self.keys_width = projection_dim

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def compare(self, features: list[Tensor], views: list[View], group: dist.ProcessGroup | None) -> Output:
        z1, z2 = features
        if len(z1):
            z1 = act(relation(views[0], views[1]), z1)
        else:  # a rank without images takes part in the gather all the same
            z1 = z1.sum((-2, -1), keepdim=True).expand(-1, -1, *z2.shape[-2:])
        height, width = z1.shape[-2:]
        require(
            z1.shape == z2.shape,
            f"SERLoss(...)(features {tuple(features[0].shape)} and {tuple(z2.shape)}, views)",
            f"the relation makes {height} x {width} of the first grid, the second has {z2.shape[-2]} x {z2.shape[-1]}",
            "features of these two views, on patches of the size that the views were made for",
            self.wants,
        )
        dtype = next(self.projector.parameters()).dtype
        tokens1, tokens2 = (self.projector(rearrange(z, "b d h w -> b (h w) d").to(dtype)) for z in (z1, z2))
        loss, chance, accuracy = contrast(tokens1, tokens2, self.temperature, group)
        spread = feature_std(torch.cat([tokens1, tokens2]).detach())
        logs = {"matching": matching(tokens1, tokens2), "chance": chance, "accuracy": accuracy, "feature_std": spread}
        return Output(loss, logs)


def feature_std(tokens: Tensor) -> Tensor:
    """Standard deviation of the directions of (B, N, D) tokens, all dimensions together, in [0, 1]."""
    directions = nn.functional.normalize(tokens.flatten(0, 1).float(), dim=-1)
    spread: Tensor = directions.var(0, correction=0).sum().sqrt()
    return spread
