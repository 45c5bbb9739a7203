"""Encoders on disk: exported so that plain timm loads them, and loaded as they were trained."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .errors import SERError
from .vit import IMAGENET, cls_layer, create, depth, late_cls

__all__ = ["export_timm", "load_encoder"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def export_timm(
    vit: nn.Module, folder: str | Path, name: str, pixels: dict[str, list[float]] | None = None, **model_args: Any
) -> None:
    """Write an encoder as a folder that plain timm loads in one line, and load it back to see that it is the same.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the same weights (timm 1.0.20 cannot read
    safetensors so; ``timm.create_model(name, checkpoint_path="FOLDER/model.safetensors", **model_args)`` always
    does). Plain timm lets [CLS] in at the
    first block; the layer with which the encoder was trained stands as ``late_cls`` in the metadata of
    model.safetensors and in config.json. `load_encoder` heeds it; with timm, call ``late_cls(vit, layer)``.

    Args:
        vit: a timm VisionTransformer or Eva without a classifier, in any mode, on any device.
        folder: made if missing; config.json and model.safetensors in it are replaced when both are whole and right.
        name: the timm architecture, such as "vit_small_patch16_224".
        pixels: mean and standard deviation that images were normalised with, (3,) each; ImageNet's by default.
        model_args: what ``timm.create_model`` was given besides the name.

    Raises:
        SERError: a model built from `name` and `model_args` does not take these weights, or gives other outputs.

    Example:
        >>> import tempfile, timm
        >>> arguments = {"img_size": 32, "depth": 4, "dynamic_img_size": True}
        >>> vit = late_cls(timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments), layer=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_timm(vit, folder, "vit_tiny_patch16_224", **arguments)
        ...     cls_layer(load_encoder(folder))
        2
    """
    call = f"export_timm(vit, {str(folder)!r}, {name!r}, ...)"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    copy = deepcopy(vit).float().cpu().eval()
    layer = cls_layer(copy)
    embed: Any = copy.patch_embed
    size = list(getattr(embed, "img_size", None) or (224, 224))
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": copy.num_features,
        "model_args": model_args,
        "late_cls": layer,
        "pretrained_cfg": {
            **(pixels or IMAGENET),
            "input_size": [embed.proj.in_channels if hasattr(embed, "proj") else 3, *size],
            "num_classes": 0,
            "interpolation": "bicubic",
            "crop_pct": 224 / 256,
        },
    }
    weights = {key: value.contiguous() for key, value in copy.state_dict().items()}
    with _replaced(folder / WEIGHTS, folder / CONFIG) as (part, config_part):
        save_file(weights, part, metadata={"late_cls": str(layer), "architecture": name, "format": "pt"})
        config_part.write_text(json.dumps(config, indent=2) + "\n")
        _verify(call, copy, _build(part.parent))


def load_encoder(model: str, pretrained: bool = True) -> nn.Module:
    """An encoder to look into: without a classifier, in evaluation mode, [CLS] joining where it did in training.

    Args:
        model: a folder that `export_timm` wrote, or its model.safetensors; "package.module:function", a function of
            yours that returns a model; or the name of a timm model.
        pretrained: of a timm name: with its published weights, which are downloaded, or with random ones.

    Raises:
        SERError: no such folder, function or timm model; a file that was cut off; a folder without config.json; or
            published weights that cannot be had.

    Example:
        >>> type(load_encoder("vit_tiny_patch16_224", pretrained=False)).__name__
        'VisionTransformer'
    """
    call = f"load_encoder({model!r})"
    path = Path(model.removeprefix("local-dir:"))
    if path.suffix == ".safetensors":
        path = path.parent if path.name == WEIGHTS else path
    if path.is_dir():
        if not ((path / CONFIG).is_file() and (path / WEIGHTS).is_file()):
            found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
            remedy = f"load_encoder({str(path / 'encoder')!r})"
            raise SERError(call, f"a folder with {found}", f"a folder with {CONFIG} and {WEIGHTS}", remedy)
        return _build(path).eval()
    if path.exists() or path.suffix == ".safetensors" or model.startswith(("local-dir:", ".", "/")):
        given = "a file that is no exported encoder" if path.exists() else "no such file or folder"
        expected = f"a folder with {CONFIG} and {WEIGHTS}, as export_timm writes"
        raise SERError(call, given, expected, "load_encoder('out/moco_v3/encoder')")
    if ":" in model and not model.startswith(("hf-hub:", "hf_hub:")):
        return _call(model).eval()
    return create(model, pretrained).eval()


def _build(folder: Path) -> nn.Module:
    """The encoder of an exported folder, with late [CLS] as it was trained."""
    call = f"load_encoder({str(folder)!r})"
    remedy = "export_timm(vit, folder, name, **model_args)"
    try:
        config = json.loads((folder / CONFIG).read_text())
        name, model_args = str(config["architecture"]), dict(config.get("model_args") or {})
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            metadata = weights.metadata() or {}
            state = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise SERError(call, f"{type(error).__name__}: {error}", "whole files", remedy) from error
    layer = metadata.get("late_cls", config.get("late_cls"))
    if layer is None:
        layer = 0  # exported by timm itself
    elif str(layer) != str(config.get("late_cls", layer)):
        given = f"late_cls={layer} in {WEIGHTS}, {config['late_cls']} in {CONFIG}"
        raise SERError(call, given, "files of one export", remedy)
    vit = create(name, pretrained_cfg_overlay=config.get("pretrained_cfg") or None, **model_args)
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split()[:40])
        raise SERError(call, first, f"weights of {name} with {model_args}", remedy) from error
    return late_cls(vit, int(layer)) if int(layer) else vit


def _call(model: str) -> nn.Module:
    """What a function of the user's returns."""
    module, function = model.split(":", 1)
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        expected = 'a timm name, or "package.module:function" from here'
        raise SERError(
            f"load_encoder({model!r})", str(error), expected, "load_encoder('vit_small_patch16_224')"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(made, nn.Module):
        given = f"{function}() returns a {type(made).__name__}"
        raise SERError(f"load_encoder({model!r})", given, "a function that returns a model", f"{model}  # return vit")
    _check_cls_layer(f"load_encoder({model!r})", made)
    return made


def _check_cls_layer(call: str, vit: nn.Module) -> None:
    """Raise for an export that was loaded with plain timm: its weights fit, [CLS] joins elsewhere, features differ."""
    known: Any = getattr(vit, "pretrained_cfg", None) or {}
    folder = Path(known.get("file") or "") if known.get("source") == "local-dir" else None
    if folder is not None and (folder / CONFIG).is_file():
        trained = json.loads((folder / CONFIG).read_text()).get("late_cls")
        if trained is not None and int(trained) != cls_layer(vit):
            given = f"[CLS] joins after {cls_layer(vit)} blocks"
            raise SERError(call, given, f"after {trained}, as {folder} was trained", f"late_cls(vit, {trained})")


@contextmanager
def _replaced(*paths: Path) -> Iterator[list[Path]]:
    """Places in a folder beside, moved over `paths` when all are written and nothing was raised."""
    for left in paths[0].parent.glob(".part-*"):  # by an export that was killed
        shutil.rmtree(left)
    beside = paths[0].parent / f".part-{os.getpid()}"
    beside.mkdir()
    parts = [beside / path.name for path in paths]
    try:
        yield parts
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
        beside.rmdir()


@torch.no_grad()
def _verify(call: str, vit: Any, loaded: Any) -> None:
    """The file gives what the model gives, for an image of the size that it was built for."""
    rows, columns = loaded.patch_embed.img_size or (224, 224)
    channels = next(loaded.patch_embed.parameters()).shape[1]
    images = torch.rand(2, channels, rows, columns, generator=torch.Generator().manual_seed(0))
    loaded.eval()
    different = (vit(images) - loaded(images)).abs().max().item()
    if different != 0 or cls_layer(loaded) != cls_layer(vit) or depth(loaded) != depth(vit):
        given = f"outputs that differ by {different:.1e} once loaded"
        remedy = "export_timm(vit, folder, name, **model_args)  # all that timm.create_model was given"
        raise SERError(call, given, "the same outputs to the last bit", remedy)
