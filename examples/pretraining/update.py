"""One step of the optimiser: forwards and backwards of its batches, and the update."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from data.batch import Group
from torch import Tensor

from ser_reg import SERError
from ser_reg.objectives.base import FINITE, SQUARABLE

from .batches import Batches
from .optimizer import clip, set_rates
from .run import Run
from .schedules import Moment
from .settings import Settings

__all__ = ["require_finite", "update"]

DROPPED_PATHS = 3  # a stream of random numbers: the sampler has 0 and 1, the views 2


def update(run: Run, batches: Batches, step: int) -> tuple[float, dict[str, Tensor]]:
    """Step number `step`; its learning rate, and scalars averaged over its batches."""
    settings, method = run.settings, run.step.method
    moment = Moment(step, run.length.steps, settings.run.epochs)
    rate = set_rates(run.optimizer.optimizer, settings.optimizer, settings.run.batch_size, moment)
    _seed(settings.run.seed, step, run.accelerator.process_index)
    method.before_step(moment)
    found = [_learn(run, batches.next(), moment) for _ in range(settings.run.accumulate)]
    method.after_update(moment)
    return rate, {name: torch.stack([f[name].detach() for f in found]).mean() for name in found[0]}


def _learn(run: Run, groups: list[Group], moment: Moment) -> dict[str, Tensor]:
    """Forward and backward, and with the last batch of a step the update."""
    accelerator, norm = run.accelerator, run.settings.optimizer.clip
    with accelerator.accumulate(run.module):
        with accelerator.autocast():  # the forward alone: what is in single precision stays so backward
            scalars = _forward(run, groups, moment.step)
        accelerator.backward(scalars["loss"])
        if accelerator.sync_gradients:
            accelerator.unscale_gradients(run.optimizer)
            if norm is not None:
                clip(run.module.parameters(), norm)
            run.step.method.before_update(moment)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return scalars


def _forward(run: Run, groups: list[Group], step: int) -> dict[str, Tensor]:
    try:
        scalars: dict[str, Tensor] = run.module(groups)
    except SERError as error:  # on CPUs a term itself finds out that features are no longer finite, or hardly so
        if error.expected not in (FINITE, SQUARABLE):
            raise
        raise _not_finite(f"{error.given} at step {step}", run.settings) from error
    return scalars


def require_finite(lines: list[dict[str, Any]], settings: Settings) -> None:
    """Raise a SERError for the first step whose loss is no number."""
    for line in lines:
        if not math.isfinite(line["loss"]):
            raise _not_finite(f"loss {line['loss']} at step {line['step']}", settings)


def _not_finite(given: str, settings: Settings) -> SERError:
    rate = f"{settings.optimizer.learning_rate / 2:g}"
    slower = f"--output-dir {settings.run.output_dir}_2 --learning-rate {rate}"
    remedy = f"{slower}  # or, to go on from the last checkpoint, --precision bf16"
    return SERError("train(settings)", given, "a finite loss; the last checkpoint is from before", remedy)


def _seed(seed: int, step: int, rank: int) -> None:
    """What a step draws (dropped paths) depends on its number alone, so that a resumed run draws the same."""
    words = np.random.SeedSequence(seed, spawn_key=(DROPPED_PATHS, step, rank)).generate_state(1)
    torch.manual_seed(int(words[0]))
