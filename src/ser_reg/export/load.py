"""Load an encoder as it was trained: of an exported folder, of a function of the user's, or by its timm name."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..backbones import backbone, create
from ..errors import SERError, require
from .files import CONFIG, WEIGHTS, build, cls_layer_of

__all__ = ["is_timm_name", "load_encoder"]


def is_timm_name(model: str | Path) -> bool:
    """Whether `load_encoder` takes it for the name of a timm model, and not for a folder or a function."""
    model = str(model)
    path = Path(model.removeprefix("local-dir:"))
    if path.exists() or path.suffix == ".safetensors" or model.startswith(("local-dir:", ".", "/")):
        return False
    return ":" not in model or model.startswith(("hf-hub:", "hf_hub:"))


def load_encoder(model: str | Path, pretrained: bool = True) -> nn.Module:
    """An encoder to look into: without a classifier, in evaluation mode, [CLS] joining where it did in training.

    Args:
        model: a folder that `export_timm` wrote, or its model.safetensors; "package.module:function", a function of
            yours that returns a model; or the name of a timm model.
        pretrained: of a timm name: with its published weights, which are downloaded, or with random ones.

    Raises:
        SERError: no such folder, function or timm model; a file that was cut off; a folder without config.json; a
            function that raises; or published weights that cannot be had.

    Example:
        >>> type(load_encoder("vit_tiny_patch16_224", pretrained=False)).__name__
        'VisionTransformer'
    """
    call = f"load_encoder({str(model)!r})"
    given, remedy = f"a {type(model).__name__}", "load_encoder('vit_small_patch16_224')"
    require(isinstance(model, (str, Path)), call, given, "a folder, a function or a timm model, by name", remedy)
    model = str(model)
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
        return build(call, path, path / CONFIG, path / WEIGHTS).eval()
    if is_timm_name(model):
        return create(model, pretrained, caller="load_encoder").eval()
    if path.exists() or ":" not in model or model.startswith(("local-dir:", ".", "/")):
        given = "a file that is no exported encoder" if path.exists() else "no such file or folder"
        expected = f"a folder with {CONFIG} and {WEIGHTS}, as export_timm writes"
        raise SERError(call, given, expected, "load_encoder('out/moco_v3/encoder')")
    return _call(model).eval()


def _call(model: str) -> nn.Module:
    """What a function of the user's returns."""
    call, here = f"load_encoder({model!r})", os.getcwd()
    module, function = model.split(":", 1)
    sys.path.insert(0, here)
    try:
        make = _imported(call, module, function)
        try:
            made = make()
        except Exception as error:  # whatever it is, it is the user's own
            given = f"{function}() raises {type(error).__name__}: {error}"
            show = f'python -c "import {module}; {module}.{function}()"  # shows where'
            raise SERError(call, given, "a function without arguments that returns a model", show) from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
    given = f"{function}() returns a {type(made).__name__}"
    require(isinstance(made, nn.Module), call, given, "a function that returns a model", f"{model}  # return vit")
    _check_cls_layer(call, made)
    return cast(nn.Module, made)


def _imported(call: str, module: str, function: str) -> Any:
    expected = 'a timm name, or "package.module:function" from here'
    remedy = "load_encoder('vit_small_patch16_224')"
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SERError(call, str(error), expected, remedy) from error
    except Exception as error:
        given, show = f"{type(error).__name__} on import of {module}: {error}", f'python -c "import {module}"'
        raise SERError(call, given, "a module that can be imported", f"{show}  # shows where") from error
    given = f"{function} is a {type(found).__name__}"
    require(callable(found), call, given, "a function that returns a model", f"def {function}(): return vit")
    return found


def _check_cls_layer(call: str, vit: nn.Module) -> None:
    """Raise for an export that was loaded with plain timm: its weights fit, [CLS] joins elsewhere, features differ."""
    known: Any = getattr(vit, "pretrained_cfg", None) or {}
    folder = Path(known.get("file") or "") if known.get("source") == "local-dir" else None
    if folder is not None and (folder / CONFIG).is_file():
        config = json.loads((folder / CONFIG).read_text())
        trained = cls_layer_of(call, None, config.get("late_cls"), "export_timm(vit, folder, name, **model_args)")
        if trained is not None:
            layer = backbone(vit, call).cls_layer
            given, expected = f"[CLS] joins after {layer} blocks", f"after {trained}, as {folder} was trained"
            require(trained == layer, call, given, expected, f"late_cls(vit, {trained})")
