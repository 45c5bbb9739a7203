"""A linear classifier on frozen features, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ser_reg.errors import SERError, require
from ser_reg.records import atomically

from .base import Session
from .classifiers import Kind
from .encoder import Encoder
from .trained import Trained, train_classifier

__all__ = ["Linear", "LinearClassifier", "linear"]


@dataclass(frozen=True, kw_only=True)
class Linear(Trained):
    """A linear classifier on the joined [CLS] of the last four blocks.

    Tables 1 and 2 of the paper: 50 epochs, cosine, no warm-up. SGD with momentum 0.9 and no decay, as MoCo-v3 and DINO
    have it. The paper's released code chooses among the rates 1, 3 and 10 and picks the best of the last epochs; here
    there are lower rates as well, for smaller data, and it is always the last epoch.

    The learning rate is chosen on held-out training images; see --augment for the paper's protocol. Leaves
    linear.safetensors for the subcommand shift.
    """

    base_rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Learning rates to choose from, for a batch of 256; times batch / 256."""

    def run(self) -> None:
        session = Session(self)
        head, results = train_classifier(session, self, linear(), self.base_rates, scaled=True)
        if session.main:
            path = self.output_dir / "linear.safetensors"
            LinearClassifier(head, results["classes"], self.last).save(path, session.encoder)
        session.write(results)


def linear() -> Kind:
    """One layer, SGD with momentum 0.9 and no decay, as in MoCo-v3's and DINO's evaluation."""

    def build(channels: int, classes: int) -> nn.Module:
        layer = nn.Linear(channels, classes)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
        return layer

    return Kind("one layer, SGD", build, lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.9))


class LinearClassifier(NamedTuple):
    """What `evaluate.py linear` trained, and on what."""

    layer: nn.Linear
    classes: list[str]
    last: int
    """Blocks whose [CLS] it sees."""

    def save(self, path: Path, encoder: Encoder) -> None:
        tensors = {name: value.detach().cpu() for name, value in self.layer.state_dict().items()}
        metadata = {"classes": json.dumps(self.classes), "last": str(self.last), "encoder": encoder.fingerprint}
        with atomically(path) as draft:
            save_file(tensors, draft, metadata=metadata | {"size": str(encoder.size)})

    @classmethod
    def load(cls, path: Path, encoder: Encoder) -> LinearClassifier:
        """Raises a SERError if there is none, or if it was trained on another encoder's features."""
        call, remedy = f"evaluate.py shift --classifier {path}", f"evaluate.py linear --model {encoder.name}"
        try:
            with safe_open(path, framework="pt") as file:
                metadata, weight, bias = file.metadata() or {}, file.get_tensor("weight"), file.get_tensor("bias")
                known = {name: metadata[name] for name in ("classes", "last", "encoder", "size")}
        except (SafetensorError, OSError, KeyError) as error:
            given = f"{type(error).__name__}: {error}"
            raise SERError(call, given, "the linear.safetensors that `evaluate.py linear` writes", remedy) from error
        require(
            (known["encoder"], known["size"]) == (encoder.fingerprint, str(encoder.size)),
            call,
            f"a classifier of the encoder {known['encoder']} at {known['size']} pixels",
            f"of {encoder.fingerprint} at {encoder.size}, which is {encoder.name}",
            remedy,
        )
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        return cls(layer, json.loads(known["classes"]), int(known["last"]))
