"""The flags of the quickstart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ser_reg import SERError

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Train a small ViT with MoCo-v3, without and with soft equivariance (SER), and compare the two."""

    steps: int = 160
    """Training steps of each arm."""
    seed: int = 0
    """Of the patches, the weights, the batches and the views; the same for both arms."""
    ser_lambda: float = 1.0
    """Weight of the SER term in the second arm; the first has 0."""
    layer: int = 2
    """Blocks ahead of the tokens that SER compares."""
    cls_layer: int | None = None
    """Blocks that run before [CLS] joins, in both arms. By default as `layer`, but at most depth - 1."""
    partition_ratio: float = 0.25
    """Part of the batch (r) that is seen whole, by the equivariant views; the rest is cropped, as MoCo-v3 does."""
    temperature: float = 0.3
    """Of the SER loss."""
    images: Path | None = None
    """Folder of your own images: photographs, or sub-folders as classes. By default those that come with
    scikit-image and scikit-learn."""
    train_patches: int = 96
    """Training patches of each photograph."""
    test_patches: int = 48
    """Held-out patches of each photograph."""
    output_dir: Path = Path("out/quickstart")
    """Where quickstart.png and results.json go."""
    batch_size: int = 64
    image_size: int = 32
    """Pixels a side."""
    patch_size: int = 4
    """Pixels a side."""
    width: int = 64
    """Channels of a token; a multiple of 4."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 4
    """Attention heads of a block; they divide the width."""
    learning_rate: float = 1e-3
    """Highest one of AdamW: linear warm-up over a tenth of the steps, then along a cosine to 0."""
    weight_decay: float = 0.1
    """Of AdamW."""
    momentum: float = 0.99
    """Of MoCo's momentum branch at the start; it goes along a cosine to 1."""
    crop_min: float = 0.2
    """Smallest area of a random crop, as a part of the image."""
    fixed_positions: bool = True
    """Sine-cosine positions, never trained, as in MoCo-v3; otherwise learned ones."""
    fixed_patches: bool = True
    """A random patch projection, never trained, as in MoCo-v3; otherwise a learned one."""
    device: str = "auto"
    """Where to train: "cpu", "cuda", or "auto" for CUDA when there is one."""

    @property
    def late_layer(self) -> int:
        """Blocks that run before [CLS] joins."""
        return min(self.layer, self.depth - 1) if self.cls_layer is None else self.cls_layer

    def check(self) -> None:
        """Raise a SERError for numbers that do not go together, before minutes are spent."""
        b2 = self.partition_ratio * self.batch_size
        for wrong, given, expected, remedy in (
            (
                min(self.steps, self.train_patches, self.test_patches, self.depth) < 1,
                f"steps={self.steps}, train_patches={self.train_patches}, test_patches={self.test_patches}, "
                f"depth={self.depth}",
                "positive numbers",
                "--steps 160 --train-patches 96 --test-patches 48 --depth 6",
            ),
            (
                self.image_size % self.patch_size != 0,
                f"image_size={self.image_size}, patch_size={self.patch_size}",
                "a whole number of patches",
                f"--image-size {max(1, round(self.image_size / self.patch_size)) * self.patch_size}",
            ),
            (
                self.width % 4 != 0 or self.width % self.heads != 0,
                f"width={self.width}, heads={self.heads}",
                "a width that 4 and the number of heads divide",
                f"--width {16 * self.heads} --heads {self.heads}",
            ),
            (
                not 2 <= b2 <= self.batch_size - 2,
                f"partition_ratio={self.partition_ratio} of batch_size={self.batch_size}",
                "at least two images in either part: without another image there are no negatives",
                "--batch-size 64 --partition-ratio 0.25",
            ),
            (
                not 0 < self.layer <= self.depth,
                f"layer={self.layer} of depth={self.depth}",
                f"a layer from 1 to {self.depth}",
                f"--layer {min(2, self.depth)}",
            ),
            (
                self.ser_lambda < 0,
                f"ser_lambda={self.ser_lambda}",
                "no negative weight",
                "--ser-lambda 1",
            ),
        ):
            if wrong:
                raise SERError("quickstart.py", given, expected, f"python examples/quickstart.py {remedy}")
