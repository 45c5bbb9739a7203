"""What changes along a training: learning rate, weight decay, momentum, temperatures."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Moment", "cosine", "ramp", "warm_cosine"]


class Moment(NamedTuple):
    """A place in the training, ahead of step `step` (0 the first). A run of fewer steps passes all epochs faster."""

    step: int
    steps: int
    epochs: float

    @property
    def progress(self) -> float:
        """Part of the training that is done, in [0, 1]."""
        return self.step / self.steps

    @property
    def epoch(self) -> float:
        """Epochs that are done, fractions included."""
        return self.progress * self.epochs


def cosine(progress: float, start: float, end: float) -> float:
    """From `start` at 0 to `end` at 1 along half a cosine."""
    return end + 0.5 * (1 + math.cos(math.pi * progress)) * (start - end)


def warm_cosine(moment: Moment, warmup_epochs: float, peak: float, end: float) -> float:
    """From 0 to `peak` in a line, then to `end` along half a cosine."""
    if moment.epoch < warmup_epochs:
        return peak * moment.epoch / warmup_epochs
    return cosine((moment.epoch - warmup_epochs) / max(moment.epochs - warmup_epochs, 1e-9), peak, end)


def ramp(epoch: float, epochs: float, start: float, end: float) -> float:
    """From `start` to `end` in a line over the first `epochs` whole epochs, of which the last has `end`, then `end`."""
    return end if int(epoch) >= epochs else start + (end - start) * int(epoch) / max(1, epochs - 1)
