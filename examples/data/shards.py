"""WebDataset shards, read at random places."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from ser_reg.errors import SERError
from ser_reg.images import IMAGE_ENDINGS, read_image

from .base import Reduction
from .patterns import files_of

__all__ = ["Shards"]

CLASSES = 100_000  # a greater number in a .cls is no label


class Shards:
    """Tar files whose members KEY.jpg (or another ending of an image) and KEY.cls (a number) form a sample.

    The headers are scanned once, without reading an image; then every image is read from its place, in any order and by
    any number of workers. Nothing is written beside the shards.

    Args:
        pattern: paths of uncompressed tar files, see `files_of`.
        split: "train" or "val".

    Raises:
        SERError: a file is missing, damaged or no tar file; a shard without images; a key that comes twice; labels for
            some samples alone, or such that are no class numbers.
    """

    def __init__(self, pattern: str, split: str) -> None:
        self._call = f"open_source({f'wds:{pattern}'!r}, {split!r})"
        self._files = files_of(pattern, split, "wds")
        keys: list[bytes] = []
        spans: list[np.ndarray] = []
        labels: list[int] = []
        for number, file in enumerate(self._files):
            images, classes = self._scan(file)
            keys += [key.encode() for key in images]
            spans.append(np.array([(number, *span) for span in images.values()], dtype=np.int64))
            labels += [classes.get(key, -1) for key in images]
        self._keys = np.array(keys)
        self._spans = np.concatenate(spans)  # (N, 3): shard, offset, bytes
        self._labels = np.array(labels, dtype=np.int32)
        self.classes = [str(label) for label in range(self._labels.max() + 1)]
        unlabelled = np.flatnonzero(self._labels < 0)
        if 0 < len(unlabelled) < len(labels):
            file, key = self._files[self._spans[unlabelled[0], 0]], keys[unlabelled[0]].decode()
            given = f"no {key}.cls, and {len(unlabelled) - 1} more of {len(labels)} images without a label"
            raise self._error(file, given, "a .cls for every image, or for none")

    def __len__(self) -> int:
        return len(self._keys)

    def image(self, i: int, reduction: Reduction | None = None) -> Image.Image:
        shard, offset, size = self._spans[i].tolist()
        # Opened anew each time: cheap beside decoding, and there is nothing that forked workers could share.
        with open(self._files[shard], "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        return read_image(io.BytesIO(data), self.name(i), f"tar --list --file '{self._files[shard]}'", reduction)

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def name(self, i: int) -> str:
        return f"{self._files[self._spans[i, 0]]}:{self._keys[i].decode()}"

    def _scan(self, file: str) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
        """(offset, bytes) of the image and label of each key of one shard."""
        images: dict[str, tuple[int, int]] = {}
        labels: dict[str, int] = {}
        for key, ending, offset, size, text in self._members(file):
            if ending in IMAGE_ENDINGS:
                if key in images:
                    raise self._error(file, f"two images of key {key!r}", "one image a key")
                images[key] = offset, size
            elif text is not None:
                number = int(text) if text.isdigit() else -1
                if not 0 <= number < CLASSES:
                    raise self._error(file, f"{text[:40]!r} in {key}.cls", f"a class number from 0 to {CLASSES - 1}")
                labels[key] = number
        if not images:
            raise self._error(file, f"no image in it (endings: {' '.join(IMAGE_ENDINGS)})", "shards of images")
        return images, labels

    def _members(self, file: str) -> Iterator[tuple[str, str, int, int, str | None]]:
        """(key, ending, offset, bytes, text of a .cls) of each file in a shard."""
        try:
            with open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # it would keep them all
                    if member.isfile():
                        path = PurePosixPath(member.name)
                        stem, dot, ending = path.name.partition(".")
                        text = tar.extractfile(member).read().decode().strip() if ending == "cls" else None
                        yield str(path.with_name(stem)), dot + ending.lower(), member.offset_data, member.size, text
                stream.seek(tar.offset)
                if any(stream.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                    raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
        except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
            raise self._error(file, str(error), "an uncompressed tar file, whole") from error

    def _error(self, file: str, given: str, expected: str) -> SERError:
        return SERError(self._call, f"{file}: {given}", expected, f"tar --list --verbose --file '{file}'")
