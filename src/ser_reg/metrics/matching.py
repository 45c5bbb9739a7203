"""Do tokens find themselves again in a moved image? Dense matching under a known transformation."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry import GroupElement
from .base import Scores, measured

__all__ = ["matching_score"]

PCK = 0.10  # of the longer side of the grid, how far off a match may be
TIE = 1e-6  # cosines that close are one
PAIRS = 2**24  # of tokens, whose similarities are held at a time


def matching_score(
    model: nn.Module,
    images: Tensor,
    layers: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
    channels: str = "trivial",
) -> Scores:
    """How often a token's best match in the moved image is where the token went, by transformation and layer.

    Every patch token of an image looks for the token of largest cosine among all tokens of the moved copy of the same
    image. Nothing constant can help it, which is what `equivariance_score` has to subtract. Transformations, f and the
    layers are those of `equivariance_score`. Where the grid has another size, a token went to a place between tokens.

    - "top1": the match is the token in which the true place lies (either of two, on their border);
    - "near": it is that one or one of its eight neighbours;
    - "pck": its centre is at most a tenth of the longer side of the grid away from the true place;
    - "chance": of top1, one in the number of tokens;
    - "position": top1 when the tokens of another moved image are searched, of which no content is right. What a model
      scores here it finds by position alone, so that top1 means something as far as it lies above.

    A match that another candidate equals is none: a model all of whose tokens are alike scores 0.

    Args:
        model: one that `patch_tokens` accepts; left in the mode it was in.
        images: (B, C, H, W), at least two, square or not.
        layers: numbers of blocks already run; each of them by default.
        generator: which other image is searched for "position".
        channels: "trivial", or "regular" to turn the channels of a token as ``SERLoss(channels="regular")`` does before
            it looks for its match.

    Returns:
        ``scores[transformation][layer][reading]``, numbers in [0, 1]: means over tokens, images and elements.

    Raises:
        SERError: fewer than two images, layers that are no list of numbers, channels that the tokens do not have, or
            what `patch_tokens` raises.

    Source: a decision of this library, as the paper measures cosines alone (Appendix A.2). "pck" is the
    percentage of correct keypoints of semantic correspondence at α = 0.10, of the grid instead of an object's box,
    averaged per image.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, dynamic_img_size=True)
        >>> scores = matching_score(vit, torch.rand(4, 3, 64, 64), layers=[2])
        >>> list(scores), list(scores["flip"][2])
        (['rotation', 'flip', 'scale'], ['top1', 'near', 'pck', 'chance', 'position'])
        >>> scores["flip"][2]["chance"]
        0.0625
    """

    def measure(g: GroupElement, maps: Tensor, moved: Tensor, other: Tensor) -> dict[str, float]:
        off = distances(g, _grid(maps), _grid(moved)).to(maps.device)
        within = {"top1": _in_each_direction(off, 0.5), "near": _in_each_direction(off, 1.5)}
        within["pck"] = off.square().sum(-1).sqrt() <= PCK * max(_grid(moved)) + TIE
        readings = _hits(maps, moved, within)
        readings["chance"] = 1 / math.prod(_grid(moved))
        readings["position"] = _hits(maps, moved[other], {"top1": within["top1"]})["top1"]
        return readings

    return measured("matching_score", model, images, layers, generator, channels, measure)


def distances(g: GroupElement, grid: tuple[int, int], moved: tuple[int, int]) -> Tensor:
    """(N, N', 2) float64: rows and columns from where each token of a grid goes to each token of the moved grid.

    Args:
        g: one element.
        grid: (h, w) of the tokens.
        moved: (h', w') of those of the moved image.

    Example:
        >>> distances(GroupElement.turn(1), (1, 2), (2, 1))[:, :, 0]    # counter-clockwise: the left one goes down
        tensor([[-1.,  0.],
                [ 0.,  1.]], dtype=torch.float64)
    """
    # In half sides from the centre, where an element is a turn and a flip whatever the sizes of the grids.
    linear = GroupElement(g.turns, g.flip, torch.ones_like(g.scale)).matrix()[0].to("cpu")
    sides = torch.tensor(moved, dtype=torch.float64)
    place = (_places(grid) @ linear.T + 1) * sides / 2
    candidate = (_places(moved) + 1) * sides / 2
    return candidate - place[:, None]


def _places(grid: tuple[int, int]) -> Tensor:
    """(N, 2) float64: row and column of every token from the centre, in half sides."""
    axes = [(2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in grid]
    return torch.cartesian_prod(*axes).view(-1, 2)


def _grid(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def _in_each_direction(off: Tensor, tokens: float) -> Tensor:
    return (off.abs() <= tokens + TIE).all(-1)


def _hits(maps: Tensor, moved: Tensor, within: dict[str, Tensor]) -> dict[str, float]:
    """How often the best match is one of those (N, N') that count, more similar than any that does not."""
    x1, x2 = (F.normalize(z.flatten(2).mT, dim=-1) for z in (maps, moved))
    found: dict[str, list[Tensor]] = {name: [] for name in within}
    some = max(1, PAIRS // (x1.shape[1] * x2.shape[1]))
    for ours, theirs in zip(x1.split(some), x2.split(some), strict=True):
        similar = ours @ theirs.mT
        for name, right in within.items():
            best, other = (similar.masked_fill(left_out, -math.inf).amax(-1) for left_out in (~right, right))
            found[name].append((best > other + TIE).float().mean(-1))
    return {name: torch.cat(shares).mean().item() for name, shares in found.items()}
