"""examples/evaluate.py: each judgement against what must come out, what must be refused, and the command line."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES)]

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

import evaluate  # noqa: E402
import probes  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from evaluation import encoder, features, transformations, tsne  # noqa: E402
from evaluation.augmented import AugmentedImages  # noqa: E402
from evaluation.classifiers import CachedBatches, choose_rate, fit, linear, mlp, predict, split, top  # noqa: E402
from evaluation.finetune import Recipe as Finetuning  # noqa: E402
from evaluation.finetune import classifier, finetune  # noqa: E402
from evaluation.progress import Progress  # noqa: E402
from evaluation.shift import ClassFolders, accuracies  # noqa: E402
from pretraining.sources import open_source  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402

from ser_reg import SERError, cls_layer, export_timm, late_cls, load_encoder  # noqa: E402

CPU = torch.device("cpu")
TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "dynamic_img_size": True}
CLASSES = {"green": (40, 200, 40), "red": (220, 30, 30), "violet": (120, 40, 220)}
LATE = 2


@pytest.fixture(autouse=True)
def _accelerate_begins_anew():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny encoder, [CLS] joining after two blocks, as a training leaves it."""
    folder = tmp_path_factory.mktemp("run") / "encoder"
    torch.manual_seed(0)
    vit = late_cls(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY), LATE)
    export_timm(vit, folder, "vit_tiny_patch16_224", **TINY)
    return folder


def picture(path, colour, draw):
    """A colour that is bright on top and dark on the right, so that every turn and flip shows."""
    rows, columns = np.linspace(1, 0.2, 40)[:, None, None], np.linspace(1, 0.4, 40)[None, :, None]
    pixels = np.array(colour) * rows * columns + draw.normal(0, 8, (40, 40, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FOLDER/train/CLASS and FOLDER/val/CLASS; one file of the latter is no image."""
    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, n in (("train", 20), ("val", 8)):
        for name, colour in CLASSES.items():
            for i in range(n):
                picture(root / part / name / f"{i:02}.png", colour, draw)
    (root / "val" / "red" / "broken.jpg").write_bytes(b"not a picture")
    return root


def call(subcommand, model, data, out, *flags):
    """Results of evaluate.py in this process."""
    arguments = ["--model", model, "--data", data, "--output-dir", out, "--workers", 0, "--device", "cpu", *flags]
    evaluate.main([subcommand, *map(str, arguments)])
    return json.loads((out / f"{subcommand}.json").read_text())


def batches(x, y, batch_size=64):
    return CachedBatches(x, y, batch_size, 0, CPU)


# k-NN


@pytest.mark.parametrize(("queries", "bank"), [(4096, 2**14), (7, 11)])
def test_knn_is_scikit_learns(monkeypatch, queries, bank):
    monkeypatch.setattr(probes, "QUERIES", queries)
    monkeypatch.setattr(probes, "BANK", bank)
    draw = torch.Generator().manual_seed(0)
    train, test = torch.randn(200, 6, generator=draw), torch.randn(90, 6, generator=draw)
    train_labels, test_labels = train.argmax(1), test.argmax(1)
    neighbours = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = neighbours.fit(train.numpy(), train_labels).score(test.numpy(), test_labels)
    assert 0.5 < expected < 1
    assert probes.knn_accuracy(train, train_labels, test, test_labels) == pytest.approx(expected, abs=1e-12)


def test_knn_in_parts_finds_the_same_neighbours(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 4, generator=draw), torch.randn(30, 4, generator=draw)
    test = torch.nn.functional.normalize(test, dim=1)
    whole = probes._nearest(test, train, 20)
    monkeypatch.setattr(probes, "BANK", 9)  # less than there are neighbours
    parts = probes._nearest(test, train, 20)
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


# Classifiers


def clouds(n, classes=4, width=12, spread=0.3):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    return torch.eye(classes, width)[labels] * 3 + spread * torch.randn(n, width, generator=draw), labels


def test_linear_separates_what_is_separable():
    (x, y), (inner, held) = clouds(400), split(400, 0)
    heads = fit(linear(), 12, 4, [0.1, 1.0], batches(x[inner], y[inner]), 10, 0, CPU)
    found = choose_rate(heads, [0.1, 1.0], x[held], y[held])
    assert max(found.values()) == 1


def test_linear_is_at_chance_on_shuffled_labels():
    x, y = clouds(1200)
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    [head] = fit(linear(), 12, 4, [1.0], batches(x[:800], y[:800]), 10, 0, CPU)
    accuracy = top(predict(head, x[800:]), y[800:], 1)
    assert abs(accuracy - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)


def test_mlp_tells_what_no_line_does():
    x = torch.randn(800, 2, generator=torch.Generator().manual_seed(0))
    y = (x.prod(1) > 0).long()
    scores = {}
    for kind, rate in ((linear(), 0.3), (mlp(32), 3e-3)):
        [head] = fit(kind, 2, 2, [rate], batches(x[:600], y[:600]), 20, 0, CPU)
        scores[len(list(head.parameters()))] = top(predict(head, x[600:]), y[600:], 1)
    assert scores[2] < 0.65
    assert scores[6] > 0.9


def test_a_diverged_rate_is_not_chosen():
    x, y = clouds(200)
    heads = fit(linear(), 12, 4, [1.0, 1e38], batches(x, y), 5, 0, CPU)
    assert not predict(heads[1], x).isfinite().all()
    assert choose_rate(heads, [1.0, 1e38], x, y) == {1.0: 1.0, 1e38: 0.0}
    with pytest.raises(SERError, match="diverged"):
        top(predict(heads[1], x), y, 1)


def test_each_rate_is_trained_as_if_alone():
    x, y = clouds(200)
    both = fit(linear(), 12, 4, [0.1, 1.0], batches(x, y), 3, 0, CPU)
    [alone] = fit(linear(), 12, 4, [1.0], batches(x, y), 3, 0, CPU)
    assert torch.equal(both[1].weight, alone.weight)
    assert not torch.equal(both[0].weight, alone.weight)


def test_batches_are_of_the_places_asked_for():
    (x, y), places = clouds(100), torch.arange(0, 100, 3)
    some = CachedBatches(x, y, 10, 0, CPU, places)
    assert (some.steps, len(list(some(0)))) == (3, 3)
    seen = torch.cat([features for features, _ in some(0)])
    assert (seen[:, None] == x[places]).all(-1).any(1).all()
    copied = CachedBatches(x[places], y[places], 10, 0, CPU)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(some(1), copied(1), strict=True))


def test_held_out_images_are_no_training_images():
    inner, held = split(1000, 3)
    assert not set(inner.tolist()) & set(held.tolist())
    assert (len(inner), len(held)) == (900, 100)
    assert len(split(10**6, 0)[1]) == 50_000
    with pytest.raises(SERError, match="two at least"):
        split(1, 0)


def test_top_counts_the_best_scores():
    scores, labels = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]]), torch.tensor([1, 2, 2])
    assert [top(scores, labels, k) for k in (1, 2, 5)] == pytest.approx([1 / 3, 2 / 3, 1])


# The encoder: [CLS] where it was in training


def test_late_cls_changes_the_features_and_is_refused_where_it_is_missing(exported):
    right, plain = load_encoder(str(exported)), timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    assert (cls_layer(right), cls_layer(plain)) == (LATE, 0)
    images = torch.randn(4, 3, 32, 32)
    assert (right(images) - plain(images)).abs().max() > 0.01
    for name in (str(exported), "my.module:load"):  # by the name that was given, by what timm remembers
        with pytest.raises(SERError, match=r"given:    a model whose \[CLS\] joins after 0 blocks") as error:
            encoder.wrap(plain, name)
        assert error.value.remedy.startswith(f"ser_reg.late_cls(vit, {LATE})")
    assert encoder.wrap(late_cls(plain, LATE), str(exported)).late_cls == LATE
    for trained in (LATE, str(LATE)):
        encoder.check_cls_layer(right, trained)
    with pytest.raises(SERError, match="after 3, as its weights were trained"):
        encoder.check_cls_layer(right, 3)


def test_late_cls_is_in_the_score(exported, folder, tmp_path):
    images = features.read(open_source("embedded", "val"), 32, 0)[0][::4]
    right = encoder.load(str(exported))
    plain = late_cls(load_encoder(str(exported)), 0)
    one, other = (probes.embed(vit, right.normalise(images)) for vit in (right.vit, plain))
    assert (one - other).norm() > 0.05 * one.norm()
    assert encoder._fingerprint(right.vit) != encoder._fingerprint(plain)  # so that no cache is shared


@pytest.mark.parametrize("form", ["{}", "{}/model.safetensors", "local-dir:{}"])
def test_every_way_to_an_export_is_corrected(exported, form):
    made = encoder.load(form.format(exported))
    assert (made.late_cls, made.size) == (LATE, 32)
    assert made.mean == pytest.approx((0.485, 0.456, 0.406))  # of the export; timm's own for this name is 0.5


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


# Features


def test_class_tokens_are_those_of_the_last_blocks(exported):
    made = encoder.load(str(exported))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = features.class_tokens(made, 3).compute(made, images)
    vit, inputs = made.vit, made.normalise(images)
    torch.testing.assert_close(found["pooled"], vit(inputs))
    torch.testing.assert_close(found["cls"][:, -48:], vit(inputs))
    seen = []
    handles = [block.register_forward_hook(lambda *call: seen.append(call[-1])) for block in vit.blocks[1:]]
    vit(inputs)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found["cls"], torch.cat([vit.norm(tokens)[:, 0] for tokens in seen], 1))


def extracted(model, source, cache, **more):
    made = encoder.load(str(model), more.pop("size", None))
    return features.extract(Accelerator(cpu=True), made, source, features.class_tokens(made, 2), cache, **more)


def test_unreadable_images_are_left_out_and_named(exported, folder, tmp_path):
    found = extracted(exported, open_source(str(folder), "val"), tmp_path, batch_size=5)
    [(name, why)] = found.unreadable
    assert name.endswith("val/red/broken.jpg")
    assert "UnidentifiedImageError" in why
    assert len(found.labels) == len(found["cls"]) == 24
    assert found.labels.bincount().tolist() == [8, 8, 8]


def test_stopped_extraction_goes_on(exported, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 10)
    source = open_source(str(folder), "val")
    whole = extracted(exported, source, tmp_path, batch_size=4)["cls"]
    paths = sorted((tmp_path / "last2").iterdir())
    assert [path.name for path in paths] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    paths[1].rename(paths[1].with_name(f".123-{paths[1].name}"))  # as a killed process leaves a half-written one
    times, said = [paths[i].stat().st_mtime_ns for i in (0, 2)], []
    again = extracted(exported, source, tmp_path, batch_size=4, note=said.append)
    assert torch.equal(again["cls"], whole)
    assert [paths[i].stat().st_mtime_ns for i in (0, 2)] == times
    assert "features of 10 of 25 images" in said[0]


def test_stopped_half_way_leaves_whole_files_only(exported, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 10)
    made, source = encoder.load(str(exported)), open_source(str(folder), "val")
    recipe, calls = features.class_tokens(made, 2), []

    def until_the_third_call(*both):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return recipe.compute(*both)

    stopped = recipe._replace(compute=until_the_third_call)
    with pytest.raises(KeyboardInterrupt):
        features.extract(Accelerator(cpu=True), made, source, stopped, tmp_path, batch_size=5)
    assert [path.name for path in (tmp_path / "last2").iterdir()] == ["00000.safetensors"]


def test_cached_features_of_something_else_are_refused(exported, folder, tmp_path):
    source = open_source(str(folder), "val")
    extracted(exported, source, tmp_path)
    path = tmp_path / "last2" / "00000.safetensors"
    other = late_cls(load_encoder(str(exported)), 1)
    export_timm(other, tmp_path / "other", "vit_tiny_patch16_224", **TINY)  # the same weights
    for wrong, arguments in {
        "model": (tmp_path / "other", source, {}),
        "images": (exported, features.Some(source, [*range(24), 0]), {}),
        "transform": (exported, source, {"size": 24}),
    }.items():
        model, images, more = arguments
        with pytest.raises(SERError, match=f"given:    {wrong} ") as error:
            extracted(model, images, tmp_path, **more)
        assert error.value.remedy == f"rm -r '{path.parent}'  # or --cache ELSEWHERE"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SERError, match="a whole file") as error:
        extracted(exported, source, tmp_path)
    assert error.value.remedy == f"rm '{path}'"


def test_features_that_are_no_numbers_are_refused(exported, folder, tmp_path):
    made, source = encoder.load(str(exported)), open_source(str(folder), "val")
    recipe = features.Recipe("nan", lambda encoder, images: {"pooled": torch.full((len(images), 2), math.nan)})
    with pytest.raises(SERError, match="pooled that are infinite or not a number, of 24 images"):
        features.extract(Accelerator(cpu=True), made, source, recipe, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_sizes_that_the_model_does_not_take_are_refused(exported):
    assert encoder.load(str(exported), 40).size == 40
    with pytest.raises(SERError, match="a multiple of 4") as error:
        encoder.load(str(exported), 30)
    assert error.value.remedy == "--size 28"
    static = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY | {"dynamic_img_size": False})
    assert encoder.wrap(static, "mine").size == 32
    with pytest.raises(SERError, match="32 x 32 pixels, the only size"):
        encoder.wrap(static, "mine", 40)


def test_other_pixels_under_the_same_names_are_noticed(exported, folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    extracted(exported, open_source(str(data), "val"), tmp_path)
    for path in (data / "val").rglob("*.png"):
        picture(path, (9, 9, 9), np.random.default_rng(1))
    with pytest.raises(SERError, match="given:    images "):
        extracted(exported, open_source(str(data), "val"), tmp_path)


def test_nothing_readable_says_so(exported, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "1.jpg").write_bytes(b"")
    with pytest.raises(SERError, match="1 images, none readable"):
        extracted(exported, open_source(str(tmp_path), "val"), tmp_path / "cache")


# Random crops


def test_crops_do_not_depend_on_the_number_of_processes(folder):
    source = open_source(str(folder), "train")
    labels = torch.tensor([source.label(i) for i in range(len(source))])

    def drawn(rank, world, epoch):
        accelerator = SimpleNamespace(num_processes=world, process_index=rank, device=CPU)
        return list(AugmentedImages(accelerator, source, list(range(50)), labels, 16, 12, 0, 0)(epoch))

    alone, parts, later = drawn(0, 1, 0), [drawn(rank, 2, 0) for rank in (0, 1)], drawn(0, 1, 1)
    assert len(alone) == 4
    for whole, *halves in zip(alone, *parts, strict=True):
        assert torch.equal(whole[0], torch.cat([images for images, _ in halves]))
        assert torch.equal(whole[1], torch.cat([labels for _, labels in halves]))
    assert not torch.equal(alone[0][0], later[0][0])
    assert torch.cat([labels for _, labels in alone]).bincount().min() > 5


@pytest.mark.parametrize("stop", [0, 1])
def test_finetuning_goes_on_where_it_was_stopped(exported, folder, tmp_path, stop):
    accelerator, made, source = Accelerator(cpu=True), encoder.load(str(exported)), open_source(str(folder), "train")
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    images = AugmentedImages(accelerator, source, list(range(60)), labels, 32, 30, 0, 0)
    recipe = Finetuning(2, 0.5, 1e-3, 0.05, 0.75, 0.1)

    def trained(name, show=lambda epoch: None, **key):
        progress = Progress(tmp_path / f"{name}.progress", key, writes=True)
        return finetune(accelerator, made, classifier(made, 3, 0), images, recipe, progress, show).state_dict()

    def interrupt(epoch):
        if epoch == stop:
            raise KeyboardInterrupt

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", interrupt)
    again = trained("stopped")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    start = classifier(made, 3, 0)
    assert cls_layer(start) == LATE
    moved = {name for name, value in start.state_dict().items() if not torch.equal(value, whole[name])}
    assert moved == set(whole)  # the whole network is trained
    Progress(tmp_path / "rate.progress", {"rate": 3}, writes=True).save({})
    with pytest.raises(SERError, match="a training with rate 3") as error:
        Progress(tmp_path / "rate.progress", {"rate": 1}, writes=True).load()
    assert "rm '" in error.value.remedy


# Turns and flips


def sets_of(make, n):
    """What Features give for layer 1: `make(element)` is (n, D)."""
    return {f"1/{element}": make(n, number) for number, element in enumerate(transformations.ELEMENTS)}


def test_probes_are_at_chance_on_features_that_know_nothing():
    draw = torch.Generator().manual_seed(0)
    train, test = (sets_of(lambda n, number: torch.randn(n, 16, generator=draw), n) for n in (600, 400))
    found = transformations.probe(train, test, [1])
    for task, elements in transformations.TASKS.items():
        chance = 1 / len(elements)
        assert abs(found[task][1] - chance) < 4 * math.sqrt(chance * (1 - chance) / (400 * len(elements)))


def test_probes_read_what_is_there():
    def make(n, number):  # tells turns apart, and of flips nothing
        return torch.eye(4, 16)[number % 4] + 0.1 * torch.randn(n, 16)

    found = transformations.probe(sets_of(make, 100), sets_of(make, 100), [1])
    assert found["rotation"][1] == 1
    assert found["flip"][1] < 0.7


def test_layers_are_parts_of_the_depth(exported):
    made = encoder.load(str(exported))
    assert transformations.layers_of(made, ()) == [1, 2, 3, 4]
    twelve = made._replace(vit=SimpleNamespace(blocks=[None] * 12))
    assert transformations.layers_of(twelve, ()) == [1, 3, 6, 9, 12]
    with pytest.raises(SERError, match="from 1 to 4"):
        transformations.layers_of(made, (5,))


# Shifts


def test_choice_is_among_the_classes_that_occur():
    layer = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.eye_(layer.weight)
    x, labels = torch.tensor([[2.0, 9, 1], [1, 9, 2], [3, 9, 1]]), torch.tensor([0, 2, 2])
    found = accuracies(layer, x, labels)
    assert (found["classes"], found["images"]) == (2, 3)
    assert found["top1"] == pytest.approx(2 / 3)
    assert found["top1_among_all"] == 0
    assert found["top5_among_all"] == 1


def test_class_folders(tmp_path):
    classes = ["n01", "n02", "n03"]
    with pytest.raises(SERError, match="no such folder"):
        ClassFolders(tmp_path / "nowhere", classes)
    for name in ("n03", "n01"):
        picture(tmp_path / "named" / name / "1.png", (1, 2, 3), np.random.default_rng(0))
        picture(tmp_path / "numbered" / str(int(name[1:]) - 1) / "1.png", (1, 2, 3), np.random.default_rng(0))
    for kind in ("named", "numbered"):
        source = ClassFolders(tmp_path / kind, classes)
        assert [source.label(i) for i in range(len(source))] == [0, 2]
    (tmp_path / "named" / "n02").mkdir()
    with pytest.raises(SERError, match="n02") as error:
        ClassFolders(tmp_path / "named", classes)
    assert error.value.remedy == f"find '{tmp_path / 'named'}' -type d -empty"
    (tmp_path / "named" / "n02").rename(tmp_path / "named" / "zebra")
    with pytest.raises(SERError, match="1 of 3 sub-folders that are no class of the classifier: zebra"):
        ClassFolders(tmp_path / "named", classes)
    with pytest.raises(SERError, match="no sub-folder"):
        ClassFolders(tmp_path / "named" / "zebra", classes)


# t-SNE


def test_some_classes_are_those_asked_for():
    labels = torch.arange(3000) % 30
    places = tsne.some_classes(labels, 20, 10, 0)
    assert labels[places].bincount(minlength=30).sort().values.tolist() == [0] * 10 + [10] * 20
    assert not torch.equal(places, tsne.some_classes(labels, 20, 10, 1))
    with pytest.raises(SERError, match="--classes 1"):
        tsne.some_classes(labels, 1, 10, 0)


# The whole, from the command line

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
    model = ("resnet18", folder, tmp_path)
    flags = ("--no-pretrained", "--size", 32)
    assert call("knn", *model, *flags)["model"]["late_cls"] is None
    with pytest.raises(SERError, match=r"no normalised \[CLS\] in its blocks") as error:
        call("linear", *model, *flags)
    assert error.value.remedy.startswith("evaluate.py linear --last 1")
    assert call("linear", *model, *flags, "--last", 1, "--epochs", 2)["results"]["test_images"] == 24
    for name in ("probe", "equivariance"):
        with pytest.raises(SERError, match="blocks with patch tokens"):
            call(name, *model, *flags)
    assert {path.name for path in tmp_path.glob("*.json")} == {"knn.json", "linear.json"}


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
