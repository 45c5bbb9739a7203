"""How equivariant is a model? The paper's score, beside what an unrelated image would score."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry import GroupElement, act
from .base import Scores, measured

__all__ = ["equivariance_score"]


def equivariance_score(
    model: nn.Module,
    images: Tensor,
    layers: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
    channels: str = "trivial",
) -> Scores:
    """Cosine between ρ_g f(x) and f(ρ_g x) over patch tokens, by transformation and layer.

    The mean over images, tokens and the elements of a transformation: "rotation" by one, two and three quarter turns,
    "flip", and "scale" of both sides by 5/6 and 7/6, in whole patches and at least one. A model of one static image
    size is scored without "scale" and, if that size is not square, without "rotation": the keys are left out. f is
    the output of a block (or stage), before the final norm, [CLS] where the model has it.

    Two readings, because a high cosine alone proves nothing: tokens that hardly vary over space score near 1 under
    any action.

    - "raw": the cosine itself, as in the paper;
    - "spatial": each map's own mean token is removed first, so that only what varies over space is compared;
    - "raw_floor", "spatial_floor": the same with ρ_g x replaced by another image's. A score means something as far
      as it lies above its floor.

    Args:
        model: one that `patch_tokens` accepts; left in the mode it was in.
        images: (B, C, H, W), at least two, square or not.
        layers: numbers of blocks already run; each of them by default.
        generator: which other image serves as the floor.
        channels: what ρ_g does to channels: "trivial", nothing, as in the paper; "regular", what
            ``SERLoss(channels="regular")`` does.

    Returns:
        ``scores[transformation][layer][reading]``, numbers in [-1, 1].

    Raises:
        SERError: fewer than two images, layers that are no list of numbers, channels that the tokens do not have, or
            what `patch_tokens` raises.

    Source: Appendix A.2 of the paper ("Equivariance score", Table 4) for the raw reading.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, dynamic_img_size=True)
        >>> scores = equivariance_score(vit, torch.rand(4, 3, 64, 64), layers=[1, 2])
        >>> list(scores), list(scores["flip"]), list(scores["flip"][2])
        (['rotation', 'flip', 'scale'], [1, 2], ['raw', 'spatial', 'raw_floor', 'spatial_floor'])
    """

    def measure(g: GroupElement, maps: Tensor, moved: Tensor, other: Tensor) -> dict[str, float]:
        return _readings(act(g, maps), moved, other)

    return measured("equivariance_score", model, images, layers, generator, channels, measure)


def _readings(acted: Tensor, moved: Tensor, other: Tensor) -> dict[str, float]:
    """The four readings for maps ρ_g f(x) and f(ρ_g x)."""
    floor = moved[other]
    pairs = {"raw": (acted, moved), "spatial": (_spatial(acted), _spatial(moved))}
    pairs |= {"raw_floor": (acted, floor), "spatial_floor": (_spatial(acted), _spatial(floor))}
    return {key: F.cosine_similarity(a, b, dim=1).mean().item() for key, (a, b) in pairs.items()}


def _spatial(maps: Tensor) -> Tensor:
    return maps - maps.mean((-2, -1), keepdim=True)
