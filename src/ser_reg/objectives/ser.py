"""Soft equivariance regularization (SER): act, project, compare."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from ..errors import SERError, require
from ..geometry import Affine, GroupElement, act, check_channels, move_channels
from ..losses.ntxent import contrast
from ..losses.tokens import places, to_device
from ..views.view import View, relation
from .base import Objective, Output, check_number, check_size
from .measures import feature_std, matching

__all__ = ["SERLoss"]


class SERLoss(Objective):
    """Soft equivariance: the tokens of a turned image should be the turned tokens.

    Acts with the relation of the two views on the first map, projects the tokens of both (LayerNorm, then a bias-free
    2-layer MLP with GELU), and compares them by the patch-wise NT-Xent loss. The weight λ belongs to your loop.

    Views may be whole images, as the paper has them, or crops (a decision of this library), whose relation is an
    `Affine`: the first map is resampled onto the grid of the second, and places that the first view has not seen are
    left out everywhere, so that the tokens of the SSL forward itself will do. If fewer than two images of all
    ranks have a place that both views have seen, the loss is zero, with a gradient of zeros.

    The loss is that of the whole batch, whatever the number of ranks. The gradient should reach the encoder: hand over
    features that were not detached.

    Logs: ``matching``, how often a token's best match among the tokens of its own image in the other view is its own
    place (of at most 8 images; chance 1/N): read this one first, as the others can be perfect without any equivariance;
    ``chance``, log of the number of candidates of an anchor, the loss when nothing is told apart; ``accuracy``,
    how often the positive is the best match (of at most 256 anchors); ``feature_std``, the standard deviation over
    tokens of the unit-length projections, all dimensions together: 1 when directions spread evenly, 0 when all tokens
    have collapsed into one; ``valid``, the share of this rank's places that were compared: 1 for whole images, 0 where
    nothing could be (then ``chance`` is 0 too, and ``accuracy`` NaN).

    Args:
        dim: D, channels of the token maps (``vit.embed_dim``).
        projection_dim: width of both layers of the projector.
        temperature: τ of the loss; 0.3 for MoCo-v3 and Barlow Twins, 0.5 for DINO.
        channels: what a turn or flip does to a token beside moving it: "trivial", nothing, as in the paper, so that a
            token has to look the same from every side, which erases orientation from it; "regular" (a decision of this
            library, with the idea of rotation steerers), permute eight blocks of channels as it permutes the eight
            turns and flips, so that a token can keep which way is up. 8 then divides D. The scores take the same word.
        maker: of no meaning here: geometry is read from the views.

    Raises:
        SERError: a size is no positive whole number, the temperature is not positive, or the channels have another name
            or are no multiple of 8.

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
    policy = "equivariant"
    default_weight = 0.5
    half_precision = True

    def __init__(
        self,
        dim: int,
        projection_dim: int = 512,
        temperature: float = 0.3,
        channels: Literal["trivial", "regular"] = "trivial",
        *,
        maker: object = None,
    ) -> None:
        super().__init__(dim, maker=maker)
        check_size("SERLoss(dim, projection_dim)", "projection_dim", projection_dim, "SERLoss(vit.embed_dim)")
        call, remedy = "SERLoss(dim, temperature)", "SERLoss(dim, temperature=0.3)"
        check_number(call, "temperature", temperature, remedy, positive=True)
        check_channels(f"SERLoss({dim}, channels={channels!r})", channels, dim)
        self.temperature = temperature
        self.channels = channels
        self.projector = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, projection_dim, bias=False),
            nn.GELU(),
            nn.Linear(projection_dim, projection_dim, bias=False),
        )
        self.keys_width = projection_dim

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, channels={self.channels!r}"

    def compare(self, features: list[Tensor], views: list[View], group: dist.ProcessGroup | None) -> Output:
        z1, z2 = features
        valid = None
        if len(z1):
            z1, valid = self._act(relation(views[0], views[1]), z1, (z2.shape[-2], z2.shape[-1]))
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
        tokens1, tokens2 = self._project([z1, z2], valid)
        loss, chance, accuracy = contrast(tokens1, tokens2, self.temperature, group, valid)
        if valid is None:
            matched, used = matching(tokens1, tokens2), chance.new_full((), 1.0 if len(z1) else float("nan"))
        else:
            share = valid.sum().item() / valid.numel()
            matched, used = _matching(tokens1, tokens2, valid), torch.where(chance > 0, share, 0.0)
        spread = feature_std(torch.cat([tokens1, tokens2]))
        logs = {"matching": matched, "chance": chance, "accuracy": accuracy, "feature_std": spread, "valid": used}
        return Output(loss, logs)

    def _act(self, g: GroupElement | Affine, z1: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The first map as the second view has it and, of crops, (B, N) on the CPU which places it has seen."""
        if isinstance(g, GroupElement):
            moved, valid = act(g, z1), None
        else:
            moved, _ = g.warp(z1, size)
            valid = g.valid(size).cpu().flatten(1).expand(len(z1), -1)
        try:
            return move_channels(g, moved, self.channels), valid
        except SERError as error:  # of another angle
            call, remedy = f"SERLoss(..., channels={self.channels!r})(features, views)", "SERLoss(dim)"
            raise SERError(call, error.given, "quarter turns and flips, which can act on channels", remedy) from error

    def _project(self, maps: list[Tensor], valid: Tensor | None) -> list[Tensor]:
        """(B, N, width) each; of valid places alone, (T, width), where it is known which these are."""
        dtype = next(self.projector.parameters()).dtype
        if valid is None:
            return [self.projector(rearrange(z, "b d h w -> b (h w) d").to(dtype)) for z in maps]
        chosen = places(valid, maps[0].device)
        tokens = [rearrange(z, "b d h w -> (b h w) d").index_select(0, chosen) for z in maps]
        return [self.projector(z.to(dtype)) for z in tokens]


def _matching(tokens1: Tensor, tokens2: Tensor, valid: Tensor, images: int = 8) -> Tensor:
    """`matching` of tokens (T, D) of valid places alone, over some images that have any, evenly spaced."""
    seen = valid.any(1).nonzero().squeeze(1)
    few = seen[torch.arange(min(images, len(seen))) * len(seen) // max(1, min(images, len(seen)))]
    of_few = torch.zeros(len(valid), dtype=torch.bool).index_fill(0, few, True)[:, None] & valid
    source, target = places(of_few[valid], tokens1.device), places(valid[few], tokens1.device)
    empty = tokens1.new_zeros(len(few) * valid.shape[1], tokens1.shape[-1])
    shape = (len(few), valid.shape[1], tokens1.shape[-1])
    padded1, padded2 = (empty.index_copy(0, target, z.detach()[source]).view(shape) for z in (tokens1, tokens2))
    return matching(padded1, padded2, valid=to_device(valid[few], tokens1.device))
