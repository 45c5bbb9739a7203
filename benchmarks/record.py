"""The record of a benchmark: raw figures beside what they were measured on.

A benchmark imports this ahead of torch, which reads the environment when it is loaded.
"""

import os

# Threads that spin while they wait stall each other when the machine is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
from pathlib import Path
from typing import Any

from ser_reg.records import atomically, environment

__all__ = ["save"]

RESULTS = Path(__file__).parent / "results"


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """RESULTS/HARDWARE/NAME.json, with "environment" and "rows"."""
    found = environment()
    hardware = found["processor"] if found["device"] == "cpu" else found["device"]
    versions = found.pop("versions")
    found = {"hardware": hardware} | found | {name.replace("-", "_"): text for name, text in versions.items()}
    folder = RESULTS / "".join(c if c.isalnum() else "-" for c in hardware).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    with atomically(folder / f"{name}.json") as path:
        path.write_text(json.dumps({"environment": found, "rows": rows}, indent=1) + "\n")
    return folder / f"{name}.json"
