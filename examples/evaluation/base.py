"""What a judgement is, and what each asks of its session: the encoder, its data, the processes, where results go.

A judgement is a frozen dataclass of its flags with a method `run`, which makes a `Session`, computes and writes. One
file holds it whole; one line of JUDGEMENTS in evaluate.py makes a subcommand of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from data import Source, open_source
from data.settings import cores
from rich.console import Console
from torch import Tensor, nn

from ser_reg.errors import SERError, require
from ser_reg.records import atomically, environment

from .encoder import load
from .features import Extraction, Features, class_tokens, extract, fingerprint

__all__ = ["Judgement", "Session", "folder_name", "labels_as", "percent"]

SECONDS = 30  # between two lines on how far a training is
PATIENCE = timedelta(days=7)  # of processes that wait while the main one trains a classifier; NCCL's own is ten minutes
MAY_BE_0 = {"label_smoothing", "layers", "seed", "warmup_epochs", "weight_decay", "workers"}
MOST_SEEDS = 2**32  # as NumPy has it


@dataclass(frozen=True, kw_only=True)
class Judgement:
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

    @property
    def name(self) -> str:
        """Of the subcommand, and of its file of results."""
        return type(self).__name__.lower()

    def run(self) -> None:
        """Judge, and write OUTPUT_DIR/NAME.json by `Session.write`. All processes call it."""
        raise NotImplementedError

    def check(self, call: str) -> None:
        """Raise a SERError for a number that would give a wrong one."""
        remedy = f"{call} --help  # has defaults"
        for flag, value in asdict(self).items():
            zero, numbers = flag in MAY_BE_0, value if isinstance(value, tuple) else (value,)
            expected = f"{'0 or more' if zero else 'more than 0'}, and finite"
            for number in numbers:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    fits = 0 < number < math.inf or (number == 0 and zero)
                    require(fits, call, f"--{flag.replace('_', '-')} {number}", expected, remedy)
        require(self.seed < MOST_SEEDS, call, f"--seed {self.seed}", f"less than {MOST_SEEDS}", f"{call} --seed 0")


class Session:
    """The encoder on its device, and what every judgement asks for.

    Args:
        settings: the judgement.
        precision: in which accelerate trains.

    Attributes:
        call: how an error names the judgement.
        main: whether this is the process that judges and writes.
    """

    def __init__(self, settings: Judgement, precision: Literal["no", "bf16"] = "no") -> None:
        self.settings, self.call, self.start = settings, f"evaluate.py {settings.name}", time.perf_counter()
        settings.check(self.call)
        self.said = self.start
        # Told so, accelerate starts gloo for several processes; left to itself without a GPU, each would be alone.
        on_cpu = settings.device == "cpu" or not torch.accelerator.is_available()
        self.accelerator = Accelerator(
            cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
        )
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.console = Console(quiet=not self.main, highlight=False, soft_wrap=True)
        self.encoder = load(settings.model, settings.size, settings.pretrained, settings.seed)
        self.encoder.model.to(self.device)
        self.unreadable: dict[str, list[tuple[str, str]]] = {}
        make_folder(settings.output_dir, self.call, "--output-dir")
        if self.encoder.late_cls:
            self.note(f"{settings.model}: [CLS] joins after {self.encoder.late_cls} blocks, as in training")

    def note(self, line: str) -> None:
        """A line for the user, from the main process."""
        self.console.print(line, markup=False)

    def note_epoch(self, epoch: int) -> None:
        """Say that an epoch is done, now and then."""
        if time.perf_counter() - self.said > SECONDS:
            self.said = time.perf_counter()
            self.note(f"{epoch + 1} epochs after {self.said - self.start:.0f} s")

    def source(self, split: Literal["train", "val"]) -> Source:
        """The labelled images of a split."""
        data = self.settings.data
        source, call = open_source(data, split, self.settings.seed), f"{self.call} --data {data}"
        labelled = source.classes and all(source.label(i) >= 0 for i in range(len(source)))
        expected = "images with labels, to be judged by"
        require(labelled, call, f"no labels in {split}", expected, "--data FOLDER  # FOLDER/val/CLASS/*.jpg")
        expected = "two at least: of one class any answer is right"
        remedy = "--data FOLDER  # FOLDER/train/CLASS/*.jpg, FOLDER/val/CLASS/*.jpg"
        require(len(source.classes) >= 2, call, f"one class, {source.classes[0]!r}", expected, remedy)
        return source

    def features(self, source: Source, where: str, extraction: Extraction) -> Features:
        """Features of a source, cached under a name for the source."""
        cache = self.settings.cache or self.settings.output_dir / "features"
        make_folder(cache, self.call, "--cache")
        features = self._extract(source, extraction, cache / where)
        self.leave_out(where, features.unreadable)
        return features

    def split(self, split: Literal["train", "val"], extraction: Extraction) -> Features:
        """Features of a split of the data."""
        return self.features(self.source(split), f"{folder_name(self.settings.data)}-{split}", extraction)

    def embeddings(self, split: Literal["train", "val"]) -> Features:
        """Features of a split that have "pooled" among them: what the linear classifier sees by default."""
        known = self.encoder.known
        return self.split(split, class_tokens(self.encoder, min(4, known.depth) if known else 1))

    def class_tokens(self, last: int) -> tuple[Extraction, str]:
        """What a classifier sees: what is extracted, and the name of its features."""
        extraction = class_tokens(self.encoder, last, self.call)
        if extraction.name != "pooled":
            return extraction, "cls"
        given = f"--last {last} of {self.settings.model}, which has no normalised [CLS] in its blocks"
        require(
            last == 1,
            self.call,
            given,
            "a timm ViT with [CLS], or --last 1",
            f"{self.call} --last 1  # its pooled output",
        )
        return extraction, "pooled"

    def logits(self, model: nn.Module, source: Source) -> tuple[Tensor, Features]:
        """What a fine-tuned network says of a source, by the way of features: any number of processes takes part."""
        folder = self.settings.output_dir / "finetune-logits"
        if self.main:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier network
        self.accelerator.wait_for_everyone()
        extraction = Extraction("logits", lambda encoder, images: {"logits": model(encoder.normalise(images))})
        features = self._extract(source, extraction, folder)
        self.leave_out("val", features.unreadable)
        return features["logits"], features

    def key(self, source: Source) -> dict[str, Any]:
        """What a training on a source depends on, beside its own settings."""
        encoder = self.encoder
        fields = {"encoder": encoder.fingerprint, "size": encoder.size, "mean": encoder.mean, "std": encoder.std}
        return fields | {"data": self.settings.data, "images": fingerprint(source), "seed": self.settings.seed}

    def leave_out(self, where: str, unreadable: list[tuple[str, str]]) -> None:
        """Say which images could not be read, now and in the results."""
        self.unreadable[where] = unreadable
        if unreadable:
            self.note(f"{where}: {len(unreadable)} unreadable images left out, such as {unreadable[0][0]}")

    def write(self, results: dict[str, Any]) -> None:
        """OUTPUT_DIR/NAME.json, from the main process."""
        if self.main:
            path = self.settings.output_dir / f"{self.settings.name}.json"
            unreadable = {
                where: {"count": len(images), "images": dict(images)} for where, images in self.unreadable.items()
            }
            described = {
                "settings": asdict(self.settings),
                "model": self.encoder.summary(),
                "environment": environment(self.device) | {"processes": self.accelerator.num_processes},
                "unreadable": unreadable,
                "results": results,
                "seconds": time.perf_counter() - self.start,
            }
            with atomically(path) as draft:
                draft.write_text(json.dumps(described, indent=1, default=str) + "\n")
            self.note(f"{path}")
        self.accelerator.wait_for_everyone()

    def _extract(self, source: Source, extraction: Extraction, folder: Path) -> Features:
        batch_size, workers = self.settings.images_at_a_time, self.settings.workers
        return extract(self.accelerator, self.encoder, source, extraction, folder, batch_size, workers, self.note)


def folder_name(data: str) -> str:
    """A name for a data set: readable, and another one for another."""
    return re.sub(r"\W+", "-", data)[-40:].strip("-") + "-" + hashlib.sha256(data.encode()).hexdigest()[:8]


def make_folder(folder: Path, call: str, flag: str) -> None:
    """Make the folder that a flag names; raises a SERError where there can be none, or none to write to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        given = f"{type(error).__name__}: {error.strerror}"
        expected = "a folder that can be made and written to"
        raise SERError(f"{call} {flag} {folder}", given, expected, f"{flag} out/evaluate") from error


def labels_as(features: Features, classes: list[str], call: str) -> Tensor:
    """Labels of features as indices into the classes of the training."""
    positions = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in features.classes if name not in positions]
    given, expected = f"classes such as {next(iter(unknown), '')!r}", "classes of the training images"
    require(not unknown, call, given, expected, "--data FOLDER  # train/ and val/ alike")
    return torch.tensor([positions[name] for name in features.classes])[features.labels]


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
