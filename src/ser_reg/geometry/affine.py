"""Affine maps of the image plane: crops, any angle, translations, and how they resample a map."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import require
from .action import MODES, _to_device, act
from .checks import check_box, check_matrix, check_size, determinant, listed
from .elements import GroupElement

__all__ = ["Affine"]

FILLS = {"edge": "border", "reflect": "reflection", "zeros": "zeros"}  # in the words of grid_sample
ROUNDING = 1e-9  # half sides: a place this close to the edge of a frame lies on it
OTHER_ANGLE = 1e-4  # half sides that a turn or shear may be off before it counts: a hundredth of a pixel at 224


class Affine:
    r"""A batch of affine maps of the image plane: where what is seen in a source is seen in a view of it.

    The frame has no pixels: row and column run from the centre in half sides, from -1 at one edge of the image to 1
    at the other, so that place i of n is at ``(2 * i + 1) / n - 1``. What lies at p in the source lies at
    ``matrix @ p`` in the view, with p = (row, column, 1), whatever grids the two are sampled on. Composition is that
    of matrices, ``(a @ b).matrix == a.matrix @ b.matrix``, and a `GroupElement` joins in from either side: it turns
    and flips, and its scale, which is one of grids, drops out.

    ======================= ===========================
    ``(a @ b) @ c``         ``a @ (b @ c)``
    ``e @ a``, ``a @ e``    ``a``
    ``a @ ~a``, ``~a @ a``  ``e``
    ======================= ===========================

    Args:
        matrix: (B, 3, 3) float64, invertible, with last row (0, 0, 1). Keep it on the CPU, where it is read without
            waiting for a GPU; `warp` moves what it needs.

    Raises:
        SERError: a matrix of another shape or type, or one that is singular, not finite, or not affine.

    Affine maps are values: make new ones instead of writing into their matrices.

    Source: a decision of this library; the paper acts with whole images, whose relations are `GroupElement`.

    Example:
        >>> left = Affine.crop(torch.tensor([[0, 0, 1, 0.5]]).double())       # top, left, height, width of the crop
        >>> right = Affine.crop(torch.tensor([[0, 0.5, 1, 0.5]]).double())
        >>> relation = right @ ~left                                          # from one crop to the other
        >>> relation.box                                                      # as the left sees it, it lies beside
        tensor([[0., 1., 1., 1.]], dtype=torch.float64)
        >>> maps, valid = relation.warp(torch.randn(1, 384, 14, 14))          # which have no place in common
        >>> bool(valid.any())
        False
        >>> (GroupElement.turn(1) @ relation).turns
        tensor([1])
    """

    def __init__(self, matrix: Tensor, *, _good: bool = False) -> None:
        if not _good:  # products and inverses of good maps are good
            check_matrix(matrix)
        self.matrix = matrix

    @classmethod
    def identity(cls, n: int) -> Affine:
        """The identity, `n` times.

        Example:
            >>> Affine.identity(2).box
            tensor([[0., 0., 1., 1.],
                    [0., 0., 1., 1.]], dtype=torch.float64)
        """
        return Affine(torch.eye(3, dtype=torch.float64).repeat(n, 1, 1), _good=True)

    @classmethod
    def crop(cls, box: Tensor) -> Affine:
        """From an image to what boxes cut out of it.

        Args:
            box: (B, 4) float64 on the CPU: top, left, height, width, in parts of the image's height and width. A box
                may reach beyond the image.

        Raises:
            SERError: boxes of another shape or type, not finite, or without area.

        Example:
            >>> Affine.crop(torch.tensor([[0.25, 0.5, 0.5, 0.25]]).double()).box
            tensor([[0.2500, 0.5000, 0.5000, 0.2500]], dtype=torch.float64)
        """
        check_box("Affine.crop(box)", box)
        top, left, height, width = box.unbind(1)
        centre = torch.stack([2 * top + height - 1, 2 * left + width - 1], 1)
        sides = torch.stack([height, width], 1)
        return cls(_matrix(torch.diag_embed(1 / sides), -centre / sides))

    @classmethod
    def rotation(cls, degrees: Tensor | float, size: tuple[float, float] = (1, 1)) -> Affine:
        """Rotation about the centre, counter-clockwise as ``torch.rot90``, within the frame of the image.

        Args:
            degrees: a number, or (B,).
            size: (height, width) of the image, in which the pixels are square: on a rectangle a rotation by another
                angle than 180 degrees shears the frame of half sides. Only the ratio counts.

        Example:
            >>> Affine.rotation(90) == Affine.of(GroupElement.turn(1))
            True
            >>> image = torch.rand(1, 3, 60, 80)
            >>> turned, valid = Affine.rotation(30.0, size=(60, 80)).warp(image, fill="zeros")
        """
        angle = _column("Affine.rotation(degrees)", degrees, "Affine.rotation(30.0)").remainder(360)
        fine = isinstance(size, (tuple, list)) and len(size) == 2 and all(0 < side < float("inf") for side in size)
        require(fine, f"Affine.rotation(degrees, size={size})", f"size={size}", "(height, width)", "size=(1, 1)")
        quarter = angle % 90 == 0
        radians = torch.deg2rad(angle)
        cos, sin = (torch.where(quarter, part.round(), part) + 0.0 for part in (radians.cos(), radians.sin()))
        aspect = size[1] / size[0]
        rows, columns = torch.stack([cos, -sin * aspect], -1), torch.stack([sin / aspect, cos], -1)
        linear = torch.stack([rows, columns], -2) + 0.0
        return cls(_matrix(linear, torch.zeros_like(linear[..., 0])))

    @classmethod
    def translation(cls, rows: Tensor | float, columns: Tensor | float) -> Affine:
        """What is seen moves down by `rows` and right by `columns`.

        Args:
            rows: a number, or (B,), in parts of the image's height.
            columns: a number, or (B,), in parts of the image's width.

        Example:
            >>> Affine.translation(0.5, 0).box          # half the height comes in from above
            tensor([[-0.5000,  0.0000,  1.0000,  1.0000]], dtype=torch.float64)
        """
        call, remedy = "Affine.translation(rows, columns)", "Affine.translation(0.1, 0.0)"
        down, right = (_column(call, part, remedy) for part in (rows, columns))
        given = f"{len(down)} rows, {len(right)} columns"
        require(len(down) == len(right) or 1 in (len(down), len(right)), call, given, "as many of each, or one", remedy)
        offset = 2 * torch.stack(torch.broadcast_tensors(down, right), 1)
        return cls(_matrix(torch.eye(2, dtype=torch.float64).expand(len(offset), 2, 2), offset))

    @classmethod
    def of(cls, g: GroupElement) -> Affine:
        """The turns and flips of group elements; their scale drops out, as the frame has no grid.

        Example:
            >>> Affine.of(GroupElement.scaling(2, 3)) == Affine.identity(1)
            True
        """
        given, remedy = f"g is a {type(g).__name__}", "Affine.of(GroupElement.turn(1))"
        require(isinstance(g, GroupElement), "Affine.of(g)", given, "a GroupElement", remedy)
        linear = GroupElement(g.turns, g.flip, torch.ones_like(g.scale)).matrix()
        return Affine(_matrix(linear, torch.zeros_like(linear[..., 0])), _good=True)

    def __matmul__(self, other: Affine | GroupElement) -> Affine:
        """``a @ b``: the map that acts with b first, then with a. Lengths are equal, or one of them is 1."""
        if isinstance(other, GroupElement):
            other = Affine.of(other)
        if not isinstance(other, Affine):
            return NotImplemented
        shorter = min(len(self), len(other))
        fit = len(self) == len(other) or 1 in (len(self), len(other))
        given = f"len(a) is {len(self)}, len(b) is {len(other)}"
        require(fit, "a @ b", given, "equal lengths, or one map for all", f"a[:{shorter}] @ b[:{shorter}]")
        return Affine(self.matrix @ other.matrix, _good=True)

    def __rmatmul__(self, other: GroupElement) -> Affine:
        """``g @ a`` of a group element and an affine map."""
        return Affine.of(other) @ self if isinstance(other, GroupElement) else NotImplemented

    def __invert__(self) -> Affine:
        """``~a``: the map with ``~a @ a`` the identity."""
        (a, b), (c, d) = self.matrix[:, :2, :2].permute(1, 2, 0)
        adjugate = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
        linear = adjugate / (a * d - b * c)[:, None, None] + 0.0
        return Affine(_matrix(linear, -(linear @ self.matrix[:, :2, 2:])[..., 0] + 0.0), _good=True)

    def __eq__(self, other: object) -> bool:
        """``a == b``: equal in every number, on whatever devices they are; see `allclose` for equal up to rounding."""
        if not isinstance(other, Affine):
            return NotImplemented
        return torch.equal(self.matrix.cpu(), other.matrix.cpu())

    __hash__ = None  # type: ignore[assignment]  # equal by value, and of tensors

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, index: int | slice | Tensor | list[int]) -> Affine:
        """Some of the batch; a single number gives a batch of one."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"map {index} of a batch of {len(self)}")
            index = [index]
        return Affine(self.matrix[index], _good=True)

    def __iter__(self) -> Iterator[Affine]:
        return (self[i] for i in range(len(self)))

    def to(self, device: torch.device | str) -> Affine:
        """The same maps on another device."""
        moved = copy.copy(self)
        moved.matrix = self.matrix.to(device)
        return moved

    def allclose(self, other: Affine, atol: float = 1e-9) -> bool:
        """Equal up to rounding, in numbers of the matrix."""
        given, remedy = f"other is a {type(other).__name__}", "a.allclose(Affine.of(g))"
        require(isinstance(other, Affine), "a.allclose(other)", given, "an Affine", remedy)
        return len(self) == len(other) and torch.allclose(self.matrix, other.matrix, rtol=atol, atol=atol)

    @property
    def turns(self) -> Tensor:
        """(B,) int64, 0 to 3: the quarter turns of ``R^turns F^flip crop(box)``.

        Raises:
            SERError: some map turns by another angle, or shears.

        Example:
            >>> crop = Affine.crop(torch.tensor([[0.25, 0.5, 0.5, 0.25]]).double())
            >>> relation = GroupElement.turn(3) @ GroupElement.mirror() @ crop
            >>> relation.turns, relation.flip
            (tensor([3]), tensor([True]))
        """
        return self._parts("turns")[0]

    @property
    def flip(self) -> Tensor:
        """(B,) bool: the flip of ``R^turns F^flip crop(box)``; raises as `turns` does."""
        return self._parts("flip")[1]

    @property
    def box(self) -> Tensor:
        """(B, 4) float64: top, left, height, width of the crop of ``R^turns F^flip crop(box)``, in parts of the source.

        Raises:
            SERError: some map turns by another angle than quarter turns, or shears.
        """
        turns, flip = self._parts("box")
        crop = (~Affine.of(_dihedral(turns, flip)) @ self).matrix
        sides = 1 / crop[:, [0, 1], [0, 1]]
        corner = (1 - (crop[:, :2, 2] + 1) * sides) / 2
        return torch.cat([corner, sides], 1) + 0.0

    def _parts(self, name: str) -> tuple[Tensor, Tensor]:
        """(turns, flip), after a look at whether there is nothing else."""
        turns, flip, off = _decompose(self.matrix)
        bad = listed(off > OTHER_ANGLE)
        expected = "quarter turns, flips and crops alone: a rotation by another angle or a shear has no such parts"
        remedy = "RandomResizedCrop and flips in the pipeline, or CroppedViews(size=224) instead of it"
        require(not bad, f"relation.{name}", lambda: f"another angle or a shear in samples {bad}", expected, remedy)
        return turns, flip

    def valid(self, size: tuple[int, int]) -> Tensor:
        """Which places of a view of this size show the source: (B, h, w) bool, on the device of the matrix, the CPU.

        A place is valid if its centre lies in the frame of the source, the edge included.

        Example:
            >>> Affine.translation(0.5, 0).valid((4, 2))[0]
            tensor([[False, False],
                    [False, False],
                    [ True,  True],
                    [ True,  True]])
        """
        check_size("relation.valid(size)", size, "size=(14, 14)")
        rows, columns = _places((~self).matrix, size)
        return (rows.abs() <= 1 + ROUNDING) & (columns.abs() <= 1 + ROUNDING)

    def warp(
        self, maps: Tensor, size: tuple[int, int] | None = None, fill: str = "edge", mode: str = "bicubic"
    ) -> tuple[Tensor, Tensor]:
        """Move maps of the source onto the grid of the view: images or token maps alike.

        Resampling is that of ``torch.nn.functional.grid_sample`` (``align_corners=False``), without a low-pass, in
        float32, or float64 for maps of it. The bicubic kernel bends ramps by up to a twentieth of a pixel, as that of
        `act` does; the bilinear one does not, and blurs. Where every map is a turn or flip onto the grid that it
        makes, it is the permutation that `act` does, bitwise and of any dtype.

        Args:
            maps: (B, D, H, W); len(relation) is B, or 1 for all maps.
            size: (h, w) of the grid; the maps' own unless given.
            fill: what is seen where the source has nothing: "edge", its nearest pixel; "reflect"; "zeros".
            mode: "bicubic" or "bilinear".

        Returns:
            maps (B, D, h, w) in the dtype of the given ones, differentiable; and `valid` (B, h, w) bool on their
            device: the places whose centre lies in the source.

        Raises:
            SERError: no batch of maps, a number of them that does not fit, integers to resample, or a word that is
                none of those above.

        Example:
            >>> crop = Affine.crop(torch.tensor([[0, 0, 0.5, 0.5]]).double())
            >>> maps, valid = crop.warp(torch.randn(8, 3, 32, 32), size=(16, 16))
            >>> maps.shape, valid.shape, bool(valid.all())
            (torch.Size([8, 3, 16, 16]), torch.Size([8, 16, 16]), True)
        """
        call = self._check_maps(maps, fill, mode)
        old = (maps.shape[-2], maps.shape[-1])
        if size is not None:
            check_size(call, size, "size=(14, 14)")
        size = old if size is None else (size[0], size[1])
        here = self if self.matrix.device.type == "cpu" else self.to("cpu")
        valid = _to_device(here.valid(size), maps.device).expand(len(maps), *size)
        if not len(maps):
            return maps.reshape(0, maps.shape[1], *size), valid
        g = here._permutation(old, size)
        if g is not None:
            return act(g, maps), valid
        given, expected = f"maps of {maps.dtype}", "floating point numbers, to be resampled"
        require(maps.is_floating_point(), call, given, expected, "relation.warp(maps.float())")
        dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
        # Sums of products rather than a matmul, which TF32 or autocast would round to a twentieth of a pixel.
        rows, columns = _places(_to_device((~here).matrix.to(dtype), maps.device), size)
        grid = torch.stack([columns, rows], -1).expand(len(maps), *size, 2)
        with torch.autocast(maps.device.type, enabled=False):
            moved = F.grid_sample(maps.to(dtype), grid, mode, FILLS[fill], align_corners=False)
        return moved.to(maps.dtype), valid

    def _check_maps(self, maps: Tensor, fill: str, mode: str) -> str:
        """Raise on bad input, return the words of the call."""
        call = "relation.warp(maps)"
        require(isinstance(maps, Tensor), call, f"a {type(maps).__name__}", "a tensor (B, D, h, w)", call)
        given = f"maps {tuple(maps.shape)}"
        batch = "relation.warp(maps[None])" if maps.ndim == 3 else "einops.rearrange(x, 'b (h w) d -> b d h w', h=h)"
        require(maps.ndim == 4 and min(maps.shape[-2:]) > 0, call, given, "a batch of maps (B, D, h, w)", batch)
        call = f"relation.warp(maps) with len(relation) = {len(self)}, maps {tuple(maps.shape)}"
        given = f"{len(self)} relations for {len(maps)} maps"
        remedy = "relation[:1].warp(maps)"
        require(len(self) in (len(maps), 1), call, given, "one relation a map, or one for all", remedy)
        require(fill in FILLS, call, f"fill={fill!r}", f"one of {tuple(FILLS)}", "relation.warp(maps, fill='edge')")
        require(mode in MODES, call, f"mode={mode!r}", f"one of {MODES}", "relation.warp(maps, mode='bicubic')")
        return call

    def _permutation(self, old: tuple[int, int], new: tuple[int, int]) -> GroupElement | None:
        """The turns and flips that these maps are, if they are nothing else and make the new grid of the old one."""
        turns, flip, _ = _decompose(self.matrix)
        g = _dihedral(turns, flip)
        if (Affine.of(g).matrix - self.matrix).abs().max() > 1e-12:
            return None
        return g if all((old[::-1] if turned else old) == new for turned, *_ in g.kinds) else None

    def __repr__(self) -> str:
        if len(self) > 2:
            return f"Affine(batch of {len(self)})"
        return f"Affine({[[[round(x, 4) for x in row] for row in rows] for rows in self.matrix.tolist()]})"


def _column(call: str, numbers: Tensor | float, remedy: str) -> Tensor:
    """(B,) float64 of a number or a tensor."""
    known = numbers is not None and not isinstance(numbers, str)
    require(known, call, f"a {type(numbers).__name__}", "a number, or a tensor (B,)", remedy)
    column = torch.as_tensor(numbers, dtype=torch.float64)
    column = column[None] if column.ndim == 0 else column
    given = f"numbers of shape {tuple(column.shape)}"
    require(column.ndim == 1 and bool(column.isfinite().all()), call, given, "finite numbers (B,)", remedy)
    return column


def _matrix(linear: Tensor, offset: Tensor) -> Tensor:
    """(B, 3, 3) of (B, 2, 2) and (B, 2)."""
    last = linear.new_tensor([0, 0, 1]).expand(len(linear), 1, 3)
    return torch.cat([torch.cat([linear, offset[..., None]], -1), last], -2)


def _dihedral(turns: Tensor, flip: Tensor) -> GroupElement:
    return GroupElement(turns, flip, torch.ones(len(turns), 2, dtype=torch.float64, device=turns.device))


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(turns, flip) of the nearest turn and flip, and how far rows and columns are from following it, in half sides."""
    linear = matrix[:, :2, :2]
    size = linear.abs()
    odd = size[:, 1, 0] * size[:, 0, 1] > size[:, 0, 0] * size[:, 1, 1]  # rows become columns
    down = torch.where(odd, linear[:, 1, 0], linear[:, 0, 0]) < 0
    followed = torch.where(odd[:, None], size[:, [1, 0], [0, 1]], size[:, [0, 1], [0, 1]])
    strayed = torch.where(odd[:, None], size[:, [0, 1], [0, 1]], size[:, [1, 0], [0, 1]])
    off = torch.where(strayed == 0, 0.0, strayed / followed).amax(1)
    return odd.long() + 2 * down.long(), determinant(linear) < 0, off


def _places(inverse: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(B, h, w) twice: row and column in the source of every place of a grid."""
    rows, columns = ((2 * torch.arange(n, device=inverse.device, dtype=inverse.dtype) + 1) / n - 1 for n in size)
    ahead = inverse[:, :2, :, None, None]
    row, column = (ahead[:, k, 1] * columns + (ahead[:, k, 0] * rows[:, None] + ahead[:, k, 2]) for k in range(2))
    return row, column
