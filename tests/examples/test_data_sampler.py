"""Which images a batch has, which of them the added term reads, and which rank takes which."""

import re

import pytest

pytest.importorskip("torchvision")

from data.sampler import PartitionSampler, whole_images

from ser_reg import SERError


def test_epochs_are_permutations():
    sampler = PartitionSampler(length=40, batch_size=12, term=2, last=6)  # two epochs of three batches
    assert len(sampler) == 6
    requests = list(sampler)
    epochs = [[r.index for batch in requests[i : i + 3] for r in batch] for i in (0, 3)]
    assert all(len(set(epoch)) == 36 and set(epoch) <= set(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [[r.term for r in batch] for batch in requests] == [[True] * 2 + [False] * 10] * 6
    assert [[r.position for r in batch] for batch in requests] == [[*range(12)]] * 6
    assert {r.pair for batch in requests for r in batch} == {None}
    seeds = [r.seed for batch in requests for r in batch]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert list(sampler) == requests
    assert list(PartitionSampler(40, 12, 2, seed=1)) != requests[:3]
    assert list(PartitionSampler(40, 12, 2)) == requests[:3]  # by default one epoch


@pytest.mark.parametrize(("term", "paired"), [(5, False), (4, True), (12, True), (0, True)])
def test_images_and_seeds_do_not_depend_on_what_the_term_reads(term, paired):
    ours, theirs = list(PartitionSampler(40, 12, 0)), list(PartitionSampler(40, 12, term, paired=paired))
    assert [[(r.index, r.seed) for r in b] for b in ours] == [[(r.index, r.seed) for r in b] for b in theirs]


@pytest.mark.parametrize(
    ("world_size", "batch_size", "term"), [(1, 12, 6), (2, 12, 4), (3, 12, 6), (3, 18, 18), (2, 8, 0)]
)
def test_ranks_take_whole_pairs(world_size, batch_size, term):
    (alone, *_) = PartitionSampler(40, batch_size, term, paired=True)
    shares = [next(iter(PartitionSampler(40, batch_size, term, r, world_size, paired=True))) for r in range(world_size)]
    assert sorted((r for share in shares for r in share), key=lambda r: r.position) == alone
    for share in shares:
        assert len(share) == batch_size // world_size
        assert sum(r.term for r in share) == term // world_size
        assert all(
            a.position % 2 == 0 and b.position == a.position + 1 for a, b in zip(share[::2], share[1::2], strict=True)
        )
    pairs = [(r.pair, r.term) for r in alone]
    assert all(a == b and (a[0] is not None) == a[1] for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    assert len({pair for pair, read in pairs if read}) == term // 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"batch_size": 12, "world_size": 5}, "--batch-size 10"),
        ({"batch_size": 64}, "--batch-size 40"),
        ({"term": 13}, "0 to 12 images"),
        ({"term": -1}, "0 to 12 images"),
        ({"paired": True, "term": 5}, "--batch-size 12 --term.ratio 0.3333"),
        ({"paired": True, "world_size": 4, "term": 8}, "--batch-size 16 --term.ratio 0.5"),
        ({"paired": True, "world_size": 3, "term": 4}, "multiples of 6"),
        ({"rank": 2, "world_size": 2}, "0 to 1"),
        ({"first": 4, "last": 3}, "0 <= first <= last"),
        ({"seed": -1}, "--seed 0"),
    ],
)
def test_sampler_refuses(settings, text):
    with pytest.raises(SERError, match=re.escape(text)):
        PartitionSampler(**{"length": 40, "batch_size": 12, "term": 4} | settings)


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
