"""Train a small ViT with MoCo-v3 on photo patches, without and with soft equivariance, and compare.

    python examples/quickstart.py                          # both arms in a few minutes on two CPU cores
    python examples/quickstart.py --images my/photographs --image-size 64 --steps 1000

The two arms start from the same weights and see the same batches and views; they differ in lambda alone. The output
folder then holds `quickstart.png` and `results.json`. The loop to copy from is `train`.
"""

from __future__ import annotations

import os

# Set ahead of torch: threads that spin while they wait stall each other when the machine is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import tyro
from moco_v3 import MoCoV3
from photo_patches import PatchData, load_patches
from pictures import draw
from pretraining.encoder import fix_patch_projection, fix_positions
from pretraining.schedules import cosine
from probes import accuracies, embed
from results import LOGGED, atomically, environment, last_tenth, print_table
from rich.console import Console
from rich.progress import Progress
from settings import Settings
from timm.models import VisionTransformer
from torch import Tensor
from torchvision.transforms import v2

from ser_reg import EquivariantViews, SERError, SERLoss, TokenTap, equivariance_score, late_cls, partition_size

__all__ = ["build", "main", "policies", "train"]

EQUIVARIANCE_IMAGES = 480
HIDDEN, OUT = 512, 128  # widths of MoCo-v3's heads; 4096 and 256 in its paper

# The photometric part of MoCo-v3, the same for both policies and both views (MoCo-v3 solarises one view in five, and
# only the second). Blur is left out, as is usual below 64 pixels. Values in [0, 1] in, about [-1, 1] out.
normalise = v2.Normalize([0.5] * 3, [0.5] * 3)
photometric = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomSolarize(threshold=128 / 255, p=0.1),
        normalise,
    ]
)


def per_image(transform: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The transform drawn anew for each image: on a batch, torchvision draws once for all."""
    return lambda images: torch.stack([transform(image) for image in images])


def build(settings: Settings) -> VisionTransformer:
    """A timm ViT as MoCo-v3 initialises it, where [CLS] joins late."""
    vit = VisionTransformer(
        img_size=settings.image_size,
        patch_size=settings.patch_size,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        num_classes=0,
        dynamic_img_size=True,
        weight_init="moco",
    )
    if settings.fixed_positions:
        fix_positions(vit)
    if settings.fixed_patches:
        fix_patch_projection(vit)
    return late_cls(vit, settings.late_layer)


def policies(settings: Settings) -> tuple[Callable[[Tensor], Tensor], EquivariantViews]:
    """T, which crops, for b1, and T_eq, which does not, for b2. Their photometric part is the same."""
    crop = v2.RandomResizedCrop(settings.image_size, scale=(settings.crop_min, 1), antialias=True)
    crops = per_image(v2.Compose([crop, v2.RandomHorizontalFlip(), photometric]))
    return crops, EquivariantViews(settings.patch_size, photometric=per_image(photometric))


def train(
    settings: Settings,
    images: Tensor,
    ser_lambda: float,
    device: torch.device,
    show: Callable[[Tensor], object] = lambda base_loss: None,
) -> tuple[VisionTransformer, Tensor]:
    """One arm: MoCo-v3, and with a positive lambda the SER term.

    Returns:
        The encoder, and what was logged: (steps, 5) for MoCo-v3 with SER, (steps, 1) for MoCo-v3 alone.
    """
    torch.manual_seed(settings.seed)
    vit = build(settings).to(device)
    moco = MoCoV3(vit, settings.width, HIDDEN, OUT).to(device)
    parameters = [p for p in moco.parameters() if p.requires_grad]
    if ser_lambda > 0:
        ser = SERLoss(settings.width, temperature=settings.temperature).to(device)
        parameters += ser.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, settings.steps))
    crops, views = policies(settings)
    whole = partition_size(settings.batch_size, settings.partition_ratio)
    torch.manual_seed(settings.seed + 1)  # both arms see the same from here on, whatever was built before

    log = []
    for step in range(settings.steps):
        batch = images[torch.randperm(len(images))[: settings.batch_size]]
        b1, b2 = batch[:-whole], batch[-whole:]
        pair = views(b2)  # two geometric views of whole images, and how they relate
        view1 = [crops(b1).to(device), pair.x1.to(device)]
        view2 = [crops(b1).to(device), pair.x2.to(device)]

        with TokenTap(vit, settings.layer) as tap:  # tokens of the latest forward, which is that of b2
            embeddings1, z1 = torch.cat([vit(part) for part in view1]), tap.tokens
            embeddings2, z2 = torch.cat([vit(part) for part in view2]), tap.tokens
        moco.follow(cosine(step / settings.steps, settings.momentum, 1.0))
        with torch.no_grad():
            targets1, targets2 = (torch.cat([moco.target(part) for part in view]) for view in (view1, view2))
        base = moco([embeddings1, embeddings2], [targets1, targets2])  # b1 and b2 jointly
        loss, logged = base, [base]
        if ser_lambda > 0:
            out = ser(z1, z2, pair.relative)
            loss = base + ser_lambda * out.loss  # the added term
            logged += [out.loss, out.chance, out.accuracy, out.feature_std]

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        log.append(torch.stack(logged).detach())
        show(base.detach())
    return vit, torch.stack(log).cpu()


def warm_cosine(step: int, steps: int) -> float:
    """Part of the highest learning rate: linear warm-up over a tenth of the steps, then along a cosine to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return cosine((step - warmup) / max(1, steps - warmup), 1.0, 0.0)


def evaluate(vit: VisionTransformer, data: PatchData, seed: int) -> dict[str, Any]:
    """Accuracy on held-out patches, and equivariance on at most 480 of them."""
    device = next(vit.parameters()).device
    train, test = normalise(data.train), normalise(data.test)
    features = (embed(vit, train), data.train_labels, embed(vit, test), data.test_labels)
    generator = torch.Generator().manual_seed(seed)
    some = test[torch.randperm(len(test), generator=generator)[:EQUIVARIANCE_IMAGES]].to(device)
    return {"accuracy": accuracies(*features), "equivariance": equivariance_score(vit, some, generator=generator)}


def main(settings: Settings) -> None:
    """Both arms, the table, the picture and the file."""
    start = time.perf_counter()
    settings.check()
    console = Console()
    has_cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if has_cuda else "cpu") if settings.device == "auto" else settings.device)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    per_photo = (settings.train_patches, settings.test_patches)
    data = load_patches(settings.images, settings.image_size, per_photo, settings.seed)
    if len(data.train) < settings.batch_size:
        given, remedy = f"{len(data.train)} training patches", "--batch-size 16 --train-patches 96"
        raise SERError("quickstart.py", given, f"a batch of {settings.batch_size}", f"quickstart.py {remedy}")
    console.print(
        f"{len(data.train)} training and {len(data.test)} held-out patches: {data.task}",
        highlight=False,
        soft_wrap=True,
    )

    torch.manual_seed(settings.seed)
    pixels = (data.train.flatten(1), data.train_labels, data.test.flatten(1), data.test_labels)
    with console.status("references: raw pixels, an untrained encoder"):
        references = {"raw_pixels": {"accuracy": accuracies(*pixels)}}
        references["untrained"] = evaluate(build(settings).to(device), data, settings.seed)

    arms, encoders = {}, {}
    with Progress(*Progress.get_default_columns(), "{task.fields[base]}", console=console) as progress:
        for arm, ser_lambda in {"control": 0.0, "ser": settings.ser_lambda}.items():
            bar = progress.add_task(f"MoCo-v3, λ = {ser_lambda:g}", total=settings.steps, base="")

            def show(base: Tensor, bar=bar) -> None:
                progress.update(bar, advance=1, base=f"loss {base:.3f}")

            begin = time.perf_counter()
            encoders[arm], log = train(settings, data.train, ser_lambda, device, show)
            seconds = time.perf_counter() - begin
            history = dict(zip(LOGGED, log.T.tolist(), strict=False))
            arms[arm] = {"ser_lambda": ser_lambda, "train_seconds": seconds, "history": history}
            arms[arm]["last_tenth"] = {name: last_tenth(values) for name, values in history.items()}
            arms[arm] |= evaluate(encoders[arm], data, settings.seed)

    results = {
        "settings": asdict(settings) | {"cls_layer": settings.late_layer},
        "environment": environment(device),
        "data": {"task": data.task, "classes": data.names, "train": len(data.train), "held_out": len(data.test)},
        "references": references,
        "arms": arms,
    }
    with atomically(settings.output_dir / "quickstart.png") as path:
        draw(path, results, encoders, data.test, data.test_labels, normalise)
    results["seconds"] = time.perf_counter() - start
    with atomically(settings.output_dir / "results.json") as path:
        path.write_text(json.dumps(results, indent=1, default=str))
    print_table(console, results)
    console.print(
        f"{settings.output_dir}/quickstart.png, results.json: {results['seconds']:.0f} s in all", soft_wrap=True
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except SERError as error:
        sys.exit(str(error))
