"""Loss curves that were recorded once, and where a run leaves them.

golden_curves.json has 20 steps of the tiny trainings of `pretraining_jobs` (seed 0), with the flags that follow theirs
and what they ran on. Weights and images are NumPy's and no path is dropped, as what timm, torchvision and torch draw
differs between releases. Rounding differs too and grows from step to step, so that the first steps are held closely
and all of them loosely. On two processes each has batch statistics of its own.

``python tests/examples/golden_curves.py`` records all of them anew, where views or losses are meant to change. A new
curve is a line with its method, processes and flags.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

__all__ = ["COLUMNS", "CURVES", "FIRST", "curve_job", "differences", "record", "write_images"]

FILE = Path(__file__).with_suffix(".json")
CURVES = json.loads(FILE.read_text())["curves"]
COLUMNS = ("loss", "base", "term")
STEPS = 20
FIRST, CLOSE, LOOSE = 3, 1e-5, 1e-2  # steps that are held closely; relative tolerances


def curve_job(name, folder):
    """The training of a curve; its images are written to a folder beside the run's."""
    curve, images = CURVES[name], folder.with_name("images of the recorded curves")
    write_images(images)
    flags = [*curve["flags"], "--steps", STEPS, "--data", images, "--output-dir", folder]
    return {"method": curve["method"], "flags": list(map(str, flags)), "own_weights": True}


def write_images(folder):
    """64 images of 64 pixels: coarse and fine noise, one upon the other."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(0)
    for i in range(64):
        coarse, fine = (numbers.integers(0, 128, (side, side, 3), dtype=np.uint8) for side in (8, 32))
        pixels = coarse.repeat(8, 0).repeat(8, 1) + fine.repeat(2, 0).repeat(2, 1)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")


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


def record():
    """Draw all curves and write them down, with what they ran on."""
    import torch
    from pretraining_jobs import lines

    from ser_reg.records import environment

    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for name, curve in CURVES.items():
            jobs.setdefault(curve["processes"], []).append(curve_job(name, Path(folder) / name))
        Path(folder, "jobs.json").write_text(json.dumps(jobs))
        command = [sys.executable, str(FILE.with_name("pretraining_jobs.py")), f"{folder}/jobs.json"]
        subprocess.run(command, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
        for name, curve in CURVES.items():
            steps = lines(Path(folder) / name)
            columns = [column for column in COLUMNS if column in steps[0]]
            found = {column: [float(f"{line[column]:.8g}") for line in steps] for column in columns}
            curves[name] = {key: curve[key] for key in ("method", "processes", "flags")} | found
    torch.set_num_threads(1)  # as each process has it
    written = json.dumps({"environment": environment(torch.device("cpu")), "curves": {}}, indent=2)
    each = ",\n".join(f"    {json.dumps(name)}: {json.dumps(curve)}" for name, curve in curves.items())
    FILE.write_text(written.replace('"curves": {}', '"curves": {\n' + each + "\n  }") + "\n")


if __name__ == "__main__":
    record()
