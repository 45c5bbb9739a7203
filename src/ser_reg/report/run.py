"""How equivariant are these models, at which layer, and why? One page with pictures, and every figure as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SERError, require
from ..export import load_encoder
from ..records import atomically, environment
from .photographs import collect

__all__ = ["NamedEncoders", "report"]


def report(
    models: Mapping[str, nn.Module],
    images: Mapping[str, Tensor] | Iterable[Tensor] | str | Path | None = None,
    output_dir: str | Path = "report",
    *,
    layers: Iterable[int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    max_images: int = 64,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Write report.html, report.json and PNGs about models, side by side.

    Of each model: the equivariance score by layer (raw and spatial, beside unrelated images), the same with its
    position coding switched off, linear probes that tell turns and flips from frozen features, and token maps as
    colours. A model that fails is named with its error and leaves the others alone; report.json is renewed after
    each model.

    Args:
        models: by the name that the plots show; looked up one after another, so that a lazy mapping such as
            `NamedEncoders` holds one at a time. Left in the mode they were in.
        images: (3, H, W) each, by name or not, uint8 or in [0, 1], not normalised: every model gets its own
            normalisation; or a folder; or None for the photographs that come with scikit-image and scikit-learn.
        output_dir: made if missing.
        layers: numbers of layers already run; 0, the embeddings, to the last by default.
        image_size: pixels a side, or (height, width); what each model was built for by default.
        max_images: drawn at random if there are more.
        device: where to move the models; where they are by default.
        seed: of all that is drawn.
        progress: show a bar.

    Returns:
        What report.json holds, with layers as whole numbers:
        ``["models"][name]["scores"][transformation][layer][reading]``, and "scores_without_positions", "probes",
        "findings" and others beside "scores"; of a model that failed "error" alone.

    Raises:
        SERError: a package of the extra `report` is missing; images that cannot be used.
        Exception: every model failed; this is what the first one raised.

    Source: Table 4, Table 7 and Figure 3 of the paper.
    """
    try:
        from rich.progress import Progress

        from .model import measure, subject_of
        from .page import write_page
    except ImportError as error:
        expected = "jinja2, matplotlib, rich, scikit-image and scikit-learn"
        raise SERError("report(models)", str(error), expected, 'pip install "ser-reg[report]"') from error
    _require_usable(models, layers, device)
    photographs, unreadable = collect(images, max_images, seed)
    folder = _folder(output_dir)
    settings: dict[str, Any] = {"layers": None if layers is None else list(layers)}
    settings |= {"image_size": (image_size, image_size) if isinstance(image_size, int) else image_size, "seed": seed}
    result: dict[str, Any] = {
        "images": {"names": list(photographs), "unreadable": unreadable},
        "settings": settings | {"max_images": max_images},
        "environment": environment(device),
        "models": {},
    }

    def ask(number: int, name: str, progress: Callable[..., None]) -> dict[str, Any]:
        model = deepcopy(models[name]).eval()
        model.to(device)
        stem = folder / f"tokens_{number}"
        subject = subject_of(name, model, list(photographs.values()), stem, **settings)
        result["environment"] = environment(subject.pixels.device)
        return measure(subject, progress)

    with Progress(disable=not progress) as bar:
        _ask_all(models, ask, bar, result, folder / "report.json")
    with atomically(folder / "report.html") as path:
        path.write_text(write_page(result, folder), encoding="utf-8")
    return result


def _ask_all(
    models: Iterable[str], ask: Callable[..., dict[str, Any]], bar: Any, result: dict[str, Any], path: Path
) -> None:
    """Fill in the result, one model after the other, and write it each time; raise if every model failed."""
    errors: list[Exception] = []
    for number, name in enumerate(models, 1):
        task = bar.add_task(name, total=None)
        try:
            record = ask(number, name, partial(bar.update, task))
        except Exception as error:  # whatever it is, the other models are not to suffer
            errors.append(error)
            record = {"error": str(error) if isinstance(error, SERError) else f"{type(error).__name__}: {error}"}
        result["models"][name] = record
        bar.update(task, completed=1, total=1)
        with atomically(path) as file:
            file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if len(errors) == len(result["models"]):
        raise errors[0]


class NamedEncoders(Mapping[str, nn.Module]):
    """Models by what `load_encoder` takes, each loaded when it is looked up, and not kept.

    Args:
        names: timm names, exported folders or "package.module:function".
        pretrained: timm names with their published weights, or with random ones.
    """

    def __init__(self, names: Iterable[str], pretrained: bool = True) -> None:
        self._names, self._pretrained = list(dict.fromkeys(names)), pretrained

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> nn.Module:
        try:
            return load_encoder(name, self._pretrained)
        except SERError as error:
            if not self._pretrained:
                raise
            load_encoder(name, pretrained=False)  # raises, too, unless it is the weights that cannot be had
            remedy = f"python -m ser_reg report {name} --untrained"
            raise SERError(error.call, error.given, "weights that can be downloaded", remedy) from error


def _folder(output_dir: str | Path) -> Path:
    """Made if missing."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        call, given = f"report(models, output_dir={str(output_dir)!r})", f"{type(error).__name__}: {error}"
        raise SERError(call, given, "a folder that can be written", 'report(models, output_dir="report")') from error
    return Path(output_dir)


def _require_usable(models: Mapping[str, nn.Module], layers: Any, device: str | torch.device | None) -> None:
    remedy = 'report({"ViT-S": load_encoder("vit_small_patch16_224")})'
    kind = type(models).__name__
    require(isinstance(models, Mapping), "report(models)", f"a {kind}", "models by name", 'report({"mine": model})')
    require(models, "report({})", "no model", "at least one, by name", remedy)
    several = layers is None or (isinstance(layers, Iterable) and not isinstance(layers, (str, Tensor)))
    remedy = f"report(models, layers=[{layers!r}])" if type(layers) is int else "report(models, layers=[3])"
    given, expected = f"layers={layers!r}", "several numbers of layers"
    require(several, "report(models, layers=...)", given, expected, remedy)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        call, expected = f"report(models, device={str(device)!r})", "a device of this machine, such as cpu or cuda"
        raise SERError(call, str(error).split("\n")[0], expected, 'report(models, device="cpu")') from error
