"""Loss curves that were recorded once, and where a run leaves them.

golden_curves.json has 20 steps of the tiny trainings of `pretraining_jobs` (seed 0), with the flags that follow theirs
and what they ran on. Rounding differs with releases and processors and grows from step to step, so that the first steps
are held closely and all of them loosely. On two processes each has batch statistics of its own.
"""

import json
from pathlib import Path

import pytest

__all__ = ["COLUMNS", "CURVES", "FIRST", "curve_job", "differences"]

CURVES = json.loads(Path(__file__).with_suffix(".json").read_text())["curves"]
COLUMNS = ("loss", "base", "term")
FIRST, CLOSE, LOOSE = 3, 1e-5, 1e-2  # steps that are held closely; relative tolerances


def curve_job(name, folder):
    """The training of a curve."""
    curve = CURVES[name]
    flags = [*curve["flags"], "--steps", len(curve["loss"]), "--output-dir", folder]
    return {"method": curve["method"], "flags": list(map(str, flags))}


def differences(found, golden):
    """Where the lines of a run leave a curve: column, step, what was found and what was recorded."""
    columns = [name for name in COLUMNS if name in golden]
    if len(found) != len(golden["loss"]) or any(
        (name in line) != (name in columns) for line in found for name in COLUMNS
    ):
        return [f"{len(found)} lines of {found[0].keys() if found else 'nothing'}, {len(golden['loss'])} of {columns}"]
    return [
        f"{name} of step {step}: {line[name]}, recorded {golden[name][step]}"
        for name in columns
        for step, line in enumerate(found)
        if line[name] != pytest.approx(golden[name][step], rel=CLOSE if step < FIRST else LOOSE, abs=0)
    ]
