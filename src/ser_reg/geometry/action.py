"""The action of group elements on images and on token maps."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import require
from .elements import GroupElement

__all__ = ["act"]

MODES = ("bicubic", "bilinear")
CHUNK_BYTES = 2**24  # of temporaries at a time on a CPU: larger ones are mapped and zeroed anew at every call


def act(g: GroupElement, x: Tensor, mode: str = "bicubic", *, antialias: bool = False) -> Tensor:
    """Act with g on maps: images or token maps alike.

    Quarter turns and flips are permutations of the grid, bitwise exact in every dtype. Scaling resamples the
    whole map onto the grid ``g.output_size((H, W))`` with the operator of ``torch.nn.functional.interpolate``
    (``align_corners=False``), and is an action up to discretisation only. Where no side changes, nothing is
    resampled.

    Args:
        g: B elements, or one for all maps.
        x: (B, C, H, W).
        mode: "bicubic" or "bilinear", how scaling resamples.
        antialias: low-pass before shrinking. Wanted for images; it bends linear ramps a little, so the
            default leaves it out.

    Returns:
        (B, C, H', W'), in the dtype of `x` (half precision is resampled in float32). Differentiable any number
        of times; memory beside the result does not grow with B.

    Raises:
        SERError: `x` is no batch of maps, has integers to resample, the number of elements does not fit, or the
            elements lead to different output sizes (other grids, or mixed quarter turns of a rectangle).

    Source: Section 3.1 of the paper ("Feature-space action").

    Example:
        >>> act(GroupElement.turn(1), torch.tensor([[[[1, 2], [3, 4]]]]))    # counter-clockwise, like torch.rot90
        tensor([[[[2, 4],
                  [1, 3]]]])
        >>> z = torch.randn(8, 384, 14, 14)
        >>> g = GroupElement.sample(8, scale=(1, 1), ratio=(1, 1))
        >>> torch.equal(act(~g, act(g, z)), z)
        True
    """
    size = _check(g, x, mode)
    height, width = x.shape[-2:]
    if not len(x):
        return x.reshape(0, x.shape[1], *size)
    if len(g) == 1 < len(x):
        g = g[[0] * len(x)]
    parities = {turned for turned, *_ in g.kinds}
    if height != width and len(parities) > 1:
        # Rectangles whose turned and unturned samples meet in one output size: each parity is a call of its own.
        turned = g.turns % 2 == 1
        halves = [torch.where(turned)[0], torch.where(~turned)[0]]
        maps = torch.cat([act(g[half], x[half.to(x.device)], mode, antialias=antialias) for half in halves])
        return maps[torch.cat(halves).argsort().to(x.device)]

    dihedral = _to_device(g.turns + 4 * g.flip, x.device)
    grid = (width, height) if True in parities else (height, width)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    table, inverse, *axes = operators((height, width), grid, size, mode, antialias, dtype, x.device)
    cells = x.permute(0, 2, 3, 1), table[dihedral], inverse[dihedral]
    # Turn first, then resample: the same element, as turns and flips carry the centred grid onto itself.
    maps = _Act.apply(*cells, grid, (height, width), *axes, False) if axes else _Permute.apply(*cells, size)
    result: Tensor = maps.permute(0, 3, 1, 2)
    return result


def _check(g: GroupElement, x: Tensor, mode: str) -> tuple[int, int]:
    """Raise on bad input, return the output size."""
    types = f"g is {type(g).__name__}, x is {type(x).__name__}"
    fine = isinstance(g, GroupElement) and isinstance(x, Tensor)
    require(fine, "act(g, x)", types, "a GroupElement and a tensor (B, C, H, W)", "act(GroupElement.turn(1), x)")
    batch = "act(g, x[None])" if x.ndim == 3 else "act(g, einops.rearrange(x, 'b (h w) d -> b d h w', h=h))"
    require(x.ndim == 4, "act(g, x)", f"x {tuple(x.shape)}", "a batch of maps (B, C, H, W)", batch)
    call = f"act(g, x) with len(g) = {len(g)}, x {tuple(x.shape)}"
    given = f"{len(g)} elements for {len(x)} maps"
    require(len(g) in (len(x), 1), call, given, "one element a map, or one for all", "act(g[:1], x)")
    require(mode in MODES, call, f"mode={mode!r}", f"one of {MODES}", "act(g, x, mode='bicubic')")
    height, width = x.shape[-2:]
    size = g.output_size((height, width))
    permutes = size in ((height, width), (width, height))
    expected = "floating point numbers, to be resampled"
    require(permutes or x.dtype.is_floating_point, call, f"x of {x.dtype}", expected, "act(g, x.float())")
    return size


def operators(
    origin: tuple[int, int],
    grid: tuple[int, int],
    size: tuple[int, int],
    mode: str,
    antialias: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The tables that turn maps of size `origin` onto `grid`, and the axes' operators from there to `size`, if any."""
    # A table made in inference mode could never be saved for a backward.
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        axes = () if grid == size else zip(grid, size, strict=True)
        return *permutations(*origin, device), *(resampling(*axis, mode, antialias, dtype, device) for axis in axes)


# Cached in eager mode, and a constant to torch.compile, which would otherwise look past the cache.
torch.compiler.assume_constant_result(operators)


def _to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """The numbers on the device of the maps, without waiting for what the GPU has still to do."""
    if device.type == "cuda" and numbers.device.type == "cpu":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def permutations(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each cell of the turned grid comes from, and back: two (8, H·W) tables; row turns + 4 · flip."""
    return (_of_tokens if height * width <= 4096 else _of_images)(height, width, device)


def _permutations(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    cells = torch.arange(height * width).view(height, width)
    table = torch.stack(
        [torch.rot90(start, turns).flatten() for start in (cells, cells.flip(-1)) for turns in range(4)]
    )
    return table.to(device), table.argsort(-1).to(device)


_of_tokens = lru_cache(256)(_permutations)  # T_eq draws some fifty grids of tokens at 224 pixels; 50 KiB each
_of_images = lru_cache(16)(_permutations)  # 6 MiB each at 224 pixels


@lru_cache(256)
def resampling(old: int, new: int, mode: str, antialias: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(new, old): the linear map by which torch resamples one axis, read off its action on unit vectors."""
    basis = torch.eye(old, dtype=torch.float64)[None, None]
    operator = F.interpolate(basis, (new, old), mode=mode, align_corners=False, antialias=antialias)[0, 0]
    return operator.to(device, dtype)


def _gather(maps: Tensor, index: Tensor) -> Tensor:
    """(b, N, C): the cells of each (b, H, W, C) map in the order of its row of `index`.

    A flat ``index_select`` of whole tokens: several times as fast as ``gather`` forward, and far faster than
    the scatter-add of its backward, which the inverse table makes a gather again.
    """
    cells = index.shape[1]
    flat = index + cells * torch.arange(len(maps), device=index.device)[:, None]
    return maps.reshape(-1, maps.shape[-1]).index_select(0, flat.flatten()).view(len(maps), cells, -1)


class _Permute(torch.autograd.Function):
    """Maps (B, H, W, C) with their cells permuted onto a grid of `size`."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, index: Tensor, inverse: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.size = tuple(maps.shape[1:3])
        return _gather(maps, index).view(len(maps), *size, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, index, ctx.size), None, None, None


class _Act(torch.autograd.Function):
    """Permute the cells of (B, H, W, C) maps onto `grid`, then resample both axes; or the adjoint of that.

    A linear map needs nothing but its adjoint for a backward of any order; working a chunk of maps at a time
    keeps the temporaries small.
    """

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        index: Tensor,
        inverse: Tensor,
        grid: tuple[int, int],
        origin: tuple[int, int],
        rows: Tensor,
        columns: Tensor,
        adjoint: bool,
    ) -> Tensor:
        ctx.save_for_backward(index, inverse, rows, columns)
        ctx.grid, ctx.origin, ctx.adjoint = grid, origin, adjoint
        channels = maps.shape[-1]
        size = origin if adjoint else (len(rows), len(columns))
        out = maps.new_empty(len(maps), *size, channels)
        step = len(maps)
        if maps.device.type == "cpu":
            step = max(1, CHUNK_BYTES // (4 * channels * max(size[0] * size[1], index.shape[1])))
        with torch.autocast(maps.device.type, enabled=False):
            for start in range(0, len(maps), max(1, step)):
                some = slice(start, start + step)
                chunk = maps[some]
                if adjoint:
                    chunk = _resample(chunk, rows.T, columns.T)
                    out[some] = _gather(chunk, inverse[some]).view(-1, *origin, channels)
                else:
                    chunk = _gather(chunk, index[some]).view(-1, *grid, channels)
                    out[some] = _resample(chunk, rows, columns)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, inverse, rows, columns = ctx.saved_tensors
        back = _Act.apply(grad, index, inverse, ctx.grid, ctx.origin, rows, columns, not ctx.adjoint)
        return (back, *(None,) * 7)


def _resample(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(b, H, W, C) maps, both axes resampled in the precision of the operators."""
    b, height, width, channels = maps.shape
    maps = rows @ maps.to(rows.dtype).reshape(b, height, width * channels)
    maps = columns @ maps.view(b * len(rows), width, channels)
    return maps.view(b, len(rows), len(columns), channels)
