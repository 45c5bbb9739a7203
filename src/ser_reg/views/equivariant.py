"""The policy T_eq: two views of the whole image, and how they relate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import broadcast
from ..errors import require, require_tensor
from ..geometry import GroupElement, act
from ..geometry.elements import check_ranges, side_factors
from .probe import check_output, probe
from .view import View

__all__ = ["EquivariantPlan", "EquivariantViews"]


class EquivariantPlan(NamedTuple):
    """What was drawn for two views: an element an image for each."""

    first: GroupElement
    second: GroupElement

    def __getitem__(self, index: int | slice | Tensor | list[int]) -> EquivariantPlan:  # type: ignore[override]
        """The plan of some of the images; a single number gives a batch of one."""
        return EquivariantPlan(self.first[index], self.second[index])


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
        photometric: any callable on a (B, C, H, W) batch that keeps its shape, such as a
            ``torchvision.transforms.v2`` pipeline; applied to each view by itself, before the geometry. Without it the
            geometry is all that is done. A torchvision pipeline called on a batch draws once for all of its images.
        normalize: (mean, standard deviation) of the channels, such as ``IMAGENET``; applied last.

    Raises:
        SERError: a range or the patch size is not positive.

    Images are resampled bicubically with antialiasing, which can overshoot the range of their values a little.

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
        photometric: Callable[[Tensor], Tensor] | None = None,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        call = "EquivariantViews(patch_size, scale, ratio)"
        pixels = isinstance(patch_size, int) and not isinstance(patch_size, bool) and patch_size >= 1
        remedy = "EquivariantViews(patch_size=16)"
        require(pixels, call, f"patch_size={patch_size!r}", "a whole number of pixels", remedy)
        check_ranges(call, scale, ratio)
        self.patch_size = patch_size
        self.scale = scale
        self.ratio = ratio
        self.rotations = rotations
        self.flips = flips
        self.photometric = photometric
        self.normalize = normalize
        self._probed: Callable[[Tensor], Tensor] | None = None  # the photometric part that was looked at
        for name, value in (("rotations", rotations), ("flips", flips)):
            remedy = f"EquivariantViews({name}=True)"
            require(isinstance(value, bool), call, f"{name}={value!r}", "True or False", remedy)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name != "_probed")
        return f"EquivariantViews({settings})"

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[View, View]:
        """Two views of the images.

        Args:
            images: (B, C, H, W), floating point, values in any range that the photometric part takes.
            generator: source of all randomness. A photometric part that draws from torch's global generator is
                seeded from it too, and the global state is left as it was. Without one, the global state is used.

        Raises:
            SERError: images of another shape or type, sides smaller than a patch allows, or a photometric part that
                changed the shape.
        """
        self._check(images)
        if self.photometric is not None and self.photometric is not self._probed:
            probe(self.photometric, images)
            self._probed = self.photometric

        def view() -> View:
            grid = broadcast(self._draw_grid(generator), images.device)
            # A rank whose subset of the batch is empty has a grid all the same: draw for one sample, keep none.
            elements = self._draw_elements(max(1, len(images)), _size(images), grid, generator)
            return self._render(images, elements, generator)

        return view(), view()

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator | None = None) -> EquivariantPlan:
        """The geometry of two views of n images, drawn on this rank alone.

        Args:
            n: images, at least one.
            size: (height, width) of the images, in pixels.
            generator: source of all randomness; without one, the global state is used.

        Example:
            >>> make_views = EquivariantViews(patch_size=16)
            >>> plan = make_views.draw(4, (224, 224), generator=torch.Generator().manual_seed(1))
            >>> plan.first.output_size((224, 224)), plan.second.output_size((224, 224))
            ((208, 176), (208, 224))
        """
        first, second = (self._draw_elements(n, size, self._draw_grid(generator), generator) for _ in range(2))
        return EquivariantPlan(first, second)

    def render(
        self, images: Tensor, plan: EquivariantPlan, generator: torch.Generator | None = None
    ) -> tuple[View, View]:
        """The views that a plan asks for.

        Args:
            images: (B, C, H, W), floating point.
            plan: what `draw` gave for B images.
            generator: of the photometric part, if it draws.
        """
        self._check(images)
        first, second = (self._render(images, elements, generator) for elements in (plan.first, plan.second))
        return first, second

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
        if self.normalize is not None and images.device.type == "cpu" and len(images):  # elsewhere the host would wait
            low, high = (end.item() for end in images.aminmax())
            expected = "values in [0, 1], to be normalised"
            given = f"images with values from {low:.4g} to {high:.4g}"
            require(low > -1 and high < 2, call, given, expected, "make_views(images / 255)  # or without normalize=")

    def _render(self, images: Tensor, elements: GroupElement, generator: torch.Generator | None) -> View:
        """One view; of no images it has the grid of the elements drawn for one."""
        if self.photometric is not None:
            with _seeded(generator, images.device):
                changed = self.photometric(images.clone())  # it may work in place, and the other view comes after
            check_output(images, changed)
            images = changed
        if len(images):
            images = act(elements, images, antialias=True)
        else:
            images = images.new_empty(*images.shape[:2], *elements.output_size(_size(images)))
        if self.normalize is not None:
            mean, std = (images.new_tensor(values)[:, None, None] for values in self.normalize)
            images = (images - mean) / std
        return View(images, elements[: len(images)], {})

    def _draw_grid(self, generator: torch.Generator | None) -> Tensor:
        """(3,): what all samples of a view share, uniform numbers for area and aspect, and the parity of turns."""
        device = "cpu" if generator is None else generator.device
        uniform = torch.rand(2, 1, generator=generator, dtype=torch.float64, device=device).cpu()
        parity = torch.randint(2, (1,), generator=generator, device=device).cpu()
        return torch.cat([uniform, parity[None]])

    def _draw_elements(
        self, n: int, size: tuple[int, int], grid: Tensor, generator: torch.Generator | None
    ) -> GroupElement:
        """n elements of one grid and one parity of turns."""
        device = "cpu" if generator is None else generator.device
        area, aspect, parity = grid
        half, flip = torch.randint(2, (2, n), generator=generator, device=device).cpu()
        sides = grid.new_tensor(size)
        cells = (side_factors(area, aspect, self.scale, self.ratio) * sides / self.patch_size).round()
        scale = cells * self.patch_size / sides
        return GroupElement(
            (parity.long() + 2 * half) * int(self.rotations), flip.bool() & self.flips, scale.expand(n, 2).clone()
        )


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


@contextlib.contextmanager
def _seeded(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded from `generator`, and put back afterwards; nothing without one."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
