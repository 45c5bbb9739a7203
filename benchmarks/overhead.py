"""What the whole term costs in a training step: time and memory with and without it, at r = 1, 10 and 50 %.

A step of MoCo-v3's kind on a ViT-S/16 at 224 pixels (on a CPU: ViT-Ti at 96), late [CLS] in both; the term's tokens
come from `patch_tokens` beside the SSL forward, as in the README's loop, or from a `TokenTap` on it.

Run: python benchmarks/overhead.py
"""

import argparse
import copy
from typing import Any

import record
import timm
import torch
from act import seconds
from memory import child, peak
from torch import Tensor, nn
from torch.nn import functional as F

from ser_reg import EquivariantViews, SERLoss, TokenTap, View, late_cls, partition_size, patch_tokens

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NAME, SIDE, BATCH = ("vit_small_patch16_224", 224, 256) if CUDA else ("vit_tiny_patch16_224", 96, 64)
LAYER, RUNS = 3, 7
RATIOS = (0.01, 0.1, 0.5)


class Step:
    """Forward and backward of two views; the momentum branch sees the other one."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        vit = timm.create_model(NAME, num_classes=0, dynamic_img_size=True)
        self.vit = late_cls(vit, LAYER).to(DEVICE)
        self.momentum = copy.deepcopy(self.vit).requires_grad_(False)
        self.head = nn.Linear(self.vit.embed_dim, 256).to(DEVICE)
        self.ser = SERLoss(self.vit.embed_dim).to(DEVICE)

    def base(self, embeddings: list[Tensor], views: list[list[Tensor]]) -> Tensor:
        queries = [F.normalize(self.head(e), dim=-1) for e in embeddings]
        with torch.no_grad():
            keys = [F.normalize(self.head(torch.cat([self.momentum(x) for x in view])), dim=-1) for view in views]
        labels = torch.arange(len(queries[0]), device=DEVICE)
        pairs = ((queries[0], keys[1]), (queries[1], keys[0]))
        return torch.stack([F.cross_entropy(q @ k.T / 0.2, labels) for q, k in pairs]).sum()

    def __call__(self, pair: list[list[Tensor]], views: tuple[View, View], mode: str) -> None:
        for module in (self.vit, self.head, self.ser):
            module.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
            embeddings, maps = [], []
            for b1, b2 in pair:
                cropped = self.vit(b1)
                with TokenTap(self.vit, LAYER) as tap:
                    embeddings.append(torch.cat([cropped, self.vit(b2)]))
                    maps.append(tap.tokens)
            loss = self.base(embeddings, pair)
            if mode == "patch_tokens":
                maps = [patch_tokens(self.vit, view.images, LAYER) for view in views]
            if mode != "plain":
                loss = loss + 0.5 * self.ser(maps, views).loss
        loss.backward()


def batch(ratio: float) -> tuple[list[list[Tensor]], tuple[View, View]]:
    """Both views of b1 and b2, and those of b2 as they were made."""
    n = partition_size(BATCH, ratio)
    images = torch.rand(BATCH, 3, SIDE, SIDE, device=DEVICE)
    views = EquivariantViews(16)(images[-n:], torch.Generator().manual_seed(0))
    return [[images[:-n], views[0].images], [images[:-n].flip(-1), views[1].images]], views


def measure(ratio: float) -> dict[str, Any]:
    step, (pair, views) = Step(), batch(ratio)
    spent: dict[str, list[float]] = {"plain": [], "tap": [], "patch_tokens": []}
    for run in range(RUNS + 1):
        for mode, times in spent.items():
            time = seconds(lambda mode=mode: step(pair, views, mode), DEVICE)
            if run:  # the first is a warm-up
                times.append(time)
    peaks = {mode: child(__file__, "--mode", mode, "--ratio", str(ratio)) for mode in spent}
    return {"ratio": ratio, "images": len(views[0].images), "seconds": spent, "peak_bytes": peaks}


def main() -> None:
    rows = []
    for ratio in RATIOS:
        row = measure(ratio)
        rows.append({"model": NAME, "side": SIDE, "batch": BATCH, **row})
        plain = row["seconds"]["plain"]
        for mode in ("tap", "patch_tokens"):
            found = sorted(a / b for a, b in zip(row["seconds"][mode], plain, strict=True))
            low, median, high = found[0], found[len(found) // 2], found[-1]
            print(
                f"r = {ratio:4.0%}, {row['images']:3} images, {mode:12}: {median:.3f} ({low:.3f} to {high:.3f})",
                flush=True,
            )
    print(record.save("overhead", rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=["plain", "tap", "patch_tokens"])
    parser.add_argument("--ratio", type=float)
    given = parser.parse_args()
    if given.mode:
        one = Step(), *batch(given.ratio)
        print(peak(lambda: one[0](*one[1:], given.mode)))
    else:
        main()
