"""Which images a batch has, and which of them are seen whole."""

import re

import pytest

pytest.importorskip("torchvision")

from data.sampler import PartitionSampler, whole_images

from ser_reg import SERError


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
    typed = float(re.fullmatch(r"--term\.ratio (\S+)", error.value.remedy)[1])
    assert whole_images(batch_size, typed, 1) == 2


@pytest.mark.parametrize(("batch_size", "ratio", "world_size"), [(64, -0.1, 1), (64, 1.1, 1), (10, 0.5, 3), (1, 1, 1)])
def test_whole_images_refuses(batch_size, ratio, world_size):
    with pytest.raises(SERError, match="remedy:   --"):
        whole_images(batch_size, ratio, world_size)
