"""Each term with views and features that suit it, small and in float64; most views are drawn without images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ser_reg import GroupElement, View
from ser_reg.objectives import OBJECTIVES, Objective
from ser_reg.views import CroppedViews, PathViews, Photometric

DIM, GRID, SIZE = 8, 3, (40, 56)


def planned(maker, n: int, seed: int) -> list[View]:
    """The views that a maker draws for n images, without images."""
    plan = maker.draw(n, SIZE, torch.Generator().manual_seed(seed))
    return [View(torch.empty(n, 0), *one) for one in zip(plan.relations, plan.drawn, strict=True)]


def cropped(n: int, seed: int = 0, **options) -> list[View]:
    return planned(CroppedViews(photometric=Photometric(solarize=0.5), turned=True, **options), n, seed)


def equivariant(n: int, seed: int = 0) -> list[View]:
    generator = torch.Generator().manual_seed(seed)
    elements = (GroupElement.sample(n, (1, 1), (1, 1), generator) for _ in range(2))
    return [View(torch.empty(n, 0), g, {}) for g in elements]


def turned(n: int, seed: int = 0) -> list[View]:
    (view,) = planned(CroppedViews(views=1, photometric=Photometric()), n, seed)
    return [View(torch.empty(4 * n, 0), all_turns(n) @ view[list(range(n)) * 4].relation, {})]


def all_turns(n: int) -> GroupElement:
    turns = torch.arange(4).repeat_interleave(n)
    return GroupElement(turns, torch.zeros(4 * n, dtype=torch.bool), torch.ones(4 * n, 2, dtype=torch.float64))


def paths(n: int, seed: int = 0) -> list[View]:
    images = torch.rand(n, 3, *SIZE, generator=torch.Generator().manual_seed(seed)).double()
    return list(PathViews("se2", size=4 * GRID)(images, torch.Generator().manual_seed(seed)))


class Case(NamedTuple):
    """A term, and what it is told."""

    settings: dict
    views: Callable[..., list[View]]
    rows: int = 1  # features of an image
    unit: int = 1  # images that stay together

    def batch(self, name: str, n: int, seed: int = 0) -> tuple[list[Tensor], list[View]]:
        """Features, leaves in float64, and views of n images."""
        generator = torch.Generator().manual_seed(seed)
        encoded = OBJECTIVES[name].encoded
        shape = (encoded, n * self.rows, DIM, GRID, GRID)
        features = torch.randn(shape, generator=generator, dtype=torch.float64)
        return [z.requires_grad_() for z in features.unbind()], self.views(n, seed)

    def chosen(self, start: int, stop: int, n: int) -> list[int]:
        """Which rows the images from start to stop are."""
        return [row * n + image for row in range(self.rows) for image in range(start, stop)]


CASES = {
    "ser": Case({"projection_dim": 16}, equivariant),
    "augself": Case({"width": 16, "flip": 0.3, "turn": 0.2, "blur": 0.1, "solarize": 0.7}, cropped),
    "equimod": Case({"hidden": 16, "width": 8}, lambda n, seed=0: cropped(n, seed, original=True)),
    "essl": Case({"hidden": 16}, turned, rows=4),
    "stl": Case({"invariance": 0.3}, lambda n, seed=0: cropped(n, seed, paired=True), unit=2),
    "reconstruction": Case({"width": 6, "patch_size": 4}, paths),
}


def build(name: str, seed: int = 0) -> Objective:
    """The term of a case, in float64, with every parameter away from where it starts."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    term = OBJECTIVES[name](DIM, **CASES[name].settings).double()
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.set_rng_state(state)
    return term
