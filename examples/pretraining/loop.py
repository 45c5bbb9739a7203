"""The loop that all trainings share, from settings to an exported encoder."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from ser_reg import SERError

from . import checkpoints
from .base import BaseMethod
from .batches import Batches
from .export import export
from .log import Log, progress_bar, summary
from .monitor import Collapse, knn
from .pictures import write_pictures
from .run import Run, prepare
from .settings import Settings, parse
from .update import require_finite, update
from .views import Recipes

__all__ = ["main", "train"]

S = TypeVar("S", bound=Settings)


def main(
    name: str,
    presets: Mapping[str, S],
    build: Callable[[S], BaseMethod],
    recipes: Callable[[S], Recipes],
) -> None:
    """What a script does: train as the command line asks for, or say in four lines why not."""
    try:
        train(name, parse(presets, f"{name}.py"), build, recipes)
    except SERError as error:
        sys.exit(str(error))


def train(name: str, settings: S, build: Callable[[S], BaseMethod], recipes: Callable[[S], Recipes]) -> None:
    """Pretrain, or go on from where a run of the same settings was stopped.

    OUTPUT_DIR then holds settings.json, metrics.jsonl (a line a step), checkpoint.pt, and encoder/, which
    ``ser_reg.load_encoder`` and timm load; reconstructions.png as well, of terms that paint.

    Args:
        name: of the base method.
        settings: all there is to know.
        build: the base method around a new encoder.
        recipes: those of its views, global ones and local ones.

    Raises:
        SERError: data that is not there, settings that do not fit it or the number of processes, a checkpoint of
            another run, or a loss that is no longer finite.
    """
    run = prepare(name, settings, build, recipes(settings))
    batches = Batches(run)
    if run.done == run.length.steps:
        export(run)
    else:
        _Loop(run, batches).go()
    run.accelerator.wait_for_everyone()  # all have noted what they could not read
    if run.is_main and (count := batches.unreadable.count()):
        run.console.print(f"{count} images could not be read and were passed over: see {batches.unreadable.path}")
    run.accelerator.end_training()
    run.console.print(f"{settings.run.output_dir}/encoder, metrics.jsonl")


class _Loop:
    """The steps of a run, and what is done between them: log, evaluate, warn, save, stop."""

    def __init__(self, run: Run, batches: Batches) -> None:
        self.run = run
        self.batches = batches
        self.log = Log(run.settings, run.accelerator, run.done)
        self.collapse = Collapse()
        self.stop = _StopSignal()
        self.saved_at = time.monotonic()
        epochs = run.settings.run.knn_every if run.held_out else 0
        self.knn_steps = max(1, round(epochs * run.length.epoch)) if epochs else 0

    def go(self) -> None:
        """To the last step, or to the one after which the run is stopped."""
        run = self.run
        run.module.train()
        with progress_bar(run.console, run.is_main) as bar:
            task = bar.add_task("", total=run.length.steps, completed=run.done)
            for step in range(run.done, run.length.steps):
                rate, scalars = update(run, self.batches, step)
                self.log.add(step, rate, scalars, run.settings.run.batch_size, self.batches.pop_waited())
                if not self._is_logged(step):
                    continue
                line = self._write(step)
                bar.update(task, completed=step + 1, description=summary(line))
                if self._save_or_stop(step):
                    break
                self.log.restart()
            else:
                write_pictures(run, self.batches.groups)

    def _is_last(self, step: int) -> bool:
        return step + 1 == self.run.length.steps

    def _evaluates(self, step: int) -> bool:
        return bool(self.knn_steps) and ((step + 1) % self.knn_steps == 0 or self._is_last(step))

    def _is_logged(self, step: int) -> bool:
        """Several processes stop together, when they write the log."""
        alone_and_stopping = self.run.accelerator.num_processes == 1 and self.stop.wished
        due = (step + 1) % self.run.settings.run.log_every == 0
        return due or self._is_last(step) or self._evaluates(step) or alone_and_stopping

    def _write(self, step: int) -> dict[str, Any]:
        """Write the steps since the last time down; the line of the last one."""
        lines, run = self.log.collect(), self.run
        if self._evaluates(step):
            size, workers = run.settings.encoder.image_size, run.settings.data.workers
            encoder = run.step.method.exported
            lines[-1]["knn"] = knn(encoder, run.source, run.held_out, size, run.accelerator, workers)
            run.console.print(f"step {step + 1}: k-NN {100 * lines[-1]['knn']:.1f} % on held-out images")
        self.log.write(lines)
        require_finite(lines, run.settings)
        if warning := self.collapse.warning([line["embedding_std"] for line in lines]):
            run.console.print(f"[bold]Warning[/] {warning}")
        return lines[-1]

    def _save_or_stop(self, step: int) -> bool:
        """Save if it is time to; whether to stop."""
        run, last = self.run, self._is_last(step)
        due = time.monotonic() - self.saved_at > 60 * run.settings.run.checkpoint_minutes
        wishes = torch.tensor([float(self.stop.wished), float(due and run.is_main)], device=run.accelerator.device)
        stopping, saving = run.accelerator.reduce(wishes, "sum").tolist()  # one for all: saving is done by all
        if stopping or saving or last:
            folder, optimizer, scaler = run.settings.run.output_dir, run.optimizer.optimizer, run.accelerator.scaler
            checkpoints.save(folder, run.module, optimizer, scaler, run.settings, step + 1, run.is_main)
            export(run)
            self.saved_at = time.monotonic()
        if stopping and not last:
            run.console.print(f"stopped after step {step + 1}: the same command goes on from here")
        return bool(stopping) and not last


class _StopSignal:
    """SIGTERM, as a scheduler sends it ahead of time: stop after the step, with a checkpoint."""

    def __init__(self) -> None:
        self.wished = False
        signal.signal(signal.SIGTERM, self._wish)

    def _wish(self, number: int, frame: object) -> None:
        self.wished = True
