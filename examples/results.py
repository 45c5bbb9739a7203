"""Results of the quickstart: as a table, with the environment, and never half-written."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["LOGGED", "atomically", "environment", "last_tenth", "print_table"]

# What a step logs, in this order: name, factor and digits in the table.
LOGGED = {
    "base_loss": ("base loss", 1, 3),
    "ser_loss": ("SER loss", 1, 3),
    "ser_chance": ("SER loss at chance", 1, 3),
    "ser_accuracy": ("best match right, %", 100, 1),
    "feature_std": ("spread, 0 to 1", 1, 3),
}
CAPTION = "spatial, raw: equivariance, as cosines (in brackets the floor: unrelated images)"


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes `path` when all is written."""
    part = path.with_name(f".{os.getpid()}-{path.name}")  # keeps the ending, which says the format
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    packages = ("torch", "torchvision", "timm", "numpy", "scikit-image", "scikit-learn")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "versions": {package: version(package) for package in packages},
    }


def last_tenth(values: list[float]) -> float:
    """Mean over the last tenth of the steps."""
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)


def print_table(console: Console, results: dict[str, Any]) -> None:
    """Both arms side by side, beside their references."""
    settings, arms = results["settings"], results["arms"]
    measured = [*results["references"].values(), *arms.values()]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=CAPTION, caption_justify="left")
    table.add_column("", no_wrap=True)
    control, ser = (f"λ = {arms[arm]['ser_lambda']:g}" for arm in ("control", "ser"))
    for column in ("pixels", "untrained", control, f"SER, {ser}"):
        table.add_column(column, justify="right", no_wrap=True)

    table.add_row("[bold]held-out accuracy, %[/]")
    for probe, name in (("knn", "k-NN"), ("linear", "linear")):
        table.add_row(f"  {name}", *(f"{100 * m['accuracy'][probe]:.1f}" for m in measured))
    for reading in ("spatial", "raw"):
        for layer in sorted({settings["layer"], settings["depth"]}):
            table.add_row(f"[bold]{reading}, layer {layer}[/]")
            for transformation, layers in arms["ser"]["equivariance"].items():
                if layer in layers:
                    scores = [m["equivariance"][transformation][layer] for m in measured[1:]]
                    cells = [f"{score[reading]:.3f} ({score[f'{reading}_floor']:.2f})" for score in scores]
                    table.add_row(f"  {transformation}", "", *cells)
    table.add_row("[bold]training, last tenth[/]")
    for key, (name, factor, digits) in LOGGED.items():
        means = [arm["last_tenth"].get(key) for arm in arms.values()]
        if any(mean is not None for mean in means):
            cells = ["" if mean is None else f"{factor * mean:.{digits}f}" for mean in means]
            table.add_row(f"  {name}", "", "", *cells)
    table.add_row("  seconds", "", "", *(f"{arm['train_seconds']:.0f}" for arm in arms.values()))
    console.print(table)


def _processor() -> str:
    """Name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
