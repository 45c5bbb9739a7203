"""Loss curves that were recorded once, and that every later version has to draw again.

Those on two processes are held by test_pretraining_runs.py, which starts such processes once.
"""

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("braceexpand")
pytest.importorskip("rich")
pytest.importorskip("skimage")
pytest.importorskip("torchvision")
pytest.importorskip("tyro")

from golden_curves import COLUMNS, CURVES, FIRST, curve_job, differences
from pretraining_jobs import METHODS, lines, train_job

QUICK = {f"{method} ser 0.5 x1" for method in METHODS}
ONE = [name for name, curve in CURVES.items() if curve["processes"] == 1]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ONE])
def test_one_process_draws_the_recorded_curve(tmp_path, name):
    train_job(**curve_job(name, tmp_path / "run"))
    assert not differences(lines(tmp_path / "run"), CURVES[name])


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
