"""The SER term: act, project, compare."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from .actions import act
from .errors import SERError
from .groups import GroupElement
from .losses import contrast

__all__ = ["SERLoss", "SEROutput"]


class SEROutput(NamedTuple):
    """The loss, and what shows that it works. All are scalars on the device of the features; only the loss has a
    gradient, so that logging the rest costs no synchronisation until it is read."""

    loss: Tensor
    chance: Tensor
    """log of the number of candidates of an anchor: the loss when nothing is told apart."""
    accuracy: Tensor
    """How often the positive is the best match (of at most 256 anchors)."""
    feature_std: Tensor
    """Standard deviation over tokens of the unit-length projections, all dimensions together: 1 when directions
    spread evenly, 0 when all tokens have collapsed into one."""
    finite: Tensor
    """(2,) bool: whether all features of z1, and of z2, were finite. On a CPU a SERError says so
    instead; elsewhere, or compiled, the loss is NaN then."""


class SERLoss(nn.Module):
    """Soft equivariance: the tokens of a turned image should be the turned tokens.

    Acts with the relation on the first map, projects the tokens of both (LayerNorm, then a bias-free 2-layer MLP with
    GELU), and compares them by the patch-wise NT-Xent loss. The weight λ belongs to your loop.

    The projector is trained: give its parameters to the optimiser. In a distributed run wrap this module like the
    model (or put both into one module); the loss then is that of the whole batch, whatever the number of ranks.
    The gradient should reach the encoder: hand over features that were not detached.

    Args:
        dim: D, channels of the token maps (``vit.embed_dim``).
        projection_dim: width of both layers of the projector.
        temperature: τ of the loss; 0.3 for MoCo-v3 and Barlow Twins, 0.5 for DINO.

    Raises:
        SERError: a size is no positive whole number, or the temperature is not positive.

    Source: Equations 2 and 3, Section 3.3, Algorithm 1 (lines 13-19) of the paper; the LayerNorm before the projector
    stands in its released code only.

    Example:
        >>> ser = SERLoss(dim=64)
        >>> pair_relation = GroupElement.sample(4, scale=(1, 1), ratio=(1, 1))
        >>> z1, z2 = torch.randn(2, 4, 64, 6, 6, requires_grad=True)
        >>> out = ser(z1, z2, pair_relation)
        >>> out.loss.shape, bool(out.loss > 0.9 * out.chance)        # unrelated features: near chance
        (torch.Size([]), True)
    """

    def __init__(self, dim: int, projection_dim: int = 512, temperature: float = 0.3) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("projection_dim", projection_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SERError(
                    "SERLoss(dim, projection_dim)",
                    f"{name}={value!r}",
                    "a positive whole number",
                    "SERLoss(vit.embed_dim)",
                )
        if not 0 < temperature < float("inf"):
            raise SERError(
                "SERLoss(dim, temperature)",
                f"temperature={temperature}",
                "a positive number",
                "SERLoss(dim, temperature=0.3)",
            )
        self.dim = dim
        self.temperature = temperature
        self.projector = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, projection_dim, bias=False),
            nn.GELU(),
            nn.Linear(projection_dim, projection_dim, bias=False),
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def forward(
        self, z1: Tensor, z2: Tensor, relative: GroupElement, group: dist.ProcessGroup | None = None
    ) -> SEROutput:
        """The loss of B pairs of token maps.

        Args:
            z1: (B, D, h1, w1), tokens of view 1.
            z2: (B, D, h2, w2), tokens of view 2.
            relative: B elements (or one for all) that take view 1 to view 2 (``pair.relative``).
            group: the processes whose images are one batch; by default all there are.

        Raises:
            SERError: maps of other shapes or devices, grids that differ after the action, one image over all ranks,
                features without gradient in training, or, on a CPU, non-finite features. In a distributed run it is
                raised on every rank.
        """
        call = f"ser(z1 {tuple(z1.shape)}, z2 {tuple(z2.shape)}, relative)"
        # One float32 island: half precision loses tokens in resampling and candidates in the log-sum-exp.
        with torch.autocast(z1.device.type, enabled=False):
            error = None
            try:
                tokens1, tokens2, finite = self._tokens(call, z1, z2, relative)
            except SERError as found:
                error, tokens1, tokens2 = found, z1, z2  # never looked at: other ranks hear of it, and all raise
            loss, chance, accuracy = contrast(
                tokens1, tokens2, self.temperature, symmetric=True, chunk_size=None, group=group, error=error
            )
            return SEROutput(loss, chance, accuracy, _spread(tokens1.detach(), tokens2.detach()), finite)

    def _tokens(self, call: str, z1: Tensor, z2: Tensor, relative: GroupElement) -> tuple[Tensor, Tensor, Tensor]:
        """Projections (B, N, P) of both views, view 1 acted on first, and whether the features were finite."""
        self._check(call, z1, z2)
        weight = next(self.projector.parameters())
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        z1, z2 = z1.to(dtype), z2.to(dtype)
        finite = torch.stack([z1.detach().isfinite().all(), z2.detach().isfinite().all()])
        if finite.device.type == "cpu" and not torch.compiler.is_compiling():
            _raise_unless_finite(call, finite)
        if len(z1):
            z1 = act(relative, z1)
        else:  # a rank without images takes part in the gather all the same
            z1 = z1.sum((-2, -1), keepdim=True).expand(-1, -1, *z2.shape[-2:])
        if z1.shape != z2.shape:
            height, width = z1.shape[-2:]
            raise SERError(
                call,
                f"the action makes {height} x {width} of z1's grid, z2 has {z2.shape[-2]} x {z2.shape[-1]}",
                "the relation of these two views",
                "ser(z1, z2, pair.relative)",
            )
        tokens1, tokens2 = (self.projector(rearrange(z, "b d h w -> b (h w) d").to(weight.dtype)) for z in (z1, z2))
        return tokens1, tokens2, finite

    def _check(self, call: str, z1: Tensor, z2: Tensor) -> None:
        for name, z in (("z1", z1), ("z2", z2)):
            if z.ndim != 4 or z.shape[1] != self.dim:
                raise SERError(
                    call,
                    f"{name} {tuple(z.shape)}",
                    f"token maps (B, {self.dim}, h, w)",
                    f"{name} = patch_tokens(vit, images, layer=3)" if z.ndim != 4 else f"SERLoss({z.shape[1]})",
                )
            if not z.dtype.is_floating_point:
                raise SERError(call, f"{name} of {z.dtype}", "floating point features", f"{name} = {name}.float()")
        if len(z1) != len(z2):
            raise SERError(
                call, f"{len(z1)} and {len(z2)} images", "two views of the same images", "pair = views(images)"
            )
        if self.training and torch.is_grad_enabled() and not (z1.requires_grad or z2.requires_grad):
            raise SERError(
                call,
                "features without gradient, in training",
                "features of the encoder, not detached: else the term trains its projector alone",
                "ser.eval()  # or, to train, patch_tokens(vit, pair.x1, layer=3) outside torch.no_grad()",
            )
        weight = next(self.projector.parameters())
        if not z1.device == z2.device == weight.device:
            raise SERError(
                call,
                f"z1 on {z1.device}, z2 on {z2.device}, the projector on {weight.device}",
                "one device",
                f"ser.to({str(z1.device)!r})",
            )


def _raise_unless_finite(call: str, finite: Tensor) -> None:
    bad = [name for name, fine in zip(("z1", "z2"), finite.tolist(), strict=True) if not fine]
    if bad:
        raise SERError(
            call,
            f"NaN or infinity in {' and '.join(bad)}",
            "finite features",
            "torch.autograd.set_detect_anomaly(True)",
        )


def _spread(*projections: Tensor) -> Tensor:
    tokens = nn.functional.normalize(torch.cat([z.flatten(0, 1).float() for z in projections]), dim=-1)
    spread: Tensor = tokens.var(0, correction=0).sum().sqrt()
    return spread
