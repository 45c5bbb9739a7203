"""The files of an exported encoder, and the encoder that is built from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import nn

from ..backbones import backbone, create, late_cls
from ..errors import SERError, require

__all__ = ["CONFIG", "FORMAT", "WEIGHTS", "build", "cls_layer_of"]

FORMAT = 2  # of all that is written to be read again; raise it when files of before can no longer be read rightly
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def build(call: str, folder: Path, config_file: Path, weights_file: Path) -> nn.Module:
    """The encoder of an exported folder, with late [CLS] as it was trained."""
    remedy = "export_timm(vit, folder, name, **model_args)"
    try:
        config = json.loads(config_file.read_text())
        name, model_args = str(config["architecture"]), dict(config.get("model_args") or {})
        with safe_open(weights_file, framework="pt") as weights:
            metadata = weights.metadata() or {}
            state = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise SERError(call, f"{type(error).__name__}: {error}", "whole files", remedy) from error
    layer = cls_layer_of(call, metadata.get("late_cls"), config.get("late_cls"), remedy)
    if layer is not None:  # exports of timm itself say nothing of [CLS], nor of a format
        _check_format(call, config.get("format", metadata.get("export_format", 1)), folder, layer)
    try:
        vit = create(name, pretrained_cfg_overlay=config.get("pretrained_cfg") or None, **model_args)
    except SERError as error:
        raise SERError(call, error.given, error.expected, error.remedy) from error
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split()[:40])
        raise SERError(call, first, f"weights of {name} with {model_args}", remedy) from error
    if not layer:
        return vit
    trunk = backbone(vit, call)
    last = trunk.depth - 1 if trunk.has_prefix else 0
    given, expected = f"late_cls={layer} in {CONFIG}", f"a whole number of {trunk.unit} from 0 to {last}, as {name} has"
    require(layer <= last, call, given, expected, remedy)
    return late_cls(vit, layer)


def cls_layer_of(call: str, in_metadata: Any, in_config: Any, remedy: str) -> int | None:
    """The layer at which [CLS] joined, of which two files are to say the same; None where neither says anything."""
    expected = "a whole number of blocks, 0 or more"
    if in_config is not None:
        fine = type(in_config) is int and in_config >= 0
        require(fine, call, f"late_cls={in_config!r} in {CONFIG}", expected, remedy)
    if in_metadata is None:
        return cast("int | None", in_config)
    require(str(in_metadata).isdecimal(), call, f"late_cls={in_metadata} in {WEIGHTS}", expected, remedy)
    layer = int(in_metadata)
    given = f"late_cls={layer} in {WEIGHTS}, {in_config} in {CONFIG}"
    require(in_config in (None, layer), call, given, "files of one export", remedy)
    return layer


def _check_format(call: str, version: Any, folder: Path, layer: Any) -> None:
    # Not pretrained=True: timm 1.0.20 cannot read safetensors so.
    plain = f"timm.create_model('local-dir:{folder}', checkpoint_path='{folder / WEIGHTS}')"
    again = f"vit = late_cls({plain}, {layer})  # and export it anew"
    require(
        str(version) == str(FORMAT),
        call,
        f"an export of format {version}, where this version of ser_reg reads format {FORMAT}",
        "an export of the same format",
        again if str(version) == "1" else "pip install --upgrade ser-reg",
    )
