"""Features of a data set, computed by all processes together: at once, or kept on disk for all judgements.

A folder of the cache holds one kind of features of one data set, as files of `CHUNK` images. A file is whole or not
there, so that an extraction that was stopped goes on where it was; and it says of which model, images and transform
its numbers are, so that none is taken for another's.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from data.base import Source, Subset
from data.labelled import NO_LABEL, LabelledBatch, LabelledDataset, collate_labelled
from data.recipe import evaluation_transform, normalise
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ser_reg.errors import SERError, require
from ser_reg.records import atomically

from .encoder import Encoder, pooled

__all__ = ["Extraction", "Features", "class_tokens", "embeddings", "extract", "fingerprint", "read"]

CHUNK = 4096  # images a file
SAMPLED, SIDE = 16, 32  # images, and pixels a side, that stand for all pixels of the data set


class Extraction(NamedTuple):
    """What is computed of a batch of images."""

    name: str
    """Says what, parameters included: files of another name hold something else."""
    compute: Callable[[Encoder, Tensor], dict[str, Tensor]]
    """Of (B, 3, S, S) uint8 images on the model's device: (B, D) features by name."""


class Features:
    """Features of those images of a source that could be read, in the order of the source.

    Attributes:
        classes: names of the classes.
        labels: (N,) int64, indices into `classes`.
        indices: (N,) of the images in the source.
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
        chunks = []
        for path in self._paths:
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118  # no image of this file could be read, otherwise
                    chunks.append(file.get_tensor(name))
        return torch.cat(chunks)


def class_tokens(encoder: Encoder, last: int, call: str = "evaluate.py") -> Extraction:
    """The embedding ("pooled") and, of a ViT with [CLS], its normalised [CLS] of the last blocks ("cls"), joined.

    Source: Section 4.1 of the paper: the linear classifier sees the last four, as in DINO's evaluation of ViT-S.
    """
    known = encoder.known
    if known is None or not known.has_class_tokens:
        return Extraction("pooled", lambda made, images: {"pooled": pooled(made.model, made.normalise(images))})
    expected, remedy = f"1 to {known.depth} blocks", f"--last {min(4, known.depth)}"
    require(1 <= last <= known.depth, call, f"--last {last}", expected, remedy)

    def compute(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        tokens = encoder.layered("evaluate.py").class_tokens(encoder.normalise(images), last)
        return dict(zip(("pooled", "cls"), tokens, strict=True))

    return Extraction(f"last{last}", compute)


@torch.no_grad()
def embeddings(
    encoder: nn.Module, source: Source, size: int, accelerator: Accelerator, workers: int
) -> tuple[Tensor, Tensor]:
    """(N, D) embeddings and (N,) labels of all images of a source, computed by all processes, on the CPU of each.

    For an encoder of a training, of ImageNet's mean and deviation: nothing is kept on disk, and each process runs
    equally many forwards, as a gather and an encoder that is sharded want. Images that cannot be read are left out,
    and a warning names them.

    Raises:
        SERError: the source has no labels.
    """
    call, remedy = "embeddings(encoder, source)", "open_source('embedded', 'val')"
    require(source.classes, call, lambda: f"unlabelled images such as {source.name(0)}", "labels", remedy)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    # Rows that came round to the first images again count for nothing.
    rows = range(rank, -(-len(source) // world_size) * world_size, world_size)
    numbers = [[i % len(source) for i in rows[start : start + 256]] for start in range(0, len(rows), 256)]
    training = encoder.training
    encoder.eval()
    features, labels = [], []
    for batch in _batches(source, size, numbers, workers, accelerator.device):
        for name, why in batch.unreadable:
            warnings.warn(f"unreadable, left out: {name} ({why})", stacklevel=2)
        with accelerator.autocast():
            features.append(encoder(normalise(batch.images.to(accelerator.device))).float())
        labels.append(batch.labels.to(accelerator.device))
    encoder.train(training)
    own = torch.cat(labels)
    own[torch.tensor(rows, device=own.device) >= len(source)] = NO_LABEL
    found, known = accelerator.gather(torch.cat(features)).cpu(), accelerator.gather(own).cpu()
    return found[known != NO_LABEL], known[known != NO_LABEL]


def extract(
    accelerator: Accelerator,
    encoder: Encoder,
    source: Source,
    extraction: Extraction,
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
    folder = cache / extraction.name
    key = {
        "recipe": extraction.name,
        "model": encoder.fingerprint,
        "images": fingerprint(source),
        "transform": f"{encoder.size} pixels, mean {encoder.mean}, std {encoder.std}",
    }
    chunks = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    call = f"features into {folder}"
    require(chunks, call, "a data set without images", "at least one", "--data FOLDER")
    paths = [folder / f"{number:05d}.safetensors" for number in range(len(chunks))]
    keys = [key | {"places": f"{chunk.start} to {chunk.stop}"} for chunk in chunks]
    missing = [n for n, path in enumerate(paths) if not _fits(path, keys[n]) or _mended(path, chunks[n], source)]
    accelerator.wait_for_everyone()  # before anybody writes: all have seen the same files
    if missing:
        note(f"features of {sum(len(chunks[n]) for n in missing)} of {len(source)} images into {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        numbers = [chunks[n][i : i + batch_size] for n in mine for i in range(0, len(chunks[n]), batch_size)]
        batches = iter(_batches(source, encoder.size, numbers, workers, accelerator.device))
        for number in mine:
            _write(paths[number], chunks[number], batches, encoder, extraction, keys[number], accelerator.device)
    accelerator.wait_for_everyone()
    features = Features(source, paths)
    why = ": ".join(next(iter(features.unreadable), ("", "")))
    given, expected = f"{len(source)} images, none readable; {why}", "at least one that can be read"
    require(len(features.labels), call, given, expected, lambda: f"file '{features.unreadable[0][0]}'")
    return features


def read(source: Source, size: int, workers: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """(N, 3, S, S) uint8 of the readable images, and what was left out."""
    numbers = [range(start, min(start + 64, len(source))) for start in range(0, len(source), 64)]
    batches = list(_batches(source, size, numbers, workers))
    images = [batch.images[batch.readable] for batch in batches]
    return torch.cat([*images, torch.empty(0, 3, size, size, dtype=torch.uint8)]), [
        pair for batch in batches for pair in batch.unreadable
    ]


def _batches(
    source: Source, size: int, numbers: Sequence[Sequence[int]], workers: int, device: torch.device | None = None
) -> DataLoader[LabelledBatch]:
    """The middle of the images of these numbers, on their way to a device."""
    return DataLoader(
        LabelledDataset(source, evaluation_transform(size)),
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=collate_labelled,
        pin_memory=device is not None and device.type == "cuda",
    )


def fingerprint(source: Source) -> str:
    """Of the names of all images and the pixels of some: others under the same names are noticed."""
    digest = hashlib.sha256(str(len(source)).encode())
    for i in range(len(source)):
        digest.update(f"\n{source.name(i)}".encode())
    sample, _ = read(Subset(source, sorted({i * len(source) // SAMPLED for i in range(SAMPLED)})), SIDE, 0)
    digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _fits(path: Path, key: dict[str, str]) -> bool:
    """Whether a file is there; raises if it is not of these images, model and transform."""
    if not path.exists():
        return False
    header = _header(path)
    wrong = [name for name, value in key.items() if header.get(name) != value]
    given, expected = ("; ".join(f"{name} {found.get(name)}" for name in wrong) for found in (header, key))
    remedy = f"rm -r '{path.parent}'  # or --cache ELSEWHERE"
    require(not wrong, f"features from {path.parent}", given, expected, remedy)
    return True


def _mended(path: Path, numbers: range, source: Source) -> bool:
    """Whether an image that could not be read when the file was written can be read now."""
    with safe_open(path, framework="pt") as file:
        left_out = sorted(set(numbers) - set(file.get_tensor("indices").tolist()))
    dataset = LabelledDataset(source, evaluation_transform(1))
    return any(dataset[i].unreadable is None for i in left_out)


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise SERError(f"features from {path}", str(error), "a whole file", f"rm '{path}'") from error


@torch.inference_mode()
def _write(
    path: Path,
    numbers: range,
    batches: Iterator[LabelledBatch],
    encoder: Encoder,
    extraction: Extraction,
    key: dict[str, str],
    device: torch.device,
) -> None:
    """Compute one file from the batches that are its images."""
    indices: list[Tensor] = []
    unreadable: list[tuple[str, str]] = []
    found: dict[str, list[Tensor]] = {}
    while sum(map(len, indices)) + len(unreadable) < len(numbers):
        batch = next(batches)
        indices.append(batch.indices[batch.readable])
        unreadable += batch.unreadable
        images = batch.images[batch.readable] if batch.unreadable else batch.images
        if len(images):
            for name, values in extraction.compute(encoder, images.to(device, non_blocking=True)).items():
                found.setdefault(name, []).append(values.float().cpu())
    tensors = {name: torch.cat(values) for name, values in found.items()}
    for name, values in tensors.items():
        lower = "evaluate.py finetune --base-rate 1e-4  # it diverged: a lower one"
        require(
            values.isfinite().all(),
            f"features into {path}",
            lambda name=name, values=values: (
                f"{name} that are infinite or not a number, of {int((~values.isfinite()).any(1).sum())} images"
            ),
            f"finite ones of all images {numbers.start} to {numbers.stop - 1}",
            lower if extraction.name == "logits" else f"evaluate.py knn --model '{encoder.name}' --device cpu",
        )
    tensors["indices"] = torch.cat(indices)
    with atomically(path) as draft:
        save_file(tensors, draft, metadata=key | {"unreadable": json.dumps(unreadable)})
