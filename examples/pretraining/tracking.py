"""What a training writes down: metrics.jsonl with a line a step, a tracker besides, and a line on the screen."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from results import atomically
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from .settings import Settings

__all__ = ["Log", "progress_bar"]

METRICS = "metrics.jsonl"
PARTIAL = {"ser_accuracy", "ser_feature_std"}  # of a process's own images


class Log:
    """Scalars of each step, kept on the device until `collect`, so that no step waits for the GPU.

    Args:
        settings: where to write, and with which tracker.
        accelerator: whose main process writes.
        done: steps that were done by earlier runs; later lines are dropped, they are made again.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, done: int) -> None:
        self.path = settings.output_dir / METRICS
        self.accelerator = accelerator
        self.steps: list[dict[str, Any]] = []
        self.tensors: list[dict[str, Tensor]] = []
        self.since = time.perf_counter()
        self.waited = 0.0
        if accelerator.is_main_process:
            self._rewind(done)
        if settings.tracker != "none":
            accelerator.init_trackers("ser-reg", _flat(settings), _tracker_arguments(settings, accelerator, done))

    def add(self, step: int, rate: float, scalars: dict[str, Tensor], images: int, waited: float) -> None:
        """Note a step; `waited`: seconds without data."""
        self.steps.append({"step": step, "learning_rate": rate, "images": images})
        self.tensors.append({name: value.detach() for name, value in scalars.items()})
        self.waited += waited

    def collect(self) -> list[dict[str, Any]]:
        """The lines of the steps since the last time, averaged over processes; the same on all of them.

        What a process without images of b2 cannot know of them is not a number there, and left out of the mean.
        """
        names = list(self.tensors[0])
        table = torch.stack([torch.stack([scalars[name].float() for name in names]) for scalars in self.tensors])
        everyone = self.accelerator.gather(table[None]).cpu()  # waits for the GPU: time is right from here on
        table = everyone.mean(0)
        partial = torch.tensor([name in PARTIAL for name in names])
        table[:, partial] = everyone[..., partial].nanmean(0)
        seconds = time.perf_counter() - self.since
        images = sum(step.pop("images") for step in self.steps)
        shared = {"images_per_second": images / seconds, "data_wait": min(1.0, self.waited / seconds)}
        lines = [
            step | dict(zip(names, values, strict=True)) | shared
            for step, values in zip(self.steps, table.tolist(), strict=True)
        ]
        self.restart()
        return lines

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Write what was collected."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            for line in lines:
                self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def restart(self) -> None:
        """Measure time from here on: after evaluations and checkpoints."""
        self.steps, self.tensors, self.waited, self.since = [], [], 0.0, time.perf_counter()

    def _rewind(self, done: int) -> None:
        """Leave the lines of the first `done` steps; a last line that was cut off goes as well."""
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() and done else []:
            try:
                if json.loads(line)["step"] < done:
                    kept.append(line + "\n")
            except ValueError:
                break
        with atomically(self.path) as part:
            part.write_text("".join(kept))


def progress_bar(console: Console, shown: bool) -> Progress:
    """A bar with the loss, images a second, and the part of the time spent waiting for data."""
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not shown,
    )


def _flat(settings: Settings) -> dict[str, Any]:
    """As TensorBoard takes hyperparameters."""
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.plain().items()}


def _tracker_arguments(settings: Settings, accelerator: Accelerator, done: int) -> dict[str, dict[str, Any]]:
    """A continued run goes on in the same curve. Only the main process tracks."""
    if not accelerator.is_main_process:
        return {}
    path: Path = settings.output_dir / "run_id"
    if not (done and path.exists()):
        path.write_text(uuid.uuid4().hex[:12])
    return {"tensorboard": {"purge_step": done}, "wandb": {"id": path.read_text(), "resume": "allow"}}
