"""The policy T_eq: two views of the whole image, and how they relate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import broadcast
from ..errors import require, require_tensor
from ..geometry import GroupElement, act
from ..geometry.elements import check_ranges, side_factors
from .photometric import Photometric, check_generator
from .pixels import Drawn, Normalize, check_colours, check_normalize, check_range, in_range, normalized, rows
from .probe import check_output, probe
from .view import View

__all__ = ["EquivariantPlan", "EquivariantViews"]


Part = Callable[[Tensor], Tensor] | Photometric | None


class EquivariantPlan(NamedTuple):
    """What was drawn for two views: an element an image for each, and how its colours change."""

    first: GroupElement
    second: GroupElement
    photometric: tuple[Drawn, Drawn] = ({}, {})
    """What a `Photometric` drew for each view; empty without one."""

    def __getitem__(self, index: int | slice | Tensor | list[int]) -> EquivariantPlan:  # type: ignore[override]
        """The plan of some of the images; a single number gives a batch of one."""
        first, second = (rows(drawn, index, len(self.first)) for drawn in self.photometric)
        return EquivariantPlan(self.first[index], self.second[index], (first, second))


class EquivariantViews:
    """The equivariant-view policy T_eq: each image whole (no crop), scaled onto the patch grid, flipped and turned.

    Within a call, all samples of a view share the grid and the parity of the quarter turns, so that the view is one
    tensor. Everything else is drawn for each sample, and all of it independently for the two views: every relation
    occurs, the identity and pure rotations included. In a distributed run all ranks use the grid and parity of the
    first, so that none waits for another's larger views: every rank then has to call. `draw` and `render` are the two
    halves of a call; a loader that draws by seed for the whole batch and keeps its own images needs no word between
    ranks.

    Args:
        patch_size: pixels a side of a patch; the sides of a view are multiples of it.
        scale: range of the area factor, uniform; (1, 1) leaves it out.
        ratio: range of the aspect factor (height over width), log-uniform; (1, 1) leaves it out.
        rotations: quarter turns or none.
        flips: left-right flips or none.
        photometric: what changes colours, applied to each view by itself, before the geometry; a pair: one for each
            view, as MoCo-v3's recipe has them. Without it the geometry is all that is done: the paper's views are
            those with a `Photometric`, which draws for each image and records in ``view.drawn`` what it drew. Any
            other callable on a (B, C, H, W) batch that keeps its shape also does, such as a
            ``torchvision.transforms.v2`` pipeline, which draws once for all images of a batch, unrecorded.
        normalize: (mean, standard deviation) of the channels, such as ``IMAGENET``; applied last.

    Raises:
        SERError: a range or the patch size is not positive, or the photometric part is none.

    Takes images with values in [0, 1] and gives values in [0, 1] before `normalize`: they are resampled bicubically
    with antialiasing, and what that overshoots is clamped. Without a `Photometric` other ranges pass, and each image
    stays in its own.

    Source: Section 3.2 and Algorithm 1 (lines 7-9) of the paper.

    Example:
        >>> make_views = EquivariantViews(patch_size=16)
        >>> view1, view2 = make_views(torch.rand(4, 3, 224, 224), generator=torch.Generator().manual_seed(1))
        >>> view1.images.shape, view2.images.shape
        (torch.Size([4, 3, 208, 176]), torch.Size([4, 3, 208, 224]))
        >>> len(view1.relation), view1.drawn
        (4, {})
    """

    def __init__(
        self,
        patch_size: int = 16,
        scale: tuple[float, float] = (0.7, 1.3),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        rotations: bool = True,
        flips: bool = True,
        photometric: Part | tuple[Part, Part] = None,
        normalize: Normalize | None = None,
    ) -> None:
        call = "EquivariantViews(patch_size, scale, ratio)"
        pixels = isinstance(patch_size, int) and not isinstance(patch_size, bool) and patch_size >= 1
        remedy = "EquivariantViews(patch_size=16)"
        require(pixels, call, f"patch_size={patch_size!r}", "a whole number of pixels", remedy)
        check_ranges(call, scale, ratio)
        check_normalize(call, normalize)
        self.patch_size = patch_size
        self.scale = scale
        self.ratio = ratio
        self.rotations = rotations
        self.flips = flips
        self.photometric = photometric
        self.normalize = normalize
        self._probed: list[Any] = []  # photometric parts that were looked at
        for name, value in (("rotations", rotations), ("flips", flips)):
            remedy = f"EquivariantViews({name}=True)"
            require(isinstance(value, bool), call, f"{name}={value!r}", "True or False", remedy)
        parts = self._parts()
        fine = len(parts) == 2 and all(part is None or _draws_apart(part) or callable(part) for part in parts)
        expected, remedy = "a Photometric, another callable, or one for each view", "photometric=Photometric()"
        require(fine, call, f"photometric={photometric!r}", expected, f"EquivariantViews({remedy})")

    def _parts(self) -> tuple[Any, ...]:
        """The photometric part of each view."""
        given: Any = self.photometric
        return tuple(given) if isinstance(given, (tuple, list)) else (given, given)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name != "_probed")
        return f"EquivariantViews({settings})"

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[View, View]:
        """Two views of the images.

        Args:
            images: (B, C, H, W), floating point, values in [0, 1], or any that the photometric part takes.
            generator: source of all randomness, on the CPU. A photometric part that draws from torch's global
                generator is seeded from it too, and the global state is left as it was. Without one, the global state
                is used.

        Raises:
            SERError: images of another shape, type or range, sides smaller than a patch allows, a photometric part
                that changed the shape, or a generator on a GPU.
        """
        self._check(images)
        for part in self._parts():
            if part is not None and not _draws_apart(part) and not any(part is known for known in self._probed):
                probe(part, images)
                self._probed.append(part)
        # A rank whose subset of the batch is empty has a grid all the same: draw for one sample, keep none.
        plan = self._draw(max(1, len(images)), _size(images), generator, images.device)
        return self._render(images, plan, generator)

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator | None = None) -> EquivariantPlan:
        """The geometry of two views of n images, and what a `Photometric` does to them, drawn on this rank alone.

        Geometry is drawn first, and is the same whatever the photometric part.

        Args:
            n: images, at least one.
            size: (height, width) of the images, in pixels.
            generator: source of all randomness, on the CPU; without one, the global state is used.

        Example:
            >>> make_views = EquivariantViews(patch_size=16)
            >>> plan = make_views.draw(4, (224, 224), generator=torch.Generator().manual_seed(1))
            >>> plan.first.output_size((224, 224)), plan.second.output_size((224, 224))
            ((208, 176), (208, 224))
        """
        return self._draw(n, size, generator, None)

    def render(
        self, images: Tensor, plan: EquivariantPlan, generator: torch.Generator | None = None
    ) -> tuple[View, View]:
        """The views that a plan asks for.

        Args:
            images: (B, C, H, W), floating point.
            plan: what `draw` gave for B images.
            generator: of a photometric part whose draws are not in the plan.
        """
        self._check(images)
        check_generator("EquivariantViews(...).render(images, plan, generator)", generator)
        return self._render(images, plan, generator)

    def _check(self, images: Tensor) -> None:
        call = f"{type(self).__name__}(patch_size={self.patch_size})(images)"
        require_tensor(call, images)
        given = f"images {tuple(images.shape)}"
        require(images.ndim == 4, call, given, "a batch (B, C, H, W)", "make_views(images[None])")
        remedy = "make_views(images.float() / 255)"
        require(images.is_floating_point(), call, f"images of {images.dtype}", "floating point numbers", remedy)
        height, width = _size(images)
        smallest = (self.scale[0] * min(self.ratio[0], 1 / self.ratio[1])) ** 0.5
        require(
            round(min(height, width) / self.patch_size * smallest) >= 1,
            call,
            f"images of {height} x {width} pixels",
            f"sides that a grid of patches fits when scaled by {smallest:.2f}",
            f"EquivariantViews(patch_size={max(1, int(min(height, width) * smallest))})",
        )
        if self.normalize is not None:
            check_range(call, images, 1)
        check_colours(call, images, any(isinstance(part, Photometric) for part in self._parts()), self.normalize)

    def _render(self, images: Tensor, plan: EquivariantPlan, generator: torch.Generator | None) -> tuple[View, View]:
        wholes = zip(self._parts(), (plan.first, plan.second), plan.photometric, strict=True)
        first, second = (self._view(images, *whole, generator) for whole in wholes)
        return first, second

    def _view(
        self, images: Tensor, part: Any, elements: GroupElement, drawn: Drawn, generator: torch.Generator | None
    ) -> View:
        """One view; of no images it has the grid of the elements drawn for one."""
        n = len(images)
        elements, size = elements[:n], elements.output_size(_size(images))
        drawn = {name: values[:n] for name, values in drawn.items()}
        if part is not None:
            images = part.apply(images, drawn) if _draws_apart(part) else _changed(part, images, generator)
        views = (
            in_range(act(elements, images, antialias=True), images)
            if n
            else images.new_empty(0, images.shape[1], *size)
        )
        return View(normalized(views, self.normalize), elements, drawn)

    def _draw(
        self, n: int, size: tuple[int, int], generator: torch.Generator | None, device: torch.device | None
    ) -> EquivariantPlan:
        """A plan; with the device of the images its grids are those of the first rank."""
        check_generator("EquivariantViews(...).draw(n, size, generator)", generator)
        elements = []
        for _ in range(2):
            grid = self._draw_grid(generator)
            grid = grid if device is None else broadcast(grid, device)
            elements.append(self._draw_elements(n, size, grid, generator))
        first, second = (part.draw(n, generator) if _draws_apart(part) else {} for part in self._parts())
        return EquivariantPlan(elements[0], elements[1], (first, second))

    def _draw_grid(self, generator: torch.Generator | None) -> Tensor:
        """(3,): what all samples of a view share, uniform numbers for area and aspect, and the parity of turns."""
        uniform = torch.rand(2, 1, generator=generator, dtype=torch.float64)
        return torch.cat([uniform, torch.randint(2, (1, 1), generator=generator)])

    def _draw_elements(
        self, n: int, size: tuple[int, int], grid: Tensor, generator: torch.Generator | None
    ) -> GroupElement:
        """n elements of one grid and one parity of turns."""
        area, aspect, parity = grid
        half, flip = torch.randint(2, (2, n), generator=generator)
        sides = grid.new_tensor(size)
        cells = (side_factors(area, aspect, self.scale, self.ratio) * sides / self.patch_size).round()
        scale = cells * self.patch_size / sides
        return GroupElement(
            (parity.long() + 2 * half) * int(self.rotations), flip.bool() & self.flips, scale.expand(n, 2).clone()
        )


def _draws_apart(part: Any) -> bool:
    """Whether a photometric part says ahead what it will do, as a `Photometric` does."""
    return hasattr(part, "draw") and hasattr(part, "apply")


def _changed(part: Callable[[Tensor], Tensor], images: Tensor, generator: torch.Generator | None) -> Tensor:
    """What a photometric part that draws by itself makes of images."""
    with _seeded(generator, images.device):
        changed = part(images.clone())  # it may work in place, and the other view comes after
    check_output(images, changed)
    return changed


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


@contextlib.contextmanager
def _seeded(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded from `generator`, and put back afterwards; nothing without one."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
