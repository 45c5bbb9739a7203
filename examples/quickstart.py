"""Train a small ViT with MoCo-v3 on photo patches, without and with soft equivariance, and compare.

    python examples/quickstart.py                          # both arms in a few minutes on two CPU cores
    python examples/quickstart.py --images my/photographs --image-size 64 --steps 1000

The two arms start from the same weights and see the same batches and views; they differ in λ, the weight of the term,
alone. The output folder then holds `quickstart.png` and `results.json`. The loop to copy from is `own_loop.py`.
"""

import os

# Set ahead of torch: threads that spin while they wait stall each other when the machine is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import math
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
import tyro
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.layers import build_sincos2d_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ser_reg import SERError, SERLoss, TokenTap
from ser_reg.backbones import backbone, late_cls, patch_tokens
from ser_reg.errors import require
from ser_reg.geometry import GroupElement, act
from ser_reg.images import Patches, load_patches
from ser_reg.metrics import equivariance_score, matching_score
from ser_reg.records import atomically, environment
from ser_reg.report.maps import colours
from ser_reg.report.style import COLOURS, FLOOR, SCORE, STYLE, draw_line, marks
from ser_reg.views import CroppedViews, EquivariantViews, Photometric, partition_size

HIDDEN, OUT, TEMPERATURE = 512, 128, 0.2  # MoCo-v3's heads, 4096 and 256 wide in its paper, and its contrast
# MoCo-v3's photometric part, the same for crops and whole images. Blur is left out, as is usual below 64 pixels.
COLOUR = {"photometric": Photometric(blur=0, solarize=0.1), "normalize": ([0.5] * 3, [0.5] * 3)}


@dataclass(frozen=True)
class Settings:
    """Train a small ViT with MoCo-v3, without and with soft equivariance (SER), and compare the two."""

    steps: int = 160  # Training steps of each arm.
    seed: int = 0  # Of patches, weights, batches and views; the same for both arms.
    weight: float = 1.0  # λ, the weight of the SER term, in the second arm; the first has 0.
    layer: int = 2  # Blocks ahead of the tokens that SER compares.
    cls_layer: int | None = None  # Blocks ahead of [CLS], in both arms. By default as `layer`, at most depth - 1.
    ratio: float = 0.25  # Part of the batch (r) that is seen whole, by the equivariant views; the rest is cropped.
    temperature: float = 0.3  # Of the SER loss.
    images: Path | None = None  # Folder of photographs, or of sub-folders as classes. By default embedded ones.
    train_patches: int = 96  # Training patches of each photograph.
    test_patches: int = 48  # Held-out patches of each photograph.
    output_dir: Path = Path("out/quickstart")  # Where quickstart.png and results.json go.
    batch_size: int = 64  # Patches a step.
    image_size: int = 32  # Pixels a side.
    patch_size: int = 4  # Pixels a side.
    width: int = 64  # Channels of a token; a multiple of 4.
    depth: int = 6  # Number of blocks.
    heads: int = 4  # Attention heads of a block; they divide the width.
    learning_rate: float = 1e-3  # The highest one: a warm-up over a tenth of the steps, then along a cosine to 0.
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # Where to train.

    def check(self) -> None:
        """Raise a SERError for numbers that do not go together, before minutes are spent."""
        least = min(self.steps, self.depth, self.train_patches, self.test_patches)
        fits, b2 = self.width % 4 == self.width % self.heads == 0, self.ratio * self.batch_size
        side = max(1, round(self.image_size / self.patch_size)) * self.patch_size
        for names, ok, expected, remedy in (
            ("steps depth train_patches test_patches", least > 0, "more than 0", "--steps 160 --depth 6"),
            ("image_size patch_size", self.image_size == side, "a whole number of patches", f"--image-size {side}"),
            ("width heads", fits, "a width that 4 and the number of heads divide", f"--width {16 * self.heads}"),
            ("ratio batch_size", 2 <= b2 <= self.batch_size - 2, "two images whole, two cropped", "--ratio 0.25"),
            ("layer depth", 0 < self.layer <= self.depth, "a layer from 1 to depth", f"--layer {min(2, self.depth)}"),
            ("weight", self.weight >= 0, "no negative weight", "--weight 1"),
        ):
            given = ", ".join(f"{name}={getattr(self, name)}" for name in names.split())
            require(ok, "quickstart.py", given, expected, f"python examples/quickstart.py {remedy}")


def build(settings: Settings) -> VisionTransformer:
    """A timm ViT as MoCo-v3 initialises it, where [CLS] joins late."""
    shape = {"embed_dim": settings.width, "depth": settings.depth, "num_heads": settings.heads, "num_classes": 0}
    kind = {"dynamic_img_size": True, "weight_init": "moco"}
    vit = VisionTransformer(settings.image_size, settings.patch_size, **shape, **kind)
    known = backbone(vit)
    positions, projection = known.positions.requires_grad_(False), known.projection.requires_grad_(False)  # as in MoCo
    bound = math.sqrt(6 / (projection.weight[0].numel() + settings.width))  # Xavier's, as if it were a linear layer
    with torch.no_grad():
        positions.zero_()[0, 1:] = build_sincos2d_pos_embed(known.grid(known.size), settings.width)
        projection.weight.uniform_(-bound, bound)
        projection.bias.zero_()
    late = min(settings.layer, settings.depth - 1) if settings.cls_layer is None else settings.cls_layer
    return late_cls(vit, late)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers, batch norm and ReLU between them, batch norm without scale and shift at the end."""
    layers: list[nn.Module] = []
    for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(width_in, width_out, bias=False), nn.BatchNorm1d(width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-2], nn.BatchNorm1d(widths[-1], affine=False))


class MoCoV3(nn.Module):
    """Encoder, projector and predictor; the first two have a copy that follows by momentum and makes the keys."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.trained = nn.Sequential(encoder, mlp(width, HIDDEN, HIDDEN, OUT))
        self.predictor = mlp(OUT, HIDDEN, OUT)
        self.target = deepcopy(self.trained).requires_grad_(False)

    def forward(self, embeddings: list[Tensor], views: list[list[Tensor]], momentum: float) -> Tensor:
        """The copy moves, then each image finds itself among the keys of the other view; embeddings (B, D) of views."""
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.trained.parameters(), strict=True):
                slow.lerp_(fast, 1 - momentum)
            keys = [self.target[1](torch.cat([self.target[0](x) for x in view])) for view in views]
        queries = [self.predictor(self.trained[1](embedding)) for embedding in embeddings]
        pairs = zip(queries, reversed(keys), strict=True)
        logits = [F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / TEMPERATURE for query, key in pairs]
        right = torch.arange(len(keys[0]), device=keys[0].device)
        return torch.stack([2 * TEMPERATURE * F.cross_entropy(x, right) for x in logits]).sum()


def cosine(progress: float, start: float, end: float) -> float:
    """From `start` at 0 to `end` at 1 along half a cosine."""
    return end + 0.5 * (1 + math.cos(math.pi * progress)) * (start - end)


def normalise(images: Tensor) -> Tensor:
    """From [0, 1] to what the encoder takes."""
    return (images - 0.5) / 0.5


def train(settings: Settings, images: Tensor, weight: float) -> tuple[VisionTransformer, dict[str, list[float]]]:
    """One arm: MoCo-v3, and with a positive weight the SER term. Returns the encoder and what the steps logged."""
    torch.manual_seed(settings.seed)
    vit = build(settings).to(settings.device)
    moco = MoCoV3(vit, settings.width).to(settings.device)
    parameters = [p for p in moco.parameters() if p.requires_grad]
    if weight > 0:
        ser = SERLoss(settings.width, temperature=settings.temperature).to(settings.device)
        parameters += ser.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.1)
    warmup = max(1, settings.steps // 10)  # in a line, then along a cosine to 0
    progress = [max(0, step - warmup) / max(1, settings.steps - warmup) for step in range(settings.steps + 1)]
    rates = [min((step + 1) / warmup, cosine(done, 1.0, 0.0)) for step, done in enumerate(progress)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates.__getitem__)
    make_views = EquivariantViews(settings.patch_size, **COLOUR)
    make_crops = CroppedViews(settings.image_size, area=(0.2, 1), **COLOUR)
    n = partition_size(settings.batch_size, settings.ratio)
    torch.manual_seed(settings.seed + 1)  # both arms see the same from here on, whatever was built before

    log = []
    for step in track(range(settings.steps), f"MoCo-v3, λ = {weight:g}"):
        batch = images[torch.randperm(len(images))[: settings.batch_size]].to(settings.device)
        views = make_views(batch[-n:])  # b2 whole; each view knows how it was made
        pair = [[crop.images, view.images] for crop, view in zip(make_crops(batch[:-n]), views, strict=True)]
        embeddings, z = [], []
        for b1, b2 in pair:
            cropped = vit(b1)
            with TokenTap(vit, settings.layer) as tap:  # the term's tokens, from the forward of b2
                embeddings.append(torch.cat([cropped, vit(b2)]))
                z.append(tap.tokens)
        loss = base = moco(embeddings, pair, cosine(step / settings.steps, 0.99, 1.0))  # b1 and b2 jointly
        logs = {"base_loss": base}
        if weight > 0:
            out = ser(z, views)
            loss = base + weight * out.loss  # the added term
            logs |= {"ser_loss": out.loss, **{f"ser_{name}": value for name, value in out.logs.items()}}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        log.append({name: value.detach() for name, value in logs.items()})
    return vit, {name: torch.stack([logs[name] for logs in log]).tolist() for name in log[0]}


def accuracies(name: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """k-NN (a vote of 20, weighted by exp(cosine / 0.07)) and linear accuracy of (N, D) features; nothing tuned."""
    nearest = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).topk(min(20, len(train)), dim=1)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[nearest.indices], (nearest.values / 0.07).exp())
    probe = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-3, max_iter=10_000))
    linear = probe.fit(train.numpy(), train_labels.numpy()).score(test.numpy(), test_labels.numpy())
    found = {"knn": (votes.argmax(1) == test_labels).double().mean().item(), "linear": float(linear)}
    print(f"{name}: held-out accuracy of k-NN {found['knn']:.1%}, linear {found['linear']:.1%}")
    return found


@torch.no_grad()
def evaluate(name: str, vit: VisionTransformer, data: Patches, settings: Settings) -> dict:
    """Accuracy on held-out patches, and equivariance on at most 480 of them."""
    vit.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    pairs = ([vit(normalise(x).to(settings.device)).cpu() for x in part.split(256)] for part in (data.train, data.test))
    train, test = map(torch.cat, pairs)
    chosen = normalise(data.test[torch.randperm(len(test), generator=generator)[:480]]).to(settings.device)
    scores = equivariance_score(vit, chosen, generator=generator)
    matching = matching_score(vit, chosen, generator=generator)
    found = accuracies(name, train, data.train_labels, test, data.test_labels)
    for kind, layers in matching.items():
        cells = [f"layer {i} {s['top1']:.1%} (chance {s['chance']:.1%})" for i, s in layers.items()]
        print(f"  tokens matched, {kind}: {cells[settings.layer - 1]}, {cells[-1]}")
    return {"accuracy": found, "equivariance": scores, "matching": matching}


@torch.no_grad()
def draw(path: Path, results: dict, encoders: dict[str, nn.Module], data: Patches) -> None:
    """Training, equivariance by layer, and tokens f of the last layer before and after a quarter turn g."""
    arms, depth, turn = results["arms"], results["settings"]["depth"], GroupElement.turn(1)
    models = {**arms, "untrained": results["references"]["untrained"]}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 12), layout="constrained")
        training, scores, maps = figure.subfigures(3, 1, height_ratios=[1, 1.1, 2])
        for panel, name in zip(training.subplots(1, 3), ("base_loss", "ser_loss", "ser_matching"), strict=True):
            panel.set(title=name.replace("_", " "), xlabel="step")
            for i, history in enumerate(arm["history"] for arm in arms.values()):
                if values := history.get(name):  # means over a tenth of the steps
                    panel.plot(torch.tensor(values).unfold(0, max(1, len(values) // 10), 1).mean(1), color=COLOURS[i])

        scores.suptitle("Spatial equivariance score by layer (dotted: of unrelated images)")
        for panel, kind in zip(scores.subplots(1, 3, sharey=True), arms["ser"]["equivariance"], strict=True):
            panel.set(title=kind, xlabel="blocks")
            for i, model in enumerate(models.values()):
                draw_line(panel, i, model["equivariance"][kind], "spatial", SCORE)
                draw_line(panel, i, model["equivariance"][kind], "spatial_floor", FLOOR)
        handles = [panel.plot([], [], label=name, **marks(i))[0] for i, name in enumerate(models)]
        scores.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)

        images = data.test[data.test.std((1, 2, 3)).argsort(descending=True)[:150:50]]  # three that vary much
        turned = act(turn, images)
        columns = [("image x", images), ("g·x", turned)]
        for arm, vit in encoders.items():
            f = [patch_tokens(vit, normalise(x), depth) for x in (images, turned)]
            pairs = zip(*(x - x.mean((2, 3), keepdim=True) for x in (act(turn, f[0]), f[1])), strict=True)
            columns += zip((f"{arm}: g·f(x)", f"{arm}: f(g·x)"), zip(*map(colours, pairs), strict=True), strict=True)
        for column, (title, pictures) in zip(maps.subplots(len(images), 6, squeeze=False).T, columns, strict=True):
            column[0].set_title(title)
            for panel, picture in zip(column, pictures, strict=True):
                panel.imshow(picture.permute(1, 2, 0).clamp(0, 1))
                panel.axis("off")
        figure.savefig(path, dpi=150)


def main(settings: Settings) -> None:
    """Both arms, the table, the picture and the file."""
    start = time.perf_counter()
    settings.check()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    per_photo = (settings.train_patches, settings.test_patches)
    data = load_patches(settings.images, settings.image_size, per_photo, settings.seed)
    given, batch = f"{len(data.train)} training patches", f"a batch of {settings.batch_size}"
    remedy = "python examples/quickstart.py --batch-size 16 --train-patches 96"
    require(len(data.train) >= settings.batch_size, "quickstart.py", given, batch, remedy)
    print(f"{given}, {len(data.test)} held out: {data.task}")

    pixels = accuracies("pixels", data.train.flatten(1), data.train_labels, data.test.flatten(1), data.test_labels)
    torch.manual_seed(settings.seed)
    untrained = evaluate("untrained", build(settings).to(settings.device), data, settings)
    arms, encoders = {}, {}
    for arm, weight in {"control": 0.0, "ser": settings.weight}.items():
        begin = time.perf_counter()
        encoders[arm], history = train(settings, data.train, weight)
        arms[arm] = {"ser_lambda": weight, "train_seconds": time.perf_counter() - begin, "history": history}
        arms[arm] |= evaluate(arm, encoders[arm], data, settings)
    results = {
        "settings": asdict(settings) | {"cls_layer": backbone(encoders["ser"]).cls_layer},
        "environment": environment(settings.device),
        "data": {"task": data.task, "classes": data.names, "train": len(data.train), "held_out": len(data.test)},
        "references": {"raw_pixels": {"accuracy": pixels}, "untrained": untrained},
        "arms": arms,
    }
    with atomically(settings.output_dir / "quickstart.png") as path:
        draw(path, results, {arm: vit.cpu() for arm, vit in encoders.items()}, data)
    results["seconds"] = time.perf_counter() - start
    with atomically(settings.output_dir / "results.json") as path:
        path.write_text(json.dumps(results, indent=1, default=str))
    print(f"{settings.output_dir}/quickstart.png, results.json: {results['seconds']:.0f} s in all")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except SERError as error:
        sys.exit(str(error))
