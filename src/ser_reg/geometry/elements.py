"""The group of SER: quarter turns, a flip and anisotropic scaling."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from ..errors import require
from .checks import check_fields

if TYPE_CHECKING:
    from .affine import Affine

__all__ = ["GroupElement", "check_ranges", "side_factors"]

# matrix of one counter-clockwise quarter turn, R^k of torch.rot90, on (row, column) offsets
_TURN_COS, _TURN_SIN = (1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 0.0, -1.0)


class GroupElement:
    r"""A batch of elements g = R^turns · F^flip · S(scale) of the group that SER acts with.

    An element first scales the whole image to another grid (no cropping), then flips it left-right, then turns
    it counter-clockwise in quarter turns, as ``torch.rot90(x, turns, (-2, -1))`` does. Turns and flips are exact
    permutations of a grid; scaling is exact in the group and, acting on a grid, up to discretisation.

    The axioms hold for every element, because turns, flips and scalings form a semidirect product:

    ======================= ===========================
    ``(a @ b) @ c``         ``a @ (b @ c)``
    ``e @ g``, ``g @ e``    ``g``
    ``g @ ~g``, ``~g @ g``  ``e``
    ======================= ===========================

    Args:
        turns: (B,) int64, quarter turns counter-clockwise, any integer (kept modulo 4).
        flip: (B,) bool, left-right flip.
        scale: (B, 2) float64, factors of height and width, positive.

    Raises:
        SERError: the tensors disagree in length or type, or a factor is not a positive number.

    Elements are values: make new ones instead of writing into their tensors, of which some facts are kept beside.
    Make them on the CPU, where reading their values costs no GPU synchronisation; what acts with them moves them.

    Source: Section 3.1 of the paper ("Geometric group for equivariance").

    Example:
        >>> g = GroupElement.sample(8, generator=torch.Generator().manual_seed(0))
        >>> h = GroupElement.sample(8)
        >>> (~(g @ h)).allclose(~h @ ~g)
        True
        >>> (g @ ~g).allclose(GroupElement.identity(8))
        True
    """

    def __init__(
        self, turns: Tensor, flip: Tensor, scale: Tensor, *, _kind: tuple[bool, float, float] | None = None
    ) -> None:
        if _kind is None:
            check_fields(turns, flip, scale)
        self.turns = turns.remainder(4)
        self.flip = flip
        self.scale = scale
        self.kinds: tuple[tuple[bool, float, float], ...]
        if _kind is not None:  # of `_of_kind`, which torch.compile of torch 2.6 can trace in no other way
            self.kinds = (_kind,)
            return
        # What decides about grids, read once and kept on the host: whoever acts with the element waits for no GPU,
        # and torch.compile knows the grids of its graph. (turned by 90 or 270 degrees, factor of height, of width)
        kinds = zip((self.turns % 2 == 1).tolist(), *scale.T.tolist(), strict=True)
        self.kinds = tuple(sorted(set(kinds)))
        require(
            all(0 < side < math.inf for _, *sides in self.kinds for side in sides),
            "GroupElement(turns, flip, scale)",
            lambda: f"scale from {scale.min():g} to {scale.max():g}",
            "factors that are positive and finite",
            "scale = torch.ones(len(turns), 2, dtype=torch.float64)",
        )

    @classmethod
    def identity(cls, n: int) -> GroupElement:
        """The identity, `n` times.

        Example:
            >>> GroupElement.identity(1)
            GroupElement(turns=[0], flip=[False], scale=[[1.0, 1.0]])
        """
        return cls(
            torch.zeros(n, dtype=torch.int64),
            torch.zeros(n, dtype=torch.bool),
            torch.ones(n, 2, dtype=torch.float64),
        )

    @classmethod
    def turn(cls, k: int, n: int = 1) -> GroupElement:
        """`k` quarter turns counter-clockwise, `n` times.

        Example:
            >>> GroupElement.turn(1) @ GroupElement.turn(3) == GroupElement.identity(1)
            True
        """
        identity = cls.identity(n)
        return cls(identity.turns + k, identity.flip, identity.scale)

    @classmethod
    def mirror(cls, n: int = 1) -> GroupElement:
        """The left-right flip, `n` times.

        Example:
            >>> GroupElement.mirror() @ GroupElement.turn(1) == GroupElement.turn(3) @ GroupElement.mirror()
            True
        """
        identity = cls.identity(n)
        return cls(identity.turns, ~identity.flip, identity.scale)

    @classmethod
    def scaling(cls, height: float, width: float, n: int = 1) -> GroupElement:
        """Scaling of the height and of the width by these factors, `n` times.

        Example:
            >>> GroupElement.scaling(0.5, 2).output_size((8, 8))
            (4, 16)
        """
        identity = cls.identity(n)
        return cls(identity.turns, identity.flip, identity.scale * identity.scale.new_tensor([height, width]))

    @classmethod
    def sample(
        cls,
        n: int,
        scale: tuple[float, float] = (0.7, 1.3),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        generator: torch.Generator | None = None,
    ) -> GroupElement:
        """`n` independent elements: turns and flips uniform, scales by area and aspect.

        Args:
            n: how many.
            scale: range of the area factor, uniform.
            ratio: range of the aspect factor (height over width), log-uniform.
            generator: source of all randomness; the global one is touched only when this is None.

        Raises:
            SERError: a range is empty or not positive.

        Source: Section 3.2 (the geometric part of T_eq), 4.1 (the range [0.7, 1.3]).

        Example:
            >>> g = GroupElement.sample(4, scale=(1, 1), ratio=(1, 1))     # the eight turns and flips alone
            >>> g.output_size((6, 6))
            (6, 6)
        """
        check_ranges("GroupElement.sample(n, scale, ratio)", scale, ratio)
        device = "cpu" if generator is None else generator.device
        uniform = torch.rand(2, n, generator=generator, dtype=torch.float64, device=device).cpu()
        dihedral = torch.randint(8, (n,), generator=generator, device=device).cpu()
        return cls(dihedral % 4, dihedral >= 4, side_factors(uniform[0], uniform[1], scale, ratio))

    @overload
    def __matmul__(self, other: GroupElement) -> GroupElement: ...

    @overload
    def __matmul__(self, other: Affine) -> Affine: ...

    def __matmul__(self, other: GroupElement | Affine) -> GroupElement | Affine:
        """``g @ h``: the element that acts with h first, then with g. Lengths are equal, or one of them is 1.

        With an `Affine`, which has no scale, it is an Affine.
        """
        if not isinstance(other, GroupElement):
            return NotImplemented
        shorter = min(len(self), len(other))
        require(
            len(self) == len(other) or 1 in (len(self), len(other)),
            "g @ h",
            f"len(g) is {len(self)}, len(h) is {len(other)}",
            "equal lengths, or one element for all",
            f"g[:{shorter}] @ h[:{shorter}]",
        )
        sign = 1 - 2 * self.flip.long()  # F R = R^-1 F
        swapped = torch.where((other.turns % 2 == 1)[:, None], self.scale.flip(-1), self.scale)  # S R = R S'
        turns, flip, scale = self.turns + sign * other.turns, self.flip ^ other.flip, swapped * other.scale
        if len(self.kinds) == len(other.kinds) == 1:
            ((turned1, height1, width1),), ((turned2, height2, width2),) = self.kinds, other.kinds
            height1, width1 = (width1, height1) if turned2 else (height1, width1)
            return self._of_kind(turns, flip, scale, (turned1 != turned2, height1 * height2, width1 * width2))
        return GroupElement(turns, flip, scale)

    def __invert__(self) -> GroupElement:
        """``~g``: the element with ``~g @ g`` the identity."""
        turns = torch.where(self.flip, self.turns, -self.turns)  # a reflection is its own inverse
        scale = 1 / torch.where((self.turns % 2 == 1)[:, None], self.scale.flip(-1), self.scale)
        if len(self.kinds) == 1:
            ((turned, height, width),) = self.kinds
            height, width = (width, height) if turned else (height, width)
            return self._of_kind(turns, self.flip, scale, (turned, 1 / height, 1 / width))
        return GroupElement(turns, self.flip, scale)

    @classmethod
    def _of_kind(cls, turns: Tensor, flip: Tensor, scale: Tensor, kind: tuple[bool, float, float]) -> GroupElement:
        """Elements that lead to one known grid: no value is read, so that a compiler takes the law into its graph."""
        given, expected = f"factors {kind[1]:g} and {kind[2]:g}", "factors that are positive and finite"
        require(all(0 < side < math.inf for side in kind[1:]), "g @ h", given, expected, "GroupElement.identity(1)")
        return cls(turns, flip, scale, _kind=kind)

    def __eq__(self, other: object) -> bool:
        """``g == h``: equal in every number, on whatever devices they are; see `allclose` for equal up to rounding."""
        if not isinstance(other, GroupElement):
            return NotImplemented
        return all(
            torch.equal(mine.cpu(), theirs.cpu())
            for mine, theirs in zip(
                (self.turns, self.flip, self.scale), (other.turns, other.flip, other.scale), strict=True
            )
        )

    __hash__ = None  # type: ignore[assignment]  # equal by value, and of tensors

    def __len__(self) -> int:
        return len(self.turns)

    def __getitem__(self, index: int | slice | Tensor | list[int]) -> GroupElement:
        """Some of the batch; a single number gives a batch of one."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"element {index} of a batch of {len(self)}")
            index = [index]
        return GroupElement(self.turns[index], self.flip[index], self.scale[index])

    def __iter__(self) -> Iterator[GroupElement]:
        return (self[i] for i in range(len(self)))

    def to(self, device: torch.device | str) -> GroupElement:
        """The same elements on another device."""
        moved = copy.copy(self)  # not anew: reading values back would wait for the device
        moved.turns, moved.flip, moved.scale = (field.to(device) for field in (self.turns, self.flip, self.scale))
        return moved

    def allclose(self, other: GroupElement, rtol: float = 1e-9) -> bool:
        """Equal turns and flips, and scales equal up to rounding."""
        return (
            len(self) == len(other)
            and bool((self.turns == other.turns).all())
            and bool((self.flip == other.flip).all())
            and torch.allclose(self.scale, other.scale, rtol=rtol, atol=0)
        )

    def matrix(self) -> Tensor:
        """(B, 2, 2) float64: the linear map on (row, column) offsets from the centre; a homomorphism.

        Example:
            >>> GroupElement(torch.tensor([1]), torch.tensor([True]), torch.tensor([[2.0, 3.0]]).double()).matrix()
            tensor([[[0., 3.],
                     [2., 0.]]], dtype=torch.float64)
        """
        cos = self.scale.new_tensor(_TURN_COS)[self.turns]
        sin = self.scale.new_tensor(_TURN_SIN)[self.turns]
        turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        mirror = torch.stack([torch.ones_like(cos), torch.where(self.flip, -1.0, 1.0).to(cos)], -1)
        return turn * (mirror * self.scale)[:, None, :] + 0.0  # + 0.0 turns -0 into 0

    def warp(
        self, maps: Tensor, size: tuple[int, int] | None = None, fill: str = "edge", mode: str = "bicubic"
    ) -> tuple[Tensor, None]:
        """What `act` makes of the maps, as ``Affine.warp`` is called: no place is without content.

        Args:
            maps: (B, D, H, W).
            size: (h, w) that is expected; ``g.output_size((H, W))`` or None. No elements and no maps make any.
            fill: "edge"; nothing is filled.
            mode: "bicubic" or "bilinear", how scaling resamples.

        Returns:
            (B, D, h, w), and None: all places are valid.

        Raises:
            SERError: as `act`; or a size that the elements do not make, or another fill.

        Example:
            >>> maps, valid = GroupElement.turn(1).warp(torch.rand(2, 8, 4, 6), size=(6, 4))
            >>> maps.shape, valid
            (torch.Size([2, 8, 6, 4]), None)
        """
        from .action import act  # which knows elements

        call = f"g.warp(maps, size={size}, fill={fill!r})"
        remedy = "Affine.of(g).warp(maps, size, fill)"
        require(fill == "edge", call, f"fill={fill!r}", "'edge': elements leave no place to fill", remedy)
        if not len(self) and isinstance(maps, Tensor) and maps.ndim == 4 and not len(maps):
            return maps.reshape(0, maps.shape[1], *(size or maps.shape[-2:])), None
        moved = act(self, maps, mode)
        made = tuple(moved.shape[-2:])
        given, fits = f"elements that make maps of {made}", isinstance(size, (tuple, list)) and tuple(size) == made
        require(size is None or fits, call, given, "that size, or None", remedy)
        return moved, None

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the grid that every element of the batch makes of a grid of this size.

        Raises:
            SERError: the elements lead to different sizes, or to none at all.

        Example:
            >>> g = GroupElement(torch.tensor([1]), torch.tensor([False]), torch.tensor([[0.5, 1.0]]).double())
            >>> g.output_size((8, 6))
            (6, 4)
        """
        sizes = {self._size_of(kind, size) for kind in self.kinds}
        call = f"g.output_size({tuple(size)})"
        require(sizes, call, "no element", "a batch of at least one", "GroupElement.identity(1)")
        require(
            len(sizes) == 1,
            call,
            lambda: self._listed_sizes(size),
            "one output size for the whole batch: the same grid, and on rectangles the same parity of turns",
            "g = GroupElement(g.turns // 2 * 2, g.flip, g.scale[:1].expand(len(g), 2))",
        )
        ((height, width),) = sizes
        require(
            height >= 1 and width >= 1,
            call,
            f"an output of {height} x {width}",
            "at least one row and one column",
            "GroupElement.sample(n, scale=(0.7, 1.3))",
        )
        return height, width

    def _listed_sizes(self, size: tuple[int, int]) -> str:
        """Which samples lead to which size."""
        found: dict[tuple[int, int], list[int]] = {}
        for i, g in enumerate(self):
            found.setdefault(self._size_of(g.kinds[0], size), []).append(i)
        return "; ".join(f"{size} from samples {samples}" for size, samples in sorted(found.items()))

    @staticmethod
    def _size_of(kind: tuple[bool, float, float], size: tuple[int, int]) -> tuple[int, int]:
        turned, *factors = kind
        height, width = (round(side * factor) for side, factor in zip(size, factors, strict=True))
        return (width, height) if turned else (height, width)

    def __repr__(self) -> str:
        if len(self) > 4:
            return f"GroupElement(batch of {len(self)})"
        scale = [[round(side, 4) for side in pair] for pair in self.scale.tolist()]
        return f"GroupElement(turns={self.turns.tolist()}, flip={self.flip.tolist()}, scale={scale})"


def side_factors(area: Tensor, aspect: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """(B, 2) factors of height and width from two uniform numbers in [0, 1) each.

    The area factor is uniform in `scale`, the aspect factor (height over width) log-uniform in `ratio`.
    """
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect)
    return torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], -1)


def check_ranges(call: str, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Raise unless both are ranges of positive numbers, the smaller first."""
    for name, ends, default in (("scale", scale, "(0.7, 1.3)"), ("ratio", ratio, "(3 / 4, 4 / 3)")):
        pair = isinstance(ends, (tuple, list)) and len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends)
        fine = pair and 0 < ends[0] <= ends[1] < math.inf
        require(fine, call, f"{name}={ends!r}", "a pair (low, high) with 0 < low <= high", f"{name}={default}")
