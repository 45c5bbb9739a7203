"""One call of evaluate.py: the encoder, its data, the processes, and where results go."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from pretraining.dataset import cores
from pretraining.sources import Source, open_source
from results import atomically, environment
from rich.console import Console
from torch import Tensor, nn

from ser_reg import SERError

from .encoder import load
from .features import Features, Recipe, class_tokens, extract

__all__ = ["Session", "Settings", "folder_name", "labels_as"]

SECONDS = 30  # between two lines on how far a training is
PATIENCE = timedelta(days=7)  # of processes that wait while the main one trains a classifier; NCCL's own is ten minutes
MAY_BE_0 = {"label_smoothing", "seed", "warmup_epochs", "weight_decay", "workers"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all evaluations share."""

    model: str
    """An exported folder (OUTPUT_DIR/encoder), a timm name, or package.module:function."""
    data: str = "embedded"
    """FOLDER with train/CLASS/* and val/CLASS/*, hf:NAME, wds:PATTERN, or "embedded" photographs."""
    output_dir: Path = Path("out/evaluate")
    """Where the results go. A folder for each model."""
    cache: Path | None = None
    """Where features go; by default OUTPUT_DIR/features."""
    size: int | None = None
    """Pixels a side; by default as the model was built for."""
    images_at_a_time: int = 256
    """Through the encoder, in each process, where no gradient is needed."""
    workers: int = min(4, cores())
    """Processes that read images, for each of the processes that compute."""
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    """CUDA when there is one, or the CPU in any case."""
    pretrained: bool = True
    """Of a timm name: published weights, or with --no-pretrained random ones."""


class Session:
    """The encoder on its device, and what every evaluation asks for.

    Args:
        name: of the subcommand.
        settings: its flags.
        precision: in which accelerate trains.
    """

    def __init__(self, name: str, settings: Settings, precision: Literal["no", "bf16"] = "no") -> None:
        self.name, self.settings, self.start = name, settings, time.perf_counter()
        for flag, value in asdict(settings).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and (value < 0 or (value == 0 and flag not in MAY_BE_0)):
                given = f"--{flag.replace('_', '-')} {value}"
                expected = "0 or more" if flag in MAY_BE_0 else "more than 0"
                raise SERError(f"evaluate.py {name}", given, expected, f"evaluate.py {name} --help  # has defaults")
        self.said = self.start
        # Told so, accelerate starts gloo for several processes; left to itself without a GPU, each would be alone.
        on_cpu = settings.device == "cpu" or not torch.accelerator.is_available()
        self.accelerator = Accelerator(
            cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
        )
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.console = Console(quiet=not self.main, highlight=False, soft_wrap=True)
        self.encoder = load(settings.model, settings.size, settings.pretrained, settings.seed)
        self.encoder.vit.to(self.device)
        self.unreadable: dict[str, list[tuple[str, str]]] = {}
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        if self.encoder.late_cls:
            self.note(f"{settings.model}: [CLS] joins after {self.encoder.late_cls} blocks, as in training")

    def note(self, line: str) -> None:
        self.console.print(line, markup=False)

    def source(self, split: Literal["train", "val"]) -> Source:
        """The labelled images of a split."""
        data = self.settings.data
        source = open_source(data, split, self.settings.seed)
        if not source.classes or any(source.label(i) < 0 for i in range(len(source))):
            call, expected = f"evaluate.py {self.name} --data {data}", "images with labels, to be judged by"
            raise SERError(call, f"no labels in {split}", expected, "--data FOLDER  # FOLDER/val/CLASS/*.jpg")
        if len(source.classes) < 2:
            call, given = f"evaluate.py {self.name} --data {data}", f"one class, {source.classes[0]!r}"
            expected = "two at least: of one class any answer is right"
            raise SERError(call, given, expected, "--data FOLDER  # FOLDER/train/CLASS/*.jpg, FOLDER/val/CLASS/*.jpg")
        return source

    def features(self, source: Source, where: str, recipe: Recipe) -> Features:
        """Features of a source, cached under a name for the source."""
        settings = self.settings
        cache = (settings.cache or settings.output_dir / "features") / where
        batch_size, workers = settings.images_at_a_time, settings.workers
        features = extract(self.accelerator, self.encoder, source, recipe, cache, batch_size, workers, self.note)
        self.leave_out(where, features.unreadable)
        return features

    def logits(self, vit: nn.Module, source: Source) -> tuple[Tensor, Features]:
        """What a fine-tuned network says of a source, by the way of features: any number of processes takes part."""
        folder = self.settings.output_dir / "finetune-logits"
        if self.main:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier network
        self.accelerator.wait_for_everyone()
        recipe = Recipe("logits", lambda encoder, images: {"logits": vit(encoder.normalise(images))})
        batch_size, workers = self.settings.images_at_a_time, self.settings.workers
        features = extract(self.accelerator, self.encoder, source, recipe, folder, batch_size, workers, self.note)
        self.leave_out("val", features.unreadable)
        return features["logits"], features

    def embeddings(self, split: Literal["train", "val"]) -> Features:
        """Features of a split that have "pooled" among them: what the linear classifier sees by default."""
        blocks = getattr(self.encoder.vit, "blocks", ())
        return self.split(split, class_tokens(self.encoder, max(1, min(4, len(blocks)))))

    def key(self, source: Source) -> dict[str, Any]:
        """What a training on a source depends on, beside its own settings."""
        encoder = self.encoder
        fields = {"encoder": encoder.fingerprint, "size": encoder.size, "mean": encoder.mean, "std": encoder.std}
        return fields | {"data": self.settings.data, "images": len(source), "seed": self.settings.seed}

    def epochs(self, epoch: int) -> None:
        """Say that an epoch is done, now and then."""
        if time.perf_counter() - self.said > SECONDS:
            self.said = time.perf_counter()
            self.note(f"{epoch + 1} epochs after {self.said - self.start:.0f} s")

    def leave_out(self, where: str, unreadable: list[tuple[str, str]]) -> None:
        """Say which images could not be read, now and in the results."""
        self.unreadable[where] = unreadable
        if unreadable:
            self.note(f"{where}: {len(unreadable)} unreadable images left out, such as {unreadable[0][0]}")

    def split(self, split: Literal["train", "val"], recipe: Recipe) -> Features:
        """Features of a split of the data."""
        return self.features(self.source(split), f"{folder_name(self.settings.data)}-{split}", recipe)

    def class_tokens(self, last: int) -> tuple[Recipe, str]:
        """What a classifier sees: the recipe, and the name of its features."""
        recipe = class_tokens(self.encoder, last)
        if recipe.name != "pooled":
            return recipe, "cls"
        if last != 1:
            given = f"--last {last} of {self.settings.model}, which has no normalised [CLS] in its blocks"
            remedy = f"evaluate.py {self.name} --last 1  # its pooled output"
            raise SERError(f"evaluate.py {self.name}", given, "a timm ViT with [CLS], or --last 1", remedy)
        return recipe, "pooled"

    def write(self, results: dict[str, Any], **more: Any) -> None:
        """OUTPUT_DIR/NAME.json, from the main process."""
        if self.main:
            path = self.settings.output_dir / f"{self.name}.json"
            unreadable = {
                where: {"count": len(images), "images": dict(images)} for where, images in self.unreadable.items()
            }
            described = {
                "settings": asdict(self.settings) | more,
                "model": self.encoder.summary(),
                "environment": environment(self.device) | {"processes": self.accelerator.num_processes},
                "unreadable": unreadable,
                "results": results,
                "seconds": time.perf_counter() - self.start,
            }
            with atomically(path) as part:
                part.write_text(json.dumps(described, indent=1, default=str) + "\n")
            self.note(f"{path}")
        self.accelerator.wait_for_everyone()


def folder_name(data: str) -> str:
    """A name for a data set: readable, and another one for another."""
    return re.sub(r"\W+", "-", data)[-40:].strip("-") + "-" + hashlib.sha256(data.encode()).hexdigest()[:8]


def labels_as(features: Features, classes: list[str], call: str) -> Tensor:
    """Labels of features as indices into the classes of the training."""
    places = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in features.classes if name not in places]
    if unknown:
        expected = "classes of the training images"
        raise SERError(call, f"classes such as {unknown[0]!r}", expected, "--data FOLDER  # train/ and val/ alike")
    return torch.tensor([places[name] for name in features.classes])[features.labels]
