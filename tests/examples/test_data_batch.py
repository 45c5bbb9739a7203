"""Views and batches: functions of their requests, whatever the process, the number of ranks or the worker."""

import random

import numpy as np
import pytest
import torch
from pictures_on_disk import Pictures, picture, write_shards
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("braceexpand")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from data import open_source
from data.batch import Batch, Request, ViewDataset, collate
from data.recipe import BICUBIC, BILINEAR, recipes
from data.sampler import PartitionSampler

from ser_reg import SERError


def dino(local_views=0):
    """Recipes of views of 16 pixels and local ones of 8, as DINO has them."""
    return recipes(16, (0.4 if local_views else 0.14, 1), BICUBIC, 8, local_views, (0.05, 0.4))


def moco_v3(local_views=0):
    return recipes(16, (0.08, 1), BILINEAR, 8, local_views)


def batches(source, workers=0, **sampling):
    views, local_views = dino(local_views=2)
    sampler = PartitionSampler(len(source), batch_size=12, whole=4, **sampling)
    return list(
        DataLoader(
            ViewDataset(source, views, local_views), batch_sampler=sampler, collate_fn=collate, num_workers=workers
        )
    )


def same(a, b):
    tensors = [[*batch.crops.images, *batch.whole.images, batch.indices] for batch in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True)) and a.unreadable == b.unreadable


def test_batch_has_both_groups():
    (batch, *_) = batches(Pictures())
    assert [t.shape for t in batch.crops.images] == [(8, 3, 16, 16)] * 2 + [(8, 3, 8, 8)] * 2
    assert [t.shape for t in batch.whole.images] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] * 2
    assert {t.dtype for group in batch[:2] for t in group.images} == {torch.uint8}
    assert all(view.images is images for view, images in zip(batch.crops.views, batch.crops.images, strict=True))
    assert [view.relation for view in batch.crops.views] == [None] * 4
    assert batch.indices.shape == (12,)
    assert len(batch.indices.unique()) == 12


def test_indices_are_those_of_the_images_b2_first():
    views, _ = dino()
    plain = [view.__class__(view.crop, view.flip, torch.nn.Identity()) for view in views]
    samples = [ViewDataset(Pictures(), plain)[Request(i, i in (3, 9), 0)] for i in (5, 3, 8, 9)]
    batch = collate(samples)
    assert batch.indices.tolist() == [3, 9, 5, 8]
    for i, image in zip((3, 9), batch.whole.images[0], strict=True):
        assert np.array_equal(image.permute(1, 2, 0), picture(i).resize((16, 16), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("whole", [False, True])
def test_empty_groups_have_no_rows(whole):
    views, local_views = dino(local_views=3)
    dataset = ViewDataset(Pictures(), views, local_views)
    batch = collate([dataset[Request(i, whole, i)] for i in range(4)])
    for group, rows in zip((batch.crops, batch.whole), (0, 4) if whole else (4, 0), strict=True):
        assert [t.shape for t in group.images] == [(rows, 3, 16, 16)] * 2 + [(rows, 3, 8, 8)] * 3
        assert {t.dtype for t in group.images} == {torch.uint8}
    only_global = collate([ViewDataset(Pictures(), views)[Request(0, whole, 0)]])
    assert [len(group.images) for group in only_global[:2]] == [2, 2]


def test_views_are_a_function_of_the_request():
    views, local_views = moco_v3(local_views=1)
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
    assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    assert not torch.equal(a.images[0], other.images[0])
    assert not torch.equal(a.images[0], a.images[1])


@pytest.mark.parametrize("whole", [False, True])
def test_all_views_of_an_image_are_drawn_independently(whole):
    """By the same recipe, which from one seed would draw the same."""
    (recipe, _), (local, *_) = dino(local_views=1)
    dataset = ViewDataset(Pictures(), [recipe] * 2, [local] * 2)
    for seed in range(10):
        first, second, *locals_ = dataset[Request(3, whole, seed)].images
        assert not torch.equal(first, second)
        assert not torch.equal(*locals_)


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
        whole = [len(part.whole.images[0]) for part in parts]
        assert sum(whole) == 4
        assert max(whole) - min(whole) <= 1
        rows = {}
        for part in parts:
            n2 = len(part.whole.images[0])
            for row, index in enumerate(part.indices.tolist()):
                group, row = (part.whole, row) if row < n2 else (part.crops, row - n2)
                rows[index] = [images[row] for images in group.images]
        for row, index in enumerate(batch.indices.tolist()):
            group, row = (batch.whole, row) if row < 4 else (batch.crops, row - 4)
            images = [images[row] for images in group.images]
            assert all(torch.equal(x, y) for x, y in zip(images, rows.pop(index), strict=True))
        assert not rows


def test_training_goes_on_where_it_stopped():
    whole_run = batches(Pictures(), last=8)
    resumed = batches(Pictures(), first=5, last=8)
    assert len(resumed) == 3
    assert all(same(a, b) for a, b in zip(whole_run[5:], resumed, strict=True))


def test_unreadable_images_are_replaced_and_named():
    views, _ = dino()
    dataset = ViewDataset(Pictures(10, broken=(8, 9, 0)), views)
    sample = dataset[Request(8, True, 5)]
    assert sample.index == 1
    assert sample.unreadable == ["picture 8", "picture 9", "picture 0"]
    assert all(torch.equal(x, y) for x, y in zip(sample.images, dataset[Request(1, True, 5)].images, strict=True))
    batch = collate([sample, dataset[Request(2, True, 5)], dataset[Request(9, False, 6)]])
    assert batch.unreadable == ["picture 8", "picture 9", "picture 0", "picture 9", "picture 0"]
    assert batch.indices.tolist() == [1, 2, 1]


@pytest.mark.parametrize(("n", "tried"), [(3, 3), (300, 100)])
def test_nothing_but_unreadable_images_is_an_error(n, tried):
    dataset = ViewDataset(Pictures(n, broken=range(n)), dino()[0])
    with pytest.raises(SERError, match=f"{tried} unreadable images in a row, from picture 1\n"):
        dataset[Request(1, False, 0)]


def test_batch_survives_pinning(monkeypatch):
    """What the pinning thread does to a batch, without a GPU to pin it for."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self.clone())
    batch = batches(Pictures(broken=(3,)))[0]
    pinned = pin_memory(batch)
    assert type(pinned) is Batch
    assert same(batch, pinned)


@pytest.mark.slow
def test_workers_of_another_kind_read_the_same(tmp_path):
    source = open_source(f"wds:{write_shards(tmp_path, shards=4)}/train-*.tar", "train")
    dataset = ViewDataset(source, moco_v3()[0])
    sampler = PartitionSampler(len(source), 4, 2)
    loaders = [
        DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=n, multiprocessing_context=context)
        for n, context in ((0, None), (2, "fork"), (2, "spawn"))
    ]
    ours, *others = (list(loader) for loader in loaders)
    assert len(ours) == 3
    assert all(same(a, b) for theirs in others for a, b in zip(ours, theirs, strict=True))
