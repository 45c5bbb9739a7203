"""Each term, trained alone on parts of photographs, learns what it says, and tells it of parts held out."""

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ser_reg.images import embedded_photographs, load_patches
from ser_reg.objectives import OBJECTIVES
from ser_reg.views import CroppedViews, PathViews, Photometric

SIDE, WIDTH, DRAWS = 24, 48, 16
COLOURS = Photometric(brightness=0.6, contrast=0.6, saturation=0.6, hue=0.2, jitter=1, grey=0, blur=0)
CROPS = {"size": SIDE, "area": (0.2, 1), "photometric": COLOURS}


class Toy(NamedTuple):
    """A term on views in which there is something to learn, and what it should come to log."""

    term: str
    logged: tuple[str, ...]
    maker: object
    settings: dict
    steps: int
    batch: int = 64
    whole: bool = False  # halves of photographs, in which up is up, instead of patches of them


TOYS = {
    "crop": Toy("augself", ("r2",), CroppedViews(SIDE, area=(0.1, 1)), {"width": 128, "colour": 0}, 220),
    "colour": Toy("augself", ("r2",), CroppedViews(**CROPS), {"width": 128, "crop": 0}, 60),
    "foreseen": Toy("equimod", ("accuracy",), CroppedViews(original=True, **CROPS), {"hidden": 256}, 60),
    "turn": Toy("essl", ("accuracy",), CroppedViews(SIDE, (0.6, 1), views=1, turned="all"), {}, 260, 20, True),
    "transformed": Toy(
        *("stl", ("accuracy_equivariance", "accuracy_transformation"), CroppedViews(paired=True, **CROPS)),
        *({"rank": 8}, 80),
    ),
    "painted": Toy(
        *("reconstruction", ("r2",), PathViews("rotation", size=SIDE, area=(0.7, 1), flip=0)),
        *({"patch_size": 4, "width": 48}, 30, 16),
    ),
}


@functools.cache
def images(whole: bool) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) to train on and held out: left and right parts of photographs, or patches of either part."""
    if not whole:
        patches = load_patches(None, 32, (32, 16), seed=0)
        return patches.train, patches.test
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for photograph in embedded_photographs().values():
        border = round(0.7 * photograph.shape[-1])
        for part, side in zip(parts, (photograph[..., :border], photograph[..., border:]), strict=True):
            part.append(F.interpolate(side[None] / 255, (32, 32), mode="bilinear", antialias=True)[0])
    return torch.stack(parts[0]), torch.stack(parts[1])


class Encoder(nn.Module):
    """Maps (B, 48, 6, 6) of images of 24 pixels, whose places know where they are."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.places = nn.Parameter(0.3 * torch.randn(WIDTH, SIDE // 4, SIDE // 4))
        self.mix = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, size, padding=size // 2) for size in (1, 3, 1))
        self.norms = nn.ModuleList(nn.GroupNorm(4, WIDTH) for _ in range(3))

    def forward(self, x):
        x = self.patches(4 * x - 2) + self.places
        for norm, mix in zip(self.norms, self.mix, strict=True):
            x = x + mix(norm(x).relu())
        return x


def encoded(encoder, term, views):
    return [encoder(view.images) for view in views[: term.encoded]]


def trained(toy, seed):
    """Encoder and term, after some steps."""
    torch.manual_seed(seed)
    encoder, term = Encoder(), OBJECTIVES[toy.term](WIDTH, **toy.settings, maker=toy.maker)
    optimiser = torch.optim.Adam([*encoder.parameters(), *term.parameters()], lr=2.5e-3)
    train, _ = images(toy.whole)
    drawn = [] if toy.whole else [toy.maker(train) for _ in range(2)]
    for step in range(toy.steps):
        if toy.whole:
            views = toy.maker(train)
        else:  # neighbours stay neighbours
            first = 2 * torch.randperm(len(train) // 2)[: toy.batch // 2]
            views = [view[torch.stack([first, first + 1], 1).flatten()] for view in drawn[step % 2]]
        loss = term(encoded(encoder, term, views), views).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return encoder, term


def shuffled(toy, z):
    """Features of which what is asked has nothing to do with what is shown."""
    far = len(z[0]) // 2 // 2 * 2  # to patches of other photographs; in pairs
    if toy.term == "essl":
        return [z[0][torch.randperm(len(z[0]))]]
    if toy.term == "equimod":
        return [z[0], z[1].roll(far, 0), z[2].roll(far, 0)]
    if toy.term == "stl":  # another image in view 2, and partners that are none
        y1, y2 = z[0].clone(), z[1].roll(far, 0)
        for y in (y1, y2):
            y[1::2] = y[1::2].roll(far // 4, 0)
        return [y1, y2]
    return [y.roll(far, 0) for y in z]


@torch.no_grad()
def judged(toy, encoder, term, shuffle):
    """What is logged of held-out parts less its chance: mean and standard error, over draws of views."""
    _, held_out = images(toy.whole)
    held_out = held_out[::5] if toy.term == "reconstruction" else held_out  # whose decoders take their time
    n = len(held_out)
    chances = {"r2": 0, "accuracy": 1 / 4 if toy.term == "essl" else 1 / (4 * n - 1)}
    chances |= {"accuracy_equivariance": 1 / (4 * n - 1), "accuracy_transformation": 1 / (2 * n - 1)}
    found = []
    for _ in range(DRAWS):
        views = toy.maker(held_out)
        z = encoded(encoder, term, views)
        logs = term(shuffled(toy, z) if shuffle else z, views).logs
        found.append([logs[name].item() - chances[name] for name in toy.logged])
    table = torch.tensor(found)
    return table.mean(0), table.std(0) / DRAWS**0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TOYS)
def test_learns_what_it_says(name, seed):
    toy = TOYS[name]
    encoder, term = trained(toy, seed)
    mean, error = judged(toy, encoder, term, shuffle=False)
    assert (mean > 5 * error).all(), (mean, error)
    assert (mean > 0.005).all(), mean
    mean, error = judged(toy, encoder, term, shuffle=True)
    assert (mean < 5 * error + 1e-3).all(), (mean, error)
