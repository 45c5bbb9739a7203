"""Training of the whole network for classification, from the pretrained encoder on."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from data.labelled import NO_LABEL
from pretraining.schedules import Moment, warm_cosine
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

from ser_reg.errors import require
from ser_reg.records import atomically

from .base import Judgement, Session, labels_as
from .checkpoint import EpochCheckpoint
from .classifiers import usual_batch
from .crops import Crops
from .encoder import Encoder
from .trained import judged

__all__ = ["Finetune", "Training", "classifier", "finetune"]


@dataclass(frozen=True, kw_only=True)
class Finetune(Judgement):
    """Train the whole network and a linear layer, AdamW, warm-up and cosine, and judge it at the end, once.

    Table 3 of the paper, which gives no settings. These are near DeiT's, without mixing of images.
    """

    epochs: int = 100
    batch_size: int | None = None
    """Of all processes together; by default 1024, and less for fewer than 16,384 training images."""
    base_rate: float = 2.5e-4
    """Highest learning rate for a batch of 256; times batch / 256."""
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    """Factor on the learning rate from a block to the one before: 0.65 to 0.75 is usual, 1 is none."""
    label_smoothing: float = 0.1
    precision: Literal["no", "bf16"] = "no"
    """Of the training; "no" is float32."""

    def check(self, call: str) -> None:
        super().check(call)
        given, expected = (
            f"--warmup-epochs {self.warmup_epochs:g} of --epochs {self.epochs}",
            "one that ends before the training",
        )
        require(self.warmup_epochs < self.epochs, call, given, expected, f"--warmup-epochs {self.epochs / 20:g}")
        given = f"--label-smoothing {self.label_smoothing:g}"
        require(self.label_smoothing < 1, call, given, "less than 1", "--label-smoothing 0.1")
        given = f"--layer-decay {self.layer_decay:g}"
        require(self.layer_decay <= 1, call, given, "1 at most, which is none", "--layer-decay 0.75")

    def run(self) -> None:
        session = Session(self, self.precision)
        encoder, train, val = session.encoder, session.source("train"), session.source("val")
        batch_size, everything = self.batch_size or usual_batch(len(train)), list(range(len(train)))
        crops = Crops(session.accelerator, train, everything, encoder.size, batch_size, self.seed, self.workers)
        rate = self.base_rate * crops.batch_size / 256
        training = Training(
            self.epochs, self.warmup_epochs, rate, self.weight_decay, self.layer_decay, self.label_smoothing
        )
        key = session.key(train) | training._asdict() | {"batch_size": crops.batch_size, "precision": self.precision}
        checkpoint = EpochCheckpoint(self.output_dir / "finetune.progress", key, session.main, crops)
        start = classifier(encoder, len(train.classes), self.seed)
        model = finetune(session.accelerator, encoder, start, crops, training, checkpoint, session.note_epoch)
        session.leave_out("train", crops.all_unreadable())
        logits, test = session.logits(model, val)
        readable = len(train) - len(session.unreadable["train"])
        results: dict[str, Any] = {"train_images": readable, "test_images": len(test.labels), "rate": rate}
        results["batch_size"] = crops.batch_size
        if session.main:
            results |= judged(session, logits, labels_as(test, train.classes, session.call))
            with atomically(self.output_dir / "finetune.safetensors") as draft:
                state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
                save_file(state, draft, metadata={"late_cls": str(encoder.late_cls or 0)})
        session.write(results)


class Training(NamedTuple):
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
    model: Any = deepcopy(encoder.model).cpu().requires_grad_(True)
    call, expected = "evaluate.py finetune", "a timm model with one linear layer"
    given = f"{encoder.name}, a {type(model).__name__} without reset_classifier"
    require(hasattr(model, "reset_classifier"), call, given, expected, "evaluate.py knn")
    model.reset_classifier(classes)
    head = model.get_classifier()
    given = f"{encoder.name}, whose classifier is a {type(head).__name__}"
    require(isinstance(head, nn.Linear), call, given, expected, "evaluate.py knn")
    nn.init.trunc_normal_(head.weight, std=2e-5, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return model.to(next(encoder.model.parameters()).device)


def finetune(
    accelerator: Accelerator,
    encoder: Encoder,
    model: nn.Module,
    crops: Crops,
    training: Training,
    checkpoint: EpochCheckpoint,
    show: Callable[[int], object] = lambda epoch: None,
) -> nn.Module:
    """AdamW, linear warm-up and a cosine to 0; what is returned is the end of the training, not its best epoch.

    Under DDP the gradient is the mean over processes, so that the rate belongs to the batch of all of them.

    Args:
        encoder: says how images are normalised.
        model: what is trained.
        checkpoint: where the state after each epoch is kept; with one there, the training goes on from it.
    """
    undecayed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups = param_groups_layer_decay(
        model, training.weight_decay, layer_decay=training.layer_decay, no_weight_decay_list=undecayed
    )
    scales = [group.pop("lr_scale") for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=training.rate)
    state = checkpoint.load() or {"epochs": 0}
    if state["epochs"]:
        model.load_state_dict(state["vit"])
        optimizer.load_state_dict(state["optimizer"])
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for epoch in range(state["epochs"], training.epochs):
        wrapped.train()
        for step, (images, labels) in enumerate(crops(epoch)):
            moment = Moment(epoch * crops.steps + step, training.epochs * crops.steps, training.epochs)
            # The step's own place in the warm-up, so that the first one is not lost to a rate of 0.
            rate = warm_cosine(moment._replace(step=moment.step + 1), training.warmup_epochs, training.rate, 0.0)
            for group, scale in zip(optimizer.param_groups, scales, strict=True):
                group["lr"] = rate * scale
            scores = wrapped(encoder.normalise(images)).float()
            lost = F.cross_entropy(
                scores, labels, label_smoothing=training.label_smoothing, reduction="sum", ignore_index=NO_LABEL
            )
            loss = lost / (labels != NO_LABEL).sum().clamp(min=1)  # a mean that is 0 where no image could be read
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        checkpoint.save({"epochs": epoch + 1, "vit": model.state_dict(), "optimizer": optimizer.state_dict()})
        show(epoch)
    # Judged as it is, in float32, whatever it was trained in.
    return accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).eval()
