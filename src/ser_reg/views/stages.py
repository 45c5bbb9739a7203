"""Who takes part in which operation: photometric changes of a batch, each image with draws of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby, islice

import torch
from torch import Tensor

from ..errors import require
from ..geometry.action import _to_device
from .colour import OPERATIONS, box_reach, box_taps

__all__ = ["FACTORS", "IDENTITY", "grouped", "masked", "range_remedy"]

FACTORS = ("brightness", "contrast", "saturation", "hue")  # as `order` counts them
IDENTITY = (1.0, 1.0, 1.0, 0.0)
STAGES = (*FACTORS * 4, "grey", "blur", "solarize")  # one after another; the four of the jitter in any order
KINDS = len(STAGES) + 1  # with those to whom nothing is done
# Of images at a time on a CPU. One thread does all that is done to them in its cache; several are woken for each
# operation, which should then be worth it.
CHUNK_BYTES, CHUNK_BYTES_OF_THREADS = 2**20, 2**24


def masked(images: Tensor, drawn: dict[str, Tensor], reach: int) -> Tensor:
    """All images through all operations, of which each keeps what was drawn for it: one graph for a compiler."""
    masks, values = _stages({name: some.to(images.device) for name, some in drawn.items()}, reach)
    x = _whole_numbers(images)
    for name, mask, value in zip(STAGES, masks.unbind(), values.unbind(), strict=True):
        x = torch.where(mask[:, None, None, None], OPERATIONS[name](x.clone(), value), x)
    changed = x.to(_wide(images.dtype)).div(255).to(images.dtype)
    return torch.where(masks.any(0)[:, None, None, None], changed, images.clamp(0, 1))


def grouped(images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """Only who takes part, an operation at a time, by indices that are known on the CPU.

    Raises:
        SERError: values outside [0, 1], of images on a CPU.
    """
    on_cpu = images.device.type == "cpu"
    at_once = CHUNK_BYTES if torch.get_num_threads() == 1 else CHUNK_BYTES_OF_THREADS
    step = max(1, at_once // (4 * max(1, images[0].numel()))) if on_cpu and len(images) else max(1, len(images))
    out = torch.empty_like(images)
    for chunk, groups in _groups(drawn, step, images.device):
        given, result = (x[chunk * step : (chunk + 1) * step] for x in (images, out))
        x = _whole_numbers(given, check=on_cpu)
        untouched = None
        for name, index, value in groups:
            if name is None:
                untouched = index
            elif len(index) == len(x):
                x = OPERATIONS[name](x, value)
            else:
                x.index_copy_(0, index, OPERATIONS[name](x.index_select(0, index), value))
        torch.div(x.to(_wide(images.dtype)), 255, out=result)
        if untouched is not None:
            result.index_copy_(0, untouched, given.index_select(0, untouched).clamp_(0, 1))
    return out


Group = tuple[str | None, Tensor, Tensor]


def _groups(drawn: dict[str, Tensor], step: int, device: torch.device) -> Iterator[tuple[int, list[Group]]]:
    """Chunk by chunk of `step` images, in order: an operation, (n,) which of the chunk take part, and what it wants to
    know of each; last, without a name, whom nothing is done to.

    Everything is found on the CPU, and reaches the device in one piece.
    """
    reaches = [box_reach(sigma) for sigma in drawn["sigma"].tolist()]
    masks, values = _stages(drawn, max(reaches, default=0))
    stage, image = torch.cat([masks, ~masks.any(0, keepdim=True)]).nonzero().unbind(1)
    chunk = image.div(step, rounding_mode="floor")
    key, order = (chunk * KINDS + stage).sort(stable=True)
    stage, image, chunk = stage[order], image[order], chunk[order]
    keys, counts = (numbers.tolist() for numbers in key.unique_consecutive(return_counts=True))
    numbers = torch.cat([values, torch.zeros_like(values[:1])])[stage, image]
    indices = _to_device(image - chunk * step, device).split(counts)
    wanted = _to_device(numbers, device).split(counts)
    farthest = (reaches[one] for one in image.tolist())
    for number, groups in groupby(zip(keys, indices, wanted, strict=True), lambda group: group[0] // KINDS):
        yield (
            number,
            [
                ((*STAGES, None)[key % KINDS], index, value[:, : max(islice(farthest, len(index))) + 1])
                for key, index, value in groups
            ],
        )


def _stages(drawn: dict[str, Tensor], reach: int) -> tuple[Tensor, Tensor]:
    """Who takes part in each stage, (19, B) bool; and what it wants to know of each image, (19, B, reach + 1).

    A factor that is the identity's is not applied: with a range of 0 torchvision leaves the operation out, too.
    """
    factors = torch.stack([drawn[name] for name in FACTORS])
    moves = torch.stack([drawn[name] != value for name, value in zip(FACTORS, IDENTITY, strict=True)])
    numbers = torch.arange(len(FACTORS), device=factors.device)
    there = drawn["order"].T[:, None] == numbers[:, None]  # (4 places, 4 operations, B)
    alone = torch.stack([drawn[name] for name in STAGES[-3:]])
    masks = torch.cat([(there & moves & drawn["jitter"]).flatten(0, 1), alone])
    values = factors.new_zeros(len(STAGES), factors.shape[1], reach + 1)
    values[: len(FACTORS) * 4, :, 0] = factors.repeat(4, 1)
    values[STAGES.index("blur")] = box_taps(drawn["sigma"], reach)
    return masks, values


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _whole_numbers(images: Tensor, check: bool = False) -> Tensor:
    """In 256 steps, float32."""
    x = images.to(_wide(images.dtype)) * 255
    if check:
        low, high = (end.item() / 255 for end in x.aminmax())
        fine = low >= -0.5 / 255 and high <= 1 + 0.5 / 255  # what rounds to one of 256 values
        given = f"images with values from {low:.4g} to {high:.4g}"
        expected = "values in [0, 1], before they are normalised"
        require(fine, "Photometric(...)(images)", given, expected, range_remedy("photometric", low, high))
    return x.round_().clamp_(0, 255).float()


def range_remedy(function: str, low: float, high: float) -> str:
    """What to type where images from low to high should be in [0, 1]."""
    if not math.isfinite(low + high):
        return "torch.isfinite(images).all()  # and so on, upstream"
    if low <= -1:
        return f"{function}(images * std + mean)  # as they were before they were normalised"
    return f"{function}(images.clamp(0, 1))" if high < 2 else f"{function}(images / 255)"
