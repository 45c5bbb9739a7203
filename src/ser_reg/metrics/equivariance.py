"""How equivariant is a model? The paper's score, beside what an unrelated image would score."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones import Backbone, backbone
from ..errors import require, require_tensor
from ..geometry import GroupElement, act

__all__ = ["equivariance_score", "transformations"]

BATCH = 64  # images at a time
STEP = 1 / 6  # of a side, what "scale" takes away or adds: inside the range of T_eq


def equivariance_score(
    model: nn.Module,
    images: Tensor,
    layers: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, dict[int, dict[str, float]]]:
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

    Returns:
        ``scores[transformation][layer][reading]``, numbers in [-1, 1].

    Raises:
        SERError: fewer than two images, layers that are no list of numbers, or what `patch_tokens` raises.

    Source: Appendix A.2 of the paper ("Equivariance score", Table 4) for the raw reading.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, dynamic_img_size=True)
        >>> scores = equivariance_score(vit, torch.rand(4, 3, 64, 64), layers=[1, 2])
        >>> list(scores), list(scores["flip"]), list(scores["flip"][2])
        (['rotation', 'flip', 'scale'], [1, 2], ['raw', 'spatial', 'raw_floor', 'spatial_floor'])
    """
    call = "equivariance_score(model, images)"
    require_tensor(call, images)
    require(
        images.ndim == 4 and len(images) >= 2,
        call,
        f"images {tuple(images.shape)}",
        "a batch (B, C, H, W) of at least two: another image is the floor",
        "equivariance_score(model, images[:64])",
    )
    seen = backbone(model, call)
    chosen = list(range(1, seen.depth + 1))
    if layers is not None:
        chosen = seen.check_layers("equivariance_score(model, images, layers=...)", layers)
    other = _other(len(images), generator)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            tokens = _tokens(seen, images, chosen)
            scores: dict[str, dict[int, dict[str, float]]] = {}
            for name, elements in transformations(model, images).items():
                readings = []
                for g in elements:
                    moved = _tokens(seen, act(g, images, antialias=True), chosen)
                    readings.append({layer: _readings(act(g, tokens[layer]), moved[layer], other) for layer in chosen})
                scores[name] = {
                    layer: {key: sum(r[layer][key] for r in readings) / len(readings) for key in readings[0][layer]}
                    for layer in chosen
                }
    finally:
        for module, mode in modes.items():
            module.training = mode
    return scores


def transformations(model: nn.Module, images: Tensor) -> dict[str, list[GroupElement]]:
    """What images of this size can be scored with, single elements by the name of the transformation."""
    seen = backbone(model)
    found = {"rotation": [GroupElement.turn(k) for k in (1, 2, 3)], "flip": [GroupElement.mirror()]}
    height, width = images.shape[-2:]
    if height != width and not seen.any_size:
        del found["rotation"]  # a turned image has another size
    if seen.any_size:
        patch = seen.stride()
        grid = [max(1, round(side / patch)) for side in (height, width)]
        grids = [[max(1, n + sign * max(1, round(n * STEP))) for n in grid] for sign in (-1, 1)]
        found["scale"] = [
            GroupElement.scaling(rows * patch / height, columns * patch / width) for rows, columns in grids
        ]
    return found


def _other(n: int, generator: torch.Generator | None) -> Tensor:
    """For each image the number of another one: the next on a random round trip through all."""
    device = "cpu" if generator is None else generator.device
    trip = torch.randperm(n, generator=generator, device=device).cpu()
    other = torch.empty_like(trip)
    other[trip] = trip.roll(-1)
    return other


def _tokens(seen: Backbone, images: Tensor, layers: list[int]) -> dict[int, Tensor]:
    call = "equivariance_score(model, images)"
    batches = [seen.maps(batch, layers, call) for batch in torch.split(images, BATCH)]
    return {layer: torch.cat([maps[layer] for maps in batches]).float() for layer in layers}


def _readings(acted: Tensor, moved: Tensor, other: Tensor) -> dict[str, float]:
    """The four readings for maps ρ_g f(x) and f(ρ_g x)."""
    floor = moved[other.to(moved.device)]
    pairs = {"raw": (acted, moved), "spatial": (_spatial(acted), _spatial(moved))}
    pairs |= {"raw_floor": (acted, floor), "spatial_floor": (_spatial(acted), _spatial(floor))}
    return {key: F.cosine_similarity(a, b, dim=1).mean().item() for key, (a, b) in pairs.items()}


def _spatial(maps: Tensor) -> Tensor:
    return maps - maps.mean((-2, -1), keepdim=True)
