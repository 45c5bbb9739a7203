"""examples/evaluate.py from the command line: every judgement end to end, and what is refused."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_to_judge import CLASSES, LATE, TINY, judge, picture
from PIL import Image
from safetensors.torch import load_file

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

import evaluate  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from evaluation import tsne  # noqa: E402
from evaluation.crops import Crops  # noqa: E402

from ser_reg import SERError, export_timm, late_cls, load_encoder  # noqa: E402

EXAMPLES = Path(evaluate.__file__).parent


@pytest.fixture(autouse=True)
def _accelerate_begins_anew():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


QUICK = {
    "knn": ("--k", 5),
    "linear": ("--epochs", 10),
    "mlp": ("--epochs", 10, "--hidden", 32),
    "finetune": ("--epochs", 2, "--warmup-epochs", 0.5),
    "probe": (),
    "equivariance": ("--images", 10),
    "tsne": ("--perplexity", 5),
}


@pytest.fixture(scope="module")
def judged(exported, folder, tmp_path_factory):
    """All evaluations into one folder, one after the other, as a user would."""
    out = tmp_path_factory.mktemp("judged")
    found = {name: judge(name, exported, folder, out, *flags) for name, flags in QUICK.items()}
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
    results = judge("shift", exported, folder, out, "--folders", folder / "val", part)["results"]
    assert results[str(folder / "val")]["top1"] == found["linear"]["results"]["top1"]
    assert results[str(part)]["top1"] == 1  # one class to choose from
    assert results[str(part)]["top1_among_all"] > 0.9
    before = (out / "shift.json").read_text()
    shutil.copytree(part / "violet", tmp_path / "other" / "zebra")
    with pytest.raises(SERError, match="zebra"):
        judge("shift", exported, folder, out, "--folders", folder / "val", tmp_path / "other")
    assert (out / "shift.json").read_text() == before


def test_shift_needs_a_classifier_of_this_encoder(judged, exported, folder, tmp_path):
    with pytest.raises(SERError, match="evaluate.py linear"):
        judge("shift", exported, folder, tmp_path, "--folders", folder / "val")
    export_timm(late_cls(load_encoder(str(exported)), 1), tmp_path / "other", "vit_tiny_patch16_224", **TINY)
    path = judged[0] / "linear.safetensors"
    with pytest.raises(SERError, match="a classifier of the encoder"):
        judge("shift", tmp_path / "other", folder, tmp_path, "--classifier", path, "--folders", folder / "val")


@pytest.fixture(scope="module")
def poisoned(folder, tmp_path_factory):
    """The test images of each class under the name of another, and upside down."""
    data, names = tmp_path_factory.mktemp("poisoned"), list(CLASSES)
    shutil.copytree(folder / "train", data / "train")
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        (data / "val" / other).mkdir(parents=True)
        for path in (folder / "val" / name).glob("*.png"):
            with Image.open(path) as image:
                image.transpose(Image.Transpose.ROTATE_180).save(data / "val" / other / path.name)
    return data


LEARNING = {
    "knn": QUICK["knn"],
    "linear": QUICK["linear"],
    "mlp": QUICK["mlp"],
    "finetune": ("--epochs", 8, "--base-rate", 0.02, "--warmup-epochs", 1),
}


@pytest.mark.parametrize("name", LEARNING)
def test_what_test_images_say_is_not_known(poisoned, folder, exported, tmp_path, name):
    honest = judge(name, exported, folder, tmp_path / "honest", *LEARNING[name])["results"]
    assert honest["top1"] > 0.9
    found = judge(name, exported, poisoned, tmp_path / "out", *LEARNING[name])["results"]
    assert found["top1"] < 0.1  # all are told to be what they look like
    for key in honest.keys() & {"rate", "held_out_accuracy", "train_images"}:
        assert found[key] == honest[key]
    for path in (tmp_path / "out").glob("*.safetensors"):  # the classifier does not know of them either
        one, other = load_file(path), load_file(tmp_path / "honest" / path.name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_how_test_images_lie_is_not_known(poisoned, exported, tmp_path):
    accuracy = judge("probe", exported, poisoned, tmp_path, *QUICK["probe"])["results"]["accuracy"]
    assert max(accuracy["rotation"].values()) < 0.1  # all are told to lie as they look


def test_a_batch_is_at_most_all_images_and_its_rate_is_of_as_many(judged, exported, folder, tmp_path):
    cache, kept = ("--cache", judged[0] / "features"), ("linear", exported, folder, tmp_path)
    rates = {}
    for asked, used in ((9, 9), (27, 27), (4096, 54)):  # six of sixty are held out
        found = judge(*kept, "--epochs", 1, "--base-rates", 1.6, "--batch-size", asked, *cache)["results"]
        assert found["batch_size"] == used
        rates[used] = found["rate"]
    assert rates == {n: pytest.approx(1.6 * n / 256) for n in rates}
    for asked, used in ((9, 9), (4096, 60)):
        flags = ("--epochs", 1, "--warmup-epochs", 0, "--base-rate", 1.6, "--batch-size", asked)
        found = judge("finetune", exported, folder, tmp_path / f"{asked}", *flags)["results"]
        assert (found["batch_size"], found["rate"]) == (used, pytest.approx(1.6 * used / 256))
    flags = ("--epochs", 1, "--hidden", 8, "--base-rates", 0.1, "--batch-size", 9, *cache)
    assert judge("mlp", exported, folder, tmp_path, *flags)["results"]["rate"] == 0.1


def test_linear_on_random_crops(exported, folder, tmp_path):
    flags = ("--augment", "--epochs", 4, "--last", 2, "--base-rates", 1, 3)
    found = judge("linear", exported, folder, tmp_path, *flags)
    assert found["results"]["protocol"].startswith("random crops")
    assert found["results"]["top1"] > 0.6
    assert {path.name for path in tmp_path.glob("*.progress")} == {"linear-all.progress", "linear-choice.progress"}
    assert judge("linear", exported, folder, tmp_path, *flags)["results"] == found["results"]  # nothing left to do
    with pytest.raises(SERError, match="a training with epochs 4"):
        judge("linear", exported, folder, tmp_path, *flags[:2], 5, *flags[3:])


def test_any_timm_model_is_judged_as_far_as_it_goes(folder, tmp_path):
    model = ("mobilenetv3_small_050", folder, tmp_path)  # of a family that the library does not know
    flags = ("--no-pretrained", "--size", 32)
    assert judge("knn", *model, *flags)["model"]["late_cls"] is None
    with pytest.raises(SERError, match=r"no normalised \[CLS\] in its blocks") as error:
        judge("linear", *model, *flags)
    assert error.value.remedy.startswith("evaluate.py linear --last 1")
    assert judge("linear", *model, *flags, "--last", 1, "--epochs", 2)["results"]["test_images"] == 24
    for name in ("probe", "equivariance"):
        with pytest.raises(SERError, match="layers with patch tokens"):
            judge(name, *model, *flags)
    assert {path.name for path in tmp_path.glob("*.json")} == {"knn.json", "linear.json"}


def test_stages_are_layers(folder, tmp_path):
    model, flags = ("resnet10t", folder, tmp_path), ("--no-pretrained", "--size", 64)
    assert judge("knn", *model, *flags)["model"]["late_cls"] is None
    assert list(judge("probe", *model, *flags)["results"]["accuracy"]["flip"]) == ["1", "2", "3", "4"]
    scores = judge("equivariance", *model, *flags, "--images", 6, "--layers", 1, 3)["results"]["scores"]
    assert list(scores["rotation"]) == ["1", "3"]


def test_images_without_labels_are_refused(exported, tmp_path):
    picture(tmp_path / "data" / "1.png", (1, 2, 3), np.random.default_rng(0))
    with pytest.raises(SERError, match="no labels in train"):
        judge("knn", exported, tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize(
    ("subcommand", "flags", "text"),
    [
        ("knn", ("--k", 0), "--k 0"),
        ("knn", ("--temperature", 0), "--temperature 0.0"),
        ("linear", ("--epochs", 0), "--epochs 0"),
        ("knn", ("--temperature", "inf"), "--temperature inf"),
        ("linear", ("--base-rates", 0.1, 0), "--base-rates 0.0"),
        ("linear", ("--base-rates", -1), "--base-rates -1.0"),
        ("finetune", ("--weight-decay", -0.1), "--weight-decay -0.1"),
        ("finetune", ("--epochs", 5), "--warmup-epochs 5 of --epochs 5"),
        ("finetune", ("--label-smoothing", 1), "--label-smoothing 1"),
        ("finetune", ("--layer-decay", 1.5), "--layer-decay 1.5"),
        ("tsne", ("--seed", 2**32), "--seed 4294967296"),
    ],
)
def test_settings_that_would_give_a_wrong_number_are_refused(exported, folder, tmp_path, subcommand, flags, text):
    with pytest.raises(SERError, match=f"given:    {text}\n"):
        judge(subcommand, exported, folder, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("subcommand", "flags", "text"),
    [
        ("knn", ("--k", 61), "--k 61 of 60 training images that can be read"),
        ("linear", ("--base-rates",), "--base-rates without a number"),
        ("linear", ("--last", 9), "--last 9"),
        ("shift", ("--folders",), "--folders without a folder"),
        ("equivariance", ("--images", 1), "1 test images that can be read"),
        ("equivariance", ("--layers", 9), "--layers 9"),
        ("probe", ("--layers", 0), "--layers 0"),
    ],
)
def test_what_there_is_not_is_refused(judged, exported, folder, tmp_path, subcommand, flags, text):
    with pytest.raises(SERError, match=f"^evaluate.py {subcommand}\n  given:    {text}\n") as error:
        judge(subcommand, exported, folder, tmp_path, "--cache", judged[0] / "features", *flags)
    assert "--" in error.value.remedy
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("flag", ["--output-dir", "--cache"])
def test_folders_that_cannot_be_made_are_named(exported, folder, tmp_path, flag):
    (tmp_path / "file").write_text("")
    with pytest.raises(SERError, match=f"^evaluate.py knn {flag} .*file\n  given:    FileExistsError"):
        judge("knn", exported, folder, tmp_path / "out", flag, tmp_path / "file")


def test_one_readable_image_a_class_is_enough_or_named(exported, tmp_path):
    for split in ("train", "val"):
        for name in ("green", "red"):
            picture(tmp_path / "data" / split / name / "1.png", CLASSES[name], np.random.default_rng(0))
            (tmp_path / "data" / split / name / "2.png").write_bytes(b"")
    few = exported, tmp_path / "data", tmp_path / "out"
    with pytest.raises(SERError, match="--k 5 of 2 training images") as error:
        judge("knn", *few, "--k", 5)
    assert error.value.remedy == "evaluate.py knn --k 1"
    found = judge("knn", *few, "--k", 1)
    assert (found["results"]["top1"], found["results"]["train_images"]) == (1, 2)
    found = judge("linear", *few, "--epochs", 1)["results"]
    assert (found["batch_size"], found["train_images"], found["top5"]) == (1, 2, None)
    found = judge("finetune", *few, "--epochs", 1, "--warmup-epochs", 0.5)
    assert (found["results"]["train_images"], found["results"]["batch_size"]) == (2, 4)
    assert sum(part["count"] for part in found["unreadable"].values()) == 4
    with pytest.raises(SERError, match="2 images"):
        judge("tsne", *few)


def test_a_network_is_not_fine_tuned_on_nothing(exported, folder, tmp_path):
    shutil.copytree(folder / "val", tmp_path / "data" / "val")
    for name in CLASSES:
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "data" / "train" / name / f"{i}.png").write_bytes(b"")
    with pytest.raises(SERError, match="9 images, none readable") as error:
        judge("finetune", exported, tmp_path / "data", tmp_path / "out")
    assert error.value.remedy.endswith("green/0.png'")


def test_unreadable_images_of_a_finished_training_stay_known(exported, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "green" / "00.png").write_bytes(b"")
    data, out = tmp_path / "data", tmp_path / "out"
    for name, flags in {
        "finetune": ("--epochs", 2, "--warmup-epochs", 0.5, "--batch-size", 60),
        "linear": ("--augment", "--epochs", 2, "--base-rates", 1, "--batch-size", 54),
    }.items():
        first, again = (judge(name, exported, data, out, *flags) for _ in range(2))  # the second goes on at the end
        assert first["unreadable"]["train"]["count"] == 1
        assert again["unreadable"] == first["unreadable"]
        assert again["results"] == first["results"]
        assert first["results"]["train_images"] == 59


@pytest.mark.parametrize("stop", [1, 3])
def test_a_classifier_on_crops_goes_on_where_it_was_stopped(exported, folder, tmp_path, monkeypatch, stop):
    flags = ("linear", exported, folder, tmp_path / "stopped", "--augment", "--epochs", 2, "--base-rates", 1, 3)
    epochs, draw = [], Crops.__call__

    def interrupted(self, epoch):
        epochs.append(epoch)
        for number, batch in enumerate(draw(self, epoch)):
            if len(epochs) == stop + 1 and number == 1:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Crops, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            judge(*flags)
        assert not list((tmp_path / "stopped").glob("*.json"))
        found = judge(*flags)["results"]
    assert epochs == [*[0, 1, 0, 1][: stop + 1], *[0, 1, 0, 1][stop:]]  # of the choice, then of all; one is done anew
    assert found == judge(*flags[:3], tmp_path / "whole", *flags[4:])["results"]
    one, other = (load_file(tmp_path / name / "linear.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_progress_of_another_training_is_refused(exported, folder, tmp_path):
    crops = ("--augment", "--epochs", 1, "--base-rates", 1)
    judge("mlp", exported, folder, tmp_path, *crops, "--hidden", 8)
    with pytest.raises(SERError, match="a training with classifier three layers, 8 channels"):
        judge("mlp", exported, folder, tmp_path, *crops, "--hidden", 16)
    judge("finetune", exported, folder, tmp_path, *QUICK["finetune"])
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SERError, match="a training with precision no"):
        judge("finetune", exported, folder, tmp_path, *QUICK["finetune"], "--precision", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    shutil.copytree(folder, tmp_path / "data")
    elsewhere = ("finetune", exported, tmp_path / "data", tmp_path / "out", *QUICK["finetune"])
    judge(*elsewhere)
    for path in (tmp_path / "data" / "train").rglob("*.png"):
        picture(path, (9, 9, 9), np.random.default_rng(1))
    with pytest.raises(SERError, match="a training with images "):  # others under the same names
        judge(*elsewhere)
    for content in ({"epochs": 1}, [1, 2]):
        torch.save(content, tmp_path / "out" / "finetune.progress")
        with pytest.raises(SERError, match="a file of something else") as error:
            judge(*elsewhere)
        assert error.value.remedy.startswith("rm '")


def test_one_class_is_refused(exported, folder, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(folder / part / "green", tmp_path / "data" / part / "green")
    with pytest.raises(SERError, match="one class, 'green'"):
        judge("knn", exported, tmp_path / "data", tmp_path / "out")


def test_command_line_errors_are_messages_not_tracebacks(exported, tmp_path, monkeypatch):
    flags = ("--model", exported, "--data", tmp_path / "nowhere", "--output-dir", tmp_path / "out", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "knn", *map(str, flags)])
    with pytest.raises(SystemExit, match="given:    no such folder"):  # of which Python prints the text alone
        runpy.run_path(str(EXAMPLES / "evaluate.py"), run_name="__main__")


# What torchrun does, but that Python and torch start once: two processes with the variables that it sets.
BOTH = """
import multiprocessing, os, socket, sys
sys.path.insert(0, sys.argv[1])
import evaluate, torch
from accelerate import PartialState
from evaluation import features

def work(rank, port):
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})
    torch.set_num_threads(1)
    features.CHUNK = 16  # so that each process has files of its own to write
    for judgement, flags in JUDGEMENTS:
        evaluate.tyro.cli(judgement, args=[*sys.argv[2:], *flags]).run()
    PartialState().destroy_process_group()

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ranks = [multiprocessing.get_context("fork").Process(target=work, args=(rank, port)) for rank in (0, 1)]
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.join()
sys.exit(max(abs(rank.exitcode) for rank in ranks))
"""


def test_two_processes_give_what_one_gives(judged, exported, folder, tmp_path):
    both = [f"(evaluate.{name.title()}, {[*map(str, QUICK[name])]})" for name in ("knn", "finetune")]
    flags = ["--model", exported, "--data", folder, "--output-dir", tmp_path, "--workers", 0, "--device", "cpu"]
    command = [sys.executable, "-c", BOTH.replace("JUDGEMENTS", f"[{', '.join(both)}]"), EXAMPLES, *flags]
    environment = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=environment)
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
        f"from plain_timm import plain_timm\ndef load():\n    return plain_timm('{exported}')\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SERError, match=r"after 2, as .* was trained"):
        judge("knn", "forgetful:load", folder, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.json"))


def test_weights_without_their_config_are_refused(exported, folder, tmp_path):
    shutil.copy(exported / "model.safetensors", tmp_path / "bare.safetensors")
    with pytest.raises(SERError, match="no exported encoder"):
        judge("knn", tmp_path / "bare.safetensors", folder, tmp_path / "out")


def test_an_encoder_that_sees_nothing_has_no_picture():
    with pytest.raises(SERError, match="embeddings of 9 images that are all the same"):  # t-SNE would crash
        tsne.embed_in_plane(torch.ones(9, 4) * torch.arange(1.0, 10)[:, None], 3, 0)


def test_some_classes_are_those_asked_for():
    labels = torch.arange(3000) % 30
    places = tsne.some_classes(labels, 20, 10, 0)
    assert labels[places].bincount(minlength=30).sort().values.tolist() == [0] * 10 + [10] * 20
    assert not torch.equal(places, tsne.some_classes(labels, 20, 10, 1))
    with pytest.raises(SERError, match="--classes 1"):
        tsne.some_classes(labels, 1, 10, 0)
