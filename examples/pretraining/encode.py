"""Run an encoder over groups of images: one forward of each image, maps of some layers kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from data.batch import Group
from torch import Tensor, nn

from ser_reg import TokenTap

from .base import Encoded

__all__ = ["encode", "encode_views"]


def encode(encoder: nn.Module, groups: Sequence[Group], layers: Sequence[int] = ()) -> Encoded:
    """Embeddings of all views, and maps of those views whose relation is known.

    Args:
        encoder: images to (B, D) embeddings.
        groups: with equally many views each.
        layers: of the maps.
    """
    embeddings, features = [], []
    for group in groups:
        found, maps = encode_views(encoder, group.images, () if group.relations is None else layers)
        embeddings.append(found)
        features.append(maps)
    joint = embeddings[0] if len(groups) == 1 else [torch.cat(same) for same in zip(*reversed(embeddings), strict=True)]
    return Encoded(joint, features)


def encode_views(
    encoder: nn.Module, views: Sequence[Tensor], layers: Sequence[int] = ()
) -> tuple[list[Tensor], list[dict[int, Tensor]]]:
    """Embeddings and maps of views of the same images; views of one size go through the encoder together.

    Views without images have both all the same, without rows: other processes have images, and a sharded encoder
    waits for the forwards of all. One image then stands in, of which nothing is kept.
    """
    sizes = [tuple(x.shape[-2:]) for x in views]
    embeddings: dict[int, Tensor] = {}
    features: dict[int, dict[int, Tensor]] = {}
    with ExitStack() as stack:
        taps = {layer: stack.enter_context(TokenTap(encoder, layer)) for layer in layers}
        for size in dict.fromkeys(sizes):  # in their order
            which = [i for i, other in enumerate(sizes) if other == size]
            images = torch.cat([views[i] for i in which])
            n = len(images)
            whole = encoder(images if n else images.new_zeros(1, *images.shape[1:]))[:n]
            embeddings |= zip(which, _parts(whole, views, which), strict=True)
            maps = {layer: _parts(tap.tokens[:n], views, which) for layer, tap in taps.items()}
            features |= {i: {layer: parts[k] for layer, parts in maps.items()} for k, i in enumerate(which)}
    return [embeddings[i] for i in range(len(views))], [features[i] for i in range(len(views))]


def _parts(rows: Tensor, views: Sequence[Tensor], which: Sequence[int]) -> tuple[Tensor, ...]:
    return rows.split([len(views[i]) for i in which])
