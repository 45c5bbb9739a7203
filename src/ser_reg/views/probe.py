"""A probe of a photometric part: does it leave things where they are, and does it draw for each image?"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import require

__all__ = ["check_output", "probe"]

DRAWS = 8
CELLS = 16  # a side; the spot fills one of them
SPOT = (3, 5)  # row and column of its cell: off the centre, both axes and both diagonals, so that all that moves shows
GREY, WHITE = 0.5, 0.9
CALL = "EquivariantViews(photometric=...)(images)"
REMEDY = "EquivariantViews(photometric=Photometric())"


def check_output(images: Tensor, changed: Any) -> None:
    """Raise unless a photometric part gave images of the same shape."""
    given = f"a {type(changed).__name__} from the photometric part"
    require(isinstance(changed, Tensor), CALL, given, f"a tensor {tuple(images.shape)}", REMEDY)
    require(
        changed.shape == images.shape,
        CALL,
        f"images {tuple(images.shape)}, after the photometric part {tuple(changed.shape)}",
        "a photometric part that keeps the shape: a crop is no element of the group",
        REMEDY,
    )


def probe(photometric: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Look at what a photometric part does to a spot on grey, in 8 draws; random numbers are put back.

    Warns if it draws once for a batch, as torchvision's transforms do.

    Args:
        photometric: called with 2 images at a time.
        images: of the shape, type and device that it will be called with.

    Raises:
        SERError: it moves the spot, or gives something else than such images.
    """
    height, width = images.shape[-2:]
    if min(height, width) < CELLS or not len(images):
        return  # of so few pixels nothing can be said
    spot = images.new_full((2, images.shape[1], CELLS, CELLS), GREY)
    spot[..., SPOT[0], SPOT[1]] = WHITE
    spot = F.interpolate(spot, (height, width), mode="nearest")
    outcomes = []
    with _random_state_put_back(images.device):
        for _ in range(DRAWS):
            changed = photometric(spot.clone())
            check_output(spot, changed)
            require(
                _there(changed),
                CALL,
                "a photometric part that moves what is in the image",
                "one that leaves every pixel where it is: else the relation of the views is wrong, without a word",
                f"{REMEDY}  # without flips, crops and rotations, which are drawn here",
            )
            outcomes.append(changed)
    draws = not all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)
    if draws and all(torch.equal(one, other) for one, other in outcomes):
        warnings.warn(
            "The photometric part draws once for all images of a batch. To draw for each: photometric=Photometric(), "
            "or photometric=lambda images: torch.stack([transform(image) for image in images])",
            stacklevel=4,
        )


def _there(changed: Tensor) -> bool:
    """Whether both spots are where they were, as far as anything can be seen at all."""
    background = changed.flatten(2).median(-1).values[..., None, None]
    cells = F.adaptive_avg_pool2d((changed - background).abs().float().mean(1, keepdim=True), CELLS)
    contrast, level = cells[..., SPOT[0], SPOT[1]].flatten(), cells.flatten(1).median(-1).values
    seen = cells.flatten(1).amax(-1) > level + 1e-3
    return bool((~seen | (contrast > 1.5 * level + 1e-3)).all())


@contextlib.contextmanager
def _random_state_put_back(device: torch.device) -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    random.setstate(state)
