"""What the report asks of one model: what it is, and every section."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..backbones import Backbone, backbone
from ..errors import SERError
from .base import Subject
from .sections import SECTIONS

__all__ = ["measure", "subject_of"]


def subject_of(
    name: str,
    model: nn.Module,
    photographs: list[Tensor],
    stem: Path,
    layers: list[int] | None,
    image_size: tuple[int, int] | None,
    seed: int,
) -> Subject:
    """A model, with all its layers and its own image size where nothing else is asked for.

    Raises:
        SERError: of no known family, or without such layers or images of such a size.
    """
    trunk = backbone(model, "report(models)")
    chosen = list(range(trunk.depth + 1))
    if layers is not None:
        chosen = trunk.check_layers("report(models, layers=...)", layers)
    if image_size is not None:
        _check_size(trunk, image_size, max(chosen))
    return Subject(name, model, photographs, image_size or trunk.size, chosen, seed, stem)


def _check_size(trunk: Backbone, size: tuple[int, int], layer: int) -> None:
    """Raise for a size that the model does not take, with one that it does."""
    try:
        trunk.check_size(f"report(models, image_size={size})", size, layer)
    except SERError as error:
        near = tuple(max(1, round(side / trunk.stride(layer))) * trunk.stride(layer) for side in size)
        remedy = f"report(models, image_size={near})" if trunk.any_size else error.remedy
        raise SERError(error.call, error.given, error.expected, remedy) from error


def measure(subject: Subject, progress: Callable[..., None]) -> dict[str, Any]:
    """All figures of one model, as they stand in report.json; pictures of it alone are saved.

    Args:
        subject: the model.
        progress: called with total=..., how many images will enter the model, and advance=..., how many entered.

    Raises:
        SERError: layers or a size that the model does not have.
    """
    start, trunk = time.monotonic(), backbone(subject.model)
    progress(total=sum(section.forwards(subject) for section in SECTIONS))
    # Copies of the model keep the hook: what enters them is counted, too.
    trunk.embedding.register_forward_pre_hook(lambda module, args: progress(advance=len(args[0])))
    record = _what_it_is(trunk, subject)
    record["left_out"] = [reason for section in SECTIONS for reason in section.left_out(subject)]
    for section in SECTIONS:
        record |= section.measure(subject)
    record["findings"] = [trunk.joins] if trunk.cls_layer else []
    record["findings"] += [sentence for section in SECTIONS for sentence in section.find(record)]
    return record | {"seconds": round(time.monotonic() - start, 1)}


def _what_it_is(trunk: Backbone, subject: Subject) -> dict[str, Any]:
    return {
        "depth": trunk.depth,
        "unit": trunk.unit,
        "image_size": subject.size,
        "patch_size": trunk.patch_size,
        "cls_layer": trunk.cls_layer,
        "has_prefix": trunk.has_prefix,
        "mean": list(trunk.mean),
        "std": list(trunk.std),
    }
