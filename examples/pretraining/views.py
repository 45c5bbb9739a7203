"""How images are moved beyond their crops, what is loaded for a term besides, and the maker that tells the term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data.recipe import Recipe, original, photometric
from data.settings import DataSettings

from ser_reg import EquivariantViews
from ser_reg.errors import require
from ser_reg.views import CroppedViews, PathViews

from .policies import Policy

__all__ = ["Recipes", "ViewSettings", "extra_recipes", "maker"]

Recipes = tuple[Sequence[Recipe], Sequence[Recipe]]  # of global views and of local ones
TURNED_AREA, TURNED_BLUR = (0.05, 0.14), 0.1  # of the small crops of E-SSL


@dataclass(frozen=True)
class ViewSettings:
    """How whole images (b2) are turned, flipped and scaled, and what else moves images beyond their crops."""

    rotations: bool = True
    """Quarter turns in the group (Table 9)."""
    flips: bool = True
    """Left-right flips in the group (Table 9)."""
    scale: tuple[float, float] = (0.7, 1.3)
    """Range of the area factor (Section 4.1); 1 1 together with `--aspect 1 1` leaves scaling out (Table 9)."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the aspect factor."""
    crop_turns: bool = False
    """Turn every crop by a random number of quarters: plain augmentation, which terms on crops know of."""
    path: Literal["rotation", "translation", "se2", "colour", "blur"] = "se2"
    """What moves the second view of terms that follow a path."""
    path_targets: int = 2
    """Images on the path between the second view's crop and the view (Table 9 of that paper)."""
    path_fill: Literal["reflect", "edge", "zeros"] = "reflect"
    """What is seen where a moved image has nothing."""

    @property
    def scaled(self) -> bool:
        """Whether views differ in size from the images."""
        return self.scale != (1, 1) or self.aspect != (1, 1)

    def check(self, script: str) -> None:
        """Raise a SERError for ranges that are none."""
        typed = f"python examples/{script}"
        require(
            all(0 < low <= high for low, high in (self.scale, self.aspect)),
            script,
            f"scale={self.scale}, aspect={self.aspect}",
            "above 0, the lower end first",
            f"{typed} --scale 0.7 1.3 --aspect 0.75 1.3333",
        )
        given = f"path_targets={self.path_targets}"
        require(self.path_targets >= 1, script, given, "one image at least", f"{typed} --path-targets 2")


def extra_recipes(policy: Policy, views: Sequence[Recipe], data: DataSettings) -> list[Recipe]:
    """Of what is loaded for the term alone: nothing, the image as it is, or a crop of the size of local views.

    Args:
        policy: of the term.
        views: of the global views.
        data: the size of local views, and whether there is blur.
    """
    if policy.extra == "original":
        return [original(views[0].size)]
    if policy.extra == "turned":
        colours = photometric(TURNED_BLUR if data.blur else 0.0)
        return [replace(views[0], size=data.local_size, area=TURNED_AREA, photometric=colours)]
    return []


def maker(
    settings: ViewSettings, policy: Policy, patch_size: int, views: Sequence[Recipe], extra: Sequence[Recipe]
) -> EquivariantViews | CroppedViews | PathViews:
    """What draws the views that the term reads, as the term is told.

    Elements of whole images and ends of paths are drawn by it; crops the loader draws, by the same law.

    Args:
        settings: of the group, the turns and the path.
        policy: of the term.
        patch_size: pixels a side.
        views: of the two global views.
        extra: of what is loaded for the term alone.
    """
    if policy.whole:
        return EquivariantViews(patch_size, settings.scale, settings.aspect, settings.rotations, settings.flips)
    seen = extra if policy.extra == "turned" else views
    size, area, colours = seen[0].size, seen[0].area, [recipe.photometric for recipe in seen]
    if policy.extra == "path":
        path, count = settings.path, settings.path_targets
        return PathViews(path, count, size, area, photometric=colours, fill=settings.path_fill)
    return CroppedViews(
        size,
        area,
        views=len(seen),
        photometric=colours,
        original=policy.extra == "original",
        turned="all" if policy.extra == "turned" else settings.crop_turns,
        paired=policy.paired,
    )
