"""The one exception of the library, and how it is worded."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["SERError", "require", "require_tensor"]


class SERError(ValueError):
    """Input that cannot give a right number, and what to type instead.

    Args:
        call: the call as the user wrote it, with its arguments.
        given: what it got (shapes, values).
        expected: what it needs.
        remedy: a line that can be typed.

    Example:
        >>> print(SERError("act(g, x)", "len(g) is 3, x has 4 images", "one element per image", "g[:4]"))
        act(g, x)
          given:    len(g) is 3, x has 4 images
          expected: one element per image
          remedy:   g[:4]
    """

    def __init__(self, call: str, given: str, expected: str, remedy: str) -> None:
        # All four stay in `args`, so that the error survives pickling on its way out of a worker process.
        super().__init__(call, given, expected, remedy)
        self.call, self.given, self.expected, self.remedy = call, given, expected, remedy

    def __str__(self) -> str:
        return f"{self.call}\n  given:    {self.given}\n  expected: {self.expected}\n  remedy:   {self.remedy}"


def require(
    condition: object,
    call: str,
    given: str | Callable[[], str],
    expected: str,
    remedy: str | Callable[[], str],
) -> None:
    """Raise a SERError of these words unless the condition holds.

    Words that take time to find, or that there are only if something is wrong, come as functions without arguments.

    Raises:
        SERError: the condition is false.

    Example:
        >>> require(0 <= 1.5 <= 1, "partition_size(256, 1.5)", "ratio=1.5", "0 to 1", "partition_size(256, 0.01)")
        Traceback (most recent call last):
        ...
        ser_reg.errors.SERError: partition_size(256, 1.5)
          given:    ratio=1.5
          expected: 0 to 1
          remedy:   partition_size(256, 0.01)
    """
    if not condition:
        raise SERError(
            call,
            given if isinstance(given, str) else given(),
            expected,
            remedy if isinstance(remedy, str) else remedy(),
        )


def require_tensor(call: str, images: Any) -> None:
    """Raise unless images are a tensor, and say how to make one of what is at hand: PIL images, arrays, lists, batches
    of a labelled data set."""
    require(
        isinstance(images, Tensor), call, lambda: _named(images), "a tensor (B, C, H, W)", lambda: _as_tensor(images)
    )


def _package(thing: Any) -> str:
    return type(thing).__module__.split(".")[0]


def _named(images: Any) -> str:
    """What it is, and of a list what is in it."""
    kind = type(images).__name__
    if isinstance(images, (list, tuple)) and images:
        return f"a {kind} of {type(images[0]).__name__}"
    return f"a {kind}"


def _as_tensor(images: Any) -> str:
    """The line that makes a tensor of what is at hand."""
    to_tensor = "torchvision.transforms.functional.to_tensor"
    if isinstance(images, (list, tuple)) and images:
        first: Any = images[0]
        if isinstance(first, Tensor):
            return "images[0]  # of (images, labels)" if first.ndim == 4 else "torch.stack(list(images))"
        if _package(first) == "PIL":
            return f"torch.stack([{to_tensor}(image) for image in images])"
        return "torch.stack([torch.as_tensor(image) for image in images])"
    if _package(images) == "PIL":
        return f"{to_tensor}(images)[None]"
    if _package(images) == "numpy":
        last = getattr(images, "ndim", 0) == 4 and images.shape[-1] in (1, 3)  # channels last, as images are stored
        return "torch.from_numpy(images)" + (".permute(0, 3, 1, 2)" if last else "")
    return "torch.stack(list(images))"
