"""Random resized crops that know where they were taken, cut and coloured on the device of the images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import require
from ..geometry import Affine, GroupElement, act
from ..geometry.action import _to_device
from ..geometry.resize import crop_and_resize
from .photometric import Photometric
from .pixels import (
    Drawn,
    Normalize,
    check_colours,
    check_draw,
    check_images,
    check_normalize,
    check_size,
    identity_drawn,
    limits,
    normalized,
    photometrics,
    rows,
)
from .view import View

__all__ = ["CroppedPlan", "CroppedViews", "draw_boxes", "share_in_pairs"]

TRIES = 10
ALIGNED = ("jitter", "order", "brightness", "contrast", "saturation", "hue", "grey")
ORIGINAL = 224 / 256  # side of the original's crop, in parts of the image's shorter side


class CroppedPlan(NamedTuple):
    """What was drawn for a few views: where each image is cropped, flipped and turned, and how it is coloured."""

    relations: tuple[Affine, ...]
    """One a view, of B crops R^turns F^flip crop(box)."""
    drawn: tuple[Drawn, ...]
    """One a view, what the photometric part drew; empty without any."""

    def __getitem__(self, index: int | slice | Tensor | list[int]) -> CroppedPlan:  # type: ignore[override]
        """The plan of some of the images; a single number gives a batch of one."""
        n = len(self.relations[0])
        return CroppedPlan(
            tuple(relation[index] for relation in self.relations),
            tuple(rows(drawn, index, n) for drawn in self.drawn),
        )


class CroppedViews:
    """Random resized crops with flips, of whole images on their device, each of which knows how it was made.

    Crops follow the law of ``torchvision.transforms.RandomResizedCrop``, drawn for each image and view: ten tries of
    an area and an aspect that fit, else the largest crop in the middle; in whole pixels. In order: crop and resize
    (bicubic, antialiased), flip, quarter turn, `photometric`, `normalize`.

    Takes images with values in [0, 1] and gives values in [0, 1] before `normalize`: what resampling overshoots is
    clamped. Without `photometric` other ranges pass, each image in its own.

    Args:
        size: side of the views, in pixels.
        area: range of the crop's share of the image, uniform.
        ratio: range of the crop's width over its height, log-uniform, as torchvision's (`EquivariantViews` has height
            over width).
        flip: probability of a left-right flip.
        views: how many crops of each image.
        photometric: what changes colours after crop and resize, one for all views or one for each of `views`; what it
            drew stands in ``view.drawn``. Without it `drawn` is empty.
        original: put the original in front, as one view more: the middle of the image, its shorter side resized to
            256/224 of `size`, neither flipped, turned nor coloured. Terms such as EquiMod compare with it.
        turned: True: each crop also makes a random number of quarter turns. "all": each view has every image four
            times, turn by turn: all of them upright, then all turned once, twice and thrice, 4B images of which
            ``relation.turns`` is the turn (E-SSL). A plan then holds the B crops, upright.
        paired: images 2i and 2i+1 share box, quarter turn, jitter, its order and factors, and greyscale, and have
            flip, blur, its sigma and solarize of their own (STL).
        normalize: (mean, standard deviation) of the channels, such as ``IMAGENET``; applied last.

    Raises:
        SERError: a range is not positive, a size no whole number, or a photometric part does not say what it draws.

    Source: the views of AugSelf, EquiMod, E-SSL and STL. That the quarter turn belongs to what pairs share, and that
    crops are cut on the device, is decided here; the sources leave it open.

    Example:
        >>> from ser_reg import relation
        >>> make_views = CroppedViews(size=32, photometric=Photometric(blur=0))
        >>> view1, view2 = make_views(torch.rand(4, 3, 64, 80), generator=torch.Generator().manual_seed(0))
        >>> view1.images.shape, view1.relation.box.shape, len(relation(view1, view2))
        (torch.Size([4, 3, 32, 32]), torch.Size([4, 4]), 4)
    """

    def __init__(
        self,
        size: int = 224,
        area: tuple[float, float] = (0.08, 1),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        views: int = 2,
        photometric: Photometric | Sequence[Photometric | None] | None = None,
        original: bool = False,
        turned: bool | Literal["all"] = False,
        paired: bool = False,
        normalize: Normalize | None = None,
    ) -> None:
        call = "CroppedViews(size, area, ratio, ...)"
        check_size(call, "CroppedViews", size)
        _check_area(call, area, ratio)
        share = isinstance(flip, (int, float)) and 0 <= flip <= 1
        require(share, call, f"flip={flip!r}", "a probability", "CroppedViews(flip=0.5)")
        count = isinstance(views, int) and not isinstance(views, bool) and views >= 1
        require(count, call, f"views={views!r}", "at least one view", "CroppedViews(views=2)")
        known = isinstance(turned, bool) or turned == "all"
        require(known, call, f"turned={turned!r}", "True, False or 'all'", "CroppedViews(turned=True)")
        for name, value in (("original", original), ("paired", paired)):
            remedy = f"CroppedViews({name}=True)"
            require(isinstance(value, bool), call, f"{name}={value!r}", "True or False", remedy)
        check_normalize(call, normalize)
        alone = not (original and turned == "all")
        remedy = "CroppedViews(turned='all')"
        require(alone, call, "an original beside turned='all'", "views of one number of images", remedy)
        self.size = size
        self.area = area
        self.ratio = ratio
        self.flip = flip
        self.views = views
        self.photometric = photometric
        self.original = original
        self.turned = turned
        self.paired = paired
        self.normalize = normalize
        self._parts = photometrics(call, photometric, views)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name != "_parts")
        return f"CroppedViews({settings})"

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[View, ...]:
        """The views of whole images, the original first where it is asked for.

        Args:
            images: (B, C, H, W), floating point, values in [0, 1]; three channels for a photometric part.
            generator: source of all randomness, on the CPU; without one, the global state is used.

        Raises:
            SERError: images of another shape, type or range, an odd batch for pairs, or a generator on a GPU.
        """
        self._check("CroppedViews(...)(images)", images)
        return self.render(images, self.draw(len(images), (images.shape[-2], images.shape[-1]), generator))

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator | None = None) -> CroppedPlan:
        """Crops, flips, turns and colours of n images, on the CPU.

        Args:
            n: images.
            size: (height, width) of the whole images, in pixels.
            generator: source of all randomness, on the CPU; without one, the global state is used.

        Example:
            >>> plan = CroppedViews(size=32).draw(4, (64, 80), torch.Generator().manual_seed(0))
            >>> len(plan.relations), len(plan[1:3].relations[0])
            (2, 2)
        """
        call = "CroppedViews(...).draw(n, size)"
        check_draw(call, n, size, generator)
        if self.paired:
            _check_pairs(call, n)
        relations, drawn = [], []
        if self.original:
            relations.append(Affine.crop(_middle(size).expand(n, 4)))
            drawn.append(identity_drawn(n) if any(self._parts) else {})
        for photometric in self._parts:
            boxes = draw_boxes(n // 2 if self.paired else n, size, self.area, self.ratio, generator)
            flip = torch.rand(n, generator=generator) < self.flip
            turns = torch.randint(4, (len(boxes),), generator=generator) * (self.turned is True)
            if self.paired:
                boxes, turns = boxes.repeat_interleave(2, 0), turns.repeat_interleave(2)
            relations.append(_moves(turns, flip) @ Affine.crop(boxes))
            colours = photometric.draw(n, generator) if photometric else identity_drawn(n) if any(self._parts) else {}
            drawn.append(share_in_pairs(colours) if self.paired and photometric else colours)
        return CroppedPlan(tuple(relations), tuple(drawn))

    def render(self, images: Tensor, plan: CroppedPlan) -> tuple[View, ...]:
        """The views that a plan asks for; each image's do not depend on what else is in the batch.

        Args:
            images: (B, C, H, W), floating point, values in [0, 1].
            plan: what `draw` gave for B images.
        """
        call = "CroppedViews(...).render(images, plan)"
        parts = (None, *self._parts) if self.original else self._parts
        remedy = "make_views.draw(len(images), images.shape[-2:])"
        require(isinstance(plan, CroppedPlan), call, f"a {type(plan).__name__}", "what its draw gives", remedy)
        self._check(call, images, len(plan.relations[0]))
        given, expected = f"a plan of {len(plan.relations)} views", f"one of {len(parts)}"
        require(len(plan.relations) == len(parts), call, given, expected, "make_views.draw(n, size)")
        low, high = limits(images)
        views = []
        for relation, drawn, part in zip(plan.relations, plan.drawn, parts, strict=True):
            crops = crop_and_resize(images, relation.box, (self.size, self.size)).clamp(low, high)
            views.append(self._view(_moved(crops, relation), relation, drawn, part))
        return tuple(views)

    def _check(self, call: str, images: Tensor, expected: int | None = None) -> None:
        photometric = any(self._parts)
        check_images(call, images, photometric or self.normalize is not None, expected)
        check_colours(call, images, photometric, self.normalize)

    def _view(self, crops: Tensor, relation: Affine, drawn: Drawn, photometric: Photometric | None) -> View:
        if photometric is not None:
            crops = photometric.apply(crops, drawn)
        if self.turned == "all":
            crops = torch.cat([torch.rot90(crops, turn, (-2, -1)) for turn in range(4)])
            matrices = [(GroupElement.turn(turn) @ relation).matrix for turn in range(4)]
            relation = Affine(torch.cat(matrices))
            drawn = {name: torch.cat([values] * 4) for name, values in drawn.items()}
        return View(normalized(crops, self.normalize), relation, drawn)


def draw_boxes(
    n: int,
    size: tuple[int, int],
    area: tuple[float, float] = (0.08, 1),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Boxes of random resized crops, by the law of torchvision's ``RandomResizedCrop``, for all images at once.

    Args:
        n: how many.
        size: (height, width) of the images, in pixels.
        area: range of the share of the image, uniform.
        ratio: range of width over height, log-uniform.
        generator: source of all randomness, on the CPU; without one, the global state is used.

    Returns:
        (n, 4) float64: top, left, height, width in parts of the image; whole pixels each.

    Raises:
        SERError: a range is empty or not positive, or the generator is on a GPU.

    Example:
        >>> box = draw_boxes(2, (48, 64), generator=torch.Generator().manual_seed(0))
        >>> box * torch.tensor([48, 64, 48, 64])
        tensor([[ 1., 11., 45., 50.],
                [ 0.,  7., 36., 43.]], dtype=torch.float64)
    """
    call = f"draw_boxes(n, size, area={area}, ratio={ratio})"
    check_draw(call, n, size, generator)
    _check_area(call, area, ratio)
    height, width = size
    share, aspect = torch.rand(2, n, TRIES, generator=generator, dtype=torch.float64)
    down, right = torch.rand(2, n, generator=generator, dtype=torch.float64)
    pixels = height * width * (area[0] + (area[1] - area[0]) * share)
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect)
    heights, widths = (pixels / aspect).sqrt().round(), (pixels * aspect).sqrt().round()
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = fits.to(torch.int8).argmax(1, keepdim=True)  # the first try that fits, as argmax gives the first of equals
    h, w = (sides.gather(1, first)[:, 0] for sides in (heights, widths))
    top, left = (down * (height - h + 1)).floor(), (right * (width - w + 1)).floor()
    boxes = torch.stack([top, left, h, w], 1)
    boxes = torch.where(fits.any(1)[:, None], boxes, _largest(size, ratio))
    return boxes / boxes.new_tensor([height, width, height, width])


def share_in_pairs(drawn: Drawn) -> Drawn:
    """Draws of images in pairs: 2i+1 has the jitter, its order and factors, and the greyscale of 2i.

    Blur, its sigma and solarize stay each image's own.

    Args:
        drawn: what a `Photometric` drew, (B,) or (B, k) each.

    Raises:
        SERError: an odd number of images.

    Source: STL (Yu et al., 2024): the aligned part of a transformation is one for a pair, the invariant part is not.

    Example:
        >>> drawn = share_in_pairs(Photometric().draw(6, torch.Generator().manual_seed(0)))
        >>> torch.equal(drawn["hue"][::2], drawn["hue"][1::2]), torch.equal(drawn["sigma"][::2], drawn["sigma"][1::2])
        (True, False)
    """
    for values in drawn.values():
        _check_pairs("share_in_pairs(drawn)", len(values))
    return {name: values[::2].repeat_interleave(2, 0) if name in ALIGNED else values for name, values in drawn.items()}


def _check_pairs(call: str, n: int) -> None:
    expected = "an even number, as images 2i and 2i+1 are a pair"
    require(n % 2 == 0, call, f"{n} images", expected, "make_views(images[: len(images) // 2 * 2])")


def _check_area(call: str, area: tuple[float, float], ratio: tuple[float, float]) -> None:
    for name, ends, most, default in (("area", area, 1, "(0.08, 1)"), ("ratio", ratio, math.inf, "(3 / 4, 4 / 3)")):
        pair = isinstance(ends, (tuple, list)) and len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends)
        fine = pair and 0 < ends[0] <= ends[1] <= most and ends[1] < math.inf
        expected = "a pair (low, high) with 0 < low <= high" + ("" if most == math.inf else ", shares of the image")
        require(fine, call, f"{name}={ends!r}", expected, f"{name}={default}")


def _moves(turns: Tensor, flip: Tensor) -> GroupElement:
    return GroupElement(turns, flip, torch.ones(len(turns), 2, dtype=torch.float64))


def _moved(crops: Tensor, relation: Affine) -> Tensor:
    """The crops flipped and turned."""
    if relation.turns.any():  # on the CPU: nothing waits
        return act(_moves(relation.turns, relation.flip), crops)
    flip = _to_device(relation.flip, crops.device)[:, None, None, None]
    return torch.where(flip, crops.flip(-1), crops)


def _middle(size: tuple[int, int]) -> Tensor:
    """(4,): the box of the original, a square in the middle."""
    side = ORIGINAL * min(size)
    height, width = side / size[0], side / size[1]
    return torch.tensor([(1 - height) / 2, (1 - width) / 2, height, width], dtype=torch.float64)


def _largest(size: tuple[int, int], ratio: tuple[float, float]) -> Tensor:
    """(4,), in pixels: the largest box in the middle whose aspect is allowed, for images on which no try fits."""
    height, width = size
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return torch.tensor([(height - h) // 2, (width - w) // 2, h, w], dtype=torch.float64)
