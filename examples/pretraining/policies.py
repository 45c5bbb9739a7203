"""What each policy of views asks of a training: which images, which views besides, and their order for the term.

A term says which policy it compares (`Objective.policy`); nothing in the engine knows a term by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

__all__ = ["POLICIES", "Policy"]

T = TypeVar("T")


class Policy(NamedTuple):
    """What the images that a term reads look like."""

    ratio: float = 1.0
    """Part of the batch that the term reads, unless it is told another."""
    whole: bool = False
    """They are seen whole and moved by elements of the group (b2), not cropped."""
    paired: bool = False
    """Neighbours share their boxes and most of what is drawn for their colours."""
    extra: Literal["none", "original", "turned", "path"] = "none"
    """What the term sees besides the base method's views: the image without any change, one small crop in its four
    turns, or the way from one view to the other."""
    control: bool = False
    """λ = 0 keeps these views, which the base method sees too. Otherwise λ = 0 is the base method alone."""

    def in_order(self, views: Sequence[T], extra: Sequence[T]) -> list[T]:
        """What the term is handed: the two global views, and the extra ones at their place."""
        if self.extra == "turned":
            return list(extra)
        return [*extra, *views[:2]] if self.extra == "original" else [*views[:2], *extra]


POLICIES = {
    "equivariant": Policy(ratio=0.01, whole=True, control=True),
    "cropped": Policy(),
    "original": Policy(extra="original"),
    "turned": Policy(extra="turned"),
    "paired": Policy(paired=True, control=True),
    "path": Policy(extra="path", control=True),
}
