"""Loss curves that were recorded once, and that every later version has to draw again.

golden_curves.json has 20 steps of the tiny trainings of `pretraining_jobs` (seed 0), with the flags that follow theirs
and what they ran on. Rounding differs with releases and processors and grows from step to step, so that the first steps
are held closely and all of them loosely. On two processes each has batch statistics of its own.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("braceexpand")
pytest.importorskip("rich")
pytest.importorskip("skimage")
pytest.importorskip("torchvision")
pytest.importorskip("tyro")

from pretraining_jobs import METHODS, lines, train_job

JOBS = Path(__file__).with_name("pretraining_jobs.py")
CURVES = json.loads(Path(__file__).with_name("golden_curves.json").read_text())["curves"]
COLUMNS = ("loss", "base", "term")
FIRST, CLOSE, LOOSE = 3, 1e-5, 1e-2  # steps that are held closely; relative tolerances
QUICK = {f"{method} ser 0.5 x1" for method in METHODS}
ONE, TWO = ([name for name, curve in CURVES.items() if curve["processes"] == n] for n in (1, 2))


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    """A training takes the GPU if there is one, and SIGTERM for itself."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def job(name, folder):
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


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ONE])
def test_one_process_draws_the_recorded_curve(tmp_path, name):
    train_job(**job(name, tmp_path))
    assert not differences(lines(tmp_path), CURVES[name])


@pytest.mark.slow
def test_two_processes_draw_the_recorded_curves(tmp_path):
    (tmp_path / "jobs.json").write_text(json.dumps([job(name, tmp_path / name) for name in TWO]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE"))}
    done = subprocess.run(
        [sys.executable, *launcher, str(JOBS), str(tmp_path / "jobs.json")],
        env=environment | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: differences(lines(tmp_path / name), CURVES[name]) for name in TWO}
    assert not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize(("step", "factor"), [(0, 1 + 1e-4), (FIRST - 1, 1 - 1e-4), (FIRST, 1.05), (-1, 0.95)])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_curve_that_is_off_is_seen(column, step, factor):
    golden = CURVES["moco_v3 ser 0.5 x1"]
    found = [
        dict(zip(COLUMNS, values, strict=True)) for values in zip(*(golden[name] for name in COLUMNS), strict=True)
    ]
    assert not differences(found, golden)
    found[step][column] *= factor
    assert len(differences(found, golden)) == 1
    assert differences(found[:-1], golden)
    assert differences([{"loss": line["loss"], "base": line["base"]} for line in found], golden)
