"""The quickstart: its encoder, its data, its loop at lambda = 0, and the whole of it from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent / "benchmarks")]

pytest.importorskip("accelerate")
pytest.importorskip("braceexpand")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("tyro")

import quickstart  # noqa: E402
import quickstart_table  # noqa: E402
from moco_v3 import MoCoV3  # noqa: E402
from photo_patches import load_patches, split_in_space  # noqa: E402
from pretraining.schedules import cosine  # noqa: E402
from probes import knn_accuracy  # noqa: E402
from results import LOGGED, atomically, last_tenth  # noqa: E402
from settings import Settings  # noqa: E402

from ser_reg import SERError, embedded_photographs, read_image  # noqa: E402

CPU = torch.device("cpu")
TINY = Settings(steps=3, batch_size=8, image_size=16, patch_size=4, width=16, depth=4, heads=2, layer=2)


@pytest.fixture(scope="module")
def images():
    return torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# The loop


def base_method_alone(settings, images):
    """MoCo-v3 as if SER had never been written."""
    torch.manual_seed(settings.seed)
    vit = quickstart.build(settings)
    moco = MoCoV3(vit, settings.width, hidden=512, out=128)
    trained = [p for p in moco.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    crops, views = quickstart.policies(settings)
    torch.manual_seed(settings.seed + 1)
    losses = []
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * quickstart.warm_cosine(step, settings.steps)
        batch = images[torch.randperm(len(images))[:8]]
        pair = views(batch[6:])
        view1, view2 = [crops(batch[:6]), pair.x1], [crops(batch[:6]), pair.x2]
        embeddings = [torch.cat([vit(x) for x in view]) for view in (view1, view2)]
        moco.follow(cosine(step / settings.steps, settings.momentum, 1.0))
        with torch.no_grad():
            targets = [torch.cat([moco.target(x) for x in view]) for view in (view1, view2)]
        loss = moco(embeddings, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return vit, torch.stack(losses)


def test_lambda_zero_is_the_base_method_bit_for_bit(images, monkeypatch):
    def built(*args, **kwargs):
        raise AssertionError("SER was built though its weight is 0")

    monkeypatch.setattr(quickstart, "SERLoss", built)
    vit, log = quickstart.train(TINY, images, 0.0, CPU)
    plain, losses = base_method_alone(TINY, images)
    assert log.shape == (3, 1)
    assert torch.equal(log[:, 0], losses)
    for (name, value), other in zip(vit.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_ser_changes_gradients_up_to_its_layer_and_nothing_else(images):
    settings = Settings(**vars(TINY) | {"steps": 1})
    control, control_log = quickstart.train(settings, images, 0.0, CPU)
    regularized, log = quickstart.train(settings, images, 1.0, CPU)
    assert torch.equal(control_log[:, 0], log[:, 0])  # same weights, batch and views
    for i, (block, other) in enumerate(zip(control.blocks, regularized.blocks, strict=True)):
        for (name, p), q in zip(block.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad) == (i >= settings.layer), f"block {i}, {name}"


def test_training_learns_the_ser_task():
    images = load_patches(None, image_size=16, per_photo=(8, 1), seed=0).train
    settings = Settings(**vars(TINY) | {"steps": 40, "batch_size": 16, "partition_ratio": 0.5})
    _, log = quickstart.train(settings, images, 1.0, CPU)
    below_chance = log[:, 2] - log[:, 1]
    assert below_chance[-10:].mean() > below_chance[:5].mean() + 0.3


# The base method, whose losses test_pretraining.py compares with their formulas


def test_official_initialisation_is_not_trained():
    vit = quickstart.build(TINY)
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert vit.pos_embed[0, 0].abs().max() == 0
    assert len(vit.pos_embed[0].unique(dim=0)) == vit.pos_embed.shape[1]
    learned = quickstart.build(Settings(**vars(TINY) | {"fixed_positions": False, "fixed_patches": False}))
    assert all(p.requires_grad for p in learned.parameters())


def test_knn_is_its_formula():
    draw = torch.Generator().manual_seed(0)
    train, test = torch.randn(30, 5, generator=draw), torch.randn(12, 5, generator=draw)
    train_labels, test_labels = torch.arange(30) % 3, torch.arange(12) % 3
    right = 0
    for x, label in zip(test, test_labels, strict=True):
        cosine = [(float(x @ t / x.norm() / t.norm()), int(c)) for t, c in zip(train, train_labels, strict=True)]
        votes = [0.0, 0.0, 0.0]
        for similarity, c in sorted(cosine, reverse=True)[:4]:
            votes[c] += torch.tensor(similarity / 0.07).exp().item()
        right += votes.index(max(votes)) == label
    assert knn_accuracy(train, train_labels, test, test_labels, k=4) == pytest.approx(right / 12)


# The data


def save(path, height, width, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


def test_all_photographs_come_with_the_packages():
    photographs = embedded_photographs()
    assert len(photographs) == 20
    for name, photograph in photographs.items():
        assert photograph.shape[0] == 3, name
        assert photograph.dtype == torch.uint8, name
        assert photograph.float().std() > 5, f"{name} is empty"


@pytest.mark.parametrize("size", [(7, 10), (10, 7), (512, 512), (41, 300)])
def test_split_shares_no_pixel(size):
    pixels = torch.arange(size[0] * size[1]).view(1, *size)
    train, test = (set(part.flatten().tolist()) for part in split_in_space(pixels))
    assert not train & test
    assert len(train | test) == pixels.numel()
    assert len(train) == pytest.approx(0.7 * pixels.numel(), abs=0.51 * min(size))


def test_held_out_patches_see_nothing_of_the_training_part(tmp_path):
    for name, size in (("wide", (40, 100)), ("tall", (100, 40)), ("square", (50, 50))):
        picture = Image.new("RGB", size[::-1], "black")
        width, height = picture.size
        right = (round(0.7 * width), 0, width, height) if width >= height else (0, round(0.7 * height), width, height)
        picture.paste("white", right)
        picture.save(tmp_path / f"{name}.png")
    data = load_patches(tmp_path, image_size=12, per_photo=(30, 20), seed=0)
    assert data.train.shape == (90, 3, 12, 12)
    assert data.test.shape == (60, 3, 12, 12)
    assert data.train.max() == 0
    assert data.test.min() == 1


def test_labels_name_the_photograph(tmp_path):
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
    for name, colour in colours.items():
        save(tmp_path / f"{name}.png", 30, 40, colour)
    data = load_patches(tmp_path, image_size=8, per_photo=(4, 3), seed=0)
    assert data.names == ["a.png", "b.png", "c.png"]
    for patches, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert torch.equal(patches.mean((2, 3)).argmax(1), labels)


def test_sub_folders_are_classes_and_images_are_held_out(tmp_path):
    for label, name in enumerate(("cats", "dogs")):
        for i in range(10):
            save(tmp_path / name / f"{i}.png", 20, 30, (100 * label, 10 * i, 0))
    data = load_patches(tmp_path, image_size=8, per_photo=(1, 1), seed=0)
    assert data.names == ["cats", "dogs"]
    assert (len(data.train), len(data.test)) == (14, 6)
    images = {tuple((255 * x).round().int().tolist()) for x in data.train[:, :, 0, 0]}
    held_out = {tuple((255 * x).round().int().tolist()) for x in data.test[:, :, 0, 0]}
    assert not images & held_out
    assert len(images | held_out) == 20
    assert torch.equal(data.test[:, 0, 0, 0] > 0.2, data.test_labels == 1)


def test_same_seed_same_patches(tmp_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    save(tmp_path / "a.png", 30, 40, "red")
    Image.effect_noise((60, 50), 80).save(tmp_path / "b.png")
    first, second, other = (load_patches(tmp_path, 8, (5, 5), seed) for seed in (0, 0, 1))
    assert torch.equal(first.train, second.train)
    assert not torch.equal(first.train, other.train)
    assert torch.equal(torch.get_rng_state(), state)


# What goes wrong

REMEDY = "python examples/quickstart.py --images FOLDER  # FOLDER/*.jpg, or FOLDER/CLASS/*.jpg"


def test_missing_folder_says_so(tmp_path):
    folder = tmp_path / "nowhere"
    with pytest.raises(SERError) as error:
        load_patches(folder, 8, (1, 1), 0)
    assert str(error.value) == (
        f"load_patches({str(folder)!r})\n"
        "  given:    no such folder\n"
        "  expected: a folder of images\n"
        f"  remedy:   {REMEDY}"
    )


def test_useless_folders_say_so(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(SERError, match="no image in it"):
        load_patches(tmp_path, 8, (1, 1), 0)
    save(tmp_path / "a.png", 30, 40, "red")
    with pytest.raises(SERError, match=r"only \['a.png'\]"):
        load_patches(tmp_path, 8, (1, 1), 0)
    save(tmp_path / "b.png", 5, 40, "red")
    with pytest.raises(SERError, match=r"b.png of 5 pixels a side"):
        load_patches(tmp_path, 8, (1, 1), 0)
    (tmp_path / "b.png").unlink()
    save(tmp_path / "sub" / "b.png", 30, 40, "red")
    with pytest.raises(SERError, match="1 images in the folder itself and sub-folders"):
        load_patches(tmp_path, 8, (1, 1), 0)
    (tmp_path / "a.png").unlink()
    save(tmp_path / "other" / "c.png", 30, 40, "red")
    with pytest.raises(SERError, match="one image in class 'other'"):
        load_patches(tmp_path, 8, (1, 1), 0)


def test_unreadable_image_is_named(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"not a picture")
    with pytest.raises(SERError, match="an image that Pillow can read") as error:
        read_image(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"image_size": 18},
        {"heads": 3},
        {"partition_ratio": 0.0},
        {"partition_ratio": 1.0},
        {"layer": 5},
        {"ser_lambda": -1.0},
    ],
)
def test_settings_that_do_not_fit_say_what_to_type(wrong):
    TINY.check()
    with pytest.raises(SERError, match="remedy:   python examples/quickstart.py --"):
        Settings(**vars(TINY) | wrong).check()


# The whole


def run(*flags):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "80"})


def test_command_line_end_to_end(tmp_path):
    out = tmp_path / "out"
    flags = "--steps 2 --batch-size 8 --image-size 8 --width 8 --heads 2 --depth 2 --layer 1"
    flags += " --train-patches 4 --test-patches 2"
    done = run(*flags.split(), "--output-dir", out)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert {path.name for path in out.iterdir()} == {"quickstart.png", "results.json"}
    with Image.open(out / "quickstart.png") as picture:
        picture.verify()
        assert min(picture.size) > 1000
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"settings", "environment", "data", "references", "arms", "seconds"}
    assert results["settings"]["steps"] == 2
    assert results["environment"]["versions"]["torch"]
    assert (results["data"]["train"], results["data"]["held_out"]) == (80, 40)
    assert [arm["ser_lambda"] for arm in results["arms"].values()] == [0, 1]
    assert list(results["arms"]) == ["control", "ser"]
    assert set(results["arms"]["control"]["history"]) == {"base_loss"}
    assert set(results["arms"]["ser"]["history"]) == set(LOGGED)
    assert all(len(values) == 2 for values in results["arms"]["ser"]["history"].values())
    for measured in (*results["arms"].values(), results["references"]["untrained"]):
        assert set(measured["accuracy"]) == {"knn", "linear"}
        assert set(measured["equivariance"]) == {"rotation", "flip", "scale"}
        for layers in measured["equivariance"].values():
            assert set(layers) == {"1", "2"}
            assert set(layers["1"]) == {"raw", "spatial", "raw_floor", "spatial_floor"}
    knn = results["arms"]["ser"]["accuracy"]["knn"]
    assert f"{100 * knn:.1f}" in done.stdout  # what is printed is what is stored
    assert "spatial, layer 2" in done.stdout
    assert "…" not in done.stdout
    published = quickstart_table.table(quickstart_table.load([out / "results.json"])).splitlines()
    assert len({row.count("|") for row in published}) == 1
    assert f"| {100 * knn:.1f} |" in published[2]
    assert max(len(line) for line in done.stdout.splitlines() if "rotation" in line) <= 80  # fits a terminal


def test_nothing_is_left_half_written(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def stopped_halfway():
        with atomically(path) as part:
            part.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_halfway()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("results.json", "old")]
    with atomically(path) as part:
        part.write_text("new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("results.json", "new")]


def test_last_tenth_is_at_least_one_step():
    assert last_tenth([1.0, 2.0, 5.0]) == 5
    assert last_tenth([float(i) for i in range(20)]) == 18.5


def test_command_line_errors_are_messages_not_tracebacks(tmp_path):
    done = run("--images", tmp_path / "nowhere", "--output-dir", tmp_path / "out")
    assert done.returncode == 1
    assert "given:    no such folder" in done.stderr
    assert "Traceback" not in done.stderr
