"""Training of the whole network for classification, from the pretrained encoder on."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from pretraining.schedules import Moment, warm_cosine
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

from ser_reg import SERError

from .augmented import AugmentedImages
from .encoder import Encoder
from .progress import Progress

__all__ = ["Recipe", "classifier", "finetune"]


class Recipe(NamedTuple):
    """How the network is trained."""

    epochs: int
    warmup_epochs: float
    rate: float
    """The highest, of the last layer."""
    weight_decay: float
    layer_decay: float
    """Factor on the rate from a block to the one before; 1 for one rate for all."""
    label_smoothing: float


def classifier(encoder: Encoder, classes: int, seed: int) -> nn.Module:
    """A copy of the encoder with a linear layer near zero behind it; [CLS] joins where it did in pretraining."""
    vit: Any = deepcopy(encoder.vit).cpu().requires_grad_(True)
    vit.reset_classifier(classes)
    head = vit.get_classifier()
    if not isinstance(head, nn.Linear):
        given = f"{encoder.name}, whose classifier is a {type(head).__name__}"
        raise SERError("evaluate.py finetune", given, "a timm model with one linear layer", "evaluate.py knn")
    nn.init.trunc_normal_(head.weight, std=2e-5, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return vit.to(next(encoder.vit.parameters()).device)


def finetune(
    accelerator: Accelerator,
    encoder: Encoder,
    vit: nn.Module,
    images: AugmentedImages,
    recipe: Recipe,
    progress: Progress,
    show: Callable[[int], object] = lambda epoch: None,
) -> nn.Module:
    """AdamW, linear warm-up and a cosine to 0; what is returned is the end of the training, not its best epoch.

    Under DDP the gradient is the mean over processes, so that the rate belongs to the batch of all of them.

    Args:
        encoder: says how images are normalised.
        vit: what `classifier` made of it; trained in place, and returned.
        progress: where the state after each epoch is kept; with one there, the training goes on from it.
    """
    groups = param_groups_layer_decay(
        vit, recipe.weight_decay, layer_decay=recipe.layer_decay, no_weight_decay_list=_undecayed(vit)
    )
    scales = [group.pop("lr_scale") for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate)
    state = progress.load() or {"epochs": 0}
    if state["epochs"]:
        vit.load_state_dict(state["vit"])
        optimizer.load_state_dict(state["optimizer"])
    model, optimizer = accelerator.prepare(vit, optimizer)
    for epoch in range(state["epochs"], recipe.epochs):
        model.train()
        for place, (batch, labels) in enumerate(images(epoch)):
            moment = Moment(epoch * images.steps + place, recipe.epochs * images.steps, recipe.epochs)
            # The step's own place in the warm-up, so that the first one is not lost to a rate of 0.
            rate = warm_cosine(moment._replace(step=moment.step + 1), recipe.warmup_epochs, recipe.rate, 0.0)
            for group, scale in zip(optimizer.param_groups, scales, strict=True):
                group["lr"] = rate * scale
            scores = model(encoder.normalise(batch)).float()
            lost = F.cross_entropy(scores, labels, label_smoothing=recipe.label_smoothing, reduction="sum")
            loss = lost / (labels >= 0).sum().clamp(min=1)  # a mean that is 0 where no image could be read
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        progress.save({"epochs": epoch + 1, "vit": vit.state_dict(), "optimizer": optimizer.state_dict()})
        show(epoch)
    # Judged as it is, in float32, whatever it was trained in.
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()


def _undecayed(vit: Any) -> set[str]:
    return set(vit.no_weight_decay()) if hasattr(vit, "no_weight_decay") else set()
