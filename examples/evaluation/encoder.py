"""An encoder as it was trained, and what tells it from any other."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ser_reg import SERError, cls_layer, load_encoder

__all__ = ["Encoder", "check_cls_layer", "load", "pooled", "wrap"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Encoder(NamedTuple):
    """A model in evaluation mode, and how its images are made."""

    vit: nn.Module
    name: str
    """As the user gave it."""
    late_cls: int | None
    """Blocks that run before [CLS] joins; None for a model that is no ViT."""
    size: int
    """Pixels a side."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    """Of weights, architecture and `late_cls`."""

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 as the model wants them."""
        mean, std = (images.new_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def need_blocks(self, call: str, remedy: str) -> None:
        """Raise unless this is a ViT, whose blocks and patch tokens can be read."""
        if self.late_cls is None:
            given = f"{self.name}, a {type(self.vit).__name__}"
            raise SERError(call, given, "a timm ViT: blocks with patch tokens", remedy)

    def summary(self) -> dict[str, Any]:
        """For results."""
        fields = {"name": self.name, "class": type(self.vit).__name__, "late_cls": self.late_cls, "size": self.size}
        return fields | {"mean": self.mean, "std": self.std, "fingerprint": self.fingerprint}


def load(model: str, size: int | None = None, pretrained: bool = True, seed: int = 0) -> Encoder:
    """The encoder that `ser_reg.load_encoder` finds under this name, [CLS] joining where it did in training.

    Args:
        model: what load_encoder takes.
        size: pixels a side; by default those that the model was built for.
        pretrained: of a timm name: with its published weights, or with random ones.
        seed: of the random ones, so that every process draws the same.

    Raises:
        SERError: what load_encoder raises; or the model does not let [CLS] in where it did in training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            vit = load_encoder(model, pretrained)
        except SERError as error:
            if "pretrained=False" not in error.remedy:
                raise
            remedy = "--no-pretrained  # random weights"
            raise SERError(f"evaluate.py --model {model}", error.given, error.expected, remedy) from error
        return wrap(vit, model, size)


def wrap(vit: nn.Module, name: str, size: int | None = None) -> Encoder:
    """A model at hand as an Encoder, checked as by `load`."""
    config = _config(vit, name)
    check_cls_layer(vit, config.get("late_cls"))
    pixels = config.get("pretrained_cfg", {})
    if size is None:
        built = getattr(getattr(vit, "patch_embed", None), "img_size", None) or pixels.get("input_size", (3, 224, 224))
        if built[-1] != built[-2]:
            given, remedy = f"a model for images of {built[-2]} x {built[-1]} pixels", f"--size {min(built[-2:])}"
            raise SERError(f"evaluate.py --model {name}", given, "a size for square images", remedy)
        size = int(built[-1])
    _check_size(vit, name, size)
    mean, std = (
        tuple(map(float, pixels.get(key) or default)) for key, default in zip(("mean", "std"), IMAGENET, strict=True)
    )
    return Encoder(vit.eval().requires_grad_(False), name, _layer(vit), size, mean, std, _fingerprint(vit))


def check_cls_layer(vit: nn.Module, trained: int | str | None) -> None:
    """Raise if [CLS] does not join where it did in training: weights load without a word, features are others.

    Args:
        vit: the model as it is used.
        trained: `late_cls` of its export; None when nothing says so.
    """
    if trained is not None and (_layer(vit) or 0) != int(trained):
        raise SERError(
            "evaluate.py --model",
            f"a model whose [CLS] joins after {_layer(vit) or 0} blocks",
            f"after {trained}, as its weights were trained (late_cls of the export)",
            f"ser_reg.late_cls(vit, {trained})  # or give the exported folder as --model",
        )


def pooled(vit: Any, images: Tensor) -> Tensor:
    """(B, D): the normalised [CLS], or whatever timm pools for this model."""
    embedding: Tensor = vit(images)
    if embedding.ndim != 2:
        given = f"features of shape {tuple(embedding.shape)}"
        remedy = "timm.create_model(..., num_classes=0)  # with its pooling"
        raise SERError("evaluate.py --model", given, "one vector an image (B, D)", remedy)
    return embedding


def _check_size(vit: Any, name: str, size: int) -> None:
    """Raise if a ViT does not take square images of this size."""
    if _layer(vit) is None:
        return
    rows, columns = vit.patch_embed.feat_ratio(as_scalar=False)
    call, given = f"evaluate.py --model {name}", f"--size {size}"
    if not vit.dynamic_img_size:
        if tuple(vit.patch_embed.img_size) != (size, size):
            built = "{} x {}".format(*vit.patch_embed.img_size)
            raise SERError(call, given, f"{built} pixels, the only size of this model", f"--size {built.split()[0]}")
    elif not vit.patch_embed.dynamic_img_pad and (size % rows or size % columns or size < 1):
        step = math.lcm(rows, columns)
        expected = f"a multiple of {step}, which patches of {rows} x {columns} pixels fill"
        raise SERError(call, given, expected, f"--size {max(1, size // step) * step}")


def _layer(vit: nn.Module) -> int | None:
    try:
        return cls_layer(vit)
    except SERError:  # another family
        return None


def _config(vit: Any, name: str) -> dict[str, Any]:
    """config.json of the export that a model came from, by our hand or by timm's; else what timm knows of it."""
    known = dict(getattr(vit, "pretrained_cfg", None) or {})
    folder = Path(name.removeprefix("local-dir:"))
    if known.get("source") == "local-dir":
        folder = Path(known["file"])
    elif folder.suffix == ".safetensors":
        folder = folder.parent
    if (folder / "config.json").is_file():
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        return config
    return {"pretrained_cfg": known}


def _fingerprint(vit: nn.Module) -> str:
    described = f"{type(vit).__module__} {vit!r} {getattr(vit, 'global_pool', '')} late_cls={_layer(vit)}"
    digest = hashlib.sha256(described.encode())
    for key, value in sorted(vit.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
