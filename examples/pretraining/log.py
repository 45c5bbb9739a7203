"""What a training writes down: metrics.jsonl with a line a step, a tracker besides, and names of unreadable images."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ser_reg.records import atomically

from .settings import Settings

__all__ = ["Log", "Unreadable", "progress_bar", "summary"]

METRICS = "metrics.jsonl"


class Log:
    """Scalars of each step, kept on the device until `collect`, so that no step waits for the GPU.

    Args:
        settings: where to write, and with which tracker.
        accelerator: whose main process writes.
        done: steps that were done by earlier runs; later lines are dropped, they are made again.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, done: int) -> None:
        self.path = settings.run.output_dir / METRICS
        self.accelerator = accelerator
        self.steps: list[dict[str, Any]] = []
        self.tensors: list[dict[str, Tensor]] = []
        self.since = time.perf_counter()
        self.waited = 0.0
        if accelerator.is_main_process:
            self._rewind(done)
        if settings.run.tracker != "none":
            accelerator.init_trackers("ser-reg", _hyperparameters(settings), self._tracker_arguments(done))

    def add(self, step: int, rate: float, scalars: dict[str, Tensor], images: int, waited: float) -> None:
        """Note a step; `waited`: seconds without data."""
        self.steps.append({"step": step, "learning_rate": rate, "images": images})
        self.tensors.append({name: value.detach() for name, value in scalars.items()})
        self.waited += waited

    def collect(self) -> list[dict[str, Any]]:
        """The lines of the steps since the last time, averaged over processes; the same on all of them.

        What the added term logs may be not a number on a process that cannot know it, having none of its images. Such
        are left out of the mean.
        """
        names = list(self.tensors[0])
        table = torch.stack([torch.stack([scalars[name].float() for name in names]) for scalars in self.tensors])
        gathered = self.accelerator.gather(table[None]).cpu()  # waits for the GPU: time is right from here on
        table = gathered.mean(0)
        partial = torch.tensor([name.startswith("term_") for name in names])
        table[:, partial] = gathered[..., partial].nanmean(0)
        seconds = time.perf_counter() - self.since
        images = sum(step.pop("images") for step in self.steps)
        common = {"images_per_second": images / seconds, "data_wait": min(1.0, self.waited / seconds)}
        lines = [
            step | dict(zip(names, values, strict=True)) | common
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
        with atomically(self.path) as path:
            path.write_text("".join(kept))

    def _tracker_arguments(self, done: int) -> dict[str, dict[str, Any]]:
        """A continued run goes on in the same curve. Only the main process tracks."""
        if not self.accelerator.is_main_process:
            return {}
        path = self.path.with_name("run_id")
        if not (done and path.exists()):
            path.write_text(uuid.uuid4().hex[:12])
        return {"tensorboard": {"purge_step": done}, "wandb": {"id": path.read_text(), "resume": "allow"}}


class Unreadable:
    """Names of images that could not be read, each once, in OUTPUT_DIR/unreadable.txt."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "unreadable.txt"
        self.names = set(self._written())

    def note(self, names: list[str]) -> None:
        """Write down those that are new."""
        new = [name for name in dict.fromkeys(names) if name not in self.names]
        if new:
            self.names.update(new)
            with self.path.open("a") as file:
                file.writelines(f"{name}\n" for name in new)

    def count(self) -> int:
        """How many there are, over all processes, which came upon some of them more than once."""
        written = self._written()
        if len(names := list(dict.fromkeys(written))) < len(written):
            with atomically(self.path) as path:
                path.write_text("".join(f"{name}\n" for name in names))
        return len(names)

    def _written(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []


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


def summary(line: dict[str, Any]) -> str:
    """A line of the log for the progress bar."""
    chance = f" (chance {line['term_chance']:.3f})" if "term_chance" in line else ""
    term = f"  term {line['term']:.3f}{chance}" if "term" in line else ""
    speed = f"{line['images_per_second']:.0f} images/s, {100 * line['data_wait']:.0f} % waiting for data"
    return f"base {line['base']:.3f}{term}  {speed}"


def _hyperparameters(settings: Settings) -> dict[str, Any]:
    """As TensorBoard takes them."""
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.flat().items()}
