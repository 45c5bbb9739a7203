"""Images per second of the input pipeline of the reference trainings: as it is, and as it was before.

JPEG files of 500 x 375 pixels, cut from the embedded photographs, become the two views of MoCo-v3 at 224 pixels.
Before, workers did everything, on PIL images; now they decode, crop, resize and flip, and what is photometric is done
on the device, batch by batch. Measured side by side, in turn: what one worker gives; what comes out at the end, with
the photometric part and on the same cores; and the milliseconds of each stage. Beside it what a model takes: a
ViT-S/16, forward and backward of both views, without the momentum branch, heads and optimiser of a training.

Run: python benchmarks/pipeline.py
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import record
import timm
import torch
from act import seconds
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_jpeg, read_file
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from data import Source, open_source
from data.batch import Batch, Request, ViewDataset, collate
from data.recipe import Recipe, normalise
from data.sampler import PartitionSampler
from moco_v3 import PRESETS, recipes

from ser_reg.images import embedded_photographs

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CORES = os.cpu_count() or 1
MODEL_BATCH = 256 if CUDA else 8
WORKERS = (1, 2) if CORES < 8 else (1, 2, 8, CORES)
IMAGES, BATCH, BATCHES, RUNS = 256, 32, 6, 5
WIDTH, HEIGHT, QUALITY = 500, 375, 95  # ImageNet's most frequent size

Loaded = Batch | list[Tensor]


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


# As it was before: version 0.1 at the end of its eleventh issue, word for word but for names


class FormerBlur(v2.Transform):
    _transformed_types = (Image.Image,)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"radius": torch.empty(1).uniform_(0.1, 2.0).item()}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return inpt.filter(ImageFilter.GaussianBlur(**params))


def former_view(recipe: Recipe) -> v2.Compose:
    """What a recipe stood for: crop, flip and photometric part, by Pillow."""
    own = recipe.photometric
    changes: list[v2.Transform] = [
        v2.RandomApply([v2.ColorJitter(own.brightness, own.contrast, own.saturation, own.hue)], p=own.jitter),
        v2.RandomGrayscale(p=own.grey),
        v2.RandomApply([FormerBlur()], p=own.blur),
    ]
    if own.solarize:
        changes.append(v2.RandomSolarize(threshold=128, p=own.solarize))
    crop = v2.RandomResizedCrop(recipe.size, recipe.area, interpolation=recipe.interpolation, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *changes, v2.PILToTensor()])


class FormerDataset(Dataset[list[Tensor]]):
    def __init__(self, source: Source, views: list[Recipe]) -> None:
        self.source, self.views = source, [former_view(recipe) for recipe in views]

    def __getitem__(self, request: Request) -> list[Tensor]:
        image = self.source.image(request.index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(request.seed)
            return [view(image) for view in self.views]


def former_collate(samples: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(images) for images in zip(*samples, strict=True)]


# Both


class Pipeline:
    """From files to normalised images on the device, one way or the other."""

    def __init__(self, source: Source, former: bool) -> None:
        self.recipes, _ = recipes(PRESETS["paper"])
        self.dataset = FormerDataset(source, self.recipes) if former else ViewDataset(source, self.recipes)
        self.collate: Callable[[list[Any]], Loaded] = former_collate if former else collate
        self.former, self.length = former, len(source)

    def requests(self, batches: int) -> PartitionSampler:
        return PartitionSampler(self.length, BATCH, 0, last=batches)

    def worker(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Images per second that one worker makes."""
        batches = list(self.requests(4))
        start = clock()
        for requests in batches:
            self.collate([self.dataset[request] for request in requests])
        return len(batches) * BATCH / (clock() - start)

    def on_device(self, loaded: Loaded) -> list[Tensor]:
        images = loaded if isinstance(loaded, list) else loaded.plain.images
        images = [view.to(DEVICE, non_blocking=True) for view in images]
        if self.former:
            return [normalise(view) for view in images]
        views = zip(images, self.recipes, strict=True)
        return [normalise(recipe.photometric(view.float() / 255)) for view, recipe in views]

    def whole(self, workers: int) -> float:
        """Images per second that are ready for the model, after the first batches, which wait for workers to start."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.requests(2 * workers + BATCHES),
            collate_fn=self.collate,
            num_workers=workers,
            pin_memory=CUDA,
        )
        batches: Iterator[Loaded] = iter(loader)
        for _ in range(2 * workers):  # those that are prefetched
            self.on_device(next(batches))
        return BATCHES * BATCH / seconds(lambda: [self.on_device(next(batches)) for _ in range(BATCHES)], DEVICE)


def in_turn(measure: Callable[[Pipeline], float], old: Pipeline, new: Pipeline) -> dict[str, list[float]]:
    """Images per second of both, a run of the one after a run of the other; the first of each is a warm-up."""
    rates = [(measure(old), measure(new)) for _ in range(RUNS + 1)][1:]
    return {"old": [a for a, _ in rates], "new": [b for _, b in rates]}


def stages(source: Source) -> dict[str, float]:
    """Milliseconds for one image, the median of several runs."""
    (first, second), _ = recipes(PRESETS["paper"])
    n = 64
    images, files = [source.image(i) for i in range(n)], [source.name(i) for i in range(n)]
    dataset = ViewDataset(source, [first, second])
    old = [former_view(recipe) for recipe in (first, second)]
    batch = torch.stack([dataset[Request(i, False, i)].images[0] for i in range(n)]).to(DEVICE).float() / 255

    class Decoded:
        def __len__(self) -> int:
            return n

        def image(self, i: int, reduction: object = None) -> Image.Image:
            return images[i]

        def name(self, i: int) -> str:
            return files[i]

    cut = ViewDataset(Decoded(), [first, second])  # type: ignore[arg-type]

    def milliseconds(step: Callable[[int], object], images: int = 1) -> float:
        """Of a step that deals with so many images; what it makes is not kept, as in a worker."""

        def run() -> None:
            for i in range(n // images):
                step(i)

        return 1e3 * statistics.median([seconds(run, DEVICE) for _ in range(RUNS + 1)][1:]) / n

    return {
        "read and decode": milliseconds(source.image),
        "the same by torchvision": milliseconds(lambda i: decode_jpeg(read_file(files[i]))),
        "before: crop, resize, flip, both views": milliseconds(
            lambda i: [view.transforms[1](view.transforms[0](images[i])) for view in old]
        ),
        "before: all of both views": milliseconds(lambda i: [view(images[i]) for view in old]),
        "now: crop, resize, flip, both views": milliseconds(lambda i: cut[Request(i, False, i)]),
        f"now: photometric part of view 1, {DEVICE.upper()}": milliseconds(lambda i: first.photometric(batch), n),
        f"now: photometric part of view 2, {DEVICE.upper()}": milliseconds(lambda i: second.photometric(batch), n),
    }


def decoders(source: Source) -> int:
    """By how many of 256 steps Pillow's and torchvision's pixels differ at most."""
    pairs = ((pil_to_tensor(source.image(i)), decode_jpeg(read_file(source.name(i)))) for i in range(64))
    return max((ours.int() - other.int()).abs().max().item() for ours, other in pairs)


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


def report(name: str, rates: dict[str, list[float]]) -> None:
    times = sorted(b / a for a, b in zip(rates["old"], rates["new"], strict=True))
    text = ", ".join(f"{k} {statistics.median(v):.0f} ({min(v):.0f} to {max(v):.0f})" for k, v in rates.items())
    print(f"{name}: {text} images per second; {statistics.median(times):.2f} times ({times[0]:.2f} to {times[-1]:.2f})")


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder))
        source = open_source(folder, "train")
        old, new = (Pipeline(source, former) for former in (True, False))
        torch.set_num_threads(1)  # as in a worker
        for clock in (time.perf_counter, time.process_time):
            rates = in_turn(lambda pipeline, clock=clock: pipeline.worker(clock), old, new)
            rows.append({"kind": "worker", "clock": clock.__name__, "images_per_second": rates})
            report(f"a worker by {clock.__name__}", rates)
        rows.append({"kind": "stages", "bytes": size, "milliseconds": stages(source), "decoders": decoders(source)})
        for name, spent in rows[-1]["milliseconds"].items():
            print(f"{spent:6.2f} ms  {name}", flush=True)
        for workers in WORKERS:
            rates = in_turn(lambda pipeline, workers=workers: pipeline.whole(workers), old, new)
            rows.append({"kind": "pipeline", "workers": workers, "device": DEVICE, "images_per_second": rates})
            report(f"{workers} workers, {DEVICE}", rates)
    torch.set_num_threads(CORES)
    rows.append({"kind": "model", "device": DEVICE, "batch": MODEL_BATCH, "images_per_second": model()})
    print(f"model: {statistics.median(rows[-1]['images_per_second']):.1f} images per second")
    print(record.save("pipeline", rows))


if __name__ == "__main__":
    main()
