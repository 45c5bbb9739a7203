"""Time and peak memory of `patch_ntxent`, forward and backward, by number of images.

196 tokens an image, 512 channels, float32. Beside it: the formula in one matrix ("dense"), the released code's form
with its gradient repaired ("released"), and the three plain matrix products that any form contains ("products"), one
forward and two backward each. Times are taken in turn in one process, memory in a process for each.

Run: python benchmarks/loss.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from act import seconds
from environment import save
from torch import Tensor

from ser_reg import patch_ntxent

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from literal import dense_ntxent, released_ntxent

TOKENS, DIM, TAU, RUNS = 196, 512, 0.3, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMED = (2, 3, 4, 8, 16, 24, 32)
WEIGHED = (4, 8, 16, 24, 48, 64)
DENSE_UP_TO = 48  # images: the full matrices of more do not fit a small machine


def products(z1: Tensor, z2: Tensor) -> Tensor:
    x1, x2 = z1.flatten(0, 1), z2.flatten(0, 1)
    logits = [x1 @ x1.mT, x1 @ x2.mT, x2 @ x2.mT]
    return torch.stack([matrix.sum() for matrix in logits]).sum()


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": lambda a, b: patch_ntxent(a, b, TAU),
    "released": lambda a, b: released_ntxent(a, b, TAU),
    "dense": lambda a, b: dense_ntxent(a, b, TAU),
    "products": products,
}


def tokens(images: int) -> tuple[Tensor, Tensor]:
    z1, z2 = torch.randn(2, images, TOKENS, DIM, device=DEVICE)
    return z1.requires_grad_(), (z1.detach() + 0.5 * z2).requires_grad_()


def time_forms(images: int) -> dict[str, Any]:
    z1, z2 = tokens(images)

    def step(form: Callable[[Tensor, Tensor], Tensor]) -> None:
        z1.grad = z2.grad = None
        form(z1, z2).backward()

    spent: dict[str, list[float]] = {name: [] for name in FORMS}
    for run in range(RUNS + 1):
        for name, form in FORMS.items():
            time = seconds(lambda form=form: step(form), DEVICE)
            if run:  # the first is a warm-up
                spent[name].append(time)
    return {"images": images, "seconds": spent}


def peak_bytes(name: str, images: int) -> int:
    """Largest resident size less that of the tokens standing there, in a process of its own (Linux)."""
    command = [sys.executable, __file__, "--form", name, "--images", str(images)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(name: str, images: int) -> None:
    """What the child process does."""
    small = tokens(2)
    FORMS[name](*small).backward()  # libraries load what they need
    z1, z2 = tokens(images)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        FORMS[name](z1, z2).backward()
        print(torch.cuda.max_memory_allocated() - before)
    else:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        FORMS[name](z1, z2).backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def ratio(row: dict[str, Any], other: str) -> tuple[float, float, float]:
    """ours / other, run by run: (lowest, median, highest)."""
    ratios = sorted(a / b for a, b in zip(row["seconds"]["ours"], row["seconds"][other], strict=True))
    return ratios[0], ratios[len(ratios) // 2], ratios[-1]


def matrix_rate(images: int, spent: float) -> float:
    """FLOPs a second of the formula's distinct products: logits forward, two products each backward."""
    m = images * TOKENS
    return 3 * 3 * 2 * m * m * DIM / spent


def main() -> None:
    rows = []
    for images in TIMED:
        row = time_forms(images)
        rows.append(row)
        text = ", ".join(f"{ratio(row, name)[1]:.2f} of {name}" for name in FORMS if name != "ours")
        print(f"{images:3} images: {text}", flush=True)
    for images in WEIGHED:
        names = ["ours", *(["released", "dense"] if images <= DENSE_UP_TO else [])]
        row = {"images": images, "peak_bytes": {name: peak_bytes(name, images) for name in names}}
        rows.append(row)
        peaks = row["peak_bytes"]
        text = ", ".join(f"{name} {bytes_ / 2**20:.0f} MiB" for name, bytes_ in peaks.items())
        print(f"{images:3} images: {text}; ours {peaks['ours'] / images / 2**20:.2f} MiB an image", flush=True)
    timed = [row for row in rows if "seconds" in row and row["images"] >= 8]
    first, last = (sorted(row["seconds"]["ours"])[RUNS // 2] for row in (timed[0], timed[-1]))
    exponent = math.log(last / first) / math.log(timed[-1]["images"] / timed[0]["images"])
    print(f"time grows with the {exponent:.2f}th power of the number of images")
    print(save("loss", rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--images", type=int)
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.form:
        measure_peak(given.form, given.images)
    else:
        main()
