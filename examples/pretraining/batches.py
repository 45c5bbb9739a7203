"""Batches of a run, from the step on with which it goes on: loaded, and their views made on the device."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from data.batch import Group, ViewDataset, collate
from data.recipe import Recipe
from data.sampler import PartitionSampler
from torch.utils.data import DataLoader

from ser_reg.backbones import backbone

from .log import Unreadable
from .run import Run
from .views import DeviceViews

__all__ = ["Batches"]


class Batches:
    """One batch after another, a function of the seed and its number alone.

    Args:
        run: whose settings and images.
        recipes: of the global views, and of the local ones.

    Attributes:
        waited: seconds that were spent waiting for data, since `pop_waited` was called last.
        unreadable: images that could not be read.
    """

    def __init__(self, run: Run, recipes: tuple[Sequence[Recipe], Sequence[Recipe]]) -> None:
        settings, length, accelerator = run.settings, run.length, run.accelerator
        rank, world_size = accelerator.process_index, accelerator.num_processes
        self.number = run.done * settings.run.accumulate
        last = length.steps * settings.run.accumulate
        sampler = PartitionSampler(
            len(run.source), length.batch, length.whole, rank, world_size, settings.run.seed, self.number, last
        )
        loader = DataLoader(
            ViewDataset(run.source, *recipes),
            batch_sampler=sampler,
            num_workers=settings.data.workers,
            collate_fn=collate,
            worker_init_fn=_outlive_stop_signal,
            pin_memory=accelerator.device.type == "cuda",
        )
        maker = settings.views.maker(backbone(run.step.method.encoder).patch_size)
        self.views = DeviceViews(maker, length.whole, settings.run.seed, rank, world_size, accelerator.device)
        self.batches = iter(loader)
        self.unreadable = Unreadable(settings.run.output_dir)
        self.waited = 0.0

    def next(self) -> list[Group]:
        """The groups of the next batch, on the device."""
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        self.unreadable.note(batch.unreadable)
        self.number += 1
        return self.views(batch, self.number - 1)

    def pop_waited(self) -> float:
        """Seconds of waiting since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited


def _outlive_stop_signal(worker: int) -> None:
    """Schedulers send SIGTERM to all processes; the training still needs batches up to its checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
