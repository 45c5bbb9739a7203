"""What an element does to the channels of a map, beside what it does to places."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from .action import _to_device
from .affine import Affine
from .elements import GroupElement

__all__ = ["check_channels", "move_channels"]

CHANNELS = ("trivial", "regular")


def move_channels(g: GroupElement | Affine, maps: Tensor, channels: str) -> Tensor:
    """Let the turns and flips of g act on the channels of maps; places stay where they are.

    With "trivial" channels a token of a turned image has to look the same: nothing is done. With "regular" ones the
    channels are eight blocks, one for each turn and flip, which g permutes as it permutes the group: block k of the
    result is block g⁻¹k, with blocks in the order of turns + 4 · flip. That is D / 8 copies of the regular
    representation; a homomorphism, orthogonal and exact in every dtype.

    Args:
        g: B elements, or affine maps made of turns, flips and crops; or one for all maps.
        maps: (B, D, h, w).
        channels: "trivial" or "regular".

    Returns:
        (B, D, h, w); the maps themselves for "trivial".

    Raises:
        SERError: another word, a D that eight does not divide, a number of elements that does not fit, or an affine
            map with another angle or a shear.

    Source: a decision of this library; the paper's channels are trivial. The idea is that of rotation steerers
    (Bökman et al., 2024).

    Example:
        >>> maps = torch.arange(8.0).view(1, 8, 1, 1)
        >>> move_channels(GroupElement.turn(1), maps, "regular").flatten()
        tensor([3., 0., 1., 2., 7., 4., 5., 6.])
    """
    call = f"move_channels(g, maps {tuple(maps.shape)}, channels={channels!r})"
    given = f"{len(g)} elements for {len(maps)} maps"
    require(len(g) in (len(maps), 1), call, given, "one element a map, or one for all", "move_channels(g[:1], ...)")
    check_channels(call, channels, maps.shape[1])
    if channels == "trivial":
        return maps
    block = _to_device(_sources(g), maps.device)
    blocks = maps.unflatten(1, (8, -1))
    moved: Tensor = blocks.gather(1, block[:, :, None, None, None].expand_as(blocks)).flatten(1, 2)
    return moved


def check_channels(call: str, channels: str, dim: int) -> None:
    """Raise unless channels of this name can be had of D = dim."""
    require(channels in CHANNELS, call, f"channels={channels!r}", f"one of {CHANNELS}", "channels='trivial'")
    fits = channels == "trivial" or dim % 8 == 0
    require(fits, call, f"{dim} channels", "a multiple of 8, a block for each turn and flip", "channels='trivial'")


def _sources(g: GroupElement | Affine) -> Tensor:
    """(B, 8): which block comes to block k, that of g⁻¹k. Plain arithmetic, which compiles."""
    block = torch.arange(8, device=g.turns.device)
    turns, flip = g.turns[:, None], g.flip[:, None]
    sign = 1 - 2 * flip.long()  # a reflection is its own inverse, and takes R^t to R^-t
    return (sign * (block % 4 - turns)) % 4 + 4 * (flip ^ (block >= 4))
