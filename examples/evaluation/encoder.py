"""An encoder as it was trained, and what tells it from any other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ser_reg.backbones import Backbone, backbone
from ser_reg.errors import SERError, require
from ser_reg.export import load_encoder
from ser_reg.images import IMAGENET

__all__ = ["Encoder", "check_cls_layer", "load", "pooled", "wrap"]


class Encoder(NamedTuple):
    """A model in evaluation mode, and how its images are made."""

    model: nn.Module
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

    @property
    def known(self) -> Backbone | None:
        """What can be asked of the model; None for one of another family, whose embeddings are all there is."""
        return _known(self.model)

    def layered(self, call: str) -> Backbone:
        """The same, where layers are needed.

        Raises:
            SERError: the model is of another family.
        """
        try:
            return backbone(self.model)
        except SERError as error:
            given, remedy = f"{self.name}, a {error.given}", "evaluate.py knn  # which any timm model can be asked"
            raise SERError(call, given, f"layers with patch tokens: {error.expected}", remedy) from error

    def summary(self) -> dict[str, Any]:
        """For results."""
        fields = {"name": self.name, "class": type(self.model).__name__, "late_cls": self.late_cls, "size": self.size}
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
            encoder = load_encoder(model, pretrained)
        except SERError as error:
            if "pretrained=False" not in error.remedy:
                raise
            remedy = "--no-pretrained  # random weights"
            raise SERError(f"evaluate.py --model {model}", error.given, error.expected, remedy) from error
        return wrap(encoder, model, size)


def wrap(model: nn.Module, name: str, size: int | None = None) -> Encoder:
    """A model at hand as an Encoder, checked as by `load`."""
    config = _config(model, name)
    check_cls_layer(model, config.get("late_cls"))
    known, pixels = _known(model), config.get("pretrained_cfg", {})
    if size is None:
        height, width = known.size if known else pixels.get("input_size", (3, 224, 224))[-2:]
        given, remedy = f"a model for images of {height} x {width} pixels", f"--size {min(height, width)}"
        require(height == width, f"evaluate.py --model {name}", given, "a size for square images", remedy)
        size = int(width)
    _check_size(model, name, size)
    _check_forward(model.eval(), name, size)
    mean, std = (
        tuple(map(float, pixels.get(key) or default)) for key, default in zip(("mean", "std"), IMAGENET, strict=True)
    )
    return Encoder(model.eval().requires_grad_(False), name, _cls_layer(model), size, mean, std, _fingerprint(model))


def check_cls_layer(model: nn.Module, trained: int | str | None) -> None:
    """Raise if [CLS] does not join where it did in training: weights load without a word, features are others.

    Args:
        model: as it is used.
        trained: `late_cls` of its export; None when nothing says so.
    """
    layer = _cls_layer(model) or 0
    require(
        trained is None or layer == int(trained),
        "evaluate.py --model",
        f"a model whose [CLS] joins after {layer} blocks",
        f"after {trained}, as its weights were trained (late_cls of the export)",
        f"ser_reg.late_cls(vit, {trained})  # or give the exported folder as --model",
    )


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    """(B, D): the normalised [CLS], or whatever timm pools for this model."""
    embedding: Tensor = model(images)
    return embedding


def _check_size(model: nn.Module, name: str, size: int) -> None:
    """Raise if a ViT does not take square images of this size."""
    known, call, given = _known(model), f"evaluate.py --model {name}", f"--size {size}"
    if known is None or not known.sequence:
        return
    try:
        require(size >= 1, call, given, "a pixel at least", f"--size {known.size[0]}")
        known.check_size(call, (size, size), known.depth)
    except SERError as error:
        patch, (height, width) = known.patch_size, known.size
        expected = f"{height} x {width} pixels, the only size of this model"
        remedy = f"--size {height}"
        if known.any_size:
            expected = f"a multiple of {patch}, which patches of {patch} x {patch} pixels fill"
            remedy = f"--size {max(1, size // patch) * patch}"
        raise SERError(call, given, expected, remedy) from error


@torch.no_grad()
def _check_forward(model: nn.Module, name: str, size: int) -> None:
    """Raise, ahead of all reading, if the model gives no embedding for an image of three channels and this size."""
    device, call = next((p.device for p in model.parameters()), "cpu"), f"evaluate.py --model {name}"
    known = _known(model)
    channels = known.channels if known else 3
    given, remedy = f"a model for images of {channels} channels", "timm.create_model(..., in_chans=3)"
    require(channels == 3, call, given, "red, green and blue", remedy)
    try:
        embedding = model(torch.zeros(1, 3, size, size, device=device))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        given = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}"
        expected = f"a model of images (1, 3, {size}, {size})"
        raise SERError(call, given, expected, "--size 224  # or another that it was built for") from error
    given = f"features of shape {tuple(embedding.shape)}" if isinstance(embedding, Tensor) else type(embedding).__name__
    remedy = "timm.create_model(..., num_classes=0)  # and pools"
    require(isinstance(embedding, Tensor) and embedding.ndim == 2, call, given, "one vector an image (B, D)", remedy)


def _known(model: nn.Module) -> Backbone | None:
    try:
        return backbone(model)
    except SERError:  # another family
        return None


def _cls_layer(model: nn.Module) -> int | None:
    known = _known(model)
    return known.cls_layer if known is not None and known.sequence else None


def _config(model: Any, name: str) -> dict[str, Any]:
    """config.json of the export that a model came from, by our hand or by timm's; else what timm knows of it."""
    known = dict(getattr(model, "pretrained_cfg", None) or {})
    folder = Path(name.removeprefix("local-dir:"))
    if known.get("source") == "local-dir":
        folder = Path(known["file"])
    elif folder.suffix == ".safetensors":
        folder = folder.parent
    if (folder / "config.json").is_file():
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        return config
    return {"pretrained_cfg": known}


def _fingerprint(model: nn.Module) -> str:
    kind, pooling = type(model).__module__, getattr(model, "global_pool", "")
    digest = hashlib.sha256(f"{kind} {model!r} {pooling} late_cls={_cls_layer(model)}".encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
