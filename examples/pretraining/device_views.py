"""Views on the device: colours of a loaded batch, turns of its crops, and what the term's policy does to its images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from data.batch import Batch, Group
from data.recipe import normalise
from torch import Tensor

from ser_reg import Affine, EquivariantViews, GroupElement, View, act
from ser_reg.views import CroppedViews, PathViews, Photometric
from ser_reg.views.cropped import share_in_pairs

from .policies import Policy

__all__ = ["DeviceViews"]

STREAM = 2  # of random numbers: the sampler has 0 and 1
ELEMENTS, COLOURS, TURNS, EXTRA, PATH = range(5)  # what is drawn, each from a stream of its own


class DeviceViews:
    """What the loader leaves out: it decodes, crops, resizes and flips; colours, turns and elements follow here.

    All is drawn for the images of all processes, from generators that depend on the seed and the number of the batch
    alone; each process keeps what its images' places in the batch say. So all processes have the same grids without a
    word between them, an image's views do not depend on where it is, and a resumed run goes on as it would have. What
    the term's policy draws has generators of its own: the base method's views are the same with a term and without.

    Args:
        photometric: of each view, global ones first.
        policy: of the term.
        maker: what moves the images that the term reads, if anything does.
        sizes: images of a batch over all processes, and how many of them the term reads.
        seed: of everything.
        device: where the encoder is.
        crop_turns: whether crops are turned by quarters.
        extra: the photometric part of the extra view that is loaded, if it has one.
    """

    def __init__(
        self,
        photometric: Sequence[Photometric],
        policy: Policy,
        maker: EquivariantViews | CroppedViews | PathViews,
        sizes: tuple[int, int],
        seed: int,
        device: torch.device | str = "cpu",
        crop_turns: bool = False,
        extra: Photometric | None = None,
    ) -> None:
        self.photometric = list(photometric)
        self.policy = policy
        self.maker = maker
        self.batch, self.read = sizes
        self.seed = seed
        self.device = device
        self.crop_turns = crop_turns
        self.extra = extra

    def __call__(self, batch: Batch, number: int) -> list[Group]:
        """The groups of batch `number`, counted from the beginning of the training: images that the term does not
        read, then those that it reads; one of them if there are no others on any process."""
        n, groups = len(batch.term.images[0]), []
        if self.read < self.batch:
            plain = self._crops(batch.plain, number, batch.positions[n:])
            groups.append(Group([normalise(view.images) for view in plain]))  # how they relate nobody asks
        if self.read:
            groups.append(self._of_term(batch.term, number, batch.positions[:n]))
        return groups

    def _of_term(self, group: Group, number: int, positions: Tensor) -> Group:
        extra: list[View] = []
        if self.policy.whole:
            views = self._moved(self._coloured(group, number, positions), number, positions)
        else:
            views = self._crops(group, number, positions)
        if self.policy.extra == "path":
            views, extra = self._along_path(views, number, positions)
        elif self.policy.extra != "none":
            extra = [self._extra(view, number, positions) for view in group.extra]
        images = [normalise(view.images) for view in views]
        return Group(images, [view.relation for view in views], [view.drawn for view in views], extra)

    def _coloured(self, group: Group, number: int, positions: Tensor) -> list[View]:
        """Views as they were loaded, in [0, 1], with their colours changed."""
        generators = [self._generator(number, COLOURS, i) for i in range(len(group.images))]
        loaded = [View(self._on_device(view.images), view.relation, {}) for view in group.views]
        given = zip(loaded, self.photometric, generators, strict=True)
        return [self._change(view, photometric, generator, positions) for view, photometric, generator in given]

    def _crops(self, group: Group, number: int, positions: Tensor) -> list[View]:
        """The same, turned by quarters if crops are."""
        views = self._coloured(group, number, positions)
        if not self.crop_turns:
            return views
        drawn = [
            torch.randint(4, (self.batch,), generator=self._generator(number, TURNS, i)) for i in range(len(views))
        ]
        if self.policy.paired:
            drawn = [torch.cat([t[: self.read : 2].repeat_interleave(2), t[self.read :]]) for t in drawn]
        return [_turn(view, turns[positions]) for view, turns in zip(views, drawn, strict=True)]

    def _change(self, view: View, photometric: Photometric, generator: torch.Generator, positions: Tensor) -> View:
        drawn = photometric.draw(self.batch, generator)
        if self.policy.paired:
            pairs = share_in_pairs({name: values[: self.read] for name, values in drawn.items()})
            drawn = {name: torch.cat([pairs[name], values[self.read :]]) for name, values in drawn.items()}
        mine = {name: values[positions] for name, values in drawn.items()}
        images = photometric.apply(view.images, mine) if len(positions) else view.images
        return View(images, view.relation, mine)

    def _moved(self, views: list[View], number: int, positions: Tensor) -> list[View]:
        """Each pair of whole images moved by the two elements of its plan."""
        generator, moved = self._generator(number, ELEMENTS), []
        for pair in zip(views[::2], views[1::2], strict=True):
            size = (pair[0].images.shape[-2], pair[0].images.shape[-1])
            plan = self.maker.draw(self.read, size, generator)
            for (images, _, drawn), elements in zip(pair, (plan.first, plan.second), strict=True):
                mine = elements[positions]
                if len(positions):
                    images = act(mine, images, antialias=True).clamp(0, 1)
                else:  # this process has none of b2, and yet the others' grids
                    images = images.new_empty(0, 3, *elements.output_size(size))
                moved.append(View(images, mine, drawn))
        return moved

    def _along_path(self, views: list[View], number: int, positions: Tensor) -> tuple[list[View], list[View]]:
        """The second view moved to the end of its path, and what is seen on the way, in [0, 1]."""
        theta = self.maker.draw_theta(self.batch, self._generator(number, PATH))[positions]
        start = views[1]
        end, targets = self.maker.render_path(start.images, theta)
        stations = [*zip(targets, self.maker.thetas(theta), strict=False), (end, theta)]
        *on_the_way, second = [
            View(images, self.maker.element(at) @ start.relation, start.drawn | {"theta": at})
            for images, at in stations
        ]
        return [views[0], second, *views[2:]], on_the_way

    def _extra(self, view: View, number: int, positions: Tensor) -> View:
        """An image as it is, normalised; or a small crop in its four turns, turn by turn."""
        view = View(self._on_device(view.images), view.relation, {})
        if self.policy.extra == "turned":
            view = self._change(view, self.extra, self._generator(number, EXTRA), positions)
            turned = [_turn(view, torch.full((len(positions),), k)) for k in range(4)]
            relation = Affine(torch.cat([v.relation.matrix for v in turned]))
            drawn = {name: torch.cat([values] * 4) for name, values in view.drawn.items()}
            view = View(torch.cat([v.images for v in turned]), relation, drawn)
        return View(normalise(view.images), view.relation, view.drawn)

    def _on_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True).float() / 255

    def _generator(self, number: int, *stream: int) -> torch.Generator:
        seed = np.random.SeedSequence(self.seed, spawn_key=(STREAM, number, *stream)).generate_state(1)
        return torch.Generator().manual_seed(int(seed[0]))


def _turn(view: View, turns: Tensor) -> View:
    """Square crops, each turned by its number of quarters."""
    n = len(turns)
    element = GroupElement(turns, torch.zeros(n, dtype=torch.bool), torch.ones(n, 2, dtype=torch.float64))
    images = act(element, view.images) if n else view.images
    return View(images, element @ view.relation, view.drawn)
