"""The README's loop with any term: another term is another word, its views and its name.

    python examples/swap_objective.py                          # SER on whole images, a minute on a CPU
    python examples/swap_objective.py equimod --layer 12       # another term, where it comes from: at the last layer
    python examples/swap_objective.py essl --steps 100

Copy the line of the term that you want from `TERMS`, and the loop from `main`.
"""

from __future__ import annotations

import os

# Set ahead of torch: threads that spin while they wait stall each other when the machine is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import timm
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from ser_reg import IMAGENET, EquivariantViews, Photometric, SERLoss, late_cls, patch_tokens
from ser_reg.images import load_patches
from ser_reg.objectives import ESSL, STL, AugSelf, EquiMod, Objective, Reconstruction
from ser_reg.views import CroppedViews, PathViews

SIZE, PATCH = 64, 8  # pixels a side
COLOURS = Photometric(blur=0.1)
CROPS: dict[str, Any] = {"size": SIZE, "area": (0.2, 1), "photometric": COLOURS, "normalize": IMAGENET}
SMALL: dict[str, Any] = CROPS | {"size": SIZE // 2, "area": (0.05, 0.14)}

# Word: what makes the views, and the term that compares them.
TERMS: dict[str, tuple[Any, Callable[..., Objective]]] = {
    "ser": (EquivariantViews(PATCH, photometric=COLOURS, normalize=IMAGENET), SERLoss),
    "ser-crops": (CroppedViews(**CROPS, turned=True), SERLoss),  # on what two crops have both seen
    "augself": (CroppedViews(**CROPS), AugSelf),
    "equimod": (CroppedViews(**CROPS, original=True), EquiMod),
    "essl": (CroppedViews(**SMALL, views=1, turned="all"), ESSL),
    "stl": (CroppedViews(**CROPS, paired=True), STL),
    "reconstruction": (PathViews("rotation", **CROPS), partial(Reconstruction, patch_size=PATCH)),
}


class SSLLoss(nn.Module):
    """Each image finds its other crop among those of the batch (SimCLR's loss); stands for any method."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.crops = CroppedViews(**CROPS)
        self.head = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 128))

    def forward(self, vit: nn.Module, images: Tensor) -> Tensor:
        crops = torch.cat([view.images for view in self.crops(images)])
        z = F.normalize(self.head(vit(crops)), dim=1)
        logits = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(images)))


def main(
    word: Annotated[Literal[tuple(TERMS)], tyro.conf.Positional] = "ser",  # type: ignore[valid-type]
    steps: int = 20,
    batch_size: int = 32,
    layer: int = 3,
    weight: float | None = None,
    ratio: float = 0.5,
) -> None:
    """Train a timm ViT with a simple SSL loss and a term.

    Args:
        word: of the term.
        steps: of the optimiser.
        batch_size: images a step.
        layer: blocks ahead of the tokens that the term compares.
        weight: λ of the term; by default what its authors take.
        ratio: part of the batch that the term sees.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    photographs = load_patches(None, SIZE, (32, 1), seed=0).train.to(device)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=SIZE, patch_size=PATCH, dynamic_img_size=True
    ).to(device)
    late_cls(vit, min(layer, 11))

    make_views, kind = TERMS[word]
    term = kind(vit.embed_dim, maker=make_views).to(device)
    weight = term.default_weight if weight is None else weight
    n = round(ratio * batch_size / 2) * 2  # even, as some terms compare images in pairs

    ssl = SSLLoss(vit.embed_dim).to(device)
    optimizer = torch.optim.AdamW([*vit.parameters(), *ssl.parameters(), *term.parameters()], lr=5e-4)
    for step in range(steps):
        images = photographs[torch.randint(len(photographs), (batch_size,))]
        base = ssl(vit, images)
        views = make_views(images[:n])
        z = [patch_tokens(vit, view.images, layer) for view in views[: term.encoded]]
        out = term(z, views)
        loss = base + weight * out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0 or step + 1 == steps:
            logs = ", ".join(f"{name} {value:.2f}" for name, value in out.logs.items())
            print(f"step {step}: SSL {base:.3f}, {word} {out.loss:.3f} ({logs})", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
