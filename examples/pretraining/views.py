"""Views on the device: those of a loaded batch, normalised, and those of b2 moved by elements of the group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from data.batch import Batch, Group
from data.recipe import normalise
from torch import Tensor

from ser_reg import EquivariantViews, act
from ser_reg.errors import require

__all__ = ["DeviceViews", "ViewSettings"]

STREAM = 2  # of random numbers: the sampler has 0 and 1


@dataclass(frozen=True)
class ViewSettings:
    """How the whole images of b2 are moved: turned, flipped and scaled."""

    rotations: bool = True
    """Quarter turns in the group (Table 9)."""
    flips: bool = True
    """Left-right flips in the group (Table 9)."""
    scale: tuple[float, float] = (0.7, 1.3)
    """Range of the area factor (Section 4.1); 1 1 together with `--aspect 1 1` leaves scaling out (Table 9)."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the aspect factor."""

    @property
    def scaled(self) -> bool:
        """Whether views differ in size from the images."""
        return self.scale != (1, 1) or self.aspect != (1, 1)

    def maker(self, patch_size: int) -> EquivariantViews:
        """What draws the elements. The photometric part is not its own: the recipes did it."""
        return EquivariantViews(patch_size, self.scale, self.aspect, self.rotations, self.flips)

    def check(self, script: str) -> None:
        """Raise a SERError for ranges that are none."""
        require(
            all(0 < low <= high for low, high in (self.scale, self.aspect)),
            script,
            f"scale={self.scale}, aspect={self.aspect}",
            "above 0, the lower end first",
            f"python examples/{script} --scale 0.7 1.3 --aspect 0.75 1.3333",
        )


class DeviceViews:
    """T_eq's geometric half, and the transfer of all views.

    Elements are drawn for the b2 of all processes, from a generator that depends on the seed and the number of the
    batch alone; each process keeps its own. So all processes have the same grid without a word between them, a
    batch's elements do not depend on how many processes there are, and a resumed run goes on as it would have.

    Args:
        maker: what draws the elements.
        whole: images of b2 over all processes.
        seed: of the elements.
        rank, world_size: which images this process has: every world_size-th, beginning with number `rank`.
        device: where the encoder is.
    """

    def __init__(
        self,
        maker: EquivariantViews,
        whole: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.maker = maker
        self.whole = whole
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.device = device

    def __call__(self, batch: Batch, number: int) -> list[Group]:
        """The groups of batch `number`, counted from the beginning of the training: b1, then b2 if there is any."""
        crops = Group([self._on_device(images) for images in batch.crops.images])
        return [crops, self._moved(batch.whole, number)] if self.whole else [crops]

    def _on_device(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.device, non_blocking=True))

    def _moved(self, group: Group, number: int) -> Group:
        """Each pair of views moved by the two elements of its plan."""
        seed = np.random.SeedSequence(self.seed, spawn_key=(STREAM, number)).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed[0]))
        views, relations = [], []
        images = [self._on_device(x) for x in group.images]
        for pair in zip(images[::2], images[1::2], strict=True):
            plan = self.maker.draw(self.whole, tuple(pair[0].shape[-2:]), generator)
            for x, elements in zip(pair, plan, strict=True):
                mine = elements[self.rank :: self.world_size]
                if len(x):
                    views.append(act(mine, x, antialias=True))
                else:  # this process has none of b2, and yet the others' grids
                    views.append(x.new_empty(0, 3, *elements.output_size(tuple(x.shape[-2:]))))
                relations.append(mine)
        return Group(views, relations)
