"""The loop inside one process: ways of training, data of one's own, and what is watched along the way."""

import math
from types import SimpleNamespace

import moco_v3
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import nn

pytest.importorskip("accelerate")

from evaluation.features import embeddings
from pictures_on_disk import picture
from pretraining import loop
from pretraining.monitor import Collapse
from pretraining_jobs import TIMES, lines, parsed, train_job

from ser_reg import SERError, load_encoder

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("moco_v3", ["--architecture", "deit3_small_patch16_224"]),
        ("moco_v3", ["--architecture", "vit_small_patch14_reg4_dinov2"]),
        ("moco_v3", ["--architecture", "eva02_tiny_patch14_224", "--initialisation", "timm"]),
        ("dino", ["--architecture", "vit_small_patch16_dinov3"]),
        ("dino", ["--no-dynamic-size", "--scale", 1, 1, "--aspect", 1, 1]),
        ("dino", ["augself", "--no-dynamic-size", "--term.layer", 3]),
        ("dino", ["equimod", "--term.ratio", 0.25, "--local-views", 4, "--precision", "bf16"]),
        ("dino", ["--precision", "bf16", "--cls-layer", 0]),
        ("dino", ["--term.ratio", 1, "--local-views", 4]),
        ("barlow_twins", ["--accumulate", 2, "--tracker", "tensorboard"]),
        ("barlow_twins", ["reconstruction", "--path", "colour", "--gradient-checkpointing", "--crop-turns"]),
    ],
)
def test_trains_and_exports(tmp_path, method, flags):
    if "tensorboard" in flags:
        pytest.importorskip("tensorboard")
    folder = tmp_path / "with space" / "run"
    train_job(method, [*flags, "--output-dir", folder])
    found = lines(folder)
    assert all(math.isfinite(line["loss"]) for line in found)
    assert len({line["loss"] for line in found}) == 3
    assert load_encoder(str(folder / "encoder"))(torch.randn(2, 3, 32, 32)).shape == (2, 24)


def test_gradient_checkpointing_and_workers_change_nothing(tmp_path):
    flags = ["--drop-path", 0.3]
    for name, more in (("plain", []), ("less", ["--gradient-checkpointing"]), ("workers", ["--workers", 2])):
        train_job("dino", [*flags, *more, "--output-dir", tmp_path / name])
    assert lines(tmp_path / "workers") == lines(tmp_path / "plain")
    for line, other in zip(lines(tmp_path / "less"), lines(tmp_path / "plain"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_seeds_give_other_runs_and_the_same_seed_the_same(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_job("dino", ["--seed", seed, "--drop-path", 0.3, "--output-dir", tmp_path / name])
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert all(x["loss"] != y["loss"] for x, y in zip(lines(tmp_path / "a"), lines(tmp_path / "c"), strict=True))


def test_non_finite_loss_ends_the_training_with_what_to_type(tmp_path):
    for more in ([], ["--term.weight", 0]):
        with pytest.raises(SERError, match="a finite loss") as error:
            train_job("moco_v3", ["--steps", 8, "--learning-rate", 1e6, *more, "--output-dir", tmp_path / "run"])
        assert "at step" in error.value.given
        assert error.value.remedy.startswith(f"--output-dir {tmp_path / 'run'}_2 --learning-rate 500000 ")
        assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_backward_is_outside_autocast(tmp_path):
    """Inside, matrix products that are computed in single precision would go backward in half precision."""
    seen = []

    def build(settings):
        method = moco_v3.build(settings)
        method.projector[0].weight.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
        return method

    AcceleratorState._reset_state()
    settings = parsed("moco_v3", ["--precision", "bf16", "--steps", 1, "--output-dir", tmp_path])
    loop.train("moco_v3", settings, build, moco_v3.recipes)
    AcceleratorState._reset_state()
    assert seen == [False]


# Folders of one's own


def folder_of(path, count, first=0):
    path.mkdir(parents=True)
    for i in range(count):
        picture(first + i, (48, 40)).save(path / f"{i:02}.png")
    return path


def test_unlabelled_folder_trains_without_knn(tmp_path, capsys):
    data = folder_of(tmp_path / "data", 20)
    train_job("dino", ["--data", data, "--knn-every", 1, "--output-dir", tmp_path / "run"])
    assert "no k-NN" in capsys.readouterr().out
    assert "knn" not in lines(tmp_path / "run")[-1]


def test_folder_of_one_class_has_knn(tmp_path, capsys):
    folder_of(tmp_path / "data" / "train" / "only", 20)
    folder_of(tmp_path / "data" / "val" / "only", 20, first=100)
    train_job("dino", ["--data", tmp_path / "data", "--knn-every", 1, "--output-dir", tmp_path / "run"])
    assert [line.get("knn") for line in lines(tmp_path / "run")] == [1.0, 1.0, 1.0]
    assert "k-NN 100.0 %" in capsys.readouterr().out


def test_knn_asks_the_training_images_about_the_held_out_ones(tmp_path):
    """A held-out image counts as what training images of its colour are, whatever it is said to be."""
    for split, name, colour, count in (
        ("train", "a", "red", 30),
        ("train", "b", "blue", 22),
        ("val", "a", "red", 1),
        ("val", "b", "red", 3),
    ):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (32, 32), colour).save(folder / f"{colour}{i}.png")
    flags = ["--data", tmp_path / "data", "--knn-every", 1, "--steps", 1, "--output-dir", tmp_path / "run"]
    train_job("moco_v3", flags)
    assert lines(tmp_path / "run")[0]["knn"] == 0.25  # all are red, as class a in training is; three are not of it


def test_knn_along_the_way_changes_nothing_of_the_training(tmp_path):
    """The encoder drops paths again, and drops the same."""
    folder_of(tmp_path / "data" / "train" / "only", 20)
    folder_of(tmp_path / "data" / "val" / "only", 3, first=100)
    flags = ["--data", tmp_path / "data", "--drop-path", 0.5]
    for every in (0, 1):
        train_job("moco_v3", [*flags, "--knn-every", every, "--output-dir", tmp_path / f"run{every}"])
    plain, judged = (lines(tmp_path / f"run{every}", without={*TIMES, "knn"}) for every in (0, 1))
    assert judged == plain
    assert all("knn" in line for line in lines(tmp_path / "run1"))


def test_unreadable_images_are_counted_and_named_once(tmp_path, capsys):
    data = folder_of(tmp_path / "data", 20)
    broken = [data / f"{i:02}.png" for i in (3, 4)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    flags = ["--data", data, "--steps", 6, "--output-dir", tmp_path / "run"]
    train_job("dino", flags, stop_after=3)
    train_job("dino", flags)
    assert sorted((tmp_path / "run" / "unreadable.txt").read_text().splitlines()) == list(map(str, broken))
    assert "2 images could not be read" in capsys.readouterr().out


# Along the way


class GreyLevels:
    """A source whose image i is grey level i, of class i."""

    def __init__(self, n):
        self.classes = [str(i) for i in range(n)]

    def __len__(self):
        return len(self.classes)

    def image(self, i, reduction=None):
        return Image.new("RGB", (8, 8), (i, i, i))

    def label(self, i):
        return i

    def name(self, i):
        return str(i)


@pytest.mark.parametrize(("images", "ranks"), [(7, 3), (2, 4), (6, 2), (5, 1)])
def test_each_image_is_embedded_once_and_all_ranks_have_equally_many(images, ranks):
    """A sharded encoder waits for the forwards of all processes, so that one more on some of them hangs."""
    encoder = nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(1))
    gathered = []
    for rank in range(ranks):
        here = SimpleNamespace(
            process_index=rank,
            num_processes=ranks,
            device=torch.device("cpu"),
            gather=lambda x: x,
            autocast=torch.no_grad,
        )
        calls = []
        handle = encoder.register_forward_hook(lambda _, args, out, calls=calls: calls.append(len(out)))
        gathered.append(embeddings(encoder, GreyLevels(images), 8, here, 0))
        handle.remove()
        assert calls == [-(-images // ranks)]
    labels = torch.cat([found for _, found in gathered])
    assert sorted(labels.tolist()) == list(range(images))
    assert torch.cat([features for features, _ in gathered])[labels.argsort(), 0].diff().gt(0).all()


def test_collapse_is_told_once_and_only_after_patience():
    watch = Collapse(threshold=0.1, patience=3)
    assert watch.warning([0.5, 0.05, 0.05]) is None
    assert watch.warning([0.5, 0.05, 0.05]) is None
    assert "collapsed" in watch.warning([0.05])
    assert watch.warning([0.05] * 9) is None
