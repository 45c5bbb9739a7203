"""The README's loop, whole: your timm ViT, your SSL loss, your loader, and the term.

    python examples/own_loop.py                                             # embedded photographs, minutes on a CPU
    python examples/own_loop.py --images my/photographs --epochs 100

Copy it and put your own in place of `Images`, `SSLLoss` and the model. What belongs to the term is marked with (SER).
"""

from __future__ import annotations

import os

# Set ahead of torch: threads that spin while they wait stall each other when the machine is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import timm
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ser_reg import (
    IMAGENET,
    EquivariantViews,
    Photometric,
    SERLoss,
    equivariance_score,
    late_cls,
    partition_size,
    patch_tokens,
)
from ser_reg.images import load_patches

SIZE, PATCH = 96, 16  # pixels a side
COLOURS = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)]  # of the crops


class Images(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Each image whole, with values in [0, 1], and the two crops that the SSL method sees."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        crop = v2.RandomResizedCrop(images.shape[-1], scale=(0.2, 1), antialias=True)
        self.crop = v2.Compose([crop, v2.RandomHorizontalFlip(), *COLOURS, v2.Normalize(*IMAGENET)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image = self.images[index]
        return image, self.crop(image), self.crop(image)


class SSLLoss(nn.Module):
    """Each image finds its other crop among those of the batch (SimCLR's loss); stands for any method."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 128))

    def forward(self, vit: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
        z = F.normalize(self.head(vit(torch.cat([x1, x2]))), dim=1)
        logits = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
        other = torch.arange(len(z), device=z.device).roll(len(x1))
        return F.cross_entropy(logits, other)


def main(
    images: Path | None = None,
    epochs: int = 2,
    batch_size: int = 64,
    layer: int = 3,
    weight: float = 0.5,
    ratio: float = 0.25,
) -> None:
    """Train a timm ViT with a simple SSL loss and the term.

    Args:
        images: folder of photographs, or of sub-folders of images; by default those that come with two packages.
        epochs: of training.
        batch_size: images a step.
        layer: blocks ahead of the tokens that the term compares.
        weight: λ of the term.
        ratio: part of the batch that the term sees; 0.01 in the paper, whose batches are large.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = Images(load_patches(images, SIZE, (96, 1), seed=0).train)
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZE, dynamic_img_size=True).to(device)
    late_cls(vit, layer)  # (SER) [CLS] joins after these blocks; the state_dict stays as it is
    make_views = EquivariantViews(PATCH, photometric=Photometric(blur=0), normalize=IMAGENET)  # (SER)
    ser, ssl = SERLoss(vit.embed_dim).to(device), SSLLoss(vit.embed_dim).to(device)
    n = partition_size(batch_size, ratio)  # (SER)
    parameters = [*vit.parameters(), *ssl.parameters(), *ser.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.05)

    for epoch in range(epochs):
        for step, (whole, x1, x2) in enumerate(loader):
            base = ssl(vit, x1.to(device), x2.to(device))  # your loop, unchanged
            views = [view.to(device) for view in make_views(whole[:n])]  # (SER) each view knows how it was made
            z = [patch_tokens(vit, view.images, layer) for view in views]  # (SER)
            out = ser(z, views)  # (SER)
            loss = base + weight * out.loss  # (SER) the added term
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                logs = ", ".join(f"{name} {value:.2f}" for name, value in out.logs.items())
                print(f"epoch {epoch}, step {step}: SSL {base:.3f}, SER {out.loss:.3f} ({logs})", flush=True)

    shown = v2.Normalize(*IMAGENET)(dataset.images[:: len(dataset) // 64]).to(device)
    scores = equivariance_score(vit.eval(), shown, layers=[layer])
    for kind, layers in scores.items():
        found = layers[layer]
        print(f"{kind}, layer {layer}: spatial {found['spatial']:.2f}, unrelated images {found['spatial_floor']:.2f}")


if __name__ == "__main__":
    tyro.cli(main)
