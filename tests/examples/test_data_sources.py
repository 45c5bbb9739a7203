"""Where images come from: what all sources promise, the embedded photographs, folders, files of every kind."""

import pickle
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures_on_disk import encoded, picture, write_folder, write_parquet, write_shards, write_tar
from PIL import Image

datasets = pytest.importorskip("datasets")
pytest.importorskip("braceexpand")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from data import Subset, open_source  # noqa: E402
from data.folders import ImageFolder  # noqa: E402

from ser_reg import SERError  # noqa: E402
from ser_reg.images import load_patches  # noqa: E402


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture(params=["embedded", "folder", "flat folder", "parquet folder", "parquet files", "shards"])
def source(request, tmp_path):
    """(a source of six pictures or more, its labels as far as known)."""
    if request.param == "embedded":
        return open_source("embedded", "train"), [0] * 6
    if request.param == "folder":
        return open_source(str(write_folder(tmp_path, {"train/cat": 2, "train/dog": 4})), "train"), [0, 0, 1, 1, 1, 1]
    if request.param == "flat folder":
        return open_source(str(write_folder(tmp_path, {".": 6})), "train"), [-1] * 6
    if request.param == "shards":
        data = f"wds:{write_shards(tmp_path)}/train-{{0000..0001}}.tar"
        return open_source(data, "train"), [0, 1, 2, 0, 1, 2]
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", 3)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", 3, first=3)
    data = f"hf:{tmp_path}/data" + ("/*.parquet" if request.param == "parquet files" else "")
    return open_source(data, "train"), [0, 1, 2, 0, 1, 2]


def test_source_has_images_labels_and_names(source):
    source, labels = source
    assert len(source) >= len(labels) == 6
    assert [source.label(i) for i in range(6)] == labels
    assert all(-1 <= label < max(1, len(source.classes)) for label in labels)
    assert len({source.name(i) for i in range(6)}) == 6
    for i in range(6):
        assert source.image(i).mode == "RGB"
        if source.image(i).size != (64, 64):  # not the photographs, which are no `picture`
            assert np.array_equal(source.image(i), picture(i))


def test_source_says_how_large_an_image_is_before_it_is_decoded(source):
    source, _ = source
    asked = []
    image = source.image(1, lambda size: asked.append(size) or 2)
    assert asked in ([image.size], [])  # it need not, if it reads no file; a PNG cannot be scaled
    assert np.array_equal(image, source.image(1))
    assert Subset(source, [4, 1]).image(1, lambda size: 1).tobytes() == image.tobytes()


def test_source_pickles(source):
    source, _ = source
    twin = pickle.loads(pickle.dumps(source))
    assert twin.classes == source.classes
    for i in (5, 0):
        assert np.array_equal(twin.image(i), source.image(i))
        assert (twin.label(i), twin.name(i)) == (source.label(i), source.name(i))


def test_jpegs_can_be_had_smaller(tmp_path):
    jpeg = encoded(picture(0, (83, 41)), "JPEG")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(jpeg)
    write_tar(tmp_path / "train.tar", {"a.jpg": jpeg})
    rows = {"image": [{"bytes": jpeg, "path": None}]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    for data in (str(tmp_path / "flat"), f"wds:{tmp_path}/train.tar", f"hf:{tmp_path}/train.parquet"):
        source, asked = open_source(data, "train"), []
        for factor, size in ((1, (83, 41)), (2, (42, 21)), (4, (21, 11)), (8, (11, 6))):
            image = source.image(0, lambda size, factor=factor, asked=asked: asked.append(size) or factor)
            assert (image.size, image.mode) == (size, "RGB")
        assert asked == [(83, 41)] * 4
        assert Subset(source, [0]).image(0, lambda size: 8).size == (11, 6)


def test_embedded_patches_are_the_photographs():
    train, val = (open_source("embedded", split) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (20 * 96, 20 * 48, 20)
    assert train.classes == val.classes
    assert Counter(map(val.label, range(len(val)))) == dict.fromkeys(range(20), 48)
    patches = load_patches(None, 64, (96, 48), 0)
    for source, images in ((train, patches.train), (val, patches.test)):
        found = torch.from_numpy(np.array(source.image(100))).permute(2, 0, 1)
        torch.testing.assert_close(found / 255, images[100])
    assert not np.array_equal(open_source("embedded", "train", seed=1).image(0), train.image(0))


def test_folder_splits_share_their_classes(tmp_path):
    root = write_folder(tmp_path, {"train/a": 2, "train/b": 1, "train/c": 1, "val/c": 2, "val/a": 1})
    (root / "train" / "a" / ".hidden.png").write_bytes(b"")
    (root / "train" / "a" / "notes.txt").write_text("")
    (root / "train" / ".cache").mkdir()
    train, val = open_source(str(root), "train"), open_source(str(root), "val")
    assert train.classes == val.classes == ["a", "b", "c"]
    assert len(train) == 4
    assert [val.label(i) for i in range(3)] == [0, 2, 2]
    assert val.name(2) == str(root / "val" / "c" / "1.png")


def test_folder_is_light(tmp_path):
    (tmp_path / "train" / "class_of_these").mkdir(parents=True)
    for i in range(2000):
        (tmp_path / "train" / "class_of_these" / f"ILSVRC2012_{i:08}.JPEG").touch()
    assert len(pickle.dumps(ImageFolder(tmp_path, "train"))) < 60 * 2000  # a str alone takes 100 bytes


def test_names_of_any_bytes(tmp_path):
    root = write_folder(tmp_path, {"train/größe": 1})
    source = open_source(str(root), "train")
    assert source.classes == ["größe"]
    assert np.array_equal(source.image(0), picture(0))


FOLDERS = {
    "nowhere": ({}, "nowhere", "train", "no such folder", "--data FOLDER"),
    "a file": ({".": 1}, "0.png", "train", "a file", "--data FOLDER"),
    "empty": ({"train": 0}, ".", "train", "no image in", "ls"),
    "no train": ({"cat": 1, "dog": 1}, ".", "train", "no train/ in it, but 2 sub-folders such as 'cat'", "mkdir"),
    "train itself": ({"train/cat": 1}, "train", "train", "no train/ in it", "--data"),
    "no val": ({"train/cat": 1}, ".", "val", "no val/ in it", "ls"),
    "flat val": ({"train/cat": 1, "val": 2}, ".", "val", "2 images in", "ls"),
    "empty val": ({"train/cat": 1, "val": 0}, ".", "val", "no class in", "ls"),
    "stranger": ({"train/cat": 1, "val/cow": 1}, ".", "val", "classes of val/ that train/ does not have: cow", "ls"),
    "empty class": ({"train/cat": 1, "train/dog": 0}, ".", "train", "no valid file for the classes dog", "find"),
    "mixed": ({"train/cat": 1, "train": 1}, ".", "train", "1 images in", "mkdir"),
    "unlabelled val": ({".": 2}, ".", "val", "images without classes, to train on alone", "ls"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_refused(case, tmp_path):
    counts, name, split, given, remedy = FOLDERS[case]
    write_folder(tmp_path, counts)
    with pytest.raises(SERError) as error:
        open_source(str(tmp_path / name), split)
    assert given in error.value.given
    assert "FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg" in error.value.expected
    assert error.value.remedy.startswith(remedy)
    assert repr(split) in error.value.call


def test_remedy_for_a_missing_train_folder_works(tmp_path):
    root = write_folder(tmp_path / "data", {"cat": 1, "dog": 1})
    with pytest.raises(SERError) as error:
        open_source(str(root), "train")
    subprocess.run(error.value.remedy, shell=True, check=True)
    assert open_source(str(root), "train").classes == ["cat", "dog"]


def test_another_split_is_refused():
    with pytest.raises(SERError, match="train or val"):
        open_source("embedded", "test")


def kinds_of_files():
    """{name: (bytes, what a pixel near the upper left corner should be)}."""
    image = Image.new("RGB", (32, 16), (200, 100, 50))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    sideways = Image.new("RGB", (32, 16), (200, 100, 50))
    sideways.paste((0, 0, 250), (0, 8, 32, 16))  # the lower half, which ends up at the left
    deep = Image.fromarray(np.full((16, 32), 0x6432, dtype=np.uint16))
    palette = image.quantize(4)
    frames = [image, Image.new("RGB", (32, 16), (0, 0, 0))]
    clear = Image.new("RGBA", (32, 16), (200, 100, 50, 128))
    return {
        "rgb.jpg": (encoded(image, "JPEG", quality=95), (200, 100, 50)),
        "exif.jpg": (encoded(sideways, "JPEG", quality=95, exif=exif), (0, 0, 250)),
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG", quality=95), (200, 100, 50)),
        "grey.jpg": (encoded(image.convert("L"), "JPEG", quality=95), (124,) * 3),
        "deep.png": (encoded(deep), (0x64,) * 3),
        "deep.tif": (encoded(deep, "TIFF"), (0x64,) * 3),
        "palette.png": (encoded(palette), (200, 100, 50)),
        "alpha.png": (encoded(clear), (200, 100, 50)),
        "bits.png": (encoded(Image.new("1", (32, 16), 1)), (255,) * 3),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), (200, 100, 50)),
        "web.webp": (encoded(image, "WEBP", lossless=True), (200, 100, 50)),
        "image.bmp": (encoded(image, "BMP"), (200, 100, 50)),
    }


def broken_files():
    photo = encoded(picture(0, (200, 150)), "JPEG")
    return {
        "truncated.jpg": photo[: len(photo) // 2],
        "no_end.jpg": photo[:-200],
        "truncated.png": encoded(picture(0, (200, 150)))[:-300],
        "header.jpg": photo[:30],
        "text.jpg": b"<html>404 Not Found</html>",
        "empty.jpg": b"",
        "zeros.jpg": bytes(1000),
        "float.tif": encoded(Image.new("F", (8, 8), 0.5), "TIFF"),
        "wide.tif": encoded(Image.fromarray(np.full((8, 8), 70000, dtype=np.int32)), "TIFF"),
    }


def test_files_of_every_kind(tmp_path):
    (tmp_path / "train").mkdir()
    files = kinds_of_files()
    for name, (data, _) in files.items():
        (tmp_path / "train" / name).write_bytes(data)
    source = open_source(str(tmp_path), "train")
    assert len(source) == len(files)
    for i in range(len(source)):
        name = Path(source.name(i)).name
        image, pixel = source.image(i), files[name][1]
        assert image.mode == "RGB", name
        assert image.size == ((16, 32) if name == "exif.jpg" else (32, 16)), name
        assert np.abs(np.subtract(image.getpixel((3, 3)), pixel)).max() <= 6, name


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_unreadable_everywhere(name, tmp_path):
    data = broken_files()[name]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_bytes(data)
    write_tar(tmp_path / "train-0.tar", {name: data})
    features = datasets.Features({"image": datasets.Image()})
    row = {"image": [{"bytes": data, "path": name}]}
    datasets.Dataset.from_dict(row, features).to_parquet(tmp_path / "train.parquet")
    for where in (str(tmp_path), f"wds:{tmp_path}/train-0.tar", f"hf:{tmp_path}/train.parquet"):
        source = open_source(where, "train")
        with pytest.raises(SERError) as error:
            source.image(0)
        assert source.name(0) in error.value.call
        assert error.value.given
        assert error.value.remedy
        pickle.loads(pickle.dumps(error.value))  # on its way out of a worker


def test_file_that_went_away(tmp_path):
    source = open_source(str(write_folder(tmp_path, {"train/a": 2})), "train")
    Path(source.name(0)).unlink()
    with pytest.raises(SERError, match="FileNotFoundError"):
        source.image(0)
