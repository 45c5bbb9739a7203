"""Questions to gradient and loss: what is trained, and is the right relation the better one?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..geometry import GroupElement
from ..views import View
from .base import Case, Finding

__all__ = ["gradient_finding", "relation_finding"]

SAME = 1e-5  # of a loss, by which rounding may move it


def gradient_finding(case: Case) -> Finding:
    """Whether all that comes before the tap, and nothing behind it, is trained by the term."""
    trunk, layer = case.trunk, case.layer
    trunk.model.zero_grad(set_to_none=True)
    case.term.zero_grad(set_to_none=True)
    loss = case.term(case.encode(case.draws[0]), case.draws[0]).loss
    if loss.requires_grad:
        torch.autograd.backward(loss)
    first = [*trunk.embedding.parameters(), *([] if trunk.positions is None else [trunk.positions])]
    parts = {f"block {i}" if trunk.unit == "blocks" else f"stage {i}": m for i, m in enumerate(trunk.layers, start=1)}
    early = {name: list(module.parameters()) for name, module in list(parts.items())[:layer]}
    early = early if layer else {"the embedding": first}
    norms = {name: _norm(parameters) for name, parameters in early.items() if parameters}
    own = list(case.term.parameters())
    norms |= {"the term": _norm(own)} if own else {}
    behind = _norm(p for module in trunk.layers[layer:] for p in module.parameters())
    frozen = [name for name, p in [*early.items(), ("the term", own)] if p and not any(x.requires_grad for x in p)]
    figure = (
        f"smallest norm {min(norms.values(), default=0.0):.1e} of the term and {layer} {trunk.unit}, "
        f"{behind:.1e} behind them"
    )
    if frozen:
        figure += f"; frozen: {', '.join(frozen)}"
    question = f"the gradient reaches the term and early {trunk.unit} only"
    return Finding(
        question, min(norms.values(), default=0.0) > 0 and behind == 0, figure, _remedy(case, frozen, behind)
    )


def _remedy(case: Case, frozen: list[str], behind: float) -> str:
    if frozen == ["the term"]:
        return "term.requires_grad_(True)"
    if frozen:
        return "model.requires_grad_(True)"
    if behind:
        return f"check(model, layer={case.trunk.depth})  # the map at layer {case.layer} depends on what comes after it"
    return f"z = patch_tokens(model, view.images, layer={case.layer})  # neither detached nor under torch.no_grad()"


def _norm(parameters: Iterable[Tensor]) -> float:
    grads = [torch.linalg.vector_norm(p.grad.float()) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(grads)).item() if grads else 0.0


@torch.no_grad()
def relation_finding(case: Case) -> Finding:
    """Whether the term heeds how views were made.

    Of a term that moves features by the relation, the true one has the lower loss, and features know places. Heads that
    have learned nothing yet prefer no answer: of other terms the loss changes at least, if features are another
    image's.
    """
    draws, moves = len(case.draws), case.term.policy == "equivariant"
    true = [case.term(z, views) for z, views in zip(case.maps, case.draws, strict=True)]
    losses = [output.loss.item() for output in true]
    wrong = [case.term(*_wrong(z, views, moves)).loss.item() for z, views in zip(case.maps, case.draws, strict=True)]
    figure = f"loss {sum(losses) / draws:.4f} against {sum(wrong) / draws:.4f}"
    if moves:
        question = "the true relation has a lower loss than a wrong one"
        lower = sum(a < b for a, b in zip(losses, wrong, strict=True))
        passed, figure = lower == draws, f"{figure}, lower in {lower} of {draws} draws"
        remedy = f"equivariance_score(model, images, layers=[{case.layer}])  # do features know places at all?"
    else:
        question = "the loss depends on how views were made"
        differ = sum(abs(a - b) > SAME * abs(a) for a, b in zip(losses, wrong, strict=True))
        passed, figure = (
            differ > 0,
            f"{figure} with another image's features (which is lower, heads have yet to learn)",
        )
        remedy = "from ser_reg.objectives.reading import crops_of, drawn_of  # in compare, of each image for itself"
    if all("matching" in output.logs for output in true):
        matching = sum(output.logs["matching"].item() for output in true) / draws
        chance = sum(1 / z[1].shape[-2:].numel() for z in case.maps) / draws
        figure = f"matching {matching:.2f} (chance {chance:.2f}), {figure}"
    return Finding(question, passed, figure, remedy)


def _wrong(maps: list[Tensor], views: tuple[View, ...], moves: bool) -> tuple[list[Tensor], tuple[View, ...]]:
    """Features and views that do not belong together: turned by another half turn, or of the image before."""
    if not moves:
        return [z.roll(1, 0) for z in maps], views
    view1, view2, *others = views
    return maps, (view1, view2._replace(relation=GroupElement.turn(2) @ view2.relation), *others)
