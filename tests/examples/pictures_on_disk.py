"""Small pictures for the tests of the examples' data: in memory, in folders, in shards, in parquet files."""

import io
import tarfile

import numpy as np
from PIL import Image

from ser_reg import SERError

__all__ = ["Pictures", "encoded", "picture", "write_folder", "write_parquet", "write_shards", "write_tar"]


def picture(seed, size=(24, 16)):
    """Smooth enough to survive JPEG, and coloured."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


class Pictures:
    """A source in memory; numbers in `broken` cannot be read."""

    def __init__(self, n=40, broken=(), classes=("even", "odd")):
        self.n, self.broken, self.classes = n, frozenset(broken), list(classes)

    def __len__(self):
        return self.n

    def image(self, i, reduction=None):
        if i in self.broken:
            raise SERError("read", "broken", "whole", f"rm {i}")
        return picture(i)

    def label(self, i):
        return i % 2

    def name(self, i):
        return f"picture {i}"


def write_folder(root, counts):
    """{"train/cat": 3, ...}: PNG files of `picture`, numbered over all."""
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(number).save(root / name / f"{i}.png")
            number += 1
    return root


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def write_shards(folder, split="train", shards=2, labels=True):
    """Three samples a shard, labels 0, 1, 2, and members that are neither image nor label."""
    for shard in range(shards):
        members = {}
        for i in range(3):
            number = 3 * shard + i
            members |= {f"a.b/{number:04}.json": b"{}"} | (
                {f"a.b/{number:04}.cls": f"{i}\n".encode()} if labels else {}
            )
            members[f"a.b/{number:04}.PNG" if i else f"a.b/{number:04}.png"] = encoded(picture(number))
        write_tar(folder / f"{split}-{shard:04}.tar", members)
    return folder


def write_parquet(path, n, first=0, labels=True):
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"picture": datasets.Image()} | ({"kind": datasets.ClassLabel(names=["a", "b", "c"])} if labels else {})
    rows = {"picture": [{"bytes": encoded(picture(first + i)), "path": None} for i in range(n)]}
    rows |= {"kind": [i % 3 for i in range(n)]} if labels else {}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(path)
    return path
