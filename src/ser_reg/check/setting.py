"""Questions to what was set up: where [CLS] joins, how images are normalised, what the optimiser holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backbones import Backbone, backbone
from ..errors import SERError, require
from ..objectives import Objective
from .base import Finding

__all__ = ["cls_finding", "optimizer_finding", "pixels_finding", "teacher_finding"]

SLACK = 0.5  # of the range of normalised pixels: resampling overshoots it a little
ADD = (
    'optimizer.add_param_group({"params": [p for p in [*term.parameters(), *model.parameters()] if p.requires_grad'
    ' and not any(p is q for group in optimizer.param_groups for q in group["params"])]})'
)


def cls_finding(trunk: Backbone, layer: int) -> Finding:
    """Whether the prefix tokens stay out of the blocks that are regularized, and of no other."""
    question = "[CLS] joins at the layer of the term"
    if not trunk.has_prefix:
        return Finding(question, True, "the model has none")
    expected = min(layer, trunk.depth - 1)  # late_cls leaves it one block at least
    figure = f"after {trunk.cls_layer} blocks, the term at layer {layer}"
    if trunk.cls_layer:
        figure += f"; plain timm, which lets it in at the first, needs late_cls(model, {trunk.cls_layer}) after loading"
    remedy = f"late_cls(model, {expected})"
    if trunk.cls_layer:
        remedy += f"  # or the term there: check(model, layer={trunk.cls_layer})"
    return Finding(question, trunk.cls_layer == expected, figure, remedy)


def pixels_finding(trunk: Backbone, images: Tensor) -> Finding:
    """Whether values lie where those of the model's normalisation do."""
    low, high = (end.item() for end in images.aminmax())
    ends = [((end - mean) / std) for end in (0.0, 1.0) for mean, std in zip(trunk.mean, trunk.std, strict=True)]
    lowest, highest = min(ends), max(ends)
    slack = SLACK * (highest - lowest)
    fine = lowest - slack <= low and high <= highest + slack
    figure = f"values from {low:.4g} to {high:.4g}, where pixels give {lowest:.3g} to {highest:.3g}"
    scaled = "images" if high <= 1 + SLACK and low >= -SLACK else "images / 255"
    remedy = f"images = torchvision.transforms.functional.normalize({scaled}, {trunk.mean}, {trunk.std})"
    return Finding("images are normalised as for the model", fine, figure, remedy)


def optimizer_finding(
    model: nn.Module, trunk: Backbone, term: object, layer: int, optimizer: torch.optim.Optimizer
) -> Finding:
    """Whether it holds all that the term is to train: its own parameters and those of the early blocks."""
    require(
        isinstance(term, Objective),
        "check(model, optimizer=optimizer)",
        "a term that is made here, which no optimiser can hold",
        "the term that you train with",
        "check(model, term=term, optimizer=optimizer)",
    )
    assert isinstance(term, Objective)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    early = {id(p) for module in [trunk.embedding, *trunk.layers[:layer]] for p in module.parameters()}
    early |= {id(trunk.positions)}
    named = [(f"term.{name}", p) for name, p in term.named_parameters()]
    named += [(f"model.{name}", p) for name, p in model.named_parameters() if id(p) in early]
    trained = [(name, p) for name, p in named if p.requires_grad]
    missing = [name for name, p in trained if id(p) not in held]
    figure = f"{len(trained) - len(missing)} of {len(trained)} parameters"
    if missing:
        figure += f", without {', '.join(missing[:3])}" + (", ..." if len(missing) > 3 else "")
    return Finding(f"the optimiser holds the term and the early {trunk.unit}", not missing, figure, ADD)


def teacher_finding(trunk: Backbone, teacher: nn.Module) -> Finding:
    """Whether the teacher sees what the student sees."""
    other = _teacher(teacher)
    figure = f"after {other.cls_layer} blocks, the student's after {trunk.cls_layer}"
    remedy = f"late_cls(teacher, {trunk.cls_layer})"
    return Finding(
        "the teacher's [CLS] joins as the student's does", other.cls_layer == trunk.cls_layer, figure, remedy
    )


def _teacher(teacher: nn.Module) -> Backbone:
    try:
        return backbone(teacher, "(model")
    except SERError as error:
        inner = error.remedy.removeprefix("(model") if error.remedy.startswith("(model") else None
        remedy = error.remedy if inner is None else f"check(model, teacher=teacher{inner})"
        raise SERError("check(model, teacher=teacher)", error.given, error.expected, remedy) from error
