"""Time of `Photometric` on a batch, and of torchvision's transforms doing the same to Pillow images one by one.

Run: python benchmarks/photometric.py
"""

import random
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image, to_tensor

from ser_reg import Photometric

BATCH, SIDE = 64, 224
VIEWS = {"first": (1.0, 0.0), "second": (0.1, 0.2)}  # of MoCo-v3: probabilities of blur and of solarisation
RUNS = 9
PICTURES = 16  # that Pillow changes in a run


def photographs(n: int) -> Tensor:
    """Values of 256 steps that vary as slowly as those of photographs do, with some noise."""
    coarse = torch.rand(n, 3, SIDE // 16, SIDE // 16)
    images = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic") + 0.05 * torch.randn(n, 3, SIDE, SIDE)
    return images.clamp(0, 1).mul(255).round() / 255


def pillow(blur: float, solarize: float) -> Callable[[Image.Image], Image.Image]:
    """What `Photometric(blur=blur, solarize=solarize)` does, as MoCo-v3 writes it."""

    def gaussian(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    return v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.Lambda(gaussian, Image.Image)], blur),
            v2.RandomApply([v2.Lambda(ImageOps.solarize, Image.Image)], solarize),
        ]
    )


def seconds(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(view: str, device: str) -> dict[str, list[float]]:
    """Images a second, new draws in each run. Pillow's beside, in turn, so that a drift of the machine meets both."""
    blur, solarize = VIEWS[view]
    photometric, transform = Photometric(blur=blur, solarize=solarize), pillow(blur, solarize)
    images = photographs(BATCH)
    pictures = [to_pil_image(image) for image in images[:PICTURES]]
    images = images.to(device)
    speed: dict[str, list[float]] = {"photometric": [], "pillow": []}
    for run in range(RUNS + 2):
        ours = BATCH / seconds(lambda: photometric(images), device)
        theirs = PICTURES / seconds(lambda: [to_tensor(transform(picture)) for picture in pictures], "cpu")
        if run >= 2:  # warm-up
            speed["photometric"].append(ours)
            speed["pillow"].append(theirs)
    return speed


def threads(device: str) -> list[int]:
    """1, 2, 4, ... as many as there are; a GPU is asked by one."""
    most = torch.get_num_threads() if device == "cpu" else 1
    return [2**i for i in range(most.bit_length())]


if __name__ == "__main__":
    torch.manual_seed(0)
    random.seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for number in threads(device):
        torch.set_num_threads(number)
        for view in VIEWS:
            found = measure(view, device)
            rows.append({"view": view, "threads": number, "batch": [BATCH, 3, SIDE, SIDE], **found})
            ours, theirs = (sorted(values) for values in found.values())
            print(
                f"{view:6} view, {number} threads: {ours[RUNS // 2]:6.0f} images/s ({ours[0]:.0f} to {ours[-1]:.0f}); "
                f"Pillow {theirs[RUNS // 2]:4.0f} ({theirs[0]:.0f} to {theirs[-1]:.0f})"
            )
    print(record.save("photometric", rows))
