"""Training images cropped at random, anew in every epoch, shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, islice

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pretraining.policies import training_crop
from pretraining.sources import Source
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ser_reg import SERError

from .encoder import Encoder

__all__ = ["AugmentedBatches", "AugmentedImages"]

NO_LABEL = -100  # which cross-entropy passes over


class AugmentedImages:
    """Random crops and flips of a source, in batches that are the same for any number of processes.

    An image that cannot be read becomes a black one without a label; its name is in `unreadable`.

    Args:
        source: the images.
        indices: which of them.
        labels: of all images of the source.
        size: pixels a side.
        batch_size: images of all processes together; a last batch that is not full waits for another epoch.
        workers: processes that read, of each process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        source: Source,
        indices: list[int],
        labels: Tensor,
        size: int,
        batch_size: int,
        seed: int,
        workers: int,
    ) -> None:
        self.accelerator, self.indices, self.seed, self.workers = accelerator, indices, seed, workers
        self.images = _Crops(source, labels, size)
        self.batch_size = min(batch_size, len(indices))
        self.steps = len(indices) // self.batch_size
        self.unreadable: dict[str, str] = {}

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of each batch: (b, 3, S, S) uint8 and (b,) labels, on its device."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        seed = self.seed + 1000 * epoch
        order = torch.randperm(len(self.indices), generator=torch.Generator().manual_seed(seed))
        mine = []
        for batch in order.split(self.batch_size)[: self.steps]:
            size = -(-len(batch) // world)  # the last process repeats images where the batch does not divide
            whole = list(islice(cycle(batch.tolist()), size * world))
            mine.append([(self.indices[i], seed) for i in whole[rank * size : (rank + 1) * size]])
        device = self.accelerator.device
        loader = DataLoader(
            self.images,
            batch_sampler=mine,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
        )
        for images, labels, failed in loader:
            self.unreadable |= failed
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def all_unreadable(self) -> list[tuple[str, str]]:
        """What no process could read so far: (name of the image, why) each."""
        return sorted(set(gather_object(list(self.unreadable.items()))))


class AugmentedBatches:
    """Features of random crops, for a classifier that every process trains alike: batches are gathered."""

    def __init__(self, images: AugmentedImages, encoder: Encoder, compute: Callable[[Encoder, Tensor], Tensor]) -> None:
        self.images, self.encoder, self.compute = images, encoder, compute
        self.steps = images.steps

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        accelerator = self.images.accelerator
        for images, labels in self.images(epoch):
            with torch.no_grad():
                features = self.compute(self.encoder, images).float()
            features, labels = accelerator.gather(features), accelerator.gather(labels)
            yield features[: self.images.batch_size], labels[: self.images.batch_size]


class _Crops(Dataset[tuple[Tensor, int, str, str]]):
    """Images by (number, seed): the crop depends on nothing else."""

    def __init__(self, source: Source, labels: Tensor, size: int) -> None:
        self.source, self.labels, self.size, self.transform = source, labels, size, training_crop(size)

    def __getitem__(self, request: tuple[int, int]) -> tuple[Tensor, int, str, str]:
        index, seed = request
        try:
            image = self.source.image(index)
        except SERError as error:
            black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return black, NO_LABEL, self.source.name(index), error.given
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                hash((seed, index)) % 2**63
            )  # the CPU's alone, where images are cropped
            return self.transform(image), int(self.labels[index]), "", ""


def _collate(samples: list[tuple[Tensor, int, str, str]]) -> tuple[Tensor, Tensor, dict[str, str]]:
    images, labels, names, whys = zip(*samples, strict=True)
    failed = {name: why for name, why in zip(names, whys, strict=True) if why}
    return torch.stack(images), torch.tensor(labels), failed
