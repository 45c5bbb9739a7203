"""A base method: heads, loss and momentum around an encoder, whose forwards it calls itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from data.batch import Group
from torch import Tensor, nn

from .schedules import Moment

__all__ = ["BaseMethod", "BaseOutput", "Encode", "Encoded", "global_views"]


class Encoded(NamedTuple):
    """What an encoder made of groups of images."""

    embeddings: list[Tensor]
    """(B, D) per view, of all groups' images; those of the last group, which the term reads, first."""
    features: list[list[dict[int, Tensor]]]
    """By group, by view: maps (n, D, h, w) by layer, those that the added term wants."""


class Encode(Protocol):
    """Runs an encoder over groups of images. The step hands it to the base method, which decides what is encoded."""

    def __call__(self, encoder: nn.Module, groups: Sequence[Group]) -> Encoded: ...


class BaseOutput(NamedTuple):
    """The loss, and what was encoded on the way to it."""

    loss: Tensor
    trained: Encoded
    """By the trained encoder."""
    momentum: Encoded | None = None
    """By the momentum encoder, if there is one."""


class BaseMethod(nn.Module):
    """A subclass says in `forward` what is encoded and what the loss is, and builds its heads beside.

    It knows nothing of the added term: what that wants to see is kept by `encode`.

    Attributes:
        encoder: images to (B, D) embeddings; trained.
        target: the momentum encoder; None without one.
    """

    encoder: nn.Module
    target: nn.Module | None

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.target = None

    @property
    def exported(self) -> nn.Module:
        """The encoder that evaluations judge: the trained one or the momentum encoder."""
        return self.encoder

    def forward(self, groups: Sequence[Group], encode: Encode) -> BaseOutput:
        """The loss of all groups jointly.

        Args:
            groups: images that the term does not read, then those that it reads (seen whole if it wants such, else
                cropped), or one of them alone.
            encode: to be called for the encoder and, without gradient, for the momentum encoder.
        """
        raise NotImplementedError

    def before_step(self, moment: Moment) -> None:
        """Ahead of the forward."""

    def before_update(self, moment: Moment) -> None:
        """Between backward and the optimiser's step."""

    def after_update(self, moment: Moment) -> None:
        """After the optimiser's step."""


def global_views(groups: Sequence[Group]) -> list[Group]:
    """The groups without their local views, which a momentum encoder does not see."""
    return [Group(group.images[:2], None if group.relations is None else group.relations[:2]) for group in groups]
