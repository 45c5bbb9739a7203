"""Does the term train what it should? Four questions to a model, answered with figures."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .distributed import place
from .errors import SERError
from .groups import GroupElement
from .regularizer import SERLoss
from .views import EquivariantViews, ViewPair, partition_size
from .vit import accepts_any_size, patch_size, patch_tokens

__all__ = ["CheckReport", "Finding", "check"]

DRAWS = 4  # pairs of views on which a true and a wrong relation are compared
SECONDS = 120  # for two processes to start, agree and end


class Finding(NamedTuple):
    """One question, whether it was answered well, and the figure."""

    question: str
    passed: bool
    figure: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.question}: {self.figure}"


class CheckReport(NamedTuple):
    """The findings; printed, a line each."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


def check(
    vit: nn.Module,
    images: Tensor | None = None,
    layer: int = 3,
    ser: SERLoss | None = None,
    batch_size: int = 256,
    ratio: float = 0.01,
    world_size: int = 1,
) -> CheckReport:
    """Ask whether SER will train this model as it should, before hours are spent.

    1. The gradient of the term reaches the projector and the early blocks, and no later one.
    2. The true relation between two views has a lower loss than a wrong one (turned by another half turn).
    3. One process and two (started here, gloo) agree on value and gradient.
    4. The memory that the term takes for your batch is there.

    The model is copied and left as it is. It takes seconds.

    Args:
        vit: a timm ViT that `patch_tokens` accepts, with `late_cls` as you train it.
        images: (B, C, H, W), at least three of yours, as you feed them; smooth noise by default.
        layer: the regularized layer.
        ser: your SERLoss; a new one by default.
        batch_size: images of a rank, of which `ratio` go to the term.
        ratio: r.
        world_size: ranks.

    Raises:
        SERError: fewer than three images, a process group of several ranks, or what the calls in your loop would raise.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=0, dynamic_img_size=True)
        >>> report = check(vit, layer=2, batch_size=64, ratio=0.1)
        >>> report.passed, len(report.findings)
        (True, 4)
    """
    _, ranks = place()
    if ranks > 1:
        raise SERError(
            "check(vit)",
            f"one of {ranks} processes",
            "a process by itself: the check starts a second one",
            "check(vit)  # ahead of torch.distributed.init_process_group",
        )
    vit = copy.deepcopy(vit).eval()
    images = _noise(vit) if images is None else images
    if images.ndim != 4 or len(images) < 3:
        raise SERError(
            "check(vit, images)", f"images {tuple(images.shape)}", "at least three images (B, C, H, W)", "check(vit)"
        )
    images = images[:8]
    views = EquivariantViews(patch_size(vit))
    if not accepts_any_size(vit):
        views.scale = views.ratio = (1.0, 1.0)
    pairs = [views(images, torch.Generator().manual_seed(seed)) for seed in range(DRAWS)]
    with torch.no_grad():
        maps = [[patch_tokens(vit, x, layer) for x in pair[:2]] for pair in pairs]
    ser = SERLoss(maps[0][0].shape[1]).to(images.device) if ser is None else copy.deepcopy(ser)
    ser.eval()
    return CheckReport(
        (
            _gradient(vit, ser, pairs[0], layer),
            _relation(ser, pairs, maps),
            _processes(ser, maps[0], pairs[0].relative),
            _memory(vit, ser, pairs[0], layer, partition_size(batch_size, ratio, world_size), world_size),
        )
    )


def _noise(vit: Any) -> Tensor:
    """Smooth images, whose patches tell places apart."""
    parameter = next(vit.parameters())
    draw = torch.Generator().manual_seed(0)
    size = vit.patch_embed.img_size or (224, 224)
    channels = next(m.in_channels for m in vit.patch_embed.modules() if isinstance(m, nn.Conv2d))
    images = F.interpolate(torch.randn(4, channels, 8, 8, generator=draw), size, mode="bicubic")
    return images.to(parameter)


def _gradient(vit: Any, ser: SERLoss, pair: ViewPair, layer: int) -> Finding:
    """Whether all that comes before the tap, and nothing behind it, is trained by the term."""
    vit.zero_grad(set_to_none=True)
    ser.zero_grad(set_to_none=True)
    maps = [patch_tokens(vit, x, layer) for x in pair[:2]]
    torch.autograd.backward(ser(*maps, pair.relative).loss)
    trained = [p for p in vit.parameters() if p.requires_grad]
    blocks = [[p for p in block.parameters() if p.requires_grad] for block in vit.blocks]
    late = {id(p) for parameters in blocks[layer:] for p in parameters}
    early = [_norm(parameters) for parameters in [list(ser.parameters()), *blocks[:layer]] if parameters]
    behind = _norm(p for p in trained if id(p) in late)
    figure = f"smallest norm {min(early):.1e} of projector and {layer} blocks, {behind:.1e} behind them"
    return Finding("the gradient reaches projector and early blocks only", min(early) > 0 and behind == 0, figure)


def _norm(parameters: Iterable[Tensor]) -> float:
    grads = [torch.linalg.vector_norm(p.grad.float()) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(grads)).item() if grads else 0.0


@torch.no_grad()
def _relation(ser: SERLoss, pairs: list[ViewPair], maps: list[list[Tensor]]) -> Finding:
    half = GroupElement(torch.tensor([2]), torch.tensor([False]), torch.ones(1, 2, dtype=torch.float64))
    true = [ser(*z, pair.relative).loss.item() for z, pair in zip(maps, pairs, strict=True)]
    wrong = [ser(*z, half @ pair.relative).loss.item() for z, pair in zip(maps, pairs, strict=True)]
    lower = sum(a < b for a, b in zip(true, wrong, strict=True))
    figure = f"loss {sum(true) / DRAWS:.4f} against {sum(wrong) / DRAWS:.4f}, lower in {lower} of {DRAWS} draws"
    return Finding("the true relation has a lower loss than a wrong one", lower == DRAWS, figure)


def _processes(ser: SERLoss, maps: list[Tensor], relative: GroupElement) -> Finding:
    """In double precision, so that what is left are mistakes; with an uneven split, as that is where they hide."""
    question = "one process and two agree on value and gradient"
    z1, z2 = (z.detach().double().cpu() for z in maps)
    ser = copy.deepcopy(ser).double().cpu()
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"z": (z1, z2), "relative": vars(relative), "ser": ser.state_dict()}, f"{folder}/task.pt")
        settings = [ser.dim, ser.projector[1].out_features, ser.temperature]
        code = f"from ser_reg.check import _rank; _rank({folder!r}, {settings!r}, "
        ranks = [
            subprocess.Popen([sys.executable, "-c", f"{code}{rank})"], stderr=subprocess.PIPE, text=True)
            for rank in (0, 1)
        ]
        try:
            errors = [rank.communicate(timeout=SECONDS)[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            return Finding(question, False, f"no answer in {SECONDS} seconds")
        finally:
            for rank in ranks:
                rank.kill()
        if any(rank.returncode for rank in ranks):
            return Finding(question, False, next(error for error in errors if error).strip().splitlines()[-1])
        two = [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]
    one = _value_and_gradients(ser, z1, z2, relative, len(z1))
    value = abs(one[0] - (two[0][0] + two[1][0]) / 2).item()
    inputs = [torch.cat([a, b]) / 2 for a, b in zip(two[0][1:3], two[1][1:3], strict=True)]
    weights = [(a + b) / 2 for a, b in zip(two[0][3:], two[1][3:], strict=True)]
    gradient = max(((a - b).norm() / a.norm()).item() for a, b in zip(one[1:], inputs + weights, strict=True))
    figure = f"value differs by {value:.1e}, gradients by {gradient:.1e} of their norm (double precision)"
    return Finding(question, max(value, gradient) < 1e-9, figure)


def _value_and_gradients(ser: SERLoss, z1: Tensor, z2: Tensor, relative: GroupElement, images: int) -> list[Tensor]:
    z1, z2 = (z.clone().requires_grad_() for z in (z1, z2))
    loss = ser(z1, z2, relative).loss
    return [loss.detach(), *torch.autograd.grad(loss, [z1, z2, *ser.parameters()])]


def _rank(folder: str, settings: list[Any], rank: int) -> None:
    """One of the two processes: the first has one image, the second the others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    task = torch.load(f"{folder}/task.pt")
    mine = slice(0, 1) if rank == 0 else slice(1, None)
    g = GroupElement(*(task["relative"][part][mine] for part in ("turns", "flip", "scale")))
    ser = SERLoss(*settings).double()
    ser.load_state_dict(task["ser"])
    z1, z2 = (z[mine] for z in task["z"])
    torch.save(_value_and_gradients(ser, z1, z2, g, len(z1)), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def _memory(vit: Any, ser: SERLoss, pair: ViewPair, layer: int, images: int, world_size: int) -> Finding:
    """What a backward pass keeps, counted on these images and scaled to those of a rank."""
    with _Kept() as encoder:
        maps = [patch_tokens(vit, x, layer) for x in pair[:2]]
    with _Kept() as term:
        ser(*maps, pair.relative)
    grow = images / len(pair.x1)
    tokens = 2 * images * maps[1].shape[-2:].numel()
    width = int(list(ser.parameters())[-1].shape[0])
    others = 2 * 4 * (world_size - 1) * tokens * width  # keys of other ranks and what is sent back to them
    needed = grow * (encoder.bytes + term.bytes) + others
    device = pair.x1.device
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _host_memory()
    figure = (
        f"{images} images a rank keep {_mib(grow * encoder.bytes)} in {layer} blocks, {_mib(grow * term.bytes)} in "
        f"the term and {_mib(others)} of other ranks, of {_mib(there)}"
    )
    return Finding("there is memory for the term", needed < there, figure)


class _Kept:
    """Counts the bytes that autograd keeps for the backward pass, parameters left out."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda x: x)

    def __enter__(self) -> _Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _count(self, x: Tensor) -> Tensor:
        if not (x.is_leaf and x.requires_grad):
            storage = x.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())


def _host_memory() -> float:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return float("inf")  # Windows does not say
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
