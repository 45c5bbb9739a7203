"""Data sets of the `datasets` library."""

import re

import numpy as np
import pytest
from pictures_on_disk import encoded, picture, write_parquet

datasets = pytest.importorskip("datasets")
pytest.importorskip("braceexpand")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from data import open_source  # noqa: E402

from ser_reg import SERError  # noqa: E402


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def test_parquet_splits(tmp_path):
    write_parquet(tmp_path / "d" / "train-00000-of-00001.parquet", 5)
    write_parquet(tmp_path / "d" / "validation-00000-of-00001.parquet", 3, first=5)
    for data in (f"hf:{tmp_path}/d", f"hf:{tmp_path}/d/{{split}}-*.parquet"):
        train = open_source(data, "train")
        assert (len(train), train.classes) == (5, ["a", "b", "c"])
        assert train.name(2) == f"{data} train[2]"
        if "{split}" in data:
            (tmp_path / "d" / "validation-00000-of-00001.parquet").rename(tmp_path / "d" / "val-0.parquet")
        val = open_source(data, "val")
        assert len(val) == 3
        assert np.array_equal(val.image(1), picture(6))


def test_parquet_without_labels(tmp_path):
    write_parquet(tmp_path / "train.parquet", 2, labels=False)
    source = open_source(f"hf:{tmp_path}/train.parquet", "train")
    assert source.classes == []
    assert source.label(1) == -1


def test_usual_names_of_columns_come_first(tmp_path):
    images = {name: [{"bytes": encoded(picture(i)), "path": None}] for i, name in enumerate(("depth", "image"))}
    kinds = {"animal": datasets.ClassLabel(names=["x"]), "label": datasets.ClassLabel(names=["y", "z"])}
    features = datasets.Features(dict.fromkeys(images, datasets.Image()) | kinds)
    rows = images | {"animal": [0], "label": [1]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "t.parquet")
    source = open_source(f"hf:{tmp_path}/t.parquet", "train")
    assert np.array_equal(source.image(0), picture(1))
    assert (source.classes, source.label(0)) == (["y", "z"], 1)


def test_rows_without_image_or_label(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
    rows = {"image": [None], "label": [0]}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    source = open_source(f"hf:{tmp_path}/a.parquet", "train")
    with pytest.raises(SERError, match=re.escape("a.parquet train[0]")):
        source.image(0)
    for number, label in enumerate((None, -1)):
        rows = {"image": [{"bytes": encoded(picture(0)), "path": None}] * 2, "label": [1, label]}
        path = tmp_path / f"b{number}.parquet"
        datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(path)
        with pytest.raises(SERError, match="rows without a label"):
            open_source(f"hf:{path}", "train")


def test_data_sets_refused(tmp_path):
    numbers = datasets.Dataset.from_dict({"pixels": [[1, 2]], "kind": ["x"]})
    (tmp_path / "d").mkdir()
    numbers.to_parquet(tmp_path / "d" / "train.parquet")
    with pytest.raises(SERError) as error:
        open_source(f"hf:{tmp_path}/d", "train")
    assert "pixels: List, kind: Value" in error.value.given
    assert "cast_column('pixels', datasets.Image())" in error.value.remedy
    with pytest.raises(SERError, match=r"the splits train(.|\n)*a split validation or val or valid or test"):
        open_source(f"hf:{tmp_path}/d", "val")
    with pytest.raises(SERError, match="a name on the hub, or parquet files"):
        open_source("hf:no/such_data_set", "train")
    (tmp_path / "d" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(SERError, match="a name on the hub, or parquet files"):
        open_source(f"hf:{tmp_path}/d", "train")
