"""Random crops of training images, anew in every epoch, divided among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, islice

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from data.base import Source
from data.labelled import LabelledDataset, collate_labelled
from data.recipe import training_crop
from torch import Tensor
from torch.utils.data import DataLoader

from ser_reg.errors import require

from .encoder import Encoder

__all__ = ["CropFeatures", "Crops"]


class Crops:
    """Random crops and flips of a source, in batches that are the same for any number of processes.

    An image that cannot be read becomes a black one without a label; its name is in `unreadable`.

    Args:
        source: the images, labelled.
        indices: which of them.
        size: pixels a side.
        batch_size: images of all processes together; a last batch that is not full waits for another epoch.
        workers: processes that read, of each process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        source: Source,
        indices: list[int],
        size: int,
        batch_size: int,
        seed: int,
        workers: int,
    ) -> None:
        self.accelerator, self.indices, self.seed, self.workers = accelerator, indices, seed, workers
        self.images = LabelledDataset(source, training_crop(size))
        self.batch_size = min(batch_size, len(indices))
        self.steps = len(indices) // self.batch_size
        self.unreadable: dict[str, str] = {}

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of each batch: (b, 3, S, S) uint8 and (b,) labels, on its device."""
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        seed = self.seed + 1000 * epoch
        order = torch.randperm(len(self.indices), generator=torch.Generator().manual_seed(seed))
        mine = []
        for batch in order.split(self.batch_size)[: self.steps]:
            size = -(-len(batch) // world_size)  # the last process repeats images where the batch does not divide
            whole = list(islice(cycle(batch.tolist()), size * world_size))
            mine.append([(self.indices[i], seed) for i in whole[rank * size : (rank + 1) * size]])
        device = self.accelerator.device
        loader = DataLoader(
            self.images,
            batch_sampler=mine,
            num_workers=self.workers,
            collate_fn=collate_labelled,
            pin_memory=device.type == "cuda",
        )
        readable = 0
        for batch in loader:
            self.unreadable |= dict(batch.unreadable)
            readable += int(batch.readable.sum())
            yield batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        unreadable = self.all_unreadable()
        require(
            any(gather_object([readable])),  # else nothing was learnt in this epoch
            "random crops of the training images",
            lambda: f"{len(unreadable)} images, none readable; {': '.join(unreadable[0])}",
            "images that can be read",
            lambda: f"file '{unreadable[0][0]}'",
        )

    def all_unreadable(self) -> list[tuple[str, str]]:
        """What no process could read so far: (name of the image, why) each."""
        return sorted(set(gather_object(list(self.unreadable.items()))))


class CropFeatures:
    """Features of random crops, for a classifier that every process trains alike: batches are gathered."""

    def __init__(self, crops: Crops, encoder: Encoder, compute: Callable[[Encoder, Tensor], Tensor]) -> None:
        self.crops, self.encoder, self.compute = crops, encoder, compute
        self.steps = crops.steps

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        accelerator = self.crops.accelerator
        for images, labels in self.crops(epoch):
            with torch.no_grad():
                features = self.compute(self.encoder, images).float()
            features, labels = accelerator.gather(features), accelerator.gather(labels)
            yield features[: self.crops.batch_size], labels[: self.crops.batch_size]
