"""Time and peak memory of `patch_ntxent`, forward and backward, by number of images.

196 tokens an image, 512 channels, float32. Beside it: the formula in one matrix ("dense"), the released code's form
with its gradient repaired ("released"), and the three plain matrix products of the formula ("products"), each with
the two of its gradient. Times are taken in turn in one process, memory in a process for each.

Run: python benchmarks/loss.py
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from act import seconds
from memory import child, peak
from torch import Tensor

from ser_reg import patch_ntxent

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from literal import dense_ntxent, released_ntxent

TOKENS, DIM, TAU, RUNS = 196, 512, 0.3, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMED = (2, 3, 4, 8, 16, 24, 32, 64) if DEVICE == "cpu" else (4, 16, 64, 256, 1024)
WEIGHED = (4, 8, 16, 24, 48, 64) if DEVICE == "cpu" else (4, 16, 64, 256, 1024)
DENSE_UP_TO = 48  # images: the full matrices of more do not fit a small machine


Step = Callable[[Tensor, Tensor], None]


def trained(form: Callable[..., Tensor]) -> Step:
    def step(z1: Tensor, z2: Tensor) -> None:
        form(z1, z2, TAU).backward()

    return step


@torch.no_grad()
def products(z1: Tensor, z2: Tensor) -> None:
    """Each matrix of logits and its two gradients, as plain products."""
    x1, x2 = z1.flatten(0, 1), z2.flatten(0, 1)
    for a, b in ((x1, x1), (x1, x2), (x2, x2)):
        logits = a @ b.mT
        logits @ b, logits.mT @ a


FORMS: dict[str, Step] = {
    "ours": trained(patch_ntxent),
    "released": trained(released_ntxent),
    "dense": trained(dense_ntxent),
    "products": products,
}


def tokens(images: int) -> tuple[Tensor, Tensor]:
    z1, z2 = torch.randn(2, images, TOKENS, DIM, device=DEVICE)
    return z1.requires_grad_(), (z1.detach() + 0.5 * z2).requires_grad_()


def time_forms(images: int) -> dict[str, Any]:
    z1, z2 = tokens(images)

    def step(name: str) -> None:
        z1.grad = z2.grad = None
        FORMS[name](z1, z2)

    spent: dict[str, list[float]] = {name: [] for name in (FORMS if images <= DENSE_UP_TO else ["ours"])}
    for run in range(RUNS + 1):
        for name in spent:
            time = seconds(lambda name=name: step(name), DEVICE)
            if run:  # the first is a warm-up
                spent[name].append(time)
    return {"images": images, "seconds": spent}


def measure_peak(name: str, images: int) -> int:
    """What the child process does."""
    FORMS[name](*tokens(2))  # libraries load what they need
    z1, z2 = tokens(images)
    return peak(lambda: FORMS[name](z1, z2))


def ratio(row: dict[str, Any], other: str) -> tuple[float, float, float]:
    """ours / other, run by run: (lowest, median, highest)."""
    ratios = sorted(a / b for a, b in zip(row["seconds"]["ours"], row["seconds"][other], strict=True))
    return ratios[0], ratios[len(ratios) // 2], ratios[-1]


def main() -> None:
    rows = []
    for images in TIMED:
        row = time_forms(images)
        rows.append(row)
        ours = sorted(row["seconds"]["ours"])[RUNS // 2]
        text = ", ".join(f"{ratio(row, name)[1]:.2f} of {name}" for name in row["seconds"] if name != "ours")
        print(f"{images:3} images: {ours:.3f} s; {text}", flush=True)
    print(record.save("loss", rows + weigh_forms()))


def weigh_forms() -> list[dict[str, Any]]:
    rows = []
    for images in WEIGHED:
        names = ["ours", *(["released", "dense"] if images <= DENSE_UP_TO else [])]
        row = {
            "images": images,
            "peak_bytes": {name: child(__file__, "--form", name, "--images", str(images)) for name in names},
        }
        rows.append(row)
        peaks = row["peak_bytes"]
        text = ", ".join(f"{name} {bytes_ / 2**20:.0f} MiB" for name, bytes_ in peaks.items())
        print(f"{images:3} images: {text}; ours {peaks['ours'] / images / 2**20:.2f} MiB an image", flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--images", type=int)
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.form:
        print(measure_peak(given.form, given.images))
    else:
        main()
