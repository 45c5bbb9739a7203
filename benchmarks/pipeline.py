"""Images per second that the input pipeline of the reference trainings delivers, and that the model takes.

The pipeline reads JPEG files of 500 x 375 pixels, cut from the embedded photographs, and makes the two views of MoCo-v3
at 224 pixels. The model is the online branch alone: a ViT-S/16, forward and backward of both views. The lower one is
the bound of a training; a training has the cost of the momentum branch, the heads and the optimiser on top.

Run: python benchmarks/pipeline.py
"""

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import timm
import torch
from act import seconds
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from data import Source, open_source
from data.batch import ViewDataset, collate
from data.recipe import normalise
from data.sampler import PartitionSampler
from moco_v3 import PRESETS, recipes

from ser_reg.images import embedded_photographs

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MODEL_BATCH = 256 if CUDA else 16
RUNS = 5 if CUDA else 3
WORKERS = (1, 2) if (os.cpu_count() or 1) < 8 else (1, 2, 8)
IMAGES, BATCH, BATCHES = 256, 32, 8
WIDTH, HEIGHT, QUALITY = 500, 375, 95  # ImageNet's most frequent size


def write_images(folder: Path) -> int:
    """Random parts of the photographs; returns the mean number of bytes."""
    torch.manual_seed(0)
    photographs = list(embedded_photographs().values())
    part = v2.RandomResizedCrop((HEIGHT, WIDTH), scale=(0.5, 1), ratio=(WIDTH / HEIGHT, WIDTH / HEIGHT))
    (folder / "train").mkdir()
    for i in range(IMAGES):
        image = v2.functional.to_pil_image(part(photographs[i % len(photographs)]))
        image.save(folder / "train" / f"{i:04}.jpg", quality=QUALITY)
    return round(statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg")))


def pipeline(source: Source, workers: int) -> list[float]:
    """Images per second, batch by batch after the first ones, which wait for the workers to start."""
    sampler = PartitionSampler(len(source), BATCH, whole=0, last=2 * workers + BATCHES)
    dataset = ViewDataset(source, *recipes(PRESETS["paper"]))
    batches = iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers))
    for _ in range(2 * workers):  # those that are prefetched
        next(batches)
    # A worker may hand in its batches with others': the time of `workers` batches is what is steady.
    rates = []
    for _ in range(BATCHES // workers):
        start = time.perf_counter()
        for _ in range(workers):
            next(batches)
        rates.append(workers * BATCH / (time.perf_counter() - start))
    return rates


def stages(source: Source) -> dict[str, float]:
    """Milliseconds of one worker for one image."""
    (first, second), _ = recipes(PRESETS["paper"])
    images = [source.image(i) for i in range(64)]

    def milliseconds(step: Callable[[int], object]) -> float:
        start = time.perf_counter()
        for i in range(len(images)):
            step(i)
        return 1e3 * (time.perf_counter() - start) / len(images)

    return {
        "read and decode": milliseconds(source.image),
        "crop and flip, both views": 2 * milliseconds(lambda i: first.flip(first.crop(images[i]))),
        "view 1, always blurred": milliseconds(lambda i: first.crops(images[i])),
        "view 2": milliseconds(lambda i: second.crops(images[i])),
        "view 1 of the whole image": milliseconds(lambda i: first.whole(images[i])),
    }


def model() -> list[float]:
    """Images per second, two views each."""
    vit = timm.create_model("vit_small_patch16_224", num_classes=0).to(DEVICE)
    views = [torch.randint(256, (MODEL_BATCH, 3, 224, 224), dtype=torch.uint8, device=DEVICE) for _ in range(2)]

    def step() -> None:
        vit.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
            outputs: list[Tensor] = [vit(normalise(view)) for view in views]
        torch.cat(outputs).float().square().mean().backward()

    return [MODEL_BATCH / seconds(step, DEVICE) for _ in range(RUNS + 1)][1:]  # the first is a warm-up


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder))
        source = open_source(folder, "train")
        torch.set_num_threads(1)  # as in a worker
        rows.append({"kind": "stages", "bytes": size, "milliseconds": stages(source)})
        for name, spent in rows[0]["milliseconds"].items():
            print(f"{spent:6.1f} ms  {name}", flush=True)
        for workers in WORKERS:
            rows.append({"kind": "pipeline", "workers": workers, "images_per_second": pipeline(source, workers)})
    torch.set_num_threads(os.cpu_count() or 1)
    rows.append({"kind": "model", "device": DEVICE, "batch": MODEL_BATCH, "images_per_second": model()})
    medians = {}
    for row in rows[1:]:
        name = "model" if row["kind"] == "model" else f"pipeline, {row['workers']} workers"
        found = sorted(row["images_per_second"])
        medians[name] = statistics.median(found)
        print(f"{name}: {medians[name]:.1f} images per second ({found[0]:.1f} to {found[-1]:.1f})")
    needed = math.ceil(medians["model"] / medians["pipeline, 1 workers"])
    for workers in WORKERS:
        bound = "pipeline" if medians[f"pipeline, {workers} workers"] < medians["model"] else "model"
        print(f"with {workers} workers the bound is the {bound}; from {needed} on it is the model")
    print(record.save("pipeline", rows))


if __name__ == "__main__":
    main()
