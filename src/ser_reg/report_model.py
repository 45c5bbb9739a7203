"""What the report asks of one model: scores with and without positions, probes, token maps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .metrics import equivariance_score, transformations
from .report_findings import early_layer, findings
from .report_images import parts, whole
from .report_maps import draw_maps
from .report_probes import mean_tokens, probe
from .vit import accepts_any_size, cls_layer, depth, native_pixels, patch_size, position_coding, without_positions

__all__ = ["look"]

VIEWS = 120  # that probes see, about or more: several parts of each image where there are fewer images
SHOWN = 3  # images with token maps


def look(
    vit: nn.Module,
    name: str,
    photographs: list[Tensor],
    stem: Path,
    tell: Callable[..., None],
    layers: list[int] | None,
    image_size: tuple[int, int] | None,
    seed: int,
) -> dict[str, Any]:
    """All figures of one model, as they stand in report.json, and its token maps as files.

    Args:
        vit: in evaluation mode, on its device; to be thrown away afterwards.
        name: in the titles of the token maps.
        photographs: (3, H, W) each, as `collect` gives them.
        stem: the beginning of the path of the token maps.
        tell: called with how many images will enter the model (total=...), and how many entered (advance=...).
        layers: numbers of blocks already run, all if None.
        image_size: (height, width) in pixels, the model's own if None.
        seed: of all that is drawn.

    Raises:
        SERError: no ViT whose tokens are known, or layers or a size that it does not have.
    """
    start, blocks = time.monotonic(), depth(vit)
    chosen = list(range(blocks + 1)) if layers is None else layers
    size, *pixels = native_pixels(vit)
    size = image_size or size
    mean, std = (torch.tensor(values)[:, None, None] for values in pixels)
    parameter = next(vit.parameters())

    def normalised(images: list[Tensor]) -> Tensor:
        return ((torch.stack(images) - mean) / std).to(parameter)

    wholes = [whole(image, size) for image in photographs]
    scored = normalised(wholes)
    draw = torch.Generator().manual_seed(seed)
    each = max(1, round(VIEWS / len(photographs)))
    views = [view for image in photographs for view in parts(image, size, each, draw)]
    positions = position_coding(vit)
    elements = transformations(vit, scored)
    forwards = (1 + len(positions[:1])) * len(scored) * (1 + sum(map(len, elements.values())))
    _count_images(vit, forwards + len(views) * (5 if size[0] == size[1] else 2), tell)

    def score(model: nn.Module) -> dict[str, dict[int, dict[str, float]]]:
        return equivariance_score(model, scored, chosen, torch.Generator().manual_seed(seed))

    record: dict[str, Any] = {
        "depth": blocks,
        "image_size": size,
        "patch_size": patch_size(vit),
        "cls_layer": cls_layer(vit),
        "mean": pixels[0],
        "std": pixels[1],
        "positions": positions,
        "left_out": _left_out(vit, size),
        "scores": score(vit),
        "scores_without_positions": score(without_positions(vit)) if positions else {},
        "probes": {},
        "probe_views": len(views),
    }
    image_of_view = [image for image in range(len(photographs)) for _ in range(each)]
    for transformation, features in mean_tokens(vit, normalised(views), chosen).items():
        record["probes"][transformation] = {layer: probe(features[layer], image_of_view)._asdict() for layer in chosen}
    pictures = sorted(wholes, key=lambda image: -image.std().item())[:SHOWN]
    record["pictures"] = []
    for layer in sorted({early_layer(blocks), blocks}):
        path = stem.with_name(f"{stem.name}_layer_{layer}.png")
        draw_maps(path, vit, torch.stack(pictures), normalised(pictures), layer, name)
        record["pictures"].append(path.name)
    record["findings"] = findings(record)
    return record | {"seconds": round(time.monotonic() - start, 1)}


def _left_out(vit: nn.Module, size: tuple[int, int]) -> list[str]:
    """What could not be asked of a model, and why."""
    said = []
    if not accepts_any_size(vit):
        said.append("no scale score: it takes images of one size only")
    if size[0] != size[1]:
        shape = f"images of {size[0]} x {size[1]} pixels have another shape once they are turned"
        if not accepts_any_size(vit):
            said.append(f"no rotation score: {shape}, and it takes one size only")
        said.append(f"no rotation probe: {shape}, which would tell the turn")
    return said


def _count_images(vit: Any, total: int, tell: Callable[..., None]) -> None:
    """Tell how many images have entered the model, or a copy of it, of how many in all."""
    tell(total=total)
    vit.patch_embed.register_forward_pre_hook(lambda module, args: tell(advance=len(args[0])))
