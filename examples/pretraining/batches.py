"""Batches of a run, from the step on with which it goes on: loaded, and their views made on the device."""

from __future__ import annotations

import signal
import time

from data.batch import Group, ViewDataset, collate
from data.sampler import PartitionSampler
from torch.utils.data import DataLoader

from ser_reg.backbones import backbone

from .device_views import DeviceViews
from .log import Unreadable
from .run import Run
from .views import extra_recipes, maker

__all__ = ["Batches"]


class Batches:
    """One batch after another, a function of the seed and its number alone.

    Args:
        run: whose settings, recipes and images.

    Attributes:
        groups: of the batch that came last.
        waited: seconds that were spent waiting for data, since `pop_waited` was called last.
        unreadable: images that could not be read.
    """

    def __init__(self, run: Run) -> None:
        settings, length, accelerator = run.settings, run.length, run.accelerator
        policy, seed, device = settings.term.policy, settings.run.seed, accelerator.device
        self.number = run.done * settings.run.accumulate
        sampler = PartitionSampler(
            len(run.source),
            length.batch,
            length.read,
            accelerator.process_index,
            accelerator.num_processes,
            seed,
            self.number,
            last=length.steps * settings.run.accumulate,
            paired=policy.paired,
        )
        extra = extra_recipes(policy, run.recipes[0], settings.data)
        loader = DataLoader(
            ViewDataset(run.source, *run.recipes, extra, whole=policy.whole),
            batch_sampler=sampler,
            num_workers=settings.data.workers,
            collate_fn=collate,
            worker_init_fn=_outlive_stop_signal,
            pin_memory=device.type == "cuda",
        )
        patch_size = backbone(run.step.method.encoder).patch_size
        self.views = DeviceViews(
            [recipe.photometric for recipe in (*run.recipes[0], *run.recipes[1])],
            policy,
            maker(settings.views, policy, patch_size, run.recipes[0], extra),
            (length.batch, length.read),
            seed,
            device,
            settings.views.crop_turns,
            extra[0].photometric if extra else None,
        )
        self.batches = iter(loader)
        self.groups: list[Group] = []
        self.unreadable = Unreadable(settings.run.output_dir)
        self.waited = 0.0

    def next(self) -> list[Group]:
        """The groups of the next batch, on the device."""
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        self.unreadable.note(batch.unreadable)
        self.number += 1
        self.groups = self.views(batch, self.number - 1)
        return self.groups

    def pop_waited(self) -> float:
        """Seconds of waiting since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited


def _outlive_stop_signal(worker: int) -> None:
    """Schedulers send SIGTERM to all processes; the training still needs batches up to its checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
