"""examples/evaluate.py from the command line: every judgement end to end, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_to_judge import CLASSES, LATE, TINY, picture
from PIL import Image
from safetensors.torch import load_file

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

import evaluate  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from evaluation import tsne  # noqa: E402

from ser_reg import SERError, export_timm, late_cls, load_encoder  # noqa: E402

EXAMPLES = Path(evaluate.__file__).parent


@pytest.fixture(autouse=True)
def _accelerate_begins_anew():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def call(subcommand, model, data, out, *flags):
    """Results of evaluate.py in this process."""
    arguments = ["--model", model, "--data", data, "--output-dir", out, "--workers", 0, "--device", "cpu", *flags]
    evaluate.main([subcommand, *map(str, arguments)])
    return json.loads((out / f"{subcommand}.json").read_text())


QUICK = {
    "knn": ("--k", 5),
    "linear": ("--epochs", 10),
    "mlp": ("--epochs", 10, "--hidden", 32),
    "finetune": ("--epochs", 2),
    "probe": (),
    "equivariance": ("--images", 10),
    "tsne": ("--perplexity", 5),
}


@pytest.fixture(scope="module")
def judged(exported, folder, tmp_path_factory):
    """All evaluations into one folder, one after the other, as a user would."""
    out = tmp_path_factory.mktemp("judged")
    found = {name: call(name, exported, folder, out, *flags) for name, flags in QUICK.items()}
    return out, found


@pytest.mark.parametrize("name", QUICK)
def test_every_subcommand_end_to_end(judged, name):
    _, found = judged
    assert set(found[name]) == {"settings", "model", "environment", "unreadable", "results", "seconds"}
    assert found[name]["model"]["late_cls"] == LATE
    assert found[name]["environment"]["processes"] == 1
    left_out = {image for part in found[name]["unreadable"].values() for image in part["images"]}
    assert all(image.endswith("val/red/broken.jpg") for image in left_out)
    if name not in ("probe", "equivariance"):
        assert sum(part["count"] for part in found[name]["unreadable"].values()) == 1


def test_colours_are_told_apart(judged):
    _, found = judged
    for name in ("knn", "linear", "mlp"):
        assert found[name]["results"]["top1"] > 0.9, name
        assert (found[name]["results"]["train_images"], found[name]["results"]["test_images"]) == (60, 24)
    assert found["linear"]["results"]["classes"] == list(CLASSES)
    assert len(found["linear"]["results"]["held_out_accuracy"]) == 5


def test_turns_that_show_are_found(judged):
    accuracy = judged[1]["probe"]["results"]["accuracy"]
    assert max(accuracy["rotation"].values()) > 0.9
    assert judged[1]["probe"]["results"]["chance"] == {"rotation": 0.25, "flip": 0.5}
    assert list(accuracy["flip"]) == ["1", "2", "3", "4"]


def test_scores_are_those_of_the_library(judged):
    scores = judged[1]["equivariance"]["results"]["scores"]
    assert list(scores) == ["rotation", "flip", "scale"]
    assert set(scores["flip"]["4"]) == {"raw", "spatial", "raw_floor", "spatial_floor"}


def test_picture_and_coordinates_of_tsne(judged):
    out, found = judged
    results = found["tsne"]["results"]
    assert len(results["coordinates"]) == len(results["classes"]) == len(results["images"]) == 24
    with Image.open(out / "tsne.png") as image:
        image.verify()
        assert min(image.size) > 800


def test_features_are_computed_once(judged):
    out, _ = judged
    kept = sorted(str(path.relative_to(out / "features")).split("/")[-2] for path in out.rglob("features/*/*/0*"))
    assert kept == ["last4", "last4", "turned-1-2-3-4", "turned-1-2-3-4"]


def test_shift_judges_the_classifier_of_linear(judged, exported, folder, tmp_path):
    out, found = judged
    part = tmp_path / "some"
    shutil.copytree(folder / "val" / "violet", part / "violet")
    results = call("shift", exported, folder, out, "--folders", folder / "val", part)["results"]
    assert results[str(folder / "val")]["top1"] == found["linear"]["results"]["top1"]
    assert results[str(part)]["top1"] == 1  # one class to choose from
    assert results[str(part)]["top1_among_all"] > 0.9
    before = (out / "shift.json").read_text()
    shutil.copytree(part / "violet", tmp_path / "other" / "zebra")
    with pytest.raises(SERError, match="zebra"):
        call("shift", exported, folder, out, "--folders", folder / "val", tmp_path / "other")
    assert (out / "shift.json").read_text() == before


def test_shift_needs_a_classifier_of_this_encoder(judged, exported, folder, tmp_path):
    with pytest.raises(SERError, match="evaluate.py linear"):
        call("shift", exported, folder, tmp_path, "--folders", folder / "val")
    export_timm(late_cls(load_encoder(str(exported)), 1), tmp_path / "other", "vit_tiny_patch16_224", **TINY)
    path = judged[0] / "linear.safetensors"
    with pytest.raises(SERError, match="a classifier of the encoder"):
        call("shift", tmp_path / "other", folder, tmp_path, "--classifier", path, "--folders", folder / "val")


def test_rate_is_not_chosen_by_test_labels(judged, exported, folder, tmp_path):
    poisoned = tmp_path / "data"
    shutil.copytree(folder, poisoned)
    for name, other in (("green", "swap"), ("red", "green"), ("swap", "red")):
        (poisoned / "val" / name).rename(poisoned / "val" / other)
    found, honest = call("linear", exported, poisoned, tmp_path / "out", *QUICK["linear"]), judged[1]["linear"]
    assert found["results"]["top1"] < 0.5 < honest["results"]["top1"]
    for key in ("rate", "held_out_accuracy"):
        assert found["results"][key] == honest["results"][key]
    one, other = (load_file(path / "linear.safetensors") for path in (tmp_path / "out", judged[0]))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_linear_on_random_crops(exported, folder, tmp_path):
    flags = ("--augment", "--epochs", 4, "--last", 2, "--base-rates", 1, 3)
    found = call("linear", exported, folder, tmp_path, *flags)
    assert found["results"]["protocol"].startswith("random crops")
    assert found["results"]["top1"] > 0.6
    assert {path.name for path in tmp_path.glob("*.progress")} == {"linear-all.progress", "linear-choice.progress"}
    assert call("linear", exported, folder, tmp_path, *flags)["results"] == found["results"]  # nothing left to do
    with pytest.raises(SERError, match="a training with epochs 4"):
        call("linear", exported, folder, tmp_path, *flags[:2], 5, *flags[3:])


def test_any_timm_model_is_judged_as_far_as_it_goes(folder, tmp_path):
    model = ("mobilenetv3_small_050", folder, tmp_path)  # of a family that the library does not know
    flags = ("--no-pretrained", "--size", 32)
    assert call("knn", *model, *flags)["model"]["late_cls"] is None
    with pytest.raises(SERError, match=r"no normalised \[CLS\] in its blocks") as error:
        call("linear", *model, *flags)
    assert error.value.remedy.startswith("evaluate.py linear --last 1")
    assert call("linear", *model, *flags, "--last", 1, "--epochs", 2)["results"]["test_images"] == 24
    for name in ("probe", "equivariance"):
        with pytest.raises(SERError, match="layers with patch tokens"):
            call(name, *model, *flags)
    assert {path.name for path in tmp_path.glob("*.json")} == {"knn.json", "linear.json"}


def test_stages_are_layers(folder, tmp_path):
    model, flags = ("resnet10t", folder, tmp_path), ("--no-pretrained", "--size", 64)
    assert call("knn", *model, *flags)["model"]["late_cls"] is None
    assert list(call("probe", *model, *flags)["results"]["accuracy"]["flip"]) == ["1", "2", "3", "4"]
    scores = call("equivariance", *model, *flags, "--images", 6, "--layers", 1, 3)["results"]["scores"]
    assert list(scores["rotation"]) == ["1", "3"]


def test_images_without_labels_are_refused(exported, tmp_path):
    picture(tmp_path / "data" / "1.png", (1, 2, 3), np.random.default_rng(0))
    with pytest.raises(SERError, match="no labels in train"):
        call("knn", exported, tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize(
    ("subcommand", "flags", "text"),
    [
        ("knn", ("--k", 0), "--k 0"),
        ("knn", ("--temperature", 0), "--temperature 0.0"),
        ("linear", ("--epochs", 0), "--epochs 0"),
        ("finetune", ("--weight-decay", -0.1), "--weight-decay -0.1"),
    ],
)
def test_settings_that_would_give_a_wrong_number_are_refused(exported, folder, tmp_path, subcommand, flags, text):
    with pytest.raises(SERError, match=f"given:    {text}\n"):
        call(subcommand, exported, folder, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


def test_one_class_is_refused(exported, folder, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(folder / part / "green", tmp_path / "data" / part / "green")
    with pytest.raises(SERError, match="one class, 'green'"):
        call("knn", exported, tmp_path / "data", tmp_path / "out")


def run(*command):
    done = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=done)


def test_command_line_errors_are_messages_not_tracebacks(exported, tmp_path):
    flags = ("--model", exported, "--data", tmp_path / "nowhere", "--output-dir", tmp_path / "out", "--device", "cpu")
    done = run(sys.executable, EXAMPLES / "evaluate.py", "knn", *flags)
    assert done.returncode == 1
    assert "given:    no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_processes_give_what_one_gives(judged, exported, folder, tmp_path):
    script = tmp_path / "both.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import evaluate, tyro\nfrom accelerate import PartialState\nfrom evaluation import features\n"
        "features.CHUNK = 16  # so that each process has files of its own to write\n"
        f"tyro.cli(evaluate.Knn, args=[*sys.argv[1:], '--k', '{QUICK['knn'][1]}']).run()\n"
        "tyro.cli(evaluate.Finetune, args=[*sys.argv[1:], '--epochs', '2']).run()\n"
        "PartialState().destroy_process_group()\n"
    )
    flags = ["--model", exported, "--data", folder, "--output-dir", tmp_path, "--workers", 0, "--device", "cpu"]
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script, *flags)
    assert done.returncode == 0, done.stderr
    for name in ("knn", "finetune"):
        two, one = json.loads((tmp_path / f"{name}.json").read_text()), judged[1][name]
        assert two["environment"]["processes"] == 2
        assert two["results"] == one["results"]
        assert two["unreadable"] == one["unreadable"]
        assert done.stdout.count(f"{name}.json") == 1  # the main process alone speaks
    [one], several = (
        [load_file(p) for p in sorted(out.glob("features/*-train/last4/*"))] for out in (judged[0], tmp_path)
    )
    assert len(several) == 4
    for key in one:  # batches are smaller here, and sums are of another order
        torch.testing.assert_close(torch.cat([part[key] for part in several]), one[key], rtol=1e-5, atol=1e-5)
    one, two = (load_file(path / "finetune.safetensors") for path in (judged[0], tmp_path))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-4)


def test_a_function_that_forgets_late_cls_is_refused(exported, folder, tmp_path, monkeypatch):
    (tmp_path / "forgetful.py").write_text(
        f"import timm\ndef load():\n    return timm.create_model('local-dir:{exported}', pretrained=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SERError, match=r"after 2, as .* was trained"):
        call("knn", "forgetful:load", folder, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.json"))


def test_weights_without_their_config_are_refused(exported, folder, tmp_path):
    shutil.copy(exported / "model.safetensors", tmp_path / "bare.safetensors")
    with pytest.raises(SERError, match="no exported encoder"):
        call("knn", tmp_path / "bare.safetensors", folder, tmp_path / "out")


def test_some_classes_are_those_asked_for():
    labels = torch.arange(3000) % 30
    places = tsne.some_classes(labels, 20, 10, 0)
    assert labels[places].bincount(minlength=30).sort().values.tolist() == [0] * 10 + [10] * 20
    assert not torch.equal(places, tsne.some_classes(labels, 20, 10, 1))
    with pytest.raises(SERError, match="--classes 1"):
        tsne.some_classes(labels, 1, 10, 0)
