"""The ablations: what they ask for, what they keep, what they show."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import tyro
from PIL import Image

pytest.importorskip("accelerate")

import ablate
import barlow_twins
import dino
import moco_v3
from ablation.plot import draw
from ablation.table import COLUMNS, markdown, summary
from ablation.variants import ABLATIONS, FULL
from accelerate.state import AcceleratorState
from pretraining.settings import parse

from ser_reg import SERError

EXAMPLES = Path(ablate.__file__).parent
PRESETS = {"moco_v3": moco_v3.PRESETS, "dino": dino.PRESETS, "barlow_twins": barlow_twins.PRESETS}
VARIANTS = [variant for ablation in ABLATIONS.values() for variant in ablation.variants]


def invented(seed):
    """A run as it is kept, of random numbers."""
    draw = random.Random(seed)
    readings = ("raw", "spatial", "raw_floor", "spatial_floor")
    scores = {
        name: {layer: {reading: draw.random() for reading in readings} for layer in ("1", "2", "10")}
        for name in ("rotation", "flip", "scale")
    }
    matching = {
        name: {layer: {key: draw.random() for key in ("top1", "near")} for layer in ("1", "2", "10")}
        for name in ("rotation", "flip")
    }
    result = {
        "accuracy": {"knn": draw.random(), "linear": draw.random()},
        "equivariance": scores,
        "matching": matching,
        "own": {"layer": 2, "channels": "trivial"},
        "orientation": {task: {"2": draw.random(), "10": draw.random()} for task in ("rotation", "flip")},
    }
    return {"flags": [], "environment": {}, "steps": 3, "result": result}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.run)
def test_variants_are_settings_of_their_script(variant):
    settings = parse(PRESETS[variant.script], f"{variant.script}.py", variant.flags.split())
    assert settings.preset == "small"
    changed = settings.same_run(PRESETS[variant.script]["small"].plain())
    assert bool(changed) == bool(variant.flags), "a variant that changes nothing compares nothing"


def test_variants_of_one_run_ask_for_the_same():
    by_run = {}
    for variant in VARIANTS:
        assert by_run.setdefault(variant.run, (variant.script, variant.flags)) == (variant.script, variant.flags)
    for ablation in ABLATIONS.values():
        runs = [variant.run for variant in ablation.variants]
        assert len(set(runs)) == len(runs)
        assert {variant.against for variant in ablation.variants} <= set(runs)


def test_summary_is_of_the_last_layer():
    run = invented(0)
    numbers = summary(run)
    last = run["result"]["equivariance"]["rotation"]["10"]  # after "2", though not for strings
    assert numbers["rotation"] == last["spatial"]
    assert numbers["rotation_raw"] == last["raw"]
    assert numbers["rotation_excess"] == last["spatial"] - last["spatial_floor"]
    assert numbers["matching_rotation"] == run["result"]["matching"]["rotation"]["10"]["top1"]
    assert numbers["own_flip"] == run["result"]["matching"]["flip"]["2"]["top1"]  # at the layer of the term
    assert numbers["turn_early"] == run["result"]["orientation"]["rotation"]["2"]
    assert numbers["flip_last"] == run["result"]["orientation"]["flip"]["10"]


def test_own_action_is_read_where_it_is_another():
    run = invented(0)
    own = invented(1)["result"]["matching"]
    run["result"]["own"] |= {"channels": "regular", "matching": own}
    assert summary(run)["own_rotation"] == own["rotation"]["2"]["top1"]
    assert summary(run)["matching_rotation"] == run["result"]["matching"]["rotation"]["10"]["top1"]


def test_results_from_before_matching_can_be_shown():
    run = invented(0)
    for key in ("matching", "own", "orientation"):
        del run["result"][key]
    assert "matching_rotation" not in summary(run)
    assert summary(run)["rotation"] == run["result"]["equivariance"]["rotation"]["10"]["spatial"]


def test_table_is_mean_and_spread_over_seeds():
    ablation = ABLATIONS["control"]
    results = {v.run: {str(s): invented(f"{v.run}{s}") for s in (0, 1, 2)} for v in ablation.variants}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(ablation, results).splitlines()]
    assert len({len(row) for row in rows}) == 1
    head = rows[0]
    row = next(row for row in rows if row[0] == "λ = 0")
    runs = [summary(run) for run in results["moco_v3--ser-lambda-0"].values()]
    full = [summary(run) for run in results[FULL.run].values()]
    values = [100 * run["knn"] for run in runs]
    assert row[head.index("k-NN, %")] == f"{mean(values):.1f} ± {stdev(values):.1f}"
    differences = [100 * (run["knn"] - other["knn"]) for run, other in zip(runs, full, strict=True)]
    assert row[head.index("k-NN, difference")] == f"{mean(differences):+.1f} ± {stdev(differences):.1f}"
    assert row[-1] == "68.82"
    ours = next(row for row in rows if row[0] == "SER")
    assert ours[head.index("k-NN, difference")] == ""
    assert len(head) == 1 + len(ablation.columns) + 2 + 1
    assert set(ablation.columns) <= set(COLUMNS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_can_be_drawn(name, tmp_path):
    ablation = ABLATIONS[name]
    draw(tmp_path / "x.png", ablation, {v.run: {"0": invented(v.run)} for v in ablation.variants})
    with Image.open(tmp_path / "x.png") as picture:
        assert min(picture.size) > 300


def test_wrong_requests_say_what_to_type(tmp_path):
    with pytest.raises(SERError, match=f"one of {', '.join(ABLATIONS)}, or all"):
        ablate.main(ablate.Settings("depth", output_dir=tmp_path))
    for wrong in ({"seeds": ()}, {"jobs": 0}):
        with pytest.raises(SERError, match="--seeds 0 1 2 --jobs 1"):
            ablate.main(ablate.Settings("layer", output_dir=tmp_path, **wrong))
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_fails_is_told_with_its_error(tmp_path, monkeypatch):
    """By a script in the place of the training's, which says how it was called."""
    (tmp_path / "moco_v3.py").write_text("import sys; sys.exit('refused ' + ' '.join(sys.argv[1:]))")
    monkeypatch.setattr(ablate, "EXAMPLES", tmp_path)
    settings = ablate.Settings("layer", flags="--steps 1", output_dir=tmp_path / "out")
    with pytest.raises(SERError, match="exit status 1: refused --preset small") as error:
        ablate.train_and_judge(settings, FULL, 7)
    assert "moco_v3.py --preset small --steps 1 --seed 7" in error.value.remedy
    assert "--steps 1 --seed 7 --output-dir" in error.value.given


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_command_line_end_to_end(tmp_path, capsys):
    def run(flags):
        """As the command line is read."""
        AcceleratorState._reset_state()  # of other tests
        typed = ["all-layers", "--seeds", "0", "--output-dir", str(tmp_path), "--flags", flags]
        ablate.main(tyro.cli(ablate.Settings, args=typed))
        return capsys.readouterr().out

    tiny = " --steps 2 --batch-size 16 --width 16 --heads 2 --hidden 16"
    shown = run(tiny)
    assert {path.name for path in tmp_path.iterdir()} == {"all-layers.md", "all-layers.png", "results.json", "runs"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {variant.run for variant in ABLATIONS["all-layers"].variants}
    kept = results["moco_v3"]["0"]
    assert kept["steps"] == 2
    assert kept["environment"]["versions"]["torch"]
    assert set(kept["result"]["equivariance"]["rotation"]) == {str(layer) for layer in range(1, 7)}
    assert f"{100 * kept['result']['accuracy']['knn']:.1f}" in (tmp_path / "all-layers.md").read_text()
    assert re.findall(r"\|.*\|", run(tiny)) == re.findall(r"\|.*\|", shown)  # nothing is trained twice
    done = script(tmp_path, f"{tiny} --drop-path 0.1")
    assert done.returncode != 0
    assert "of a run with" in done.stderr
    assert "Traceback" not in done.stderr


def script(folder, flags):
    command = [sys.executable, EXAMPLES / "ablate.py", "all-layers", "--seeds", 0, "--output-dir", folder]
    command = [*map(str, command), "--flags", flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
