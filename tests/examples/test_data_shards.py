"""WebDataset shards, and the patterns that name them."""

import gzip
import tarfile

import numpy as np
import pytest
from pictures_on_disk import encoded, picture, write_shards, write_tar

pytest.importorskip("braceexpand")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from data import open_source

from ser_reg import SERError


def test_shards_of_both_splits(tmp_path):
    write_shards(tmp_path, "train", shards=3)
    write_shards(tmp_path, "val", shards=1)
    pattern = f"wds:{tmp_path}/{{split}}-*.tar"
    train, val = open_source(pattern, "train"), open_source(pattern, "val")
    assert (len(train), len(val)) == (9, 3)
    assert train.classes == ["0", "1", "2"]
    assert train.name(4) == f"{tmp_path}/train-0001.tar:a.b/0004"
    assert np.array_equal(train.image(7), picture(7))
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    write_shards(unlabelled, labels=False)
    assert open_source(f"wds:{unlabelled}/train-{{0000,0001}}.tar", "train").classes == []


def test_shards_with_long_names(tmp_path):
    name = "/".join(["n" * 60] * 4) + ".jpg"
    write_tar(tmp_path / "t.tar", {name: encoded(picture(3)), "x.cls": b"1"})
    source = open_source(f"wds:{tmp_path}/t.tar", "train")
    assert source.name(0).endswith(name[:-4])
    assert np.array_equal(source.image(0), picture(3))


def shard_cases():
    image = encoded(picture(0))
    return {
        "no label for one": ({"0.png": image, "0.cls": b"1", "1.png": image}, "no 1.cls"),
        "label in words": ({"0.png": image, "0.cls": b"cat"}, "'cat' in 0.cls"),
        "negative label": ({"0.png": image, "0.cls": b"-1"}, "'-1' in 0.cls"),
        "great label": ({"0.png": image, "0.cls": b"1000000"}, "'1000000' in 0.cls"),
        "no image": ({"0.txt": b"", "0.cls": b"1"}, "no image in it"),
        "two images": ({"0.png": image, "0.jpg": image}, "two images of key '0'"),
    }


@pytest.mark.parametrize("case", shard_cases())
def test_shards_refused(case, tmp_path):
    members, text = shard_cases()[case]
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(SERError) as error:
        open_source(f"wds:{tmp_path}/train-0.tar", "train")
    assert text in error.value.given
    assert "train-0.tar" in error.value.given
    assert error.value.remedy.startswith("tar --list")


@pytest.mark.parametrize("damage", ["cut", "overwritten", "compressed", "text"])
def test_damaged_shards_are_refused(damage, tmp_path):
    whole = (write_shards(tmp_path) / "train-0000.tar").read_bytes()
    with tarfile.open(tmp_path / "train-0000.tar") as tar:
        start = tar.getmembers()[5].offset
    data = {
        "cut": whole[: start + 700],
        "overwritten": whole[:start] + bytes(range(256)) * 2 + whole[start + 512 :],
        "compressed": gzip.compress(whole),
        "text": b"404 Not Found" * 100,
    }[damage]
    (tmp_path / "train-0001.tar").write_bytes(data)
    with pytest.raises(SERError, match=r"train-0001.tar: (.|\n)*an uncompressed tar file, whole"):
        open_source(f"wds:{tmp_path}/train-{{0000..0001}}.tar", "train")


PATTERNS = {
    "wds:{}/train-{{0000..0003}}.tar": ("train", "2 of 4 not there, the first '{}/train-0002.tar'", "ls '{}'"),
    "wds:{}/none-*.tar": ("train", "1 of 1 not there", "ls '{}'"),
    "wds:{}/train-{{0000..0001}}.tar": (
        "val", "a pattern of training files alone", "--data 'wds:{}/{{split}}-{{0000..0003}}.tar'",
    ),
    "hf:{}/*.parquet": (
        "val", "a pattern of training files alone", "--data 'hf:{}/{{split}}-{{0000..0003}}.parquet'",
    ),
    "wds:{}/{{split}}-0000.tar": ("val", "1 of 1 not there, the first '{}/val-0000.tar'", "ls '{}'"),
    "wds:{}/train-{{0000..0001.tar": ("train", "", "--data 'wds:{}/{{split}}-{{0000..0003}}.tar'"),
}  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_refused(pattern, tmp_path):
    write_shards(tmp_path)
    split, given, remedy = (text.format(tmp_path) for text in PATTERNS[pattern])
    with pytest.raises(SERError) as error:
        open_source(pattern.format(tmp_path), split)
    assert given in error.value.given
    assert error.value.remedy == remedy
