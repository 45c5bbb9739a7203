"""Settings that all trainings share: typed, saved with every run, and the command line at the same time."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import timm
import torch
import tyro

from ser_reg import SERError

from .dataset import cores

__all__ = ["SMALL", "Settings", "parse"]

# These may differ between a run and its continuation: they do not change what is learned.
FREE = {"output_dir", "resume", "workers", "tracker", "log_every", "knn_every", "checkpoint_minutes"}
FREE |= {"precision", "fsdp", "gradient_checkpointing"}  # nor these, up to rounding

# Settings, of all methods, that are positive if they are set at all, and what to type instead.
SIZES = {
    "image_size": 224,
    "local_size": 96,
    "patch_size": 16,
    "width": 384,
    "depth": 12,
    "heads": 6,
    "projection_dim": 512,
    "hidden": 2048,
    "out": 256,
    "bottleneck": 256,
    "prototypes": 65536,
    "log_every": 50,
}


@dataclass(frozen=True)
class Settings:
    """Pretrain a ViT, with soft equivariance (SER) or without."""

    preset: str
    """Where all other settings start from: "paper", the ImageNet-1k run; "released", what the released code of SER
    sets instead; "official" (Barlow Twins), the recipe of its release; "small", minutes on a CPU."""
    data: str = "embedded"
    """A folder (DATA/train/CLASS/*.jpg, DATA/val/CLASS/*.jpg), "hf:NAME_OR_PATH" for Hugging Face datasets,
    "wds:PATTERN" for WebDataset shards, or "embedded": photographs that come with scikit-image and scikit-learn."""
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
    seed: int = 0
    """Of weights, order, crops and geometry."""

    # The encoder
    architecture: str = "vit_small_patch16_224"
    """Any timm ViT."""
    image_size: int = 224
    """Pixels a side of a global view."""
    patch_size: int | None = None
    """Pixels a side; by default that of the architecture, as the next three."""
    width: int | None = None
    """Channels of a token."""
    depth: int | None = None
    """Number of blocks."""
    heads: int | None = None
    """Attention heads of a block. Official MoCo-v3 has 12 in ViT-S, the released code of SER 6, as timm."""
    dynamic_size: bool = True
    """Whether the encoder takes images of any size: scaling and local views need it."""
    drop_path: float = 0.0
    """Highest rate of stochastic depth, in the trained branch."""
    initialisation: Literal["timm", "moco"] = "timm"
    """Of linear layers: truncated normal, or uniform as in official MoCo-v3."""
    positions: Literal["learned", "sincos"] = "learned"
    """Position embedding: learned, or fixed sine-cosine as in official MoCo-v3. The released code of SER learns it."""
    patch_projection: Literal["trained", "fixed", "fixed-default"] = "trained"
    """Trained; not trained after MoCo-v3's initialisation; or not trained after PyTorch's default one, as in the
    released code of SER."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""

    # SER
    partition_ratio: float = 0.01
    """r: part of the batch that is seen whole, by the equivariant views (Table 8). 0: the plain base method."""
    ser_lambda: float = 0.5
    """λ: weight of SER (Table 8). 0: the control (Table 5). The released scripts set 1.0 (DINO 0.3)."""
    ser_temperature: float = 0.3
    """τ (Section 3.3): 0.3, DINO 0.5. The released scripts set 0.5 (MoCo-v3) and 0.4."""
    layer: int = 3
    """Blocks ahead of the tokens that SER compares (Figure 3, Table 4)."""
    all_layers: bool = False
    """SER at every layer instead, each with a projector of its own (Table 10)."""
    cls_layer: int | None = None
    """Blocks that run before [CLS] joins (Figure 3, right). By default as `layer`, all but one at most; 0 without
    b2."""
    ser_target: Literal["online", "momentum"] = "online"
    """The other view's tokens come from the trained encoder, as in the equations, or from the momentum encoder, as in
    the released code for MoCo-v3 and DINO."""
    projection_dim: int = 512
    """Width of SER's projector."""
    rotations: bool = True
    """Quarter turns in the group (Table 9)."""
    flips: bool = True
    """Left-right flips in the group (Table 9)."""
    scale: tuple[float, float] = (0.7, 1.3)
    """Range of the area factor (Section 4.1); 1 1 together with `--aspect 1 1` leaves scaling out (Table 9)."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the aspect factor."""

    # Views
    crop_min: float | None = None
    """Smallest area of a global crop, as a part of the image; by default that of the official base."""
    local_views: Literal[0, 4] = 0
    """Local views besides the two global ones: the paper's 2 views, or 2+4 (Appendix A.1)."""
    local_size: int = 96
    """Pixels a side of a local view."""
    blur: bool = True
    """Gaussian blur among the photometric changes; a radius of up to 2 pixels is too much for tiny images."""

    # Optimisation
    optimizer: Literal["adamw", "lars"] = "adamw"
    """The paper trains all three with AdamW; official Barlow Twins uses LARS."""
    learning_rate: float = 1.5e-4
    """Highest one, for 256 images; it grows with the batch."""
    final_learning_rate: float = 0.0
    """Last one; it does not grow with the batch."""
    warmup_epochs: float = 10
    """Linear, from 0 (Section 4.1)."""
    weight_decay: float = 0.1
    """At the start."""
    final_weight_decay: float | None = None
    """At the end of a cosine; by default as at the start."""
    decay_vectors: bool = True
    """Weight decay on biases and normalisation as well."""
    clip: float | None = None
    """Highest norm of each parameter's gradient by itself."""

    # Engine
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision, or none."""
    accumulate: int = 1
    """Parts in which the batch is computed. Negatives and batch statistics are those of a part: not a bigger batch."""
    fsdp: bool = False
    """Shard parameters over the processes (FSDP2), for encoders that do not fit one GPU."""
    workers: int = min(8, cores())
    """Processes that prepare images, for each process that trains."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Besides metrics.jsonl, which is always written."""
    log_every: int = 50
    """Steps between writings of the log; each step has its line."""
    knn_every: float = 10
    """Epochs between k-NN evaluations; 0 for none."""
    checkpoint_minutes: float = 15
    """Between checkpoints; there is always one at the end."""

    @property
    def late_layer(self) -> int:
        """Blocks that run before [CLS] joins."""
        if self.cls_layer is not None:
            return self.cls_layer
        return min(self.layer, self.blocks - 1) if self.partition_ratio > 0 else 0

    @property
    def blocks(self) -> int:
        """Depth of the encoder."""
        return _depth(self.architecture) if self.depth is None else self.depth

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that SER is applied to."""
        return tuple(range(1, self.blocks + 1)) if self.all_layers else (self.layer,)

    @property
    def has_ser(self) -> bool:
        """Whether there is a SER term at all."""
        return self.ser_lambda > 0 and self.partition_ratio > 0

    def check(self, script: str) -> None:
        """Raise a SERError for settings that do not go together, before hours are spent.

        What depends on data and processes is checked where they are known.
        """
        scales = self.scale != (1, 1) or self.aspect != (1, 1)
        sizes = {name: getattr(self, name, None) for name in SIZES}
        zeros = {name: size for name, size in sizes.items() if size is not None and size < 1}
        for wrong, given, expected, remedy in (
            (
                bool(zeros) or self.workers < 0,
                ", ".join(f"{name}={size}" for name, size in {**zeros, "workers": self.workers}.items()),
                "positive numbers",
                " ".join(f"--{name.replace('_', '-')} {SIZES[name]}" for name in zeros) or "--workers 0",
            ),
            (
                not 0 < self.layer <= self.blocks,
                f"layer={self.layer} of an encoder of {self.blocks} blocks",
                f"a layer from 1 to {self.blocks}",
                f"--layer {min(3, self.blocks)}",
            ),
            (
                self.cls_layer is not None and not 0 <= self.cls_layer < self.blocks,
                f"cls_layer={self.cls_layer} of an encoder of {self.blocks} blocks",
                f"0 to {self.blocks - 1}: [CLS] has to pass one block at least",
                f"--cls-layer {min(3, self.blocks - 1)}",
            ),
            (
                self.local_views > 0 and not self.dynamic_size,
                f"local_views={self.local_views} with an encoder of one image size",
                "an encoder that takes images of any size",
                "--dynamic-size",
            ),
            (
                self.partition_ratio > 0 and scales and not self.dynamic_size,
                f"scale={self.scale}, aspect={self.aspect} with an encoder of one image size",
                "an encoder that takes images of any size, or a group without scaling",
                "--scale 1 1 --aspect 1 1  # or --dynamic-size",
            ),
            (
                not 0 <= self.partition_ratio <= 1,
                f"partition_ratio={self.partition_ratio}",
                "a part of the batch, 0 to 1",
                "--partition-ratio 0.01",
            ),
            (self.ser_lambda < 0, f"ser_lambda={self.ser_lambda}", "no negative weight", "--ser-lambda 0.5"),
            (self.ser_temperature <= 0, f"ser_temperature={self.ser_temperature}", "above 0", "--ser-temperature 0.3"),
            (
                self.fsdp and self.precision == "fp16",
                "fsdp with precision=fp16",
                "bf16, which needs no scaling of the loss, or none",
                "--fsdp --precision bf16",
            ),
            (
                self.batch_size < 2 or self.accumulate < 1 or self.batch_size % self.accumulate != 0,
                f"batch_size={self.batch_size}, accumulate={self.accumulate}",
                "two images or more, which divide into as many parts",
                f"--batch-size {max(2, self.batch_size)} --accumulate 1",
            ),
            (
                (self.steps is not None and self.steps < 1) or self.epochs <= 0 or self.warmup_epochs < 0,
                f"steps={self.steps}, epochs={self.epochs}, warmup_epochs={self.warmup_epochs}",
                "positive numbers",
                "--steps 100 --epochs 100 --warmup-epochs 10",
            ),
            (
                self.local_views > 0 and self.local_size >= self.image_size,
                f"local views of {self.local_size} pixels, global ones of {self.image_size}",
                "local views that are smaller",
                f"--local-size {max(1, self.image_size * 96 // 224)}",
            ),
            (
                any(not 0 < low <= high for low, high in (self.scale, self.aspect)),
                f"scale={self.scale}, aspect={self.aspect}",
                "above 0, the lower end first",
                "--scale 0.7 1.3 --aspect 0.75 1.3333",
            ),
            (
                not 0 <= self.drop_path < 1,
                f"drop_path={self.drop_path}",
                "a probability below 1",
                "--drop-path 0.1",
            ),
            (
                self.crop_min is not None and not 0 < self.crop_min <= 1,
                f"crop_min={self.crop_min}",
                "a part of the image, 0 to 1",
                "--crop-min 0.08",
            ),
        ):
            if wrong:
                raise SERError(script, given, expected, f"python examples/{script} {remedy}")

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def same_run(self, other: Mapping[str, Any]) -> list[str]:
        """Names of settings in which a saved run differs from this one, so that it cannot go on with these."""
        mine = self.plain()
        return sorted(name for name in {*mine, *other} - FREE if mine.get(name) != other.get(name))


@lru_cache
def _depth(architecture: str) -> int:
    """Blocks of a timm architecture; 12 for one that there is not, which is found out when it is built."""
    for device in ("meta", "cpu"):  # older timm cannot build on the first, which costs nothing
        try:
            with torch.device(device):
                return len(timm.create_model(architecture).blocks)
        except Exception:  # errors of all kinds, and models without blocks
            continue
    return 12


# What the presets "small" share: a CPU in minutes.
SMALL: dict[str, Any] = {
    "preset": "small",
    "data": "embedded",
    "architecture": "vit_tiny_patch16_224",
    "image_size": 32,
    "patch_size": 4,
    "width": 64,
    "depth": 6,
    "heads": 4,
    "layer": 2,
    "partition_ratio": 0.25,
    "local_size": 16,
    "crop_min": 0.2,
    "blur": False,
    "projection_dim": 128,
    "batch_size": 64,
    "epochs": 5,
    "warmup_epochs": 0.5,
    "learning_rate": 4e-3,
    "workers": 0,
    "log_every": 10,
    "knn_every": 1,
    "precision": "no",
}

S = TypeVar("S", bound=Settings)


def parse(presets: dict[str, S], script: str, arguments: list[str] | None = None) -> S:
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
    if preset not in presets:
        remedy = f"python examples/{script} --preset small"
        raise SERError(script, f"preset={preset!r}", f"one of {', '.join(presets)}", remedy)
    settings = tyro.cli(type(presets[preset]), default=presets[preset], args=arguments)
    settings.check(script)
    return settings
