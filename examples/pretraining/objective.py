"""Base method and regularizer in one module, with one forward: what DDP, FSDP and autocast see."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ser_reg import TokenTap, ViewPair

from .regularizer import Regularization, SoftEquivariance
from .schedules import Moment

__all__ = ["Method", "Objective", "Views"]


class Views(NamedTuple):
    """A batch on the device, ready for the encoder."""

    crops: list[Tensor]
    """b1: per view, (n1, 3, S, S); the two global views, then local ones of another size."""
    whole: list[ViewPair]
    """b2: the global pair, then pairs of local views; of one image each, n2 of them. Empty without b2."""


class Method(Protocol):
    """A base method: heads, loss and momentum around an encoder. A subclass of `nn.Module`."""

    encoder: nn.Module
    """Images to (B, D) embeddings; trained."""
    target: nn.Module | None
    """The momentum encoder, if the method has one."""
    exported: nn.Module
    """The encoder that evaluations judge."""

    def __call__(self, embeddings: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The loss.

        Args:
            embeddings: (B, D) of every view, global ones first.
            targets: (B, D) of the two global views from the momentum encoder; none without one.
        """

    def before_step(self, moment: Moment) -> None:
        """Ahead of the forward."""

    def before_update(self, moment: Moment) -> None:
        """Between backward and the optimiser's step."""

    def after_update(self, moment: Moment) -> None:
        """After the optimiser's step."""


class Objective(nn.Module):
    """L = L_inv(b1 and b2 jointly) + λ · L_equiv(b2), Equation 3.

    Args:
        method: the base method.
        regularizer: what stands beside it; None leaves the base method alone.
        weight: λ.
        target: whether the second of two token maps comes from the trained encoder, as in the paper's equations, or
            from the momentum encoder, as in its released code.
    """

    def __init__(
        self, method: Method, regularizer: SoftEquivariance | None = None, weight: float = 0.0, target: str = "online"
    ) -> None:
        super().__init__()
        self.method = method
        self.regularizer = regularizer
        self.weight = weight
        self.target = target

    def forward(self, views: Views) -> dict[str, Tensor]:
        """Scalars: "loss", to go backward from; "base", "ser" and diagnostics, detached."""
        layers = self.regularizer.layers if self.regularizer is not None else ()
        embeddings, tokens = encode(self.method.encoder, views.crops, views.whole, layers)
        targets, slow_tokens = [], tokens
        if self.method.target is not None:
            with torch.no_grad():  # local views never go through the momentum encoder
                wanted = layers if self.target == "momentum" else ()
                targets, slow_tokens = encode(self.method.target, views.crops[:2], views.whole[:1], wanted)
        base = self.method(embeddings, targets)
        scalars = {"loss": base, "base": base.detach(), "embedding_std": spread(embeddings[0].detach())}
        if self.regularizer is None:
            return scalars
        if self.target == "momentum":
            parts = self._towards(slow_tokens, tokens, views.whole[0])  # local views have no momentum side
            parts += self._between(tokens[1:], views.whole[1:])
        else:
            parts = self._between(tokens, views.whole)
        ser = torch.stack([part.loss for part in parts]).mean()
        logs = {name: torch.stack([part.logs[name] for part in parts]).mean() for name in parts[0].logs}
        return scalars | {"loss": base + self.weight * ser, "ser": ser.detach()} | logs

    def _between(self, tokens: list[tuple[dict[int, Tensor], ...]], pairs: list[ViewPair]) -> list[Regularization]:
        """Both views of each pair in the trained encoder."""
        return [self.regularizer(one, two, pair) for (one, two), pair in zip(tokens, pairs, strict=True)]

    def _towards(
        self, slow: list[tuple[dict[int, Tensor], ...]], fast: list[tuple[dict[int, Tensor], ...]], pair: ViewPair
    ) -> list[Regularization]:
        """Each view of the trained encoder against the other view of the momentum encoder."""
        back = ViewPair(pair.x2, pair.x1, pair.g2, pair.g1)
        (fast1, fast2), (slow1, slow2) = fast[0], slow[0]
        return [self.regularizer(fast1, slow2, pair), self.regularizer(fast2, slow1, back)]


def encode(
    encoder: nn.Module, crops: list[Tensor], pairs: list[ViewPair], layers: tuple[int, ...]
) -> tuple[list[Tensor], list[tuple[dict[int, Tensor], ...]]]:
    """Embeddings of all views, and tokens of b2's by pair, view and layer; all from one forward of each image.

    Returns:
        (B, D) per view, images of b2 first; per pair, for both views, tokens (n2, D, h, w) by layer.
    """
    crops = [crop for crop in crops if len(crop)]
    by_size = {size: [crop for crop in crops if crop.shape[-2:] == size] for size in {c.shape[-2:]: 0 for c in crops}}
    cropped = [part for same in by_size.values() for part in encoder(torch.cat(same)).chunk(len(same))]
    whole, tokens = [], []
    with ExitStack() as stack:
        taps = {layer: stack.enter_context(TokenTap(encoder, layer)) for layer in layers}
        for pair in pairs:
            maps = []
            for x in (pair.x1, pair.x2):
                n = len(x)  # none on some of many processes: one image then stands in, of which nothing is kept
                whole.append(encoder(x if n else x.new_zeros(1, *x.shape[1:]))[:n])
                maps.append({layer: tap.tokens[:n] for layer, tap in taps.items()})
            tokens.append(tuple(maps))
    if not (whole and cropped):
        return whole or cropped, tokens
    return [torch.cat(parts) for parts in zip(whole, cropped, strict=True)], tokens


def spread(embeddings: Tensor) -> Tensor:
    """1 for directions spread evenly over all dimensions, 0 when all images have the same embedding."""
    return F.normalize(embeddings.float(), dim=1).var(0, correction=0).sum().sqrt()
