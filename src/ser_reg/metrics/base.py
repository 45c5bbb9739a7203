"""What the scores share: which elements images are moved by, tokens before and after, and which image is another's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..backbones import Backbone, backbone
from ..errors import require, require_tensor
from ..geometry import GroupElement, act, check_channels, move_channels

__all__ = ["Measure", "Scores", "measured", "other_images", "transformations"]

BATCH = 64  # images at a time
STEP = 1 / 6  # of a side, what "scale" takes away or adds: inside the range of T_eq

Scores = dict[str, dict[int, dict[str, float]]]
"""[transformation][layer][reading]."""
Measure = Callable[[GroupElement, Tensor, Tensor, Tensor], dict[str, float]]
"""Readings of an element, maps of all images, maps of the moved images, and for each image the number of another."""


def measured(
    name: str,
    model: nn.Module,
    images: Tensor,
    layers: Iterable[int] | None,
    generator: torch.Generator | None,
    channels: str,
    measure: Measure,
) -> Scores:
    """The mean of `measure` over the elements of each transformation; the model stays in the mode it was in.

    Args:
        name: of the score, for errors.
        model, images, layers, generator, channels: as the scores have them.
        measure: is handed maps of all images whose channels were moved by the element, but not their places.

    Raises:
        SERError: as the scores.
    """
    call = f"{name}(model, images)"
    require_tensor(call, images)
    require(
        images.ndim == 4 and len(images) >= 2,
        call,
        f"images {tuple(images.shape)}",
        "a batch (B, C, H, W) of at least two: another image is the floor",
        f"{name}(model, images[:64])",
    )
    seen = backbone(model, call)
    chosen = list(range(1, seen.depth + 1))
    if layers is not None:
        chosen = seen.check_layers(f"{name}(model, images, layers=...)", layers)
    other = other_images(len(images), generator).to(images.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            tokens = _tokens(call, seen, images, chosen)
            for i, maps in tokens.items():
                given, remedy = f"features of layer {i} that are not finite", "model.float(), images.float()"
                require(maps.isfinite().all(), call, given, "finite images and features", remedy)
                check_channels(f"{name}(model, images, channels={channels!r})", channels, maps.shape[1])
            scores: Scores = {}
            for transformation, elements in transformations(model, images).items():
                readings = []
                for g in elements:
                    moved = _tokens(call, seen, act(g, images, antialias=True), chosen)
                    readings.append(
                        {i: measure(g, move_channels(g, tokens[i], channels), moved[i], other) for i in chosen}
                    )
                scores[transformation] = {
                    i: {key: sum(r[i][key] for r in readings) / len(readings) for key in readings[0][i]} for i in chosen
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


def other_images(n: int, generator: torch.Generator | None) -> Tensor:
    """For each image the number of another one: the next on a random round trip through all."""
    device = "cpu" if generator is None else generator.device
    trip = torch.randperm(n, generator=generator, device=device).cpu()
    other = torch.empty_like(trip)
    other[trip] = trip.roll(-1)
    return other


def _tokens(call: str, seen: Backbone, images: Tensor, layers: list[int]) -> dict[int, Tensor]:
    batches = [seen.maps(batch, layers, call) for batch in torch.split(images, BATCH)]
    return {layer: torch.cat([maps[layer] for maps in batches]).float() for layer in layers}
