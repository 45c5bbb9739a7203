"""Settings of the data: which images, how they are cropped, and how many processes prepare them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ser_reg.errors import require

__all__ = ["DataSettings", "cores"]


def cores() -> int:
    """Cores that this process may use, which are fewer than the machine's in many containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class DataSettings:
    """Images and their views."""

    data: str = "embedded"
    """A folder (DATA/train/CLASS/*.jpg, DATA/val/CLASS/*.jpg), "hf:NAME_OR_PATH" for Hugging Face datasets,
    "wds:PATTERN" for WebDataset shards, or "embedded": photographs that come with scikit-image and scikit-learn."""
    crop_min: float | None = None
    """Smallest area of a global crop, as a part of the image; by default that of the official base."""
    local_views: Literal[0, 4] = 0
    """Local views besides the two global ones: the paper's 2 views, or 2+4 (Appendix A.1)."""
    local_size: int = 96
    """Pixels a side of a local view."""
    blur: bool = True
    """Gaussian blur among the photometric changes; a radius of up to 2 pixels is too much for tiny images."""
    workers: int = min(8, cores())
    """Processes that prepare images, for each process that trains."""

    @property
    def area(self) -> tuple[float, float] | None:
        """Range of the area of a global crop, as a part of the image; None: that of the official base."""
        return None if self.crop_min is None else (self.crop_min, 1.0)

    def check(self, call: str) -> None:
        """Raise a SERError for settings that do not go together.

        That local views are smaller than global ones, whose size is the encoder's, is for `data.recipe.recipes`.
        """
        type_ = f"python examples/{call}"
        size, workers = f"local_size={self.local_size}", f"workers={self.workers}"
        require(self.local_size >= 1, call, size, "positive numbers", f"{type_} --local-size 96")
        require(self.workers >= 0, call, workers, "positive numbers, or none", f"{type_} --workers 0")
        require(
            self.crop_min is None or 0 < self.crop_min <= 1,
            call,
            f"crop_min={self.crop_min}",
            "a part of the image, 0 to 1",
            f"{type_} --crop-min 0.08",
        )
