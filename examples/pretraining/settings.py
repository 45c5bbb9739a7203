"""Settings of a training: in groups, each beside what it sets; saved with every run, and the command line as well."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tyro
from data.settings import DataSettings

from ser_reg import SERError
from ser_reg.errors import require
from ser_reg.export import FORMAT

from .encoder import EncoderSettings
from .optimizer import OptimizerSettings
from .positive import require_positive
from .term import DEFAULT_TERM, TERMS, NoTerm, TermSettings, term_words
from .views import ViewSettings

__all__ = ["SMALL", "RunSettings", "Settings", "flatten", "parse", "read_run", "require_format"]

# These may differ between a run and its continuation: they do not change what is learned.
FREE = {"output_dir", "resume", "workers", "tracker", "log_every", "knn_every", "checkpoint_minutes"}
FREE |= {"precision", "fsdp", "gradient_checkpointing"}  # nor these, up to rounding

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class RunSettings:
    """The run: how long, on what, and what it leaves."""

    output_dir: Path = Path("out/pretraining")
    """Where checkpoints, logs and the encoder go."""
    resume: Literal["auto", "never"] = "auto"
    """Go on from the checkpoint in the output folder if there is one, or start anew and write over it."""
    steps: int | None = None
    """Steps of the optimiser; by default as many as the epochs have. All schedules are stretched to it."""
    epochs: float = 100
    """Passes over the data (Section 4.1)."""
    batch_size: int = 2048
    """Images of a step, over all processes (Section 4.1)."""
    accumulate: int = 1
    """Parts in which the batch is computed. Negatives and batch statistics are those of a part: not a bigger batch."""
    seed: int = 0
    """Of weights, order, crops and geometry."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision, or none."""
    fsdp: bool = False
    """Shard parameters over the processes (FSDP2), for encoders that do not fit one GPU."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Besides metrics.jsonl, which is always written."""
    log_every: int = 50
    """Steps between writings of the log; each step has its line."""
    knn_every: float = 10
    """Epochs between k-NN evaluations; 0 for none."""
    checkpoint_minutes: float = 15
    """Between checkpoints; there is always one at the end."""

    def check(self, script: str) -> None:
        """Raise a SERError for numbers that do not go together."""
        typed = f"python examples/{script}"
        require_positive(script, self, log_every=50)
        require(
            not (self.fsdp and self.precision == "fp16"),
            script,
            "fsdp with precision=fp16",
            "bf16, which needs no scaling of the loss, or none",
            f"{typed} --fsdp --precision bf16",
        )
        require(
            self.batch_size >= 2 and self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
            script,
            f"batch_size={self.batch_size}, accumulate={self.accumulate}",
            "two images or more, which divide into as many parts",
            f"{typed} --batch-size {max(2, self.batch_size)} --accumulate 1",
        )
        require(
            (self.steps is None or self.steps >= 1) and self.epochs > 0,
            script,
            f"steps={self.steps}, epochs={self.epochs}",
            "positive numbers",
            f"{typed} --steps 100 --epochs 100",
        )


@dataclass(frozen=True)
class Settings:
    """All that a training is told. A base method's script adds a group `method` with its own settings."""

    suited: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Defaults of terms, by their words, that the base method wants to be others."""

    preset: str
    """Where all other settings start from: "paper", the ImageNet-1k run; "released", what the released code of SER
    sets instead; "official" (Barlow Twins), the recipe of its release; "small", minutes on a CPU."""
    run: tyro.conf.OmitArgPrefixes[RunSettings] = field(default_factory=RunSettings)
    data: tyro.conf.OmitArgPrefixes[DataSettings] = field(default_factory=DataSettings)
    encoder: tyro.conf.OmitArgPrefixes[EncoderSettings] = field(default_factory=EncoderSettings)
    views: tyro.conf.OmitArgPrefixes[ViewSettings] = field(default_factory=ViewSettings)
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerSettings] = field(default_factory=OptimizerSettings)
    term: TermSettings | NoTerm = field(default_factory=TERMS[DEFAULT_TERM])

    @property
    def has_term(self) -> bool:
        """Whether there is an added term at all."""
        return self.term.weight > 0 and self.term.ratio > 0

    @property
    def read(self) -> float:
        """Part of the batch that has the views which the term reads. λ = 0 keeps those that the base method sees."""
        return self.term.ratio if self.term.weight > 0 or self.term.policy.control else 0.0

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that the term is applied to."""
        return tuple(range(1, self.encoder.block_count + 1)) if self.term.all_layers else (self.term.layer,)

    @property
    def late_layer(self) -> int:
        """Blocks that run before [CLS] joins."""
        if self.encoder.cls_layer is not None:
            return self.encoder.cls_layer
        return min(self.term.layer, self.encoder.block_count - 1) if self.term.ratio > 0 else 0

    def groups(self) -> Iterator[tuple[str, Any]]:
        """Name and settings of each group."""
        for f in dataclasses.fields(self):
            if dataclasses.is_dataclass(value := getattr(self, f.name)):
                yield f.name, value

    def but(self: S, preset: str | None = None, term: Mapping[str, Any] | None = None, **changes: Any) -> S:
        """The same with other values, by their plain names; those of the term apart."""
        made: dict[str, Any] = {"preset": self.preset if preset is None else preset}
        for name, group in self.groups():
            names = {f.name for f in dataclasses.fields(group)}
            own = (term or {}) if name == "term" else {key: changes.pop(key) for key in names & changes.keys()}
            made[name] = dataclasses.replace(group, **own)
        if changes:
            raise TypeError(f"no such settings: {', '.join(changes)}")
        return type(self)(**made)

    def check(self, script: str) -> None:
        """Raise a SERError for settings that do not go together, before hours are spent.

        What depends on data and processes is checked where they are known.
        """
        for _, group in self.groups():
            group.check(script)
        typed, encoder, data = f"python examples/{script}", self.encoder, self.data
        require(
            self.term.name == NoTerm.name or 0 < self.term.layer <= encoder.block_count,
            script,
            lambda: f"layer={self.term.layer} of an encoder of {encoder.block_count} blocks",
            f"a layer from 1 to {encoder.block_count}",
            lambda: f"{typed} {self.term.name} --term.layer {min(3, encoder.block_count)}",
        )
        require(
            encoder.dynamic_size or not data.local_views,
            script,
            f"local_views={data.local_views} with an encoder of one image size",
            "an encoder that takes images of any size",
            f"{typed} --dynamic-size",
        )
        require(
            encoder.dynamic_size or not (self.term.policy.whole and self.views.scaled),
            script,
            f"scale={self.views.scale}, aspect={self.views.aspect} with an encoder of one image size",
            "an encoder that takes images of any size, or a group without scaling",
            f"{typed} --scale 1 1 --aspect 1 1  # or --dynamic-size",
        )
        require(
            encoder.dynamic_size or self.term.policy.extra != "turned" or data.local_size == encoder.image_size,
            script,
            f"turned crops of {data.local_size} pixels with an encoder of images of {encoder.image_size}",
            "an encoder that takes images of any size, or crops of its own",
            f"{typed} {self.term.name} --local-size {encoder.image_size}  # or --dynamic-size",
        )
        require(
            not data.local_views or data.local_size < encoder.image_size,
            script,
            f"local views of {data.local_size} pixels, global ones of {encoder.image_size}",
            "local views that are smaller",
            f"{typed} --local-size {max(1, encoder.image_size * 96 // 224)}",
        )

    def plain(self) -> dict[str, Any]:
        """As JSON has it, by group; the term with its name."""
        found = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return found | {"term": {"name": self.term.name, **found["term"]}}

    def flat(self) -> dict[str, Any]:
        """As the command line has it: plain names, but for those of the term."""
        return flatten(self.plain())

    def same_run(self, other: Mapping[str, Any]) -> list[str]:
        """Names of settings in which a saved run differs from this one, so that it cannot go on with these.

        Args:
            other: its settings, as `plain` gave them.
        """
        mine, theirs = self.flat(), flatten(other)
        return sorted(name for name in {*mine, *theirs} - FREE if mine.get(name) != theirs.get(name))


def flatten(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that `Settings.plain` gave, by the names of their flags."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, Mapping):
            flat |= {f"term.{key}" if name == "term" else key: inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


# What the presets "small" have in common: a CPU in minutes.
SMALL: dict[str, Any] = {
    "preset": "small",
    "data": "embedded",
    "architecture": "vit_tiny_patch16_224",
    "image_size": 32,
    "patch_size": 4,
    "width": 64,
    "depth": 6,
    "heads": 4,
    "local_size": 16,
    "crop_min": 0.2,
    "blur": False,
    "batch_size": 64,
    "epochs": 5,
    "warmup_epochs": 0.5,
    "learning_rate": 4e-3,
    "workers": 0,
    "log_every": 10,
    "knn_every": 1,
    "precision": "no",
    "term": {"layer": 2, "ratio": 0.25, "projection_dim": 128},
}


def parse(presets: Mapping[str, S], script: str, arguments: list[str] | None = None) -> S:
    """The settings that the command line asks for: those of `--preset`, "small" if none is given, and its other flags.

    Raises:
        SERError: there is no such preset, or the settings do not go together.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    preset = "small"
    for flag, value in pairwise([*arguments, ""]):
        if flag == "--preset":
            preset = value
        elif flag.startswith("--preset="):
            preset = flag.removeprefix("--preset=")
    remedy = f"python examples/{script} --preset small"
    require(preset in presets, script, f"preset={preset!r}", f"one of {', '.join(presets)}", remedy)
    chosen = presets[preset]
    # As the preset's class, but for the words of the terms, whose defaults are the preset's.
    term = ("term", term_words(chosen.term, type(chosen).suited), field(default=chosen.term))
    space = {"__doc__": type(chosen).__doc__}
    shown = dataclasses.make_dataclass("Shown", [term], bases=(type(chosen),), namespace=space, frozen=True)
    given = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen)}
    found = tyro.cli(shown, default=shown(**given), args=arguments, config=(tyro.conf.CascadeSubcommandArgs,))
    settings = type(chosen)(**{name: getattr(found, name) for name in given})
    settings.check(script)
    return settings


def read_run(folder: Path) -> dict[str, Any]:
    """What settings.json in a run's folder says: "method", "settings" by group, and "environment".

    Raises:
        SERError: it was written by a version with another format.
    """
    path = folder / "settings.json"
    run: dict[str, Any] = json.loads(path.read_text())
    require_format(f"read_run({str(folder)!r})", path, run)
    return run


def require_format(call: str, path: Path, found: Mapping[str, Any]) -> None:
    """Raise a SERError unless what a file holds is of the format that this version reads and writes."""
    version = found.get("format", 1)
    if version != FORMAT:
        given = f"format {version} in {path}, where this version of ser_reg has format {FORMAT}"
        raise SERError(call, given, f"format {FORMAT}", f"--output-dir {path.parent}_2  # or the version that wrote it")
