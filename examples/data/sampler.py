"""Which images a global batch has, which of them the added term reads, and which rank takes which."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from ser_reg.errors import require

from .batch import Request

__all__ = ["PartitionSampler", "whole_images"]

PERMUTATIONS, VIEWS = 0, 1  # two families of random numbers of one seed


class PartitionSampler(Sampler[list[Request]]):
    """This rank's share of each global batch, for ``DataLoader(batch_sampler=...)``.

    Images, their order and the seeds of their views are pure functions of the seed and the number of the batch: the
    same whatever the term reads, for any number of ranks and workers, and after a restart with another `first`. The
    last batch of an epoch is left out if it would be short.

    Args:
        length: number of images.
        batch_size: images of a global batch, over all ranks.
        term: how many of them the added term reads; see `whole_images`. They come first in the batch.
        rank: this process; it takes every world_size-th image of the batch, beginning with image number `rank`, so that
            all ranks have equally many, and their shares of the term's images differ by one at most.
        world_size: number of processes.
        seed: of everything.
        first: number of the first batch, counted from the beginning of the training.
        last: number of the batch before which to stop; by default the end of the first epoch.
        paired: images 2i and 2i+1 of the term stay neighbours, on one rank, and share the boxes of their crops; ranks
            take every world_size-th pair. Batch and term's images have to divide by 2 · world_size.

    Raises:
        SERError: numbers that do not go together.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        term: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        first: int = 0,
        last: int | None = None,
        paired: bool = False,
    ) -> None:
        call = f"PartitionSampler(length={length}, batch_size={batch_size}, term={term}, world_size={world_size})"
        _check_batch(call, batch_size, world_size)
        remedy = f"--batch-size {max(1, length // world_size) * world_size}"
        require(batch_size <= length, call, f"{length} images", f"at least a batch of {batch_size}", remedy)
        require(
            0 <= term <= batch_size,
            call,
            f"term={term}",
            f"0 to {batch_size} images that the term reads",
            f"whole_images({batch_size}, 0.01, {world_size})",
        )
        if paired:
            _check_pairs(call, batch_size, term, world_size)
        require(0 <= rank < world_size, call, f"rank={rank}", f"0 to {world_size - 1}", "PartitionSampler(..., rank=0)")
        require(seed >= 0, call, f"seed={seed}", "0 or greater", "--seed 0")
        last = length // batch_size if last is None else last
        remedy = "PartitionSampler(..., first=0, last=100)"
        require(0 <= first <= last, call, f"first={first}, last={last}", "0 <= first <= last", remedy)
        self.length = length
        self.batch_size = batch_size
        self.term = term
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.first = first
        self.last = last
        self.paired = paired

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[Request]]:
        for number in range(self.first, self.last):
            epoch, batch = divmod(number, self.length // self.batch_size)
            start = batch * self.batch_size
            indices = _permutation(self.length, self.seed, epoch)[start : start + self.batch_size].tolist()
            seeds = (
                np.random.SeedSequence(self.seed, spawn_key=(VIEWS, number)).generate_state(self.batch_size).tolist()
            )
            requests = [
                Request(index, i < self.term, seed, i, seeds[i - i % 2] if self.paired and i < self.term else None)
                for i, (index, seed) in enumerate(zip(indices, seeds, strict=True))
            ]
            together = 1 + self.paired
            yield [request for request in requests if request.position // together % self.world_size == self.rank]


@lru_cache(maxsize=1)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(PERMUTATIONS, epoch))).permutation(length)


def whole_images(batch_size: int, ratio: float, world_size: int) -> int:
    """How many images of a global batch the added term reads: b2, if it is one that wants them whole.

    r times the batch, rounded; on many ranks some have none. `ser_reg.partition_size` is for loops in which each rank
    deals with its own images: it gives every rank the same share, so that r comes in steps of world_size / batch_size.
    Here the global batch is divided first, and r is met up to half an image.

    Args:
        batch_size: images of the global batch.
        ratio: r; 0 for none.
        world_size: number of ranks.

    Raises:
        SERError: r is outside [0, 1], or gives fewer than two images: without another one there are no negatives, and
            the equivariance loss is identically zero. Or the ranks' shares of the batch would differ.

    Source: Section 3.2; r = 0.01 is best in Table 8.

    Example:
        >>> [whole_images(2048, r, world_size=8) for r in (0, 0.005, 0.01, 0.02)]
        [0, 10, 20, 41]
    """
    call = f"whole_images(batch_size={batch_size}, ratio={ratio}, world_size={world_size})"
    _check_batch(call, batch_size, world_size)
    require(0 <= ratio <= 1, call, f"ratio={ratio}", "a part of the batch, 0 to 1", "--term.ratio 0.01")
    if ratio == 0:
        return 0
    images = round(ratio * batch_size)
    require(
        images >= 2,
        call,
        f"{images} of {batch_size} images in b2",
        "two at least: with one there are no negatives, and the equivariance loss is identically zero",
        "--batch-size 2 --term.ratio 1" if batch_size < 2 else f"--term.ratio {2 / batch_size:.4g}",
    )
    return images


def _check_batch(call: str, batch_size: int, world_size: int) -> None:
    require(
        batch_size >= 1 and world_size >= 1 and batch_size % world_size == 0,
        call,
        f"a batch of {batch_size} on {world_size} ranks",
        "equally many images on every rank",
        lambda: f"--batch-size {max(1, round(batch_size / max(1, world_size))) * max(1, world_size)}",
    )


def _check_pairs(call: str, batch_size: int, term: int, world_size: int) -> None:
    unit = 2 * world_size
    batch = max(unit, round(batch_size / unit) * unit)
    images = min(batch, max(unit, round(term / unit) * unit))
    require(
        batch_size % unit == term % unit == 0,
        call,
        f"{term} of {batch_size} images in pairs on {world_size} ranks",
        f"multiples of {unit}, so that pairs stay together and ranks have equally many",
        f"--batch-size {batch} --term.ratio {images / batch:.4g}",
    )
