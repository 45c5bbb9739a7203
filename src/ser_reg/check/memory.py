"""Question to the machine: is there memory for the term?"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import SERError
from ..views import partition_size
from .base import Case, Finding

__all__ = ["memory_finding"]


def memory_finding(case: Case, batch_size: int, ratio: float, world_size: int) -> Finding:
    """What a backward pass keeps, counted on these images and scaled to those of a rank."""
    images, views = partition_size(batch_size, ratio, world_size), case.draws[0]
    kept = [p for module in (case.trunk.model, case.term) for p in module.parameters()]
    with _Kept(kept) as encoder:
        maps = case.encode(views)
    with _Kept(kept) as added:
        case.term(maps, views)
    grow = images / case.images
    places = maps[-1].shape[-2:].numel() if case.term.dense else 1
    tokens = grow * sum(map(len, maps)) * places
    others = 2 * 4 * (world_size - 1) * tokens * case.term.keys_width  # keys of other ranks, and what is sent back
    needed = grow * (encoder.bytes + added.bytes) + others
    device = views[0].images.device
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _host_memory()
    figure = (
        f"{images} images a rank keep {_mib(grow * encoder.bytes)} in {case.layer} {case.trunk.unit}, "
        f"{_mib(grow * added.bytes)} in the term and {_mib(others)} of other ranks, of {_mib(there)}"
    )
    fit = max(1, math.floor(0.9 * images * there / needed)) if needed else images
    fine = needed < there
    return Finding("there is memory for the term", fine, figure, "" if fine else _remedy(batch_size, fit, world_size))


def _remedy(batch_size: int, images: int, world_size: int) -> str:
    ratio = float(f"{images / batch_size:.2e}")
    try:
        n = partition_size(batch_size, ratio, world_size)
    except SERError:
        n = images
    return f"n = partition_size({batch_size}, {ratio:g}, {world_size})  # {n} images"


class _Kept:
    """Counts the bytes that autograd keeps for the backward pass, parameters left out."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._left_out = {p.untyped_storage().data_ptr() for p in parameters}
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda x: x)

    def __enter__(self) -> _Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _count(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()  # a layer without bias keeps its weight turned over, which is a view of it
        if storage.data_ptr() not in self._left_out:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())


def _host_memory() -> float:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return float("inf")  # Windows does not say
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
