"""What a term reads of views: where they were cropped, and what was drawn to change them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import SERError, require
from ..views.view import View

__all__ = ["crops_of", "drawn_of"]


def crops_of(call: str, view: View, n: int, wants: str) -> Any:
    """The relation of a view whose images were cropped, flipped and turned by quarters, and so have a box.

    Args:
        call: what the user called, for the message.
        view: with a relation of n elements, or of one for all.
        n: images of the view.
        wants: the line that makes such views.

    Returns:
        The relation, an `Affine` of n elements.

    Raises:
        SERError: the view is a whole image, or was moved in ways that no crop, flip or quarter turn is.
    """
    kind = type(view.relation).__name__
    require(hasattr(type(view.relation), "box"), call, f"a view moved by a {kind}", "crops that know their box", wants)
    relation: Any = view.relation if len(view.relation) == n else view.relation[[0] * n]
    try:
        relation.box  # noqa: B018  # which raises for other angles
    except SERError as error:
        raise SERError(call, error.given, "crops, flips and quarter turns", wants) from error
    return relation


def drawn_of(call: str, view: View, names: Sequence[str], n: int, wants: str) -> dict[str, Tensor]:
    """What the photometric part drew for the n images of a view, by these names.

    Raises:
        SERError: a name is missing, or its values are not n. The remedy is the line that makes such views.
    """
    missing = [name for name in names if name not in view.drawn]
    have = ", ".join(sorted(view.drawn)) or "nothing"
    expected = "views that say how their colours were changed"
    require(not missing, call, f"no {', '.join(missing)} in what was drawn ({have})", expected, wants)
    for name in names:
        given = f"{len(view.drawn[name])} values of {name} for {n} images"
        require(len(view.drawn[name]) == n, call, given, "one of each image", wants)
    return {name: view.drawn[name] for name in names}
