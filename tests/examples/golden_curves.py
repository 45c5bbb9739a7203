"""Loss curves that were recorded once, and where a run leaves them.

golden_curves.json has 20 steps of the tiny trainings of `pretraining_jobs` (seed 0), with the flags that follow theirs
and what they ran on. Weights and images are NumPy's and no path is dropped, as what timm, torchvision and torch draw
differs between releases. Rounding differs too and grows from step to step, so that the first steps are held closely
and all of them loosely. On two processes each has batch statistics of its own.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

__all__ = ["COLUMNS", "CURVES", "FIRST", "curve_job", "differences", "write_images"]

CURVES = json.loads(Path(__file__).with_suffix(".json").read_text())["curves"]
COLUMNS = ("loss", "base", "term")
FIRST, CLOSE, LOOSE = 3, 1e-5, 1e-2  # steps that are held closely; relative tolerances


def curve_job(name, folder):
    """The training of a curve; its images are written to a folder beside the run's."""
    curve, images = CURVES[name], folder.with_name("images of the recorded curves")
    write_images(images)
    flags = [*curve["flags"], "--steps", len(curve["loss"]), "--data", images, "--output-dir", folder]
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
