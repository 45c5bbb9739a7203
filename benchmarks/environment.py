"""What a figure was measured on."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch

__all__ = ["environment", "hardware", "save"]

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """The name of the accelerator, or else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    return {
        "hardware": hardware(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "ser_reg": version("ser-reg"),
    }


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Raw figures beside what they were measured on, in a folder of the hardware's name."""
    folder = RESULTS / "".join(c if c.isalnum() else "-" for c in hardware()).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path
