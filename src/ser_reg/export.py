"""Encoders on disk: exported so that plain timm loads them, and loaded as they were trained."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .backbones import backbone, create, late_cls
from .errors import SERError, require
from .images import IMAGENET
from .records import atomically

__all__ = ["FORMAT", "export_timm", "load_encoder"]

FORMAT = 2  # of all that is written to be read again; raise it when files of before can no longer be read rightly
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def export_timm(
    vit: nn.Module,
    folder: str | Path,
    name: str,
    normalize: tuple[Sequence[float], Sequence[float]] = IMAGENET,
    **model_args: Any,
) -> None:
    """Write an encoder as a folder that plain timm loads in one line, and load it back to see that it is the same.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the same weights (timm 1.0.20 cannot read
    safetensors so; ``timm.create_model(name, checkpoint_path="FOLDER/model.safetensors", **model_args)`` always
    does). Plain timm lets [CLS] in at the
    first block; the layer with which the encoder was trained stands as ``late_cls`` in the metadata of
    model.safetensors and in config.json. `load_encoder` heeds it; with timm, call ``late_cls(vit, layer)``.

    Args:
        vit: a timm model that `backbone` knows, without a classifier, in any mode, on any device.
        folder: made if missing; config.json and model.safetensors in it are replaced when both are whole and right.
        name: the timm architecture, such as "vit_small_patch16_224".
        normalize: mean and standard deviation that images were normalised with, (3,) each.
        model_args: what ``timm.create_model`` was given besides the name.

    Raises:
        SERError: a model built from `name` and `model_args` does not take these weights, or gives other outputs.

    Example:
        >>> import tempfile, timm
        >>> from ser_reg.backbones import backbone
        >>> arguments = {"img_size": 32, "depth": 4, "dynamic_img_size": True}
        >>> vit = late_cls(timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments), layer=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_timm(vit, folder, "vit_tiny_patch16_224", **arguments)
        ...     backbone(load_encoder(folder)).cls_layer
        2
    """
    call = f"export_timm(vit, {str(folder)!r}, {name!r}, ...)"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder)
    copy = deepcopy(vit).float().cpu().eval()
    trunk = backbone(copy)
    mean, std = normalize
    config = {
        "format": FORMAT,
        "architecture": name,
        "num_classes": 0,
        "num_features": trunk.width(),
        "model_args": model_args,
        "late_cls": trunk.cls_layer,
        "pretrained_cfg": {
            "mean": list(mean),
            "std": list(std),
            "input_size": [trunk.channels, *trunk.size],
            "num_classes": 0,
            "interpolation": "bicubic",
            "crop_pct": 224 / 256,
        },
    }
    state = {key: value.contiguous() for key, value in copy.state_dict().items()}
    # "format" is taken: readers of safetensors expect the framework there.
    metadata = {"format": "pt", "export_format": str(FORMAT), "late_cls": str(trunk.cls_layer), "architecture": name}
    with atomically(folder / WEIGHTS) as weights, atomically(folder / CONFIG) as text:
        save_file(state, weights, metadata=metadata)
        text.write_text(json.dumps(config, indent=2) + "\n")
        _verify(call, copy, _build(folder, text, weights))


def _remove_unfinished(folder: Path) -> None:
    """What exports left that were killed: as large as a model, and hidden."""
    for name in (WEIGHTS, CONFIG):
        for left in folder.glob(f".*-{name}"):
            left.unlink()


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
        require(
            (path / CONFIG).is_file() and (path / WEIGHTS).is_file(),
            call,
            lambda: "a folder with " + (", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"),
            f"a folder with {CONFIG} and {WEIGHTS}",
            f"load_encoder({str(path / 'encoder')!r})",
        )
        return _build(path, path / CONFIG, path / WEIGHTS).eval()
    if path.exists() or path.suffix == ".safetensors" or model.startswith(("local-dir:", ".", "/")):
        given = "a file that is no exported encoder" if path.exists() else "no such file or folder"
        expected = f"a folder with {CONFIG} and {WEIGHTS}, as export_timm writes"
        raise SERError(call, given, expected, "load_encoder('out/moco_v3/encoder')")
    if ":" in model and not model.startswith(("hf-hub:", "hf_hub:")):
        return _call(model).eval()
    return create(model, pretrained).eval()


def _build(folder: Path, config_file: Path, weights_file: Path) -> nn.Module:
    """The encoder of an exported folder, with late [CLS] as it was trained."""
    call = f"load_encoder({str(folder)!r})"
    remedy = "export_timm(vit, folder, name, **model_args)"
    try:
        config = json.loads(config_file.read_text())
        name, model_args = str(config["architecture"]), dict(config.get("model_args") or {})
        with safe_open(weights_file, framework="pt") as weights:
            metadata = weights.metadata() or {}
            state = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise SERError(call, f"{type(error).__name__}: {error}", "whole files", remedy) from error
    layer = metadata.get("late_cls", config.get("late_cls"))
    in_config = config.get("late_cls", layer)
    given = f"late_cls={layer} in {WEIGHTS}, {in_config} in {CONFIG}"
    require(str(layer) == str(in_config), call, given, "files of one export", remedy)
    if layer is not None:  # exports of timm itself say nothing of [CLS], nor of a format
        _check_format(call, config.get("format", metadata.get("export_format", 1)), folder, layer)
    vit = create(name, pretrained_cfg_overlay=config.get("pretrained_cfg") or None, **model_args)
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split()[:40])
        raise SERError(call, first, f"weights of {name} with {model_args}", remedy) from error
    return late_cls(vit, int(layer)) if int(layer or 0) else vit


def _check_format(call: str, version: Any, folder: Path, layer: Any) -> None:
    again = f"vit = late_cls(timm.create_model('local-dir:{folder}', pretrained=True), {layer})  # and export it anew"
    require(
        str(version) == str(FORMAT),
        call,
        f"an export of format {version}, where this version of ser_reg reads format {FORMAT}",
        "an export of the same format",
        again if str(version) == "1" else "pip install --upgrade ser-reg",
    )


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
    call, given = f"load_encoder({model!r})", f"{function}() returns a {type(made).__name__}"
    require(isinstance(made, nn.Module), call, given, "a function that returns a model", f"{model}  # return vit")
    _check_cls_layer(call, made)
    return cast(nn.Module, made)


def _check_cls_layer(call: str, vit: nn.Module) -> None:
    """Raise for an export that was loaded with plain timm: its weights fit, [CLS] joins elsewhere, features differ."""
    known: Any = getattr(vit, "pretrained_cfg", None) or {}
    folder = Path(known.get("file") or "") if known.get("source") == "local-dir" else None
    if folder is not None and (folder / CONFIG).is_file():
        trained = json.loads((folder / CONFIG).read_text()).get("late_cls")
        if trained is not None:
            layer = backbone(vit).cls_layer
            given, expected = f"[CLS] joins after {layer} blocks", f"after {trained}, as {folder} was trained"
            require(int(trained) == layer, call, given, expected, f"late_cls(vit, {trained})")


@torch.no_grad()
def _verify(call: str, vit: nn.Module, loaded: nn.Module) -> None:
    """The file gives what the model gives, for an image of the size that it was built for."""
    ours, theirs = backbone(vit), backbone(loaded.eval())
    images = torch.rand(2, theirs.channels, *theirs.size, generator=torch.Generator().manual_seed(0))
    different = (vit(images) - loaded(images)).abs().max().item()
    require(
        different == 0 and theirs.cls_layer == ours.cls_layer and theirs.depth == ours.depth,
        call,
        f"outputs that differ by {different:.1e} once loaded",
        "the same outputs to the last bit",
        "export_timm(vit, folder, name, **model_args)  # all that timm.create_model was given",
    )
