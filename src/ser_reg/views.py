"""The policy T_eq: two views of the whole image, and how they relate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .actions import act
from .distributed import share
from .errors import SERError
from .groups import GroupElement, check_ranges, side_factors

__all__ = ["EquivariantViews", "ViewPair", "partition_size"]


class ViewPair(NamedTuple):
    """Two views of a batch: x_i is the photometrically changed image acted on by g_i."""

    x1: Tensor
    x2: Tensor
    g1: GroupElement
    g2: GroupElement

    @property
    def relative(self) -> GroupElement:
        """g2 @ ~g1, the element that takes the geometry of view 1 to that of view 2."""
        return self.g2 @ ~self.g1


class EquivariantViews:
    """The equivariant-view policy T_eq: each image whole (no crop), scaled onto the patch grid, flipped and turned.

    Within a call, all samples of a view share the grid and the parity of the quarter turns, so that the view is one
    tensor. Everything else is drawn for each sample, and all of it independently for the two views: every relation
    occurs, the identity and pure rotations included.

    Args:
        patch_size: pixels a side of a patch; the sides of a view are multiples of it.
        scale: range of the area factor, uniform; (1, 1) leaves it out.
        ratio: range of the aspect factor (height over width), log-uniform; (1, 1) leaves it out.
        rotations: quarter turns or none.
        flips: left-right flips or none.
        photometric: any callable on a (B, C, H, W) batch that keeps its shape, such as a
            ``torchvision.transforms.v2`` pipeline; applied to each view by itself, before the geometry.
        shared_grid: in a distributed run all ranks use the grid and parity of the first, so that none waits for
            another's larger views; every rank then has to call. The loss is right either way.

    Raises:
        SERError: a range or the patch size is not positive.

    Images are resampled bicubically with antialiasing.

    Source: Section 3.2 and Algorithm 1 (lines 7-9) of the paper.

    Example:
        >>> views = EquivariantViews(patch_size=16)
        >>> pair = views(torch.rand(4, 3, 224, 224), generator=torch.Generator().manual_seed(1))
        >>> pair.x1.shape, pair.x2.shape
        (torch.Size([4, 3, 208, 176]), torch.Size([4, 3, 208, 224]))
        >>> pair.relative.allclose(pair.g2 @ ~pair.g1)
        True
    """

    def __init__(
        self,
        patch_size: int = 16,
        scale: tuple[float, float] = (0.7, 1.3),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        rotations: bool = True,
        flips: bool = True,
        photometric: Callable[[Tensor], Tensor] | None = None,
        shared_grid: bool = True,
    ) -> None:
        call = "EquivariantViews(patch_size, scale, ratio)"
        if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
            raise SERError(
                call, f"patch_size={patch_size!r}", "a whole number of pixels", "EquivariantViews(patch_size=16)"
            )
        check_ranges(call, scale, ratio)
        self.patch_size = patch_size
        self.scale = scale
        self.ratio = ratio
        self.rotations = rotations
        self.flips = flips
        self.photometric = photometric
        self.shared_grid = shared_grid

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"EquivariantViews({settings})"

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> ViewPair:
        """Draw two views.

        Args:
            images: (B, C, H, W), floating point, values in any range.
            generator: source of all randomness. A photometric part that draws from torch's global generator is
                seeded from it too, and the global state is left as it was. Without one, the global state is used.

        Raises:
            SERError: images of another shape or type, sides smaller than a patch allows, or a photometric part that
                changed the shape.
        """
        self._check(images)
        (x1, g1), (x2, g2) = (self._view(images, generator) for _ in range(2))
        return ViewPair(x1, x2, g1, g2)

    def elements(
        self, n: int, size: tuple[int, int], generator: torch.Generator | None = None
    ) -> tuple[GroupElement, GroupElement]:
        """The geometric half alone, for loaders that do the photometric half elsewhere: n elements for each view.

        ``ViewPair(act(g1, x1, antialias=True), act(g2, x2, antialias=True), g1, g2)`` is then the pair. Ranks that
        draw for the whole batch from the same generator, with ``shared_grid=False``, and keep their own part share
        everything without a word between them.

        Args:
            n: images, at least one.
            size: (height, width) of the images, in pixels.
            generator: source of all randomness; without one, the global state is used.

        Example:
            >>> views = EquivariantViews(patch_size=16, shared_grid=False)
            >>> g1, g2 = views.elements(4, (224, 224), generator=torch.Generator().manual_seed(1))
            >>> g1.output_size((224, 224)), g2.output_size((224, 224))
            ((208, 176), (208, 224))
        """
        device = torch.device("cpu") if generator is None else generator.device
        return self._draw(n, size, device, generator), self._draw(n, size, device, generator)

    def _check(self, images: Tensor) -> None:
        call = f"{type(self).__name__}(patch_size={self.patch_size})(images)"
        if images.ndim != 4:
            raise SERError(call, f"images {tuple(images.shape)}", "a batch (B, C, H, W)", "views(images[None])")
        if not images.dtype.is_floating_point:
            raise SERError(call, f"images of {images.dtype}", "floating point numbers", "views(images.float() / 255)")
        height, width = images.shape[-2:]
        smallest = (self.scale[0] * min(self.ratio[0], 1 / self.ratio[1])) ** 0.5
        if round(min(height, width) / self.patch_size * smallest) < 1:
            raise SERError(
                call,
                f"images of {height} x {width} pixels",
                f"sides that a grid of patches fits when scaled by {smallest:.2f}",
                f"EquivariantViews(patch_size={max(1, int(min(height, width) * smallest))})",
            )

    def _view(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, GroupElement]:
        """One view: its images and elements."""
        size = (images.shape[-2], images.shape[-1])
        # A rank whose share of the batch is empty has a grid all the same: draw for one sample, keep none.
        drawn = self._draw(max(1, len(images)), size, images.device, generator)
        element = drawn[: len(images)]
        if self.photometric is not None:
            with _seeded(generator, images.device):
                changed = self.photometric(images.clone())  # it may work in place, and the other view comes after
            if changed.shape != images.shape:
                raise SERError(
                    "EquivariantViews(photometric=...)(images)",
                    f"images {tuple(images.shape)}, after the photometric part {tuple(changed.shape)}",
                    "a photometric part that keeps the shape: a crop is no element of the group",
                    "EquivariantViews(photometric=v2.ColorJitter(0.4, 0.4, 0.2, 0.1))",
                )
            images = changed
        if not len(images):
            return images.new_empty(*images.shape[:2], *drawn.output_size(size)), element
        return act(element, images, antialias=True), element

    def _draw(
        self, n: int, size: tuple[int, int], images_device: torch.device, generator: torch.Generator | None
    ) -> GroupElement:
        """n elements of one grid and one parity of turns."""
        device = "cpu" if generator is None else generator.device
        uniform = torch.rand(2, 1, generator=generator, dtype=torch.float64, device=device).cpu()
        parity = torch.randint(2, (1,), generator=generator, device=device).cpu()
        grid = torch.cat([uniform, parity[None]])
        area, aspect, parity = share(grid, images_device) if self.shared_grid else grid
        half, flip = torch.randint(2, (2, n), generator=generator, device=device).cpu()
        sides = uniform.new_tensor(size)
        cells = (side_factors(area, aspect, self.scale, self.ratio) * sides / self.patch_size).round()
        scale = cells * self.patch_size / sides
        return GroupElement(
            (parity.long() + 2 * half) * int(self.rotations), flip.bool() & self.flips, scale.expand(n, 2).clone()
        )


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


def partition_size(batch_size: int, ratio: float, world_size: int = 1) -> int:
    """How many of a rank's images go to b2, the part of the batch that SER sees.

    The share is the same on every rank, so r is met up to whole images a rank: of 256 images a rank, r = 0.005, 0.01
    and 0.02 give 1, 3 and 5. A positive r never gives none, nor exactly one image over all ranks: without another
    image there are no negatives, and the loss is identically zero.

    Args:
        batch_size: images of this rank.
        ratio: r, the part of the batch that goes to b2; 0 for none.
        world_size: number of ranks.

    Raises:
        SERError: r is outside [0, 1], or all ranks together do not have two images.

    Source: Section 3.2; r = 0.01 is best in Table 8.

    Example:
        >>> [partition_size(256, r, world_size=8) for r in (0, 0.005, 0.01, 0.02)]
        [0, 1, 3, 5]
        >>> partition_size(64, 0.01)
        2
    """
    call = f"partition_size(batch_size={batch_size}, ratio={ratio}, world_size={world_size})"
    if not 0 <= ratio <= 1:
        raise SERError(call, f"ratio={ratio}", "a part of the batch, 0 to 1", "partition_size(batch_size, ratio=0.01)")
    if batch_size < 1 or world_size < 1:
        raise SERError(
            call,
            f"{batch_size} images on {world_size} ranks",
            "at least one of each",
            "partition_size(len(images), 0.01, world_size=1)",
        )
    if ratio == 0:
        return 0
    if batch_size * world_size < 2:
        raise SERError(
            call,
            "one image over all ranks",
            "at least two: with one there are no negatives, and the loss is identically zero",
            f"partition_size(batch_size=2, ratio={ratio})",
        )
    return min(batch_size, max(round(batch_size * ratio), 2 if world_size == 1 else 1))
