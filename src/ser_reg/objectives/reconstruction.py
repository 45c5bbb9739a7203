"""Reconstruction: paint, from the tokens of two views, the images on the way between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import require
from ..views.view import View, relation
from .base import Objective, Output, check_size, mean_over_ranks
from .heads import BatchNorm
from .measures import explained, feature_std, matching

__all__ = ["Reconstruction"]

WIDTH = 256  # of the widest layer of a decoder
LOOKED_AT = 8  # images at most, whose tokens are matched


class Reconstruction(Objective):
    """Reconstructs the images between two views, g_{kθ/(K+1)}(u), from the tokens of both: v1, and v2 = g_θ(u).

    A linear map of its own, D-`width`, takes the tokens of both views; for each of the K targets a decoder of its own
    takes the two concatenated at each place: Linear(2 `width`, 256), then as many up-convolutions (transposed, 4 x 4,
    stride 2, without bias; batch norm over all ranks; ReLU) as lead from a patch to its pixels, each of half the width
    of the one before, the last of `channels` and with a sigmoid instead of the ReLU. Where the patch size is no power
    of two, the nearest one is taken and the image resized bilinearly. The loss is the mean over targets, images and
    pixels of the squared error.

    ========  =======================================================  =======================================
    head      target                                                   loss
    ========  =======================================================  =======================================
    D_k       ``views[1 + k].images``, in [0, 1], before normalising   mean over k of the MSE, k = 1..K
    ========  =======================================================  =======================================

    The linear map stands for the equivariant part of the source's linear head, whose output is split in two: two
    parts of a linear map are two linear maps of the same input. The base method gives up that width through its own
    setting.

    Logs: ``r2``, the share of the targets' variance about the mean image of this rank's batch that is explained;
    ``psnr``, of the mean error, in decibels; ``matching``, how often a token of view 1, moved by the relation to view
    2, matches best at its own place (of at most 8 images; chance 1/N; places seen by both); ``chance``, the loss of
    the mean image; ``feature_std``, the standard deviation of the directions of the tokens, 0 when all are one.

    What the source leaves open, and is decided here: the decoders' widths and kernel; the mean over pixels, which says
    what λ = 1 means; gradients through both views.

    Args:
        dim: D, channels of the token maps.
        width: of the linear map, d_equi of the source; by default 256 D / 384.
        patch_size: pixels a side that a token stands for; by default the maker's, or else 16.
        channels: of the images.
        targets: K, how many images there are on the way; by default as many as the maker makes, or else 2.
        maker: the maker of the views.

    Raises:
        SERError: a size is no positive whole number.

    Source: Wang et al., Self-Supervised Learning Based on Transformed Image Reconstruction for Equivariance-Coherent
    Feature Representation, AAAI 2026, Equations 1 to 4, Figure 1; K = 2 of its Table 9.

    Example:
        >>> from ser_reg.views import PathViews
        >>> make_views = PathViews("rotation", size=32)
        >>> views = make_views(torch.rand(3, 3, 40, 40))
        >>> z = [torch.randn(3, 64, 8, 8, requires_grad=True) for view in views[:2]]
        >>> term = Reconstruction(dim=64, patch_size=4, maker=make_views)
        >>> term(z, views).loss.shape, len(term.decoders)
        (torch.Size([]), 2)
    """

    wants = 'views = PathViews("se2", size=224)(images)'
    policy = "path"

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        patch_size: int | None = None,
        channels: int = 3,
        targets: int | None = None,
        *,
        maker: object = None,
    ) -> None:
        super().__init__(dim, maker=maker)
        width = max(1, round(WIDTH * dim / 384)) if width is None else width
        patch_size = getattr(maker, "patch_size", 16) if patch_size is None else patch_size
        if targets is None:
            targets = getattr(maker, "targets", 2) + bool(getattr(maker, "final", False))
        sizes = {"width": width, "patch_size": patch_size, "channels": channels, "targets": targets}
        for name, value in sizes.items():
            default = {"width": WIDTH, "patch_size": 16, "channels": 3, "targets": 2}[name]
            check_size(f"Reconstruction(dim, {name})", name, value, f"Reconstruction(dim, {name}={default})")
        self.width, self.patch_size, self.channels = width, patch_size, channels
        self.linear = nn.Linear(dim, width)
        self.decoders = nn.ModuleList(_Decoder(2 * width, channels, patch_size) for _ in range(targets))

    def extra_repr(self) -> str:
        return f"width={self.width}, patch_size={self.patch_size}, targets={len(self.decoders)}"

    def compare(self, features: list[Tensor], views: list[View], group: dist.ProcessGroup | None) -> Output:
        call = "Reconstruction(...)(features, views)"
        targets = self._targets(call, features, views)
        counts = self.image_counts(call, features, group, least=1)
        tokens = self._tokens(features)
        loss = 0.0 * tokens.sum()
        errors, r2, chance = [], [], []
        for decoder, target in zip(self.decoders, targets, strict=True):
            painted = decoder(tokens, target.shape[-2:], group)
            each = (painted - target).square().flatten(1).mean(1)
            loss = loss + mean_over_ranks(each, counts, group) / len(targets)
            found = explained(painted, target)
            errors.append(each.detach().mean())
            r2.append(found[0])
            chance.append(found[1])
        logs = {
            "r2": torch.stack(r2).mean(),
            "psnr": -10 * torch.stack(errors).clamp(min=1e-12).log10().mean(),
            "matching": self._matching(tokens.detach(), views),
            "chance": torch.stack(chance).mean(),
            "feature_std": feature_std(rearrange(tokens, "b (v d) h w -> (b v h w) d", v=2)),
        }
        return Output(loss, logs)

    @torch.no_grad()
    def pictures(self, features: Sequence[Tensor], views: Sequence[View]) -> tuple[list[Tensor], list[Tensor]]:
        """Targets and what is painted of them, (B, C, H, W) each, K of both, as in evaluation: for a report.

        Args:
            features, views: as for a call.

        Raises:
            SERError: as a call does.

        Example:
            >>> from ser_reg.views import PathViews
            >>> views = PathViews("blur", size=32)(torch.rand(3, 3, 40, 40))
            >>> z = [torch.randn(3, 64, 8, 8) for view in views[:2]]
            >>> targets, painted = Reconstruction(dim=64, patch_size=4).pictures(z, views)
            >>> len(painted), painted[0].shape
            (2, torch.Size([3, 3, 32, 32]))
        """
        call = "Reconstruction(...).pictures(features, views)"
        training = self.training
        self.eval()
        try:
            with torch.autocast(features[0].device.type, enabled=False):
                checked = self._checked(call, features, views)
                targets = self._targets(call, checked, list(views))
                tokens = self._tokens(checked)
                painted = [d(tokens, t.shape[-2:], None) for d, t in zip(self.decoders, targets, strict=True)]
        finally:
            self.train(training)
        return targets, painted

    def _tokens(self, features: Sequence[Tensor]) -> Tensor:
        """(B, 2 width, h, w), of both views at each place."""
        z = (self.linear(rearrange(map_, "b d h w -> b h w d")) for map_ in features)
        return rearrange(torch.cat(list(z), -1), "b h w d -> b d h w")

    def _targets(self, call: str, features: Sequence[Tensor], views: Sequence[View]) -> list[Tensor]:
        """The images to paint, once they fit the decoders."""
        z1, z2 = features
        given = f"features {tuple(z1.shape)} and {tuple(z2.shape)}"
        require(z1.shape == z2.shape, call, given, "views of one size", self.wants)
        found = [view.images for view in views[2:]]
        given, many = f"{len(found)} views behind the two that are encoded", len(self.decoders)
        on_a_path = found and all("theta" in view.drawn for view in views[1:])
        other = f"Reconstruction(dim, targets={len(found)})" if on_a_path else self.wants
        require(len(found) == many, call, given, f"{many} images on the way", other)
        height, width = z1.shape[-2:]
        for i, images in enumerate(found, start=1):
            given = f"target {i} {tuple(images.shape)} for features {tuple(z1.shape)}"
            shape = (len(z1), self.channels)
            require(images.ndim == 4 and images.shape[:2] == shape, call, given,
                    f"images ({len(z1)}, {self.channels}, H, W)", self.wants)  # fmt: skip
            patch = self.patch_size
            off = max(abs(images.shape[-2] - height * patch), abs(images.shape[-1] - width * patch))
            near = max(1, round(images.shape[-2] / height))
            expected = f"one token for {patch} x {patch} pixels"
            require(off < patch, call, given, expected, f"Reconstruction(dim, patch_size={near})")
            if images.device.type == "cpu" and images.numel():  # elsewhere the host would have to wait
                low, high = (float(end) for end in images.aminmax())
                given = f"target {i} from {low:.3g} to {high:.3g}"
                remedy = "PathViews(normalize=IMAGENET)  # which normalises what is encoded alone"
                require(-0.01 <= low <= high <= 1.01, call, given, "targets in [0, 1], not normalised", remedy)
        return [images.to(z1.device, z1.dtype) for images in found]

    @torch.no_grad()
    def _matching(self, tokens: Tensor, views: Sequence[View]) -> Tensor:
        """Of tokens that view 1 and view 2 have at the same place of the image."""
        n = len(tokens)
        if not n:
            return tokens.new_full((), math.nan)
        step = -(-n // LOOKED_AT)
        z1, z2 = tokens[::step].chunk(2, 1)
        moves = relation(views[0], views[1])
        moves = moves[::step] if len(moves) == n else moves
        moved, valid = moves.warp(z1, (z2.shape[-2], z2.shape[-1]))
        tokens1, tokens2 = (rearrange(z, "b d h w -> b (h w) d") for z in (moved, z2))
        return matching(tokens1, tokens2, valid=None if valid is None else valid.flatten(1))


class _Decoder(nn.Module):
    """From the tokens of both views to an image."""

    def __init__(self, width: int, channels: int, patch_size: int) -> None:
        super().__init__()
        doublings = round(math.log2(patch_size))
        widths = [WIDTH, *(max(channels, WIDTH // 2**i) for i in range(1, doublings)), channels]
        widths = widths if doublings else [channels]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.linear = nn.Conv2d(width, widths[0], 1)  # a linear map at each place
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(BatchNorm(width) for width in widths[1:])

    def forward(self, tokens: Tensor, size: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
        """(B, channels, *size) in [0, 1] of tokens (B, width, h, w)."""
        x = self.linear(tokens)
        for i, (up, norm) in enumerate(zip(self.ups, self.norms, strict=True), start=1):
            x = norm(up(x), group)
            x = x if i == len(self.ups) else F.relu(x)
        x = x.sigmoid()
        return x if x.shape[-2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear")
