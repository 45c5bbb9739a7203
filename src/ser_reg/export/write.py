"""Write an encoder as a folder that plain timm loads, and that says how."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ..backbones import Backbone, backbone
from ..errors import SERError, require
from ..images import IMAGENET
from ..records import atomically
from .files import CONFIG, FORMAT, WEIGHTS, build

__all__ = ["export_timm"]

CARD = "README.md"
MARK = "<!-- Written by ser_reg.export_timm, and replaced by the next export. -->"


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
    does). But plain timm lets [CLS] in at the
    first block, and so gives other features than the encoder was trained for, without an error. The layer at which it
    joined stands at the top of README.md, and as ``late_cls`` in the metadata of model.safetensors and in config.json.
    `load_encoder` heeds it; with timm, call ``late_cls(vit, layer)`` after loading.

    Args:
        vit: a timm model that `backbone` knows, without a classifier, in any mode, on any device.
        folder: made if missing; README.md, config.json and model.safetensors in it are replaced when all are whole and
            right. A README.md of your own stays.
        name: the timm architecture, such as "vit_small_patch16_224".
        normalize: mean and standard deviation that images were normalised with, (3,) each.
        model_args: what ``timm.create_model`` was given besides the name.

    Raises:
        SERError: a model built from `name` and `model_args` does not take these weights, or gives other outputs; a
            folder that cannot be written; a model that `backbone` does not know.

    Example:
        >>> import tempfile, timm
        >>> from ser_reg import late_cls, load_encoder
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
    backbone(vit, call)
    copy = deepcopy(vit).float().cpu().eval()
    trunk = backbone(copy)
    config = {
        "format": FORMAT,
        "architecture": name,
        "num_classes": 0,
        "num_features": trunk.width(),
        "model_args": model_args,
        "late_cls": trunk.cls_layer,
        "pretrained_cfg": {
            **_pixels(call, normalize),
            "input_size": [trunk.channels, *trunk.size],
            "num_classes": 0,
            "interpolation": "bicubic",
            "crop_pct": 224 / 256,
        },
    }
    config_text = _json(call, config)
    state = {key: value.contiguous() for key, value in copy.state_dict().items()}
    # "format" is taken: readers of safetensors expect the framework there.
    metadata = {"format": "pt", "export_format": str(FORMAT), "late_cls": str(trunk.cls_layer), "architecture": name}
    with _writable(call, folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        paths = (atomically(folder / file) for file in (WEIGHTS, CONFIG, CARD))
        with next(paths) as weights, next(paths) as text, next(paths) as card:
            save_file(state, weights, metadata=metadata)
            text.write_text(config_text)
            own = (folder / CARD).is_file() and MARK not in (folder / CARD).read_text(errors="replace")
            card.write_bytes((folder / CARD).read_bytes() if own else _card(trunk, name, model_args).encode())
            _verify(call, copy, build(call, folder, text, weights))


def _pixels(call: str, normalize: Any) -> dict[str, list[float]]:
    """Mean and standard deviation as config.json has them."""
    try:
        mean, std = ([float(value) for value in values] for values in normalize)
    except (TypeError, ValueError) as error:
        expected, remedy = "mean and standard deviation of each channel", "export_timm(..., normalize=IMAGENET)"
        raise SERError(call, f"normalize={normalize!r}", expected, remedy) from error
    return {"mean": mean, "std": std}


def _json(call: str, config: dict[str, Any]) -> str:
    try:
        return json.dumps(config, indent=2) + "\n"
    except TypeError as error:
        remedy = f"export_timm(vit, folder, {config['architecture']!r}, depth=12)  # names in place of classes"
        expected = "arguments of timm.create_model that JSON can hold"
        raise SERError(call, f"{config['model_args']}: {error}", expected, remedy) from error


@contextmanager
def _writable(call: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        given = "a file" if folder.is_file() else f"{type(error).__name__}: {error}"
        raise SERError(call, given, "a folder that can be written", "export_timm(vit, 'encoder', name)") from error


def _card(trunk: Backbone, name: str, model_args: dict[str, Any]) -> str:
    """What says first how the encoder is to be loaded, to who finds the folder."""
    layer, arguments = trunk.cls_layer, "".join(f", {key}={value!r}" for key, value in model_args.items())
    joins = "[CLS] joins at the first block, as in plain timm." if trunk.has_prefix else "It has no [CLS] to join late."
    if layer:
        joins = (
            f"**[CLS] joins after {layer} blocks.** Plain timm (`load_state_dict`, `checkpoint_path`, `local-dir:`) "
            f"loads these weights without an error, but lets [CLS] in at the first block and so gives other features. "
            f"After it, type `late_cls(vit, {layer})`, as below."
        )
    code = [
        "import ser_reg, timm",
        "",
        'vit = ser_reg.load_encoder(".")  # this folder; nothing else to do',
        "",
        f'vit = timm.create_model("{name}", num_classes=0, checkpoint_path="{WEIGHTS}"{arguments})  # or with timm',
    ]
    code += [f"vit = ser_reg.late_cls(vit, {layer})  # without it, other features"] if layer else []
    return "\n".join([f"# {name}, an encoder", "", joins, "", "```python", *code, "```", "", MARK, ""])


def _remove_unfinished(folder: Path) -> None:
    """What exports left that were killed: as large as a model, and hidden."""
    for name in (WEIGHTS, CONFIG, CARD):
        for left in folder.glob(f".*-{name}"):
            left.unlink()


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
