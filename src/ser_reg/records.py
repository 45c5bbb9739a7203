"""What a record of figures needs: to be whole on disk, and to say what was measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["atomically", "environment"]

PACKAGES = ("ser-reg", "torch", "torchvision", "timm", "numpy", "scikit-image", "scikit-learn")


@contextmanager
def atomically(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when all is written; if anything is raised, `path` stays as it was.

    It lies in the same folder and has the same ending, which often says the format.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomically(f"{folder}/result.json") as file:
        ...         _ = file.write_text("{}")
        ...     [path.name for path in Path(folder).iterdir()]
        ['result.json']
    """
    path = Path(path)
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def environment(device: str | torch.device | None = None) -> dict[str, Any]:
    """Hardware and versions: "device", "processor", "cores", "threads", "platform", "python", "versions".

    Args:
        device: what figures were measured on; by default the GPU if there is one, else the processor.

    Returns:
        Plain values. "device" is the name of the GPU, or "cpu"; "versions" has those packages that are installed.

    Example:
        >>> environment("cpu")["device"]
        'cpu'
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
