"""Views with the images on the way between them: v1, v2 = g_θ(u), and targets g_{kθ/(K+1)}(u)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import require
from ..geometry import Affine
from .cropped import CroppedPlan, CroppedViews
from .photometric import Photometric, check_generator
from .pixels import (
    Drawn,
    Normalize,
    check_colours,
    check_images,
    check_normalize,
    identity_drawn,
    in_range,
    normalized,
    rows,
)
from .view import View

__all__ = ["FAMILIES", "PathPlan", "PathViews"]

Range = tuple[float, float]
ROTATION: tuple[Range, ...] = ((-45.0, 45.0),)
TRANSLATION: tuple[Range, ...] = ((-0.1, 0.1), (-0.1, 0.1))
FAMILIES: dict[str, tuple[Range, ...]] = {  # ranges of θ, one for each of its columns
    "rotation": ROTATION,  # degrees
    "translation": TRANSLATION,  # rows and columns, in parts of the view's sides
    "se2": ROTATION + TRANSLATION,
    "colour": ((-0.4, 0.4), (-0.4, 0.4), (-0.2, 0.2), (-0.1, 0.1)),  # factors less 1, and hue in whole circles
    "blur": ((0.1, 2.0),),  # sigma, in pixels of the view
}
GEOMETRIC = ("rotation", "translation", "se2")
FILLS = ("reflect", "edge", "zeros")


class PathPlan(NamedTuple):
    """What was drawn for two views and the path to the second."""

    crops: CroppedPlan
    """Of v1 and of u, from which the path starts."""
    theta: Tensor
    """(B, p) float32, where the path ends."""

    def __getitem__(self, index: int | slice | Tensor | list[int]) -> PathPlan:  # type: ignore[override]
        """The plan of some of the images; a single number gives a batch of one."""
        crops = self.crops.__getitem__(index)  # mypy takes brackets for those of a tuple
        return PathPlan(crops, rows({"theta": self.theta}, index, len(self.theta))["theta"])


class PathViews:
    """Two crops of each image, the second moved along a path, and the images on the way as targets.

    v1 = A1(I), u = A2(I), v2 = g_θ(u) and targets u_k = g_{kθ/(K+1)}(u) for k = 1..K, with A1 and A2 a random resized
    crop, a flip and `photometric`. θ is drawn for each image, uniform in the range of its family:

    ============= ================================================== ======================================
    `family`      columns of θ                                        range
    ============= ================================================== ======================================
    "rotation"    degrees counter-clockwise, about the middle         ±45
    "translation" rows, columns, in parts of the view's sides         ±0.1 each
    "se2"         degrees, rows, columns: turned, then shifted        as above
    "colour"      brightness - 1, contrast - 1, saturation - 1, hue   ±0.4, ±0.4, ±0.2, ±0.1
    "blur"        sigma in pixels                                     0.1 to 2, the path starting at 0
    ============= ================================================== ======================================

    Takes images with values in [0, 1]. Views v1 and v2 have values in [0, 1] before `normalize`; targets stay in
    [0, 1], never normalised. ``drawn["theta"]`` (B, p) of v2 and of each target is how far it is on the path; of v1, 0.

    Args:
        family: which transformations the path is made of.
        targets: K, images between u and v2.
        size, area, ratio, flip: of the two crops, as in `CroppedViews`.
        photometric: what changes the colours of v1 and u, one for both or a pair; before g.
        fill: what is seen where a moved image has none: "reflect", "edge" or "zeros", whose border tells the angle.
        final: the end of the path as a target too, the last one (not normalised, where v2 is).
        normalize: (mean, standard deviation) of the channels, such as ``IMAGENET``; of v1 and v2.

    Raises:
        SERError: an unknown family or fill, no target, or what `CroppedViews` does not take.

    Source: the second paper (transformed-image reconstruction), equation 1 and Table 2, K = 2 of Table 9. It leaves
    open the law of θ, the unit of translation, order and centre of SE(2), the colours' arithmetic and what fills
    uncovered pixels: uniform for each image, percent of the side, about the middle and then shifted, factors 1 + θ in
    the order of the table, and reflection are decided here.

    Example:
        >>> make_views = PathViews("rotation", size=32)
        >>> views = make_views(torch.rand(4, 3, 48, 64), generator=torch.Generator().manual_seed(0))
        >>> len(views), views[1].drawn["theta"].shape                    # v1, v2 and two targets
        (4, torch.Size([4, 1]))
        >>> torch.allclose(views[2].drawn["theta"], views[1].drawn["theta"] / 3)
        True
    """

    def __init__(
        self,
        family: str = "se2",
        targets: int = 2,
        size: int = 224,
        area: Range = (0.08, 1),
        ratio: Range = (3 / 4, 4 / 3),
        flip: float = 0.5,
        photometric: Photometric | Sequence[Photometric | None] | None = None,
        fill: str = "reflect",
        final: bool = False,
        normalize: Normalize | None = None,
    ) -> None:
        call = "PathViews(family, targets, ...)"
        expected = f"one of {', '.join(FAMILIES)}"
        require(
            isinstance(family, str) and family in FAMILIES, call, f"family={family!r}", expected, "PathViews('se2')"
        )
        count = isinstance(targets, int) and not isinstance(targets, bool) and targets >= 1
        require(count, call, f"targets={targets!r}", "at least one image on the path", "PathViews(targets=2)")
        require(fill in FILLS, call, f"fill={fill!r}", f"one of {', '.join(FILLS)}", "PathViews(fill='reflect')")
        require(isinstance(final, bool), call, f"final={final!r}", "True or False", "PathViews(final=True)")
        check_normalize(call, normalize)
        self.family = family
        self.targets = targets
        self.size = size
        self.area = area
        self.ratio = ratio
        self.flip = flip
        self.photometric = photometric
        self.fill = fill
        self.final = final
        self.normalize = normalize
        self._crops = CroppedViews(size, area, ratio, flip, 2, photometric)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name != "_crops")
        return f"PathViews({settings})"

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[View, ...]:
        """v1, v2 and the targets, of whole images.

        Args:
            images: (B, C, H, W), floating point, values in [0, 1]; three channels for colours.
            generator: source of all randomness, on the CPU; without one, the global state is used.

        Raises:
            SERError: images of another shape, type or range, or a generator on a GPU.
        """
        self._check("PathViews(...)(images)", images)
        return self.render(images, self.draw(len(images), (images.shape[-2], images.shape[-1]), generator))

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator | None = None) -> PathPlan:
        """Two crops of n images and where their paths end, on the CPU.

        Args:
            n: images.
            size: (height, width) of the whole images, in pixels.
            generator: source of all randomness, on the CPU; without one, the global state is used.
        """
        return PathPlan(self._crops.draw(n, size, generator), self.draw_theta(n, generator))

    def draw_theta(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, p) float32: where the paths of n images end."""
        check_generator("PathViews(...).draw_theta(n, generator)", generator)
        low, high = torch.tensor(FAMILIES[self.family]).T.unbind()
        theta: Tensor = low + (high - low) * torch.rand(n, len(low), generator=generator)
        return theta

    def render(self, images: Tensor, plan: PathPlan) -> tuple[View, ...]:
        """The views that a plan asks for: v1, v2 and the targets.

        Args:
            images: (B, C, H, W), floating point, values in [0, 1].
            plan: what `draw` gave for B images.
        """
        call, remedy = "PathViews(...).render(images, plan)", "make_views.draw(len(images), images.shape[-2:])"
        require(isinstance(plan, PathPlan), call, f"a {type(plan).__name__}", "what its draw gives", remedy)
        self._check(call, images, len(plan.theta))
        first, start = self._crops.render(images, plan.crops)
        end, targets = self.render_path(start.images, plan.theta)
        v1 = View(normalized(first.images, self.normalize), first.relation, self._drawn(first, 0 * plan.theta))
        v2 = self._on_the_path(start, normalized(end, self.normalize), plan.theta)
        thetas = self.thetas(plan.theta)
        return v1, v2, *(self._on_the_path(start, *one) for one in zip(targets, thetas, strict=False))

    def render_path(self, u: Tensor, theta: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """v2 and the targets of images that are cropped already.

        Args:
            u: (B, C, h, w), floating point, values in [0, 1], where the paths start.
            theta: (B, p), where they end, on the CPU; see `draw_theta`.

        Returns:
            v2 (B, C, h, w) in [0, 1], not normalised, and K targets like it, K + 1 with `final`.

        Example:
            >>> make_views, u = PathViews("rotation"), torch.rand(2, 3, 32, 32)
            >>> v2, targets = make_views.render_path(u, make_views.draw_theta(2))
            >>> v2.shape, len(targets)
            (torch.Size([2, 3, 32, 32]), 2)
        """
        call = f"PathViews({self.family!r}).render_path(u, theta)"
        check_images(call, u, unit=True)
        shape = (len(u), len(FAMILIES[self.family]))
        given = f"theta {tuple(theta.shape)} for u {tuple(u.shape)}"
        require(tuple(theta.shape) == shape, call, given, f"theta {shape}", "theta = make_views.draw_theta(len(u))")
        *targets, end = (self._moved(u, part) for part in self.thetas(theta))
        return end, (*targets, end) if self.final else tuple(targets)

    def thetas(self, theta: Tensor) -> tuple[Tensor, ...]:
        """K + 1 stations of the path, evenly spaced in the parameters, θ the last.

        Example:
            >>> PathViews("rotation").thetas(torch.tensor([[30.0]]))
            (tensor([[10.]]), tensor([[20.]]), tensor([[30.]]))
        """
        stations = self.targets + 1
        return (*(theta * k / stations for k in range(1, stations)), theta)

    def element(self, theta: Tensor, size: tuple[int, int] = (1, 1)) -> Affine:
        """g_θ as a geometric transformation of the view, the identity for colours and blur.

        Args:
            theta: (B, p), on the CPU.
            size: (height, width) of the images that it moves, whose proportions make a rotation rigid.

        Example:
            >>> g = PathViews("rotation").element(torch.tensor([[90.0]]))
            >>> g.allclose(Affine.rotation(90.0))
            True
        """
        columns = theta.double().T
        if self.family not in GEOMETRIC:
            return Affine.identity(len(theta))
        if self.family == "translation":
            return Affine.translation(*columns)
        turned = Affine.rotation(columns[0], size)
        return Affine.translation(*columns[1:]) @ turned if self.family == "se2" else turned

    def _check(self, call: str, images: Tensor, expected: int | None = None) -> None:
        check_images(call, images, True, expected)
        photometric = self.family not in GEOMETRIC or any(self._crops._parts)
        check_colours(call, images, photometric, self.normalize)

    def _moved(self, u: Tensor, theta: Tensor) -> Tensor:
        """g_θ(u), in the range of u."""
        if self.family in GEOMETRIC:
            maps, _ = self.element(theta, (u.shape[-2], u.shape[-1])).warp(u, fill=self.fill)
            return in_range(maps, u)
        drawn = identity_drawn(len(theta))
        if self.family == "colour":
            drawn["jitter"] = torch.ones_like(drawn["jitter"])
            drawn["order"] = torch.arange(4).expand(len(theta), 4).clone()
            brightness, contrast, saturation, drawn["hue"] = theta.float().T
            for name, offset in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
                drawn[name] = 1 + offset
        else:
            drawn["sigma"] = theta[:, 0].float()
            drawn["blur"] = drawn["sigma"] > 0
        return Photometric().apply(u, drawn)

    def _on_the_path(self, start: View, images: Tensor, theta: Tensor) -> View:
        return View(images, self.element(theta) @ start.relation, self._drawn(start, theta))

    @staticmethod
    def _drawn(view: View, theta: Tensor) -> Drawn:
        return {**view.drawn, "theta": theta}
