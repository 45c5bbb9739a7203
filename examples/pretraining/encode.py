"""Run an encoder over groups of images: one forward of each image, maps of some layers kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from data.batch import Group
from torch import Tensor, nn

from ser_reg import TokenTap

from .base import Encoded

__all__ = ["encode"]


def encode(encoder: nn.Module, groups: Sequence[Group], layers: Sequence[int] = ()) -> Encoded:
    """Embeddings of all views, and maps of those views whose relation is known.

    Args:
        encoder: images to (B, D) embeddings.
        groups: with equally many views each; a group without images counts for nothing.
        layers: of the maps.
    """
    embeddings, features = [], []
    for group in groups:
        if group.relations is None:
            found, maps = _by_size(encoder, group.images), [{} for _ in group.images]
        else:
            found, maps = _one_by_one(encoder, group.images, layers)
        embeddings.append(found)
        features.append(maps)
    present = [found for found in reversed(embeddings) if found]
    joint = present[0] if len(present) == 1 else [torch.cat(same) for same in zip(*present, strict=True)]
    return Encoded(joint, features)


def _by_size(encoder: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings of crops; views of one size go through the encoder together."""
    views = [images for images in views if len(images)]
    sizes = dict.fromkeys(x.shape[-2:] for x in views)  # in their order
    by_size = {size: [x for x in views if x.shape[-2:] == size] for size in sizes}
    return [part for same in by_size.values() for part in encoder(torch.cat(same)).chunk(len(same))]


def _one_by_one(
    encoder: nn.Module, views: Sequence[Tensor], layers: Sequence[int]
) -> tuple[list[Tensor], list[dict[int, Tensor]]]:
    """Embeddings and maps of views of which each has a size of its own.

    A view without images has both all the same, without rows: other processes have images, and a sharded encoder
    waits for the forwards of all. One image then stands in, of which nothing is kept.
    """
    embeddings, features = [], []
    with ExitStack() as stack:
        taps = {layer: stack.enter_context(TokenTap(encoder, layer)) for layer in layers}
        for images in views:
            n = len(images)
            embeddings.append(encoder(images if n else images.new_zeros(1, *images.shape[1:]))[:n])
            features.append({layer: tap.tokens[:n] for layer, tap in taps.items()})
    return embeddings, features
