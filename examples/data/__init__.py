"""Where images come from, how their views are made, and in which batches they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ser_reg.errors import require

from .base import Source, Subset
from .embedded import EmbeddedPatches
from .folders import ImageFolder
from .hugging_face import HuggingFaceDataset
from .shards import Shards

__all__ = ["SOURCES", "Source", "Subset", "open_source"]

# What `--data` begins with -> what opens the rest of it for a split and a seed. Without a colon it is the whole word;
# what begins with none of them is a folder.
SOURCES: dict[str, Callable[[str, Literal["train", "val"], int], Source]] = {
    "embedded": lambda rest, split, seed: EmbeddedPatches(split, seed),
    "hf:": lambda rest, split, seed: HuggingFaceDataset(rest, split),
    "wds:": lambda rest, split, seed: Shards(rest, split),
}


def open_source(data: str, split: Literal["train", "val"], seed: int = 0) -> Source:
    """The images of a split.

    Args:
        data: "embedded" for patches of the photographs inside scikit-image and scikit-learn; a folder in ImageNet's
            layout (FOLDER/train/CLASS/*, FOLDER/val/CLASS/*), or of images alone, to train on without labels;
            "hf:NAME", "hf:FOLDER" or "hf:FOLDER/{split}-*.parquet" for what `datasets` loads;
            "wds:FOLDER/{split}-{0000..0146}.tar" for WebDataset shards.
        split: "train", or "val" for what is held out.
        seed: of the embedded patches.

    Raises:
        SERError: it is not there, or not as described.
    """
    call = f"open_source({data!r}, {split!r})"
    require(split in ("train", "val"), call, f"split={split!r}", "train or val", f"open_source({data!r}, 'val')")
    for start, opens in SOURCES.items():
        if data == start or (start.endswith(":") and data.startswith(start)):
            return opens(data.removeprefix(start), split, seed)
    return ImageFolder(Path(data), split)
