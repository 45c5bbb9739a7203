"""Batches of relations joined into one, by hand or by torch's loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data._utils.collate import default_collate_fn_map

from ..errors import require
from .affine import Affine
from .elements import GroupElement

__all__ = ["concatenate"]


def concatenate(relations: Sequence[GroupElement | Affine]) -> GroupElement | Affine:
    """One batch of several, in their order: elements if all are, else affine maps.

    A ``torch.utils.data.DataLoader`` does this when a data set gives relations, alone or in a `View`: its default
    collate knows both kinds.

    Raises:
        SERError: nothing to join.

    Example:
        >>> turns = [GroupElement.turn(k) for k in range(4)]
        >>> concatenate(turns).turns
        tensor([0, 1, 2, 3])
        >>> torch.utils.data.default_collate(turns) == concatenate(turns)
        True
    """
    require(relations, "concatenate(relations)", "none", "one at least", "GroupElement.identity(0)")
    elements = [g for g in relations if isinstance(g, GroupElement)]
    if len(elements) == len(relations):
        return GroupElement(*(torch.cat([getattr(g, name) for g in elements]) for name in ("turns", "flip", "scale")))
    maps = [Affine.of(a) if isinstance(a, GroupElement) else a for a in relations]
    return Affine(torch.cat([a.matrix for a in maps]))


def _collate(batch: list[Any], *, collate_fn_map: object = None) -> GroupElement | Affine:
    return concatenate(batch)


default_collate_fn_map.update({GroupElement: _collate, Affine: _collate})
