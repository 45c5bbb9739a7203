"""Does the term train what it should? A few questions to a model, answered with figures."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Backbone, backbone
from ..distributed import rank_and_world_size
from ..errors import SERError, require
from ..objectives import OBJECTIVES, Objective, SERLoss
from .base import Case, CheckReport
from .inputs import images_for
from .memory import memory_finding
from .processes import processes_finding
from .setting import cls_finding, optimizer_finding, pixels_finding, teacher_finding
from .training import gradient_finding, relation_finding
from .views import draw_views, maker_for

__all__ = ["check"]

DRAWS = 4  # of the views, with which what is true and what is wrong are compared
RATIO = {True: 0.01, False: 1.0}  # of whole images that are moved, and of crops


def check(
    model: nn.Module,
    images: Tensor | str | Path | None = None,
    layer: int = 3,
    term: str | type[Objective] | Objective = SERLoss,
    batch_size: int = 256,
    ratio: float | None = None,
    world_size: int = 1,
    *,
    image_size: int | tuple[int, int] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    teacher: nn.Module | None = None,
) -> CheckReport:
    """Ask whether a term will train this model as it should, before hours are spent.

    1. [CLS] joins at the layer of the term, as `late_cls` lets it.
    2. The gradient of the term reaches its own parameters and the early layers, and no later one.
    3. The true relation between two views has a lower loss than a wrong one (turned by another half turn); beside it
       stands how often tokens find their place in their own image, the reading to look at first. Of a term whose heads
       have to learn what views tell (all but those of policy "equivariant"), that the loss changes at all with another
       image's features: which of the two is lower says nothing before.
    4. One process and two (started here, gloo) agree on value and gradient.
    5. The memory that the term takes for your batch is there.

    Views are drawn by the term's maker, if it has one that draws for batches; else as its `policy` says, with the
    defaults of these makers. The term is asked as it trains, its dropouts left out.

    Given images, that these are normalised as for the model; given an optimiser, that it holds the term and the early
    layers; given a teacher, that its [CLS] joins where the student's does.

    Model and term are copied and left as they are. It takes seconds. A finding that failed says what to type.

    Args:
        model: one that `patch_tokens` accepts, with `late_cls` as you train it.
        images: (B, C, H, W), at least three of yours, as you feed them; or a folder; smooth noise by default.
        layer: the regularized layer, to the last.
        term: yours, or its class for a new one, or its name in `OBJECTIVES`.
        batch_size: images of a rank, of which `ratio` go to the term.
        ratio: r; by default 0.01 for terms on whole images that are moved, 1 for those on crops.
        world_size: ranks.
        image_size: pixels a side, or (height, width), of noise and of images of a folder; by default those that the
            model was built for.
        optimizer: yours, to which you gave `term`.
        teacher: the model that makes the targets of your SSL loss, if there is one.

    Raises:
        SERError: fewer than three images, no term of this name, a process group of several ranks, or what the calls in
            your loop would raise.

    Example:
        >>> import timm
        >>> from ser_reg import late_cls
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=0, dynamic_img_size=True)
        >>> report = check(late_cls(vit, 2), layer=2, batch_size=64, ratio=0.1)
        >>> report.passed, len(report.findings)
        (True, 5)
    """
    _, ranks = rank_and_world_size()
    require(
        ranks == 1,
        "check(model)",
        f"one of {ranks} processes",
        "a process by itself: the check starts a second one",
        "check(model)  # ahead of torch.distributed.init_process_group",
    )
    if isinstance(term, str):
        known = f"one of {', '.join(OBJECTIVES)}"
        require(term in OBJECTIVES, f"check(model, term={term!r})", "no such term", known, "check(model, term='ser')")
        term = OBJECTIVES[term]
    yours = backbone(model, "check(model)")
    yours.check_layer(f"check(model, layer={layer!r})", layer)
    findings = [cls_finding(yours, layer)]
    if optimizer is not None:
        findings.append(optimizer_finding(model, yours, term, layer, optimizer))
    if teacher is not None:
        findings.append(teacher_finding(yours, teacher))
    with warnings.catch_warnings(), _named():
        warnings.filterwarnings("ignore", "images with values")  # there is a finding of it
        given = images_for(yours, images, layer, image_size)
        if isinstance(images, Tensor):
            findings.append(pixels_finding(yours, given))
        case = _case(model, given, layer, term)
        findings += [gradient_finding(case), relation_finding(case), processes_finding(case)]
        share = RATIO[term.policy == "equivariant"] if ratio is None else ratio
        findings.append(memory_finding(case, batch_size, share, world_size))
    return CheckReport(tuple(findings))


def _case(model: nn.Module, images: Tensor, layer: int, term: type[Objective] | Objective) -> Case:
    """Copies, the model in evaluation mode, the term in training, and views that both take."""
    trunk = backbone(copy.deepcopy(model).eval())
    maker = getattr(term, "maker", None)
    if not hasattr(maker, "draw"):  # none, or one of a loader, which takes a file at a time
        maker = maker_for(trunk, term.policy, (images.shape[-2], images.shape[-1]), layer)
    term = copy.deepcopy(term) if isinstance(term, Objective) else _built(term, trunk, layer, maker)
    term = term.to(images.device).train()
    for module in term.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # or no two calls would agree
            module.eval()
    if term.policy == "paired":
        images = images[torch.arange(max(4, len(images) // 2 * 2)) % len(images)]
    draws = draw_views(maker, term, images, DRAWS)
    case = Case(trunk, term, layer, len(images), draws, [])
    with torch.no_grad():
        case.maps.extend(case.encode(views) for views in draws)
    return case


def _built(term: type[Objective], trunk: Backbone, layer: int, maker: Any) -> Objective:
    """A new one; a term that paints pixels is told how many a token stands for."""
    known = {"patch_size": trunk.stride(layer), "channels": trunk.channels}
    taken = inspect.signature(term).parameters
    painted = {name: value for name, value in known.items() if name in taken and "patch_size" in taken}
    return term(trunk.width(layer), maker=maker, **painted)


@contextmanager
def _named() -> Iterator[None]:
    """Errors of what is called here say that it was called by the check."""
    try:
        yield
    except SERError as error:
        if error.call.startswith("check("):
            raise
        raise SERError(f"check(model), in {error.call}", error.given, error.expected, error.remedy) from error
