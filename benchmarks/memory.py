"""Peak memory of a step, in a process of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["child", "peak"]


def child(*command: str) -> int:
    """What a fresh Python process prints: a number."""
    return int(subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout)


def peak(step: Callable[[], None]) -> int:
    """Bytes that a step needs beyond those in use before it: of the GPU if there is one, else resident (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """From the kernel's account of this process. (getrusage's maximum begins with that of the parent.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
