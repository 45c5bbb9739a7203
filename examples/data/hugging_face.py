"""Data sets of the `datasets` library."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ser_reg.errors import SERError, require
from ser_reg.images import read_image

from .base import Reduction
from .patterns import files_of

__all__ = ["HuggingFaceDataset"]

# What the splits of a data set are called, the likeliest first. Where none is for validation there is one for tests.
SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "test")}


class HuggingFaceDataset:
    """A data set of the Hugging Face hub, or local parquet files, as `datasets` loads it: memory-mapped from its cache.

    Columns are found by their type: the image is the column "image" if that is one, or else the first `Image`; the
    label the column "label" if that is one, or else the first `ClassLabel`; without any, the images are unlabelled.

    Args:
        path: a name on the hub, a folder of parquet files, or a pattern of them, see `files_of`.
        split: "train" or "val"; the latter may be called "validation", "val", "valid" or, without these, "test".

    Raises:
        SERError: `datasets` cannot load it, there is no such split, no image column, or labels that are not known.
    """

    def __init__(self, path: str, split: str) -> None:
        call = f"open_source({f'hf:{path}'!r}, {split!r})"
        data = _load(path, split, call)
        require(len(data), call, "no rows", "images", f"datasets.load_dataset({path!r})")
        image, label = (_column(data, kind) for kind in ("Image", "ClassLabel"))
        columns = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in data.features.items())
        remedy = f"data.cast_column({next(iter(data.features))!r}, datasets.Image()).to_parquet('train.parquet')"
        require(image is not None, call, f"the columns {columns}", "one of type Image", remedy)
        self.classes: list[str] = data.features[label].names if label else []
        labels = data.with_format("numpy")[label][:] if label else np.full(len(data), -1)
        known = not label or (labels.dtype.kind in "iu" and labels.min() >= 0)
        remedy = f"data.filter(lambda row: (row[{label!r}] or -1) >= 0)"
        require(known, call, f"rows without a {label}", "a label in every row", remedy)
        self._labels = labels.astype(np.int32)
        self._path, self._split = path, split
        self._data, self._column = data.select_columns(image), image
        self._data = self._data.cast_column(image, type(data.features[image])(decode=False))

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, i: int, reduction: Reduction | None = None) -> Image.Image:
        cell = self._data[i][self._column] or {"bytes": b"", "path": None}
        file = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
        remedy = f"datasets.load_dataset({self._path!r}).filter(lambda row, i: i != {i}, with_indices=True)"
        return read_image(file, self.name(i), remedy, reduction)

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def name(self, i: int) -> str:
        return f"hf:{self._path} {self._split}[{i}]"


def _load(path: str, split: str, call: str) -> Any:
    """A split as a `datasets.Dataset`."""
    try:
        import datasets  # here, as it takes seconds and is of use for this source alone
    except ModuleNotFoundError as error:
        raise SERError(call, str(error), "the package datasets", "pip install datasets") from error
    local = Path(path).expanduser()
    pattern = path.endswith(".parquet") or any(sign in path for sign in "*?{[")
    names = ("train",) if pattern else SPLITS[split]
    try:
        if pattern:
            data = datasets.load_dataset("parquet", data_files={"train": files_of(path, split, "hf")})
        else:
            data = datasets.load_dataset(str(local) if local.exists() else path)
    except SERError:
        raise
    except Exception as error:  # network, unknown names, rights, broken files: each has its own kind
        given = f"{type(error).__name__}: {error}"
        raise SERError(
            call, given, "a name on the hub, or parquet files", f"datasets.load_dataset({path!r})  # shows all of it"
        ) from error
    found = next((name for name in names if name in data), None)
    remedy = f"datasets.load_dataset({path!r})  # a folder's files are train-*.parquet and validation-*.parquet"
    require(found is not None, call, f"the splits {', '.join(data)}", f"a split {' or '.join(names)}", remedy)
    return data[found]


def _column(data: Any, kind: str) -> str | None:
    """The column of a type, the usual name first."""
    found = [name for name, feature in data.features.items() if type(feature).__name__ == kind]
    usual = {"Image": "image", "ClassLabel": "label"}[kind]
    return usual if usual in found else next(iter(found), None)
