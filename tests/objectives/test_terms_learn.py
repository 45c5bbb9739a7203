"""Each term, trained alone on patches of photographs, learns what it says, and tells it of held-out photographs."""

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from ser_reg.images import load_patches
from ser_reg.objectives import OBJECTIVES
from ser_reg.views import CroppedViews, PathViews, Photometric

SIDE, WIDTH, STEPS, BATCH = 24, 48, 120, 64
COLOURS = Photometric(brightness=0.6, contrast=0.6, saturation=0.6, hue=0.2, jitter=1, grey=0, blur=0)
MAKERS = {
    "augself": CroppedViews(SIDE, area=(0.2, 1), photometric=COLOURS),
    "equimod": CroppedViews(SIDE, area=(0.2, 1), photometric=COLOURS, original=True),
    "essl": CroppedViews(SIDE, area=(0.5, 1), views=1, turned="all", flip=0),
    "stl": CroppedViews(SIDE, area=(0.2, 1), photometric=COLOURS, paired=True),
    "reconstruction": PathViews("rotation", size=SIDE, area=(0.7, 1), flip=0),
}
SETTINGS = {
    "augself": {"width": 128},
    "equimod": {"hidden": 256},
    "stl": {"rank": 8},
    "reconstruction": {"patch_size": 4, "width": 48},
}


@functools.cache
def patches() -> tuple[Tensor, Tensor]:
    found = load_patches(None, 32, (32, 16), seed=0)
    return found.train, found.test


class Encoder(nn.Module):
    """Maps (B, 48, 6, 6) of images of 24 pixels, whose places know where they are."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.places = nn.Parameter(0.3 * torch.randn(WIDTH, SIDE // 4, SIDE // 4))
        self.mix = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, size, padding=size // 2) for size in (1, 3, 1))
        self.norms = nn.ModuleList(nn.GroupNorm(4, WIDTH) for _ in range(3))

    def forward(self, images):
        x = self.patches(images) + self.places
        for norm, mix in zip(self.norms, self.mix, strict=True):
            x = x + mix(norm(x).relu())
        return x


def features(encode, term, views):
    return [encode(4 * view.images - 2) for view in views[: term.encoded]]


def trained(name, seed):
    """Encoder and term, after some steps on patches of the parts of photographs to train on."""
    torch.manual_seed(seed)
    encode, term = Encoder(), OBJECTIVES[name](WIDTH, **SETTINGS.get(name, {}), maker=MAKERS[name])
    optimiser = torch.optim.Adam([*encode.parameters(), *term.parameters()], lr=3e-3)
    images, _ = patches()
    drawn = [MAKERS[name](images) for _ in range(2)]
    for step in range(STEPS):
        chosen = pairs(len(images))[:BATCH] if name == "stl" else torch.randperm(len(images))[:BATCH]
        if name == "essl":
            chosen = torch.cat([turn * len(images) + chosen[: BATCH // 2] for turn in range(4)])
        views = [view[chosen] for view in drawn[step % 2]]
        loss = term(features(encode, term, views), views).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return encode.eval(), term.eval()


def pairs(n: int) -> Tensor:
    """Neighbours 2i and 2i+1, in another order of pairs."""
    first = 2 * torch.randperm(n // 2)
    return torch.stack([first, first + 1], 1).flatten()


def other(name, z):
    """Features of which a view belongs to another image than the other views, or its turn to another one."""
    if name == "essl":
        return [z[0].roll(len(z[0]) // 4 // 2, 0)[torch.randperm(len(z[0]))]]
    if name == "augself":
        return [x.roll(1, 0) for x in z]
    if name == "reconstruction":
        return [x.roll(1, 0) for x in z]
    return [z[0], *(x.roll(2, 0) for x in z[1:])]


@torch.no_grad()
def judged(name, encode, term, shuffled=False):
    """Mean and standard error, over draws of views of held-out patches, of what is logged, less its chance."""
    _, images = patches()
    found = []
    for _ in range(6):
        views = MAKERS[name](images)
        z = features(encode, term, views)
        logs = term(other(name, z) if shuffled else z, views).logs
        chance = math.exp(-logs["chance"]) if "accuracy" in logs else 0
        if name == "stl":
            chance = 1 / (4 * len(images) - 1)
        found.append({k: v.item() - chance for k, v in logs.items() if k.startswith(("accuracy", "r2"))})
    table = {k: torch.tensor([row[k] for row in found]) for k in found[0]}
    return {k: (x.mean().item(), x.std().item() / len(x) ** 0.5) for k, x in table.items()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_learns_what_it_says(name, seed):
    encode, term = trained(name, seed)
    of_held_out, of_shuffled = (judged(name, encode, term, shuffled) for shuffled in (False, True))
    print(name, seed, of_held_out, of_shuffled)
