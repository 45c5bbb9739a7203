"""The data of the reference trainings: sources, policies, views and batches."""

import gzip
import io
import pickle
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

datasets = pytest.importorskip("datasets")
pytest.importorskip("braceexpand")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from photo_patches import load_patches  # noqa: E402
from pretraining.dataset import Batch, LabelledDataset, Request, ViewDataset, collate  # noqa: E402
from pretraining.folders import ImageFolder  # noqa: E402
from pretraining.partition import PartitionSampler, whole_images  # noqa: E402
from pretraining.policies import GaussianBlur, evaluation, normalise, policies, training_crop  # noqa: E402
from pretraining.sources import open_source  # noqa: E402

from ser_reg import SERError  # noqa: E402

METHODS = ("moco_v3", "dino", "barlow_twins")


def picture(seed, size=(24, 16)):
    """Smooth enough to survive JPEG, and coloured."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


class Pictures:
    """A source in memory; numbers in `broken` cannot be read."""

    def __init__(self, n=40, broken=(), classes=("even", "odd")):
        self.n, self.broken, self.classes = n, frozenset(broken), list(classes)

    def __len__(self):
        return self.n

    def image(self, i):
        if i in self.broken:
            raise SERError("read", "broken", "whole", f"rm {i}")
        return picture(i)

    def label(self, i):
        return i % 2

    def name(self, i):
        return f"picture {i}"


# Policies


@pytest.fixture
def pillow_calls(monkeypatch):
    """What Pillow was asked to do: {operation: [argument]}."""
    calls = defaultdict(list)

    def record(owner, method, name, argument):
        original = getattr(owner, method)

        def recorded(*args, **kwargs):
            value = argument(*args, **kwargs)
            if value is not None:
                calls[name(*args) if callable(name) else name].append(value)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, recorded)

    record(Image.Image, "filter", "blur", lambda image, kernel: kernel.radius)
    record(ImageOps, "solarize", "solarize", lambda image, threshold: threshold)
    record(ImageEnhance._Enhance, "enhance", lambda kind, factor: type(kind).__name__, lambda kind, factor: factor)
    record(Image.Image, "transpose", "flip", lambda image, method: method)
    record(Image.Image, "convert", "hue", lambda image, mode: mode if mode == "HSV" else None)
    return calls


def within_chance(count, n, p):
    return abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize(("view", "blur", "solarize"), [("first", 1.0, 0.0), ("second", 0.1, 0.2), ("local", 0.5, 0.0)])
@pytest.mark.parametrize("method", METHODS)
def test_operations_are_as_frequent_as_published(method, view, blur, solarize, pillow_calls):
    (first, second), (local,) = policies(method, 16, local_size=8, local_views=1)
    policy = {"first": first, "second": second, "local": local}[view]
    n, image, grey = 1500, picture(0, (20, 20)), 0
    for whole in (False, True):
        pillow_calls.clear()
        grey = 0
        for _ in range(n):
            out = policy.whole(image) if whole else policy.crops(image)
            grey += bool((out == out[:1]).all())
        counts = Counter({name: len(values) for name, values in pillow_calls.items()})
        jitters = {counts[name] for name in ("Brightness", "Contrast", "Color", "hue")}
        assert len(jitters) == 1
        expected = {"blur": blur, "solarize": solarize, "Brightness": 0.8, "flip": 0.0 if whole else 0.5}
        for name, p in expected.items():
            assert within_chance(counts[name], n, p), (name, whole)
        assert within_chance(grey, n, 0.2)
        assert set(pillow_calls["solarize"]) <= {128}
        assert set(pillow_calls["flip"]) <= {Image.Transpose.FLIP_LEFT_RIGHT}
        ranges = {"blur": (0.1, 2.0), "Brightness": (0.6, 1.4), "Contrast": (0.6, 1.4), "Color": (0.8, 1.2)}
        for name, (low, high) in ranges.items():
            values, slack = pillow_calls[name], 0.05 * (high - low)
            assert low - 1e-6 <= min(values) < low + slack, name
            assert high - slack < max(values) <= high + 1e-6, name


def test_without_blur_the_rest_stays(pillow_calls):
    (first, second), _ = policies("moco_v3", 16, blur=False)
    for _ in range(50):
        first.crops(picture(0)), second.crops(picture(0))
    assert not pillow_calls["blur"]
    assert pillow_calls["solarize"]
    assert pillow_calls["hue"]


def test_colour_jitter_is_pillows():
    jitter = policies("dino", 16)[0][0].photometric.transforms[0].transforms[0]
    image, hues = picture(1), []
    for seed in range(60):
        torch.manual_seed(seed)
        out = jitter(image)
        torch.manual_seed(seed)
        drawn = jitter.make_params([])
        expected = image
        for step in drawn["fn_idx"].tolist():
            if step < 3:
                name = ("Brightness", "Contrast", "Color")[step]
                factor = drawn[("brightness_factor", "contrast_factor", "saturation_factor")[step]]
                expected = getattr(ImageEnhance, name)(expected).enhance(factor)
            else:
                h, s, v = np.asarray(expected.convert("HSV")).transpose(2, 0, 1)
                h = ((h.astype(int) + int(drawn["hue_factor"] * 255)) % 256).astype(np.uint8)
                expected = Image.fromarray(np.stack([h, s, v], -1), "HSV").convert("RGB")
        assert np.array_equal(out, expected)
        hues.append(drawn["hue_factor"])
    assert -0.1 <= min(hues) < -0.09
    assert 0.09 < max(hues) <= 0.1


def test_blur_is_pillows():
    torch.manual_seed(3)
    out = GaussianBlur((0.1, 2.0))(picture(0))
    torch.manual_seed(3)
    radius = 0.1 + 1.9 * torch.rand(1).item()
    assert np.array_equal(out, picture(0).filter(ImageFilter.GaussianBlur(radius)))


OFFICIAL_AREAS = {"moco_v3": (0.08, 1), "dino": (0.14, 1), "barlow_twins": (0.08, 1)}
OFFICIAL_RESAMPLING = {"moco_v3": "BILINEAR", "dino": "BICUBIC", "barlow_twins": "BICUBIC"}


@pytest.mark.parametrize("method", METHODS)
def test_crops_are_pillows(method):
    image, areas, ratios = picture(2, (80, 80)), [], []  # a square, of which a crop can have any area
    for view in policies(method, 32)[0]:
        for seed in range(300):
            torch.manual_seed(seed)
            box = view.crop.make_params([image])
            areas.append(box["height"] * box["width"] / 80**2)
            ratios.append(box["width"] / box["height"])
            if seed >= 20:
                continue
            flip = torch.rand(1) < 0.5
            corners = box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"]
            expected = image.crop(corners).resize((32, 32), Image.Resampling[OFFICIAL_RESAMPLING[method]])
            expected = view.photometric(ImageOps.mirror(expected) if flip else expected)
            torch.manual_seed(seed)
            out = view.crops(image)
            assert out.dtype == torch.uint8
            assert np.array_equal(out.permute(1, 2, 0), expected)
    low, high = OFFICIAL_AREAS[method]
    assert low - 0.01 < min(areas) < low + 0.05
    assert 0.9 < max(areas) <= high
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) <= 1.4  # 4/3 and rounding to pixels


@pytest.mark.parametrize(
    ("settings", "area", "local_area"),
    [
        ({"method": "dino", "local_views": 8}, (0.4, 1), (0.05, 0.4)),
        ({"method": "dino"}, (0.14, 1), None),
        ({"method": "dino", "area": (0.25, 1)}, (0.25, 1), None),
        ({"method": "moco_v3", "local_views": 4}, (0.08, 1), (0.05, 0.25)),
        ({"method": "moco_v3", "local_views": 4, "local_area": (0.05, 0.14)}, (0.08, 1), (0.05, 0.14)),
        ({"method": "barlow_twins", "local_views": 4}, (0.08, 1), (0.05, 0.25)),
    ],
)
def test_areas_and_sizes(settings, area, local_area):
    views, local_views = policies(size=224, **settings)
    assert [view.crop.scale for view in views] == [area] * 2
    assert [view.crop.scale for view in local_views] == [local_area] * settings.get("local_views", 0)
    assert [view.crops(picture(0)).shape for view in views] == [(3, 224, 224)] * 2
    assert {view.whole(picture(0)).shape for view in local_views} <= {(3, 96, 96)}
    assert {view.crop.interpolation for view in local_views} <= {views[0].crop.interpolation}


@pytest.mark.parametrize("method", METHODS)
def test_whole_images_are_neither_cropped_nor_flipped(method):
    image = Image.new("RGB", (90, 60), (90, 90, 90))
    marks = {(0, 0): (250, 0, 0), (80, 0): (0, 250, 0), (0, 50): (0, 0, 250), (80, 50): (250, 250, 0)}
    for corner, colour in marks.items():
        image.paste(colour, (*corner, corner[0] + 10, corner[1] + 10))
    views, local_views = policies(method, 48, local_size=24, local_views=1)
    for view in views + local_views:
        side = view.crop.size[0]
        resized = image.resize((side, side), Image.Resampling.BICUBIC)
        for (left, top), colour in marks.items():
            place = (side - 2 if left else 1, side - 2 if top else 1)
            assert np.abs(np.subtract(resized.getpixel(place), colour)).max() < 40
        for seed in range(10):
            torch.manual_seed(seed)
            expected = view.photometric(resized)
            torch.manual_seed(seed)
            assert np.array_equal(view.whole(image).permute(1, 2, 0), expected)


def test_flip_commutes_with_the_photometric_part():
    for view in policies("moco_v3", 32)[0]:
        for seed in range(30):
            torch.manual_seed(seed)
            flipped_last = ImageOps.mirror(view.photometric(picture(seed, (31, 20))))
            torch.manual_seed(seed)
            assert np.array_equal(flipped_last, view.photometric(ImageOps.mirror(picture(seed, (31, 20)))))


def test_evaluation_sees_the_middle():
    image = picture(0, (600, 400))
    resized = image.resize((384, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(evaluation(224)(image).permute(1, 2, 0), resized.crop((80, 16, 304, 240)))
    assert evaluation(56)(image).shape == training_crop(56)(image).shape == (3, 56, 56)


def test_normalise_is_its_formula():
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = torch.stack([(images[:, c] / 255 - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(normalise(images), expected)
    torch.testing.assert_close(normalise(images / 255), expected)
    assert normalise(images.double()).dtype == torch.float64
    torch.testing.assert_close(normalise(images[0]), expected[0])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"method": "simclr", "size": 224}, "one of moco_v3, dino, barlow_twins"),
        ({"method": "dino", "size": 64, "local_views": 4}, "local_size=27, local_views=4"),
    ],
)
def test_policies_refuse(settings, text):
    with pytest.raises(SERError, match=re.escape(text)):
        policies(**settings)


# Views and batches


def batches(source, workers=0, method="dino", **sampling):
    views, local_views = policies(method, 16, local_size=8, local_views=2)
    sampler = PartitionSampler(len(source), batch_size=12, whole=4, **sampling)
    return list(
        DataLoader(
            ViewDataset(source, views, local_views), batch_sampler=sampler, collate_fn=collate, num_workers=workers
        )
    )


def same(a, b):
    tensors = [[t for part in batch[:4] for t in part] + [batch.indices] for batch in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True)) and a.unreadable == b.unreadable


def test_batch_has_both_parts():
    (batch, *_) = batches(Pictures())
    assert [t.shape for t in batch.crops] == [(8, 3, 16, 16)] * 2
    assert [t.shape for t in batch.local_crops] == [(8, 3, 8, 8)] * 2
    assert [t.shape for t in batch.whole] == [(4, 3, 16, 16)] * 2
    assert [t.shape for t in batch.local_whole] == [(4, 3, 8, 8)] * 2
    assert {t.dtype for part in batch[:4] for t in part} == {torch.uint8}
    assert batch.indices.shape == (12,)
    assert len(batch.indices.unique()) == 12


def test_indices_are_those_of_the_images_b2_first():
    views, _ = policies("dino", 16)
    plain = [view.__class__(view.crop, view.flip, torch.nn.Identity()) for view in views]
    samples = [ViewDataset(Pictures(), plain)[Request(i, i in (3, 9), 0)] for i in (5, 3, 8, 9)]
    batch = collate(samples)
    assert batch.indices.tolist() == [3, 9, 5, 8]
    for i, image in zip((3, 9), batch.whole[0], strict=True):
        assert np.array_equal(image.permute(1, 2, 0), picture(i).resize((16, 16), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("whole", [False, True])
def test_empty_parts_have_no_rows(whole):
    views, local_views = policies("dino", 16, local_size=8, local_views=3)
    dataset = ViewDataset(Pictures(), views, local_views)
    batch = collate([dataset[Request(i, whole, i)] for i in range(4)])
    parts = ((batch.crops, batch.local_crops), (batch.whole, batch.local_whole))
    for (images, local_images), rows in zip(parts, (0, 4) if whole else (4, 0), strict=True):
        assert [t.shape for t in images] == [(rows, 3, 16, 16)] * 2
        assert [t.shape for t in local_images] == [(rows, 3, 8, 8)] * 3
    assert collate([ViewDataset(Pictures(), views)[Request(0, whole, 0)]]).local_whole == []


def test_views_are_a_function_of_the_request():
    views, local_views = policies("moco_v3", 16, local_size=8, local_views=1)
    dataset = ViewDataset(Pictures(), views, local_views)
    states = torch.get_rng_state(), random.getstate()
    a = dataset[Request(3, False, 7)]
    other = dataset[Request(3, False, 8)]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    b = dataset[Request(3, False, 7)]
    assert all(torch.equal(x, y) for x, y in zip(a.views + a.local_views, b.views + b.local_views, strict=True))
    assert not torch.equal(a.views[0], other.views[0])
    assert not torch.equal(a.views[0], a.views[1])


def test_number_of_workers_changes_nothing():
    ours, theirs = (batches(Pictures(broken=(7,)), workers) for workers in (0, 2))
    assert len(ours) == len(theirs) == 3
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_number_of_ranks_changes_nothing(world_size):
    alone = batches(Pictures(), last=5)
    ranks = [batches(Pictures(), rank=rank, world_size=world_size, last=5) for rank in range(world_size)]
    for number, batch in enumerate(alone):
        parts = [rank[number] for rank in ranks]
        assert {len(part.indices) for part in parts} == {12 // world_size}
        whole = [len(part.whole[0]) for part in parts]
        assert sum(whole) == 4
        assert max(whole) - min(whole) <= 1
        rows = {}
        for part in parts:
            for row, index in enumerate(part.indices.tolist()):
                n2 = len(part.whole[0])
                place = (part.whole, part.local_whole, row) if row < n2 else (part.crops, part.local_crops, row - n2)
                rows[index] = [t[place[2]] for t in place[0] + place[1]]
        for row, index in enumerate(batch.indices.tolist()):
            images = batch.whole + batch.local_whole if row < 4 else batch.crops + batch.local_crops
            images = [t[row if row < 4 else row - 4] for t in images]
            assert all(torch.equal(x, y) for x, y in zip(images, rows.pop(index), strict=True))
        assert not rows


def test_training_goes_on_where_it_stopped():
    whole_run = batches(Pictures(), last=8)
    resumed = batches(Pictures(), first=5, last=8)
    assert len(resumed) == 3
    assert all(same(a, b) for a, b in zip(whole_run[5:], resumed, strict=True))


def test_epochs_are_permutations():
    sampler = PartitionSampler(length=40, batch_size=12, whole=2, last=6)  # two epochs of three batches
    assert len(sampler) == 6
    requests = list(sampler)
    epochs = [[r.index for batch in requests[i : i + 3] for r in batch] for i in (0, 3)]
    assert all(len(set(epoch)) == 36 and set(epoch) <= set(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [[r.whole for r in batch] for batch in requests] == [[True] * 2 + [False] * 10] * 6
    seeds = [r.seed for batch in requests for r in batch]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert list(sampler) == requests
    assert list(PartitionSampler(40, 12, 2, seed=1)) != requests[:3]
    assert list(PartitionSampler(40, 12, 2)) == requests[:3]  # by default one epoch


def test_requests_do_not_depend_on_what_is_seen_whole():
    ours, theirs = (list(PartitionSampler(40, 12, whole)) for whole in (0, 5))
    assert [[(r.index, r.seed) for r in b] for b in ours] == [[(r.index, r.seed) for r in b] for b in theirs]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"batch_size": 12, "world_size": 5}, "--batch-size 10"),
        ({"batch_size": 64}, "--batch-size 40"),
        ({"whole": 13}, "0 to 12 images"),
        ({"whole": -1}, "0 to 12 images"),
        ({"rank": 2, "world_size": 2}, "0 to 1"),
        ({"first": 4, "last": 3}, "0 <= first <= last"),
        ({"seed": -1}, "--seed 0"),
    ],
)
def test_sampler_refuses(settings, text):
    with pytest.raises(SERError, match=re.escape(text)):
        PartitionSampler(**{"length": 40, "batch_size": 12, "whole": 4} | settings)


@pytest.mark.parametrize(
    ("batch_size", "ratio", "world_size", "expected"),
    [(2048, 0, 8, 0), (2048, 0.01, 8, 20), (2048, 0.02, 8, 41), (64, 0.05, 1, 3), (64, 0.05, 8, 3), (8, 1, 2, 8)],
)
def test_whole_images(batch_size, ratio, world_size, expected):
    assert whole_images(batch_size, ratio, world_size) == expected


@pytest.mark.parametrize("batch_size", [2, 3, 7, 64, 128, 1000, 4096])
def test_one_whole_image_ends_with_what_to_type(batch_size):
    with pytest.raises(SERError, match="two at least") as error:
        whole_images(batch_size, 1.4 / batch_size, 1)
    typed = float(re.fullmatch(r"--partition-ratio (\S+)", error.value.remedy)[1])
    assert whole_images(batch_size, typed, 1) == 2


@pytest.mark.parametrize(("batch_size", "ratio", "world_size"), [(64, -0.1, 1), (64, 1.1, 1), (10, 0.5, 3), (1, 1, 1)])
def test_whole_images_refuses(batch_size, ratio, world_size):
    with pytest.raises(SERError, match="remedy:   --"):
        whole_images(batch_size, ratio, world_size)


def test_unreadable_images_are_replaced_and_named():
    views, _ = policies("dino", 16)
    dataset = ViewDataset(Pictures(10, broken=(8, 9, 0)), views)
    sample = dataset[Request(8, True, 5)]
    assert sample.index == 1
    assert sample.unreadable == ["picture 8", "picture 9", "picture 0"]
    assert all(torch.equal(x, y) for x, y in zip(sample.views, dataset[Request(1, True, 5)].views, strict=True))
    batch = collate([sample, dataset[Request(2, True, 5)], dataset[Request(9, False, 6)]])
    assert batch.unreadable == ["picture 8", "picture 9", "picture 0", "picture 9", "picture 0"]
    assert batch.indices.tolist() == [1, 2, 1]


@pytest.mark.parametrize(("n", "tried"), [(3, 3), (300, 100)])
def test_nothing_but_unreadable_images_is_an_error(n, tried):
    dataset = ViewDataset(Pictures(n, broken=range(n)), policies("dino", 16)[0])
    with pytest.raises(SERError, match=f"{tried} unreadable images in a row, from picture 1\n"):
        dataset[Request(1, False, 0)]


def test_labelled_images():
    dataset = LabelledDataset(Pictures(10, broken=(4,)), evaluation(16))
    assert dataset[3][1] == 1
    assert torch.equal(dataset[3][0], evaluation(16)(picture(3)))
    with pytest.warns(UserWarning, match="picture 4"):
        image, label = dataset[4]
    assert label == -1
    assert image.shape == (3, 16, 16)
    assert not image.any()
    with pytest.raises(SERError, match="unlabelled images such as picture 0"):
        LabelledDataset(Pictures(classes=()), evaluation(16))


def test_batch_survives_pinning(monkeypatch):
    """What the pinning thread does to a batch, without a GPU to pin it for."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self.clone())
    batch = batches(Pictures(broken=(3,)))[0]
    pinned = pin_memory(batch)
    assert type(pinned) is Batch
    assert same(batch, pinned)


# Sources


def write_folder(root, counts):
    """{"train/cat": 3, ...}: PNG files of `picture`, numbered over all."""
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(number).save(root / name / f"{i}.png")
            number += 1
    return root


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def write_shards(folder, split="train", shards=2, labels=True):
    """Three samples a shard, labels 0, 1, 2, and members that are neither image nor label."""
    for shard in range(shards):
        members = {}
        for i in range(3):
            number = 3 * shard + i
            members |= {f"a.b/{number:04}.json": b"{}"} | (
                {f"a.b/{number:04}.cls": f"{i}\n".encode()} if labels else {}
            )
            members[f"a.b/{number:04}.PNG" if i else f"a.b/{number:04}.png"] = encoded(picture(number))
        write_tar(folder / f"{split}-{shard:04}.tar", members)
    return folder


def write_parquet(path, n, first=0, labels=True, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"picture": datasets.Image()} | ({"kind": datasets.ClassLabel(names=["a", "b", "c"])} if labels else {})
    rows = {"picture": [{"bytes": encoded(picture(first + i)), "path": None} for i in range(n)]}
    rows |= {"kind": [i % 3 for i in range(n)]} if labels else {}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(path)
    return path


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


def test_source_pickles(source):
    source, _ = source
    twin = pickle.loads(pickle.dumps(source))
    assert twin.classes == source.classes
    for i in (5, 0):
        assert np.array_equal(twin.image(i), source.image(i))
        assert (twin.label(i), twin.name(i)) == (source.label(i), source.name(i))


def test_workers_of_another_kind_read_the_same(tmp_path):
    source = open_source(f"wds:{write_shards(tmp_path, shards=4)}/train-*.tar", "train")
    dataset = ViewDataset(source, policies("moco_v3", 16)[0])
    sampler = PartitionSampler(len(source), 4, 2)
    loaders = [
        DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=n, multiprocessing_context=context)
        for n, context in ((0, None), (2, "fork"), (2, "spawn"))
    ]
    ours, *others = (list(loader) for loader in loaders)
    assert len(ours) == 3
    assert all(same(a, b) for theirs in others for a, b in zip(ours, theirs, strict=True))


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


# Files of every kind


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


# Shards


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


# datasets


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
