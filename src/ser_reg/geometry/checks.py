"""What elements, affine maps, boxes and grids have to be, and the words when they are not."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require

__all__ = ["check_box", "check_fields", "check_matrix", "check_size", "determinant", "listed"]


def check_fields(turns: Tensor, flip: Tensor, scale: Tensor) -> None:
    """Raise unless these are turns, flips and scales of group elements."""
    call = "GroupElement(turns, flip, scale)"
    fields = {"turns": turns, "flip": flip, "scale": scale}
    for name, field in fields.items():
        require(
            isinstance(field, Tensor),
            call,
            f"{name} is {type(field).__name__}",
            "three tensors",
            "GroupElement(torch.tensor([1]), torch.tensor([False]), torch.ones(1, 2, dtype=torch.float64))",
        )
    n = len(turns) if turns.ndim else 0

    def named(attribute: str, words: str = "{} {}") -> str:
        return ", ".join(words.format(name, getattr(field, attribute)) for name, field in fields.items())

    shapes = {name: tuple(field.shape) for name, field in fields.items()}
    require(
        shapes == {"turns": (n,), "flip": (n,), "scale": (n, 2)},
        call,
        ", ".join(f"{name} {shape}" for name, shape in shapes.items()),
        "turns (B,), flip (B,), scale (B, 2) of one length B",
        "scale = torch.ones(len(turns), 2, dtype=torch.float64)",
    )
    require(
        [field.dtype for field in fields.values()] == [torch.int64, torch.bool, torch.float64],
        call,
        lambda: named("dtype"),
        "turns int64, flip bool, scale float64",
        "GroupElement(turns.long(), flip.bool(), scale.double())",
    )
    require(
        len({field.device for field in fields.values()}) == 1,
        call,
        lambda: named("device", "{} on {}"),
        "all on one device",
        "GroupElement(turns.cpu(), flip.cpu(), scale.cpu())",
    )


def check_matrix(matrix: Tensor) -> None:
    """Raise unless these are affine maps (B, 3, 3) float64 that can be undone."""
    call, remedy = "Affine(matrix)", "Affine(torch.eye(3, dtype=torch.float64)[None])"
    require(isinstance(matrix, Tensor), call, f"a {type(matrix).__name__}", "a tensor (B, 3, 3)", remedy)
    given, one = f"matrix {tuple(matrix.shape)}", "Affine(matrix[None])" if matrix.shape == (3, 3) else remedy
    require(matrix.ndim == 3 and matrix.shape[1:] == (3, 3), call, given, "a batch of matrices (B, 3, 3)", one)
    given = f"matrix of {matrix.dtype}"
    require(matrix.dtype == torch.float64, call, given, "float64, in which maps compose", "Affine(matrix.double())")
    bad = listed(~matrix.isfinite().flatten(1).all(1))
    require(not bad, call, lambda: f"numbers that are not finite in samples {bad}", "finite numbers", remedy)
    bad = listed((matrix[:, 2] != matrix.new_tensor([0, 0, 1])).any(1))
    expected = "last rows (0, 0, 1): a perspective is no affine map"
    require(not bad, call, lambda: f"{matrix[bad[0], 2].tolist()} in samples {bad}", expected, remedy)
    linear = matrix[:, :2, :2]
    bad = listed(determinant(linear).abs() <= 1e-12 * linear.square().sum((1, 2)))
    require(not bad, call, lambda: f"singular matrices in samples {bad}", "maps that can be undone", remedy)


def check_box(call: str, box: Tensor) -> None:
    """Raise unless these are boxes (B, 4) float64 on the CPU: top, left, height, width in parts of the whole."""
    remedy = "box = torch.tensor([[0.25, 0.25, 0.5, 0.5]], dtype=torch.float64)"
    require(isinstance(box, Tensor), call, f"box is {type(box).__name__}", "a tensor (B, 4)", remedy)
    one = "box[None]" if box.shape == (4,) else remedy
    require(box.ndim == 2 and box.shape[1] == 4, call, f"box {tuple(box.shape)}", "(B, 4)", one)
    require(box.dtype == torch.float64, call, f"box of {box.dtype}", "float64, in which boxes compose", "box.double()")
    given, expected = f"box on {box.device}", "on the CPU, where it is read without waiting for a GPU"
    require(box.device.type == "cpu", call, given, expected, "box.cpu()")
    bad = listed(~(box.isfinite().all(1) & (box[:, 2:] > 0).all(1)))
    expected = "finite numbers: top, left, height, width, the last two positive"
    require(not bad, call, lambda: f"{box[bad[0]].tolist()} in samples {bad}", expected, remedy)


def listed(wrong: Tensor) -> list[int]:
    """The samples that are wrong."""
    return torch.where(wrong)[0].tolist()


def check_size(call: str, size: tuple[int, ...], remedy: str) -> None:
    """Raise unless this is the size of a grid."""
    fine = isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    require(fine, call, f"size={size!r}", "(height, width), whole numbers above 0", remedy)


def determinant(linear: Tensor) -> Tensor:
    """(B,) of (B, 2, 2)."""
    return linear[:, 0, 0] * linear[:, 1, 1] - linear[:, 0, 1] * linear[:, 1, 0]
