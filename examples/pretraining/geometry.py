"""From a loaded batch to views on the device: normalised, and those of b2 moved by elements of the group."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ser_reg import EquivariantViews, ViewPair, act

from .dataset import Batch
from .objective import Views
from .policies import normalise
from .settings import Settings

__all__ = ["Geometry"]

STREAM = 2  # of random numbers: the partition has 0 and 1


class Geometry:
    """T_eq's geometric half, and the transfer of all views.

    Elements are drawn for the b2 of all processes, from a generator that depends on the seed and the number of the
    batch alone; each process keeps its part. So all processes have the same grid without a word between them, a
    batch's elements do not depend on how many processes there are, and a resumed run goes on as it would have.

    Args:
        settings: group, sizes and seed.
        patch_size: of the encoder, in pixels.
        whole: images of b2 over all processes.
        rank, world_size: which of them this process has: every world_size-th, beginning with number `rank`.
        device: where the encoder is.
    """

    def __init__(
        self, settings: Settings, patch_size: int, whole: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.views = EquivariantViews(
            patch_size, settings.scale, settings.aspect, settings.rotations, settings.flips, shared_grid=False
        )
        self.seed = settings.seed
        self.whole = whole
        self.rank, self.world_size = rank, world_size
        self.device = device

    def __call__(self, batch: Batch, number: int) -> Views:
        """The views of batch `number`, counted from the beginning of the training."""
        seed = np.random.SeedSequence(self.seed, spawn_key=(STREAM, number)).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed[0]))
        pairs = []
        if self.whole:
            wholes = [self._on_device(x) for x in (*batch.whole, *batch.local_whole)]
            pairs = [self._pair(x1, x2, generator) for x1, x2 in zip(wholes[::2], wholes[1::2], strict=True)]
        return Views([self._on_device(x) for x in (*batch.crops, *batch.local_crops)], pairs)

    def _on_device(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.device, non_blocking=True))

    def _pair(self, x1: Tensor, x2: Tensor, generator: torch.Generator) -> ViewPair:
        elements = self.views.elements(self.whole, tuple(x1.shape[-2:]), generator)
        g1, g2 = (g[self.rank :: self.world_size] for g in elements)
        if not len(x1):  # this process has none of b2, and yet the others' grids
            sizes = (g.output_size(tuple(x1.shape[-2:])) for g in elements)
            return ViewPair(*(x1.new_empty(0, 3, *size) for size in sizes), g1, g2)
        return ViewPair(act(g1, x1, antialias=True), act(g2, x2, antialias=True), g1, g2)
