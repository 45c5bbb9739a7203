"""Features: those of the last blocks, computed once, kept whole, never taken for another's."""

import math
import shutil

import numpy as np
import pytest
import torch
from encoder_to_judge import TINY, picture
from pictures_on_disk import Pictures

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from data import Subset, open_source  # noqa: E402
from data.recipe import evaluation_transform  # noqa: E402
from evaluation import encoder, features  # noqa: E402

from ser_reg import IMAGENET, SERError, export_timm, late_cls, load_encoder  # noqa: E402


@pytest.fixture(autouse=True)
def _accelerate_begins_anew():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_class_tokens_are_those_of_the_last_blocks(exported):
    made = encoder.load(str(exported))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = features.class_tokens(made, 3).compute(made, images)
    vit, inputs = made.model, made.normalise(images)
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
        "images": (exported, Subset(source, [*range(24), 0]), {}),
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


def test_mended_images_are_read_again(exported, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 10)
    shutil.copytree(folder, tmp_path / "data")
    broken, cache = tmp_path / "data" / "val" / "red" / "broken.jpg", tmp_path / "cache"
    made = open_source(str(tmp_path / "data"), "val")
    assert len(extracted(exported, made, cache).labels) == 24
    times = {path.name: path.stat().st_mtime_ns for path in (cache / "last2").iterdir()}
    shutil.copy(folder / "val" / "red" / "00.png", broken)
    found = extracted(exported, made, cache)
    assert not found.unreadable
    assert len(found["cls"]) == len(found.labels) == 25
    again = {path.name for path in (cache / "last2").iterdir() if path.stat().st_mtime_ns != times[path.name]}
    assert again == {"00001.safetensors"}  # the file that it belongs to, and no other


def test_embeddings_are_of_the_normalised_pixels_of_all_batches():
    class Flat(torch.nn.Flatten):
        """An encoder that passes on what it is given."""

    source = Pictures(n=300, broken=(7,))  # more than are read or embedded at a time
    with pytest.warns(UserWarning, match="picture 7"):
        found, labels = features.embeddings(Flat(), source, 16, Accelerator(cpu=True), 0)
    assert torch.equal(labels, torch.tensor([i % 2 for i in range(300) if i != 7]))
    expected = torch.stack([evaluation_transform(16)(source.image(i)) for i in range(300) if i != 7])
    stored, unreadable = features.read(source, 16, 0)
    assert torch.equal(stored, expected)
    assert [name for name, _ in unreadable] == ["picture 7"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    torch.testing.assert_close((found.view(-1, 3, 16, 16) * std + mean) * 255, expected.float())


def test_features_that_are_no_numbers_are_refused(exported, folder, tmp_path):
    made, source = encoder.load(str(exported)), open_source(str(folder), "val")
    recipe = features.Extraction("nan", lambda encoder, images: {"pooled": torch.full((len(images), 2), math.nan)})
    with pytest.raises(SERError, match="pooled that are infinite or not a number, of 24 images"):
        features.extract(Accelerator(cpu=True), made, source, recipe, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


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
