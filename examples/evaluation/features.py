"""Features of a data set: computed once, by all processes together, and kept on disk.

A folder of the cache holds one kind of features of one data set, as files of `CHUNK` images. A file is whole or not
there, so that an extraction that was stopped goes on where it was; and it says of which model, images and transform
its numbers are, so that none is taken for another's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from PIL import Image
from pretraining.policies import evaluation
from pretraining.sources import Source
from results import atomically
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ser_reg import SERError

from .encoder import Encoder, pooled

__all__ = ["Features", "Recipe", "Some", "class_tokens", "extract", "read"]

CHUNK = 4096  # images a file
SAMPLED, SIDE = 16, 32  # images, and pixels a side, that stand for all pixels of the data set

Batch = tuple[list[int], Tensor | None, list[tuple[str, str]]]  # numbers and images that were read; those that were not


class Recipe(NamedTuple):
    """What is computed of a batch of images."""

    name: str
    """Says what, parameters included: files of another name hold something else."""
    compute: Callable[[Encoder, Tensor], dict[str, Tensor]]
    """Of (B, 3, S, S) uint8 images on the model's device: (B, D) features by name."""


class Some:
    """A part of a source."""

    def __init__(self, source: Source, indices: list[int]) -> None:
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, i: int) -> Image.Image:
        return self.source.image(self.indices[i])

    def label(self, i: int) -> int:
        return self.source.label(self.indices[i])

    def name(self, i: int) -> str:
        return self.source.name(self.indices[i])


class Features:
    """Features of those images of a source that could be read, in the order of the source.

    Attributes:
        classes: names of the classes.
        labels: (N,) int64, indices into `classes`.
        indices: (N,) places in the source.
        unreadable: what was left out: (name of the image, why) each.
    """

    def __init__(self, source: Source, paths: list[Path]) -> None:
        self._paths = paths
        self.classes = source.classes
        self.indices = self["indices"]
        self.unreadable = [tuple(pair) for path in paths for pair in json.loads(_header(path)["unreadable"])]
        self.labels = torch.tensor([source.label(i) for i in self.indices.tolist()], dtype=torch.int64)

    def __getitem__(self, name: str) -> Tensor:
        """(N, D): read from disk now, and not kept."""
        parts = []
        for path in self._paths:
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118  # no image of this file could be read, otherwise
                    parts.append(file.get_tensor(name))
        return torch.cat(parts)


def class_tokens(encoder: Encoder, last: int) -> Recipe:
    """The embedding ("pooled") and, of a ViT with [CLS], its normalised [CLS] of the last blocks ("cls"), joined.

    Source: Section 4.1 of the paper: the linear classifier sees the last four, as in DINO's evaluation of ViT-S.
    """
    vit = encoder.vit
    normalised = not isinstance(getattr(vit, "norm", None), torch.nn.Identity | None)
    if encoder.late_cls is None or getattr(vit, "cls_token", None) is None or not normalised:
        return Recipe("pooled", lambda encoder, images: {"pooled": pooled(encoder.vit, encoder.normalise(images))})

    def compute(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        model = encoder.vit
        final, blocks = model.forward_intermediates(
            encoder.normalise(images), indices=last, norm=True, return_prefix_tokens=True, output_fmt="NLC"
        )
        tokens = torch.cat([prefix[:, 0] for _, prefix in blocks], dim=1)
        return {"pooled": model.forward_head(final, pre_logits=True), "cls": tokens}

    depth = len(vit.blocks)
    if not 1 <= last <= depth:
        raise SERError("evaluate.py", f"--last {last}", f"1 to {depth} blocks", f"--last {min(4, depth)}")
    return Recipe(f"last{last}", compute)


def extract(
    accelerator: Accelerator,
    encoder: Encoder,
    source: Source,
    recipe: Recipe,
    cache: Path,
    batch_size: int = 256,
    workers: int = 0,
    note: Callable[[str], object] = lambda line: None,
) -> Features:
    """The features of all readable images, from disk as far as they are there.

    Each process computes files of its own; the folder must be one that all of them see. The numbers do not depend on
    how many processes there are: batches never cross the border of a file.

    Args:
        encoder: on the device of `accelerator`.
        cache: the folder for these features, of this data set.
        batch_size: images at a time, of a process.
        workers: processes that read images, of each of these processes.
        note: takes a line on what is done.

    Raises:
        SERError: a file in the folder is of another model, other images or another transform, or cut off; or no image
            can be read.
    """
    folder = cache / recipe.name
    key = {
        "recipe": recipe.name,
        "model": encoder.fingerprint,
        "images": _fingerprint(source),
        "transform": f"{encoder.size} pixels, mean {encoder.mean}, std {encoder.std}",
    }
    parts = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    if not parts:
        raise SERError(f"features into {folder}", "a data set without images", "at least one", "--data FOLDER")
    paths = [folder / f"{number:05d}.safetensors" for number in range(len(parts))]
    keys = [key | {"places": f"{part.start} to {part.stop}"} for part in parts]
    missing = [number for number, path in enumerate(paths) if not _fits(path, keys[number])]
    accelerator.wait_for_everyone()  # before anybody writes: all have seen the same files
    if missing:
        note(f"features of {sum(len(parts[n]) for n in missing)} of {len(source)} images into {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        batches_of_mine = [parts[n][i : i + batch_size] for n in mine for i in range(0, len(parts[n]), batch_size)]
        loader = DataLoader(
            _Readable(source, encoder.size),
            batch_sampler=batches_of_mine,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=accelerator.device.type == "cuda",
        )
        batches = iter(loader)
        for number in mine:
            _write(paths[number], parts[number], batches, encoder, recipe, keys[number], accelerator.device)
    accelerator.wait_for_everyone()
    features = Features(source, paths)
    if not len(features.labels):
        name, why = features.unreadable[0]
        given, expected = f"{len(source)} images, none readable; {name}: {why}", "at least one that can be read"
        raise SERError(f"features into {folder}", given, expected, f"file '{name}'")
    return features


def read(source: Source, size: int, workers: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """(N, 3, S, S) uint8 of the readable images, and what was left out."""
    loader = DataLoader(_Readable(source, size), batch_size=64, num_workers=workers, collate_fn=_collate)
    batches = list(loader)
    images = [images for _, images, _ in batches if images is not None]
    return torch.cat(images or [torch.empty(0, 3, size, size)]), [one for *_, failed in batches for one in failed]


def _fingerprint(source: Source) -> str:
    """Of the names of all images and the pixels of some: others under the same names are noticed."""
    digest = hashlib.sha256(str(len(source)).encode())
    for i in range(len(source)):
        digest.update(f"\n{source.name(i)}".encode())
    sample, _ = read(Some(source, sorted({i * len(source) // SAMPLED for i in range(SAMPLED)})), SIDE, 0)
    digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _fits(path: Path, key: dict[str, str]) -> bool:
    """Whether a file is there; raises if it is not of these images, model and transform."""
    if not path.exists():
        return False
    header = _header(path)
    wrong = [name for name, value in key.items() if header.get(name) != value]
    if wrong:
        given = "; ".join(f"{name} {header.get(name)}" for name in wrong)
        expected = "; ".join(f"{name} {key[name]}" for name in wrong)
        remedy = f"rm -r '{path.parent}'  # or --cache ELSEWHERE"
        raise SERError(f"features from {path.parent}", given, expected, remedy)
    return True


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise SERError(f"features from {path}", str(error), "a whole file", f"rm '{path}'") from error


class _Readable(Dataset[tuple[int, Tensor | None, str, str]]):
    """Images by number: uint8, or why they cannot be read."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.transform = source, evaluation(size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str, str]:
        try:
            return index, self.transform(self.source.image(index)), "", ""
        except SERError as error:
            return index, None, self.source.name(index), error.given


def _collate(samples: list[tuple[int, Tensor | None, str, str]]) -> Batch:
    read = [(index, image) for index, image, *_ in samples if image is not None]
    failed = [(name, why) for _, image, name, why in samples if image is None]
    return [index for index, _ in read], torch.stack([image for _, image in read]) if read else None, failed


@torch.inference_mode()
def _write(
    path: Path,
    numbers: range,
    batches: Iterator[Batch],
    encoder: Encoder,
    recipe: Recipe,
    key: dict[str, str],
    device: torch.device,
) -> None:
    """Compute one file from the batches that are its images."""
    indices: list[int] = []
    unreadable: list[tuple[str, str]] = []
    found: dict[str, list[Tensor]] = {}
    while len(indices) + len(unreadable) < len(numbers):
        read, images, failed = next(batches)
        indices += read
        unreadable += failed
        if images is not None:
            for name, values in recipe.compute(encoder, images.to(device, non_blocking=True)).items():
                found.setdefault(name, []).append(values.float().cpu())
    tensors = {name: torch.cat(values) for name, values in found.items()}
    for name, values in tensors.items():
        if not values.isfinite().all():
            given = f"{name} that are infinite or not a number, of {int((~values.isfinite()).any(1).sum())} images"
            expected = f"finite ones of all images {numbers.start} to {numbers.stop - 1}"
            lower = "evaluate.py finetune --base-rate 1e-4  # it diverged: a lower one"
            remedy = lower if recipe.name == "logits" else f"evaluate.py knn --model '{encoder.name}' --device cpu"
            raise SERError(f"features into {path}", given, expected, remedy)
    tensors["indices"] = torch.tensor(indices, dtype=torch.int64)
    with atomically(path) as part:
        save_file(tensors, part, metadata=key | {"unreadable": json.dumps(unreadable)})
