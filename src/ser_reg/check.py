"""Does the term train what it should? Four questions to a model, answered with figures."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import Backbone, backbone, patch_tokens
from .distributed import rank_and_world_size
from .errors import require
from .geometry import GroupElement
from .objectives import Objective, SERLoss
from .views import EquivariantViews, View, partition_size

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
    model: nn.Module,
    images: Tensor | None = None,
    layer: int = 3,
    term: type[Objective] | Objective = SERLoss,
    batch_size: int = 256,
    ratio: float = 0.01,
    world_size: int = 1,
) -> CheckReport:
    """Ask whether a term will train this model as it should, before hours are spent.

    1. The gradient of the term reaches its own parameters and the early layers, and no later one.
    2. The true relation between two views has a lower loss than a wrong one (turned by another half turn).
    3. One process and two (started here, gloo) agree on value and gradient.
    4. The memory that the term takes for your batch is there.

    Model and term are copied and left as they are. It takes seconds.

    Args:
        model: one that `patch_tokens` accepts, with `late_cls` as you train it.
        images: (B, C, H, W), at least three of yours, as you feed them; smooth noise by default.
        layer: the regularized layer.
        term: yours, or its class for a new one.
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
    _, ranks = rank_and_world_size()
    require(
        ranks == 1,
        "check(model)",
        f"one of {ranks} processes",
        "a process by itself: the check starts a second one",
        "check(model)  # ahead of torch.distributed.init_process_group",
    )
    model = copy.deepcopy(model).eval()
    trunk = backbone(model, "check(model)")
    trunk.check_layer(f"check(model, layer={layer!r})", layer)
    images = _noise(trunk) if images is None else images
    expected = "at least three images (B, C, H, W)"
    fine = images.ndim == 4 and len(images) >= 3
    require(fine, "check(model, images)", f"images {tuple(images.shape)}", expected, "check(model)")
    make_views = EquivariantViews(trunk.stride(layer))
    if not trunk.any_size:
        make_views = EquivariantViews(trunk.stride(layer), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    draws = [make_views(images[:8], torch.Generator().manual_seed(seed)) for seed in range(DRAWS)]
    with torch.no_grad():
        maps = [_features(model, views, layer) for views in draws]
    width = maps[0][0].shape[1]
    term = copy.deepcopy(term) if isinstance(term, Objective) else term(width, maker=make_views).to(images.device)
    term.eval()
    return CheckReport(
        (
            _gradient(trunk, term, draws[0], layer),
            _relation(term, draws, maps),
            _processes(term, maps[0], draws[0]),
            _memory(trunk, term, draws[0], layer, partition_size(batch_size, ratio, world_size), world_size),
        )
    )


def _noise(trunk: Backbone) -> Tensor:
    """Smooth images, whose patches tell positions apart."""
    draw = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.randn(4, trunk.channels, 8, 8, generator=draw), trunk.size, mode="bicubic")
    return images.to(next(trunk.model.parameters()))


def _features(model: nn.Module, views: Sequence[View], layer: int) -> list[Tensor]:
    return [patch_tokens(model, view.images, layer) for view in views]


def _gradient(trunk: Backbone, term: Objective, views: Sequence[View], layer: int) -> Finding:
    """Whether all that comes before the tap, and nothing behind it, is trained by the term."""
    trunk.model.zero_grad(set_to_none=True)
    term.zero_grad(set_to_none=True)
    torch.autograd.backward(term(_features(trunk.model, views, layer), views).loss)
    trained = [[p for p in module.parameters() if p.requires_grad] for module in (term, *trunk.layers)]
    early = [_norm(parameters) for parameters in trained[: 1 + layer] if parameters]
    behind = _norm(p for parameters in trained[1 + layer :] for p in parameters)
    figure = f"smallest norm {min(early):.1e} of the term and {layer} {trunk.unit}, {behind:.1e} behind them"
    question = f"the gradient reaches the term and early {trunk.unit} only"
    return Finding(question, min(early) > 0 and behind == 0, figure)


def _norm(parameters: Iterable[Tensor]) -> float:
    grads = [torch.linalg.vector_norm(p.grad.float()) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(grads)).item() if grads else 0.0


@torch.no_grad()
def _relation(term: Objective, draws: Sequence[tuple[View, ...]], maps: list[list[Tensor]]) -> Finding:
    half = GroupElement.turn(2)
    true = [term(z, views).loss.item() for z, views in zip(maps, draws, strict=True)]
    turned = [(view1, view2._replace(relation=half @ view2.relation), *others) for view1, view2, *others in draws]
    wrong = [term(z, views).loss.item() for z, views in zip(maps, turned, strict=True)]
    lower = sum(a < b for a, b in zip(true, wrong, strict=True))
    figure = f"loss {sum(true) / DRAWS:.4f} against {sum(wrong) / DRAWS:.4f}, lower in {lower} of {DRAWS} draws"
    return Finding("the true relation has a lower loss than a wrong one", lower == DRAWS, figure)


def _processes(term: Objective, maps: list[Tensor], views: Sequence[View]) -> Finding:
    """In double precision, so that what is left are mistakes; with an uneven split, as that is where they hide."""
    question = "one process and two agree on value and gradient"
    features = [z.detach().double().cpu() for z in maps]
    term, views = copy.deepcopy(term).double().cpu(), [view.to("cpu") for view in views]
    with tempfile.TemporaryDirectory() as folder:
        torch.save((term, features, views), f"{folder}/task.pt")
        failed = _run_ranks(folder)
        if failed:
            return Finding(question, False, failed)
        two = [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]
    one = _value_and_gradients(term, features, views)
    n = 1 + len(features)
    value = abs(one[0] - (two[0][0] + two[1][0]) / 2).item()
    inputs = [torch.cat([a, b]) / 2 for a, b in zip(two[0][1:n], two[1][1:n], strict=True)]
    weights = [(a + b) / 2 for a, b in zip(two[0][n:], two[1][n:], strict=True)]
    gradient = max(((a - b).norm() / a.norm()).item() for a, b in zip(one[1:], inputs + weights, strict=True))
    figure = f"value differs by {value:.1e}, gradients by {gradient:.1e} of their norm (double precision)"
    return Finding(question, max(value, gradient) < 1e-9, figure)


def _value_and_gradients(term: Objective, features: Sequence[Tensor], views: Sequence[View]) -> list[Tensor]:
    features = [z.clone().requires_grad_() for z in features]
    loss = term(features, views).loss
    return [loss.detach(), *torch.autograd.grad(loss, [*features, *term.parameters()])]


def _run_ranks(folder: str) -> str:
    """Start the two processes and wait for them; what went wrong, if anything did."""
    code = f"from ser_reg.check import _rank; _rank({folder!r}, "
    ranks = [
        subprocess.Popen([sys.executable, "-c", f"{code}{rank})"], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=SECONDS)[1] for rank in ranks]
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS} seconds"
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        return next(error for error in errors if error).strip().splitlines()[-1]
    return ""


def _rank(folder: str, rank: int) -> None:
    """One of the two processes: the first has one image, the second the others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    term, features, views = torch.load(f"{folder}/task.pt", weights_only=False)  # that the parent has just written
    mine = slice(0, 1) if rank == 0 else slice(1, None)
    found = _value_and_gradients(term, [z[mine] for z in features], [view[mine] for view in views])
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def _memory(
    trunk: Backbone, term: Objective, views: Sequence[View], layer: int, images: int, world_size: int
) -> Finding:
    """What a backward pass keeps, counted on these images and scaled to those of a rank."""
    with _Kept() as encoder:
        maps = _features(trunk.model, views, layer)
    with _Kept() as added:
        term(maps, views)
    grow = images / len(views[0].images)
    tokens = len(maps) * images * maps[-1].shape[-2:].numel()
    others = 2 * 4 * (world_size - 1) * tokens * term.keys_width  # keys of other ranks and what is sent back to them
    needed = grow * (encoder.bytes + added.bytes) + others
    device = views[0].images.device
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _host_memory()
    figure = (
        f"{images} images a rank keep {_mib(grow * encoder.bytes)} in {layer} {trunk.unit}, "
        f"{_mib(grow * added.bytes)} in the term and {_mib(others)} of other ranks, of {_mib(there)}"
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
