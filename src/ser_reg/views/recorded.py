"""The user's own torchvision pipeline, unchanged, with a record of what it did to the geometry."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import SERError, require
from ..geometry import Affine
from .view import View

__all__ = ["recorded"]

CALL = "recorded(transform)"
NO_AFFINE = ("RandomPerspective", "ElasticTransform")  # of torchvision v2
NO_POINTS = ("AugMix", "AutoAugment", "RandAugment", "TrivialAugmentWide", "CutMix", "MixUp")  # which raise on points
PARTS = torch.tensor([[x, y] for y in (0.0, 0.5, 1.0) for x in (0.0, 0.5, 1.0)], dtype=torch.float64)
NO_BOXES = ("ClampBoundingBoxes", "ClampKeyPoints", "ConvertBoundingBoxFormat", "SetClampingMode")  # of the record
OF_ARRAYS = ("ToImage", "ToPILImage", "ToTensor", "Lambda")  # all others of v2 pass arrays by
MISFIT = 0.05  # pixels of the view that a point may be off where an affine map takes it


def recorded(transform: Callable[[Any], Any]) -> _Recorded:
    """The same transform, which gives a `View` that knows how it was made.

    In a data set that has a transform, this is all that changes: PyTorch's default collate makes batches of such
    views, and images are those that the transform alone would have made, from the same random numbers.

    Takes what the transform takes: a PIL image, a tensor (C, H, W), or an array (H, W, C) if the pipeline begins with
    ``v2.ToImage()``, as other transforms pass arrays by. The images of the view have
    the values that the transform gives, which are not looked at: in [0, 1] where it ends in
    ``v2.ToImage(), v2.ToDtype(torch.float32, scale=True)``, normalised where ``v2.Normalize`` comes last, 0 to 255
    where it gives uint8. The relation has length 1, and `drawn` is empty: a term that wants to know colours takes
    views of `CroppedViews`.

    Args:
        transform: a ``torchvision.transforms.v2`` pipeline that ends in a tensor. Not of it: perspective and elastic
            transforms, which are no affine maps, and AutoAugment and its like, which refuse points. What it leaves
            empty (the border that ``v2.Pad`` adds, or a crop of it) counts as image where the source reaches there.

    Raises:
        SERError: torchvision is older than 0.23; transforms of torchvision v1 or of Albumentations; a transform that
            raises, that moves points in a way that no affine map does, or that gives something else than one tensor.

    The geometry is read off key points and a bounding box that go through the pipeline beside the image. A transform
    of your own that moves images and silently passes points by cannot be detected unless it changes the size: register
    a kernel for ``tv_tensors.KeyPoints`` and ``tv_tensors.BoundingBoxes``, or use torchvision's functionals in it.
    ``v2.RandomRotation(expand=True)``, and ``v2.CenterCrop`` of more than there is, are off by up to a pixel of each
    axis in torchvision itself.

    Source: a decision of this library; no paper has it.

    Example:
        >>> from torchvision.transforms import v2
        >>> transform = recorded(v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip()]))
        >>> view1, view2 = (transform(image) for image in [torch.rand(3, 48, 64)] * 2)     # two crops of one image
        >>> view1.images.shape, view1.relation.box.shape
        (torch.Size([3, 32, 32]), torch.Size([1, 4]))
    """
    return _Recorded(transform)


class _Recorded:
    """A transform beside which points travel; a class of its own so that it pickles."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        given, remedy = f"a {type(transform).__name__}", "recorded(v2.Compose([v2.RandomResizedCrop(224)]))"
        require(callable(transform), CALL, given, "a torchvision.transforms.v2 pipeline", remedy)
        _points_of_torchvision()
        parts = list(_parts(transform))
        for part in parts:
            _check_part(part)
        self.transform = transform
        self._erases = any(type(part).__name__ == "RandomErasing" for part in parts)
        self._pure = any(type(part).__name__ == "ToPureTensor" for part in parts)
        if self._pure:  # behind which nothing tells whether a function took the points for an image
            of_all = any(type(part).__name__ == "Lambda" and object in part.types for part in parts)
            given = "a v2.Lambda of everything beside v2.ToPureTensor"
            require(not of_all, CALL, given, "a function of images", "the pipeline without v2.ToPureTensor")

    def __repr__(self) -> str:
        return f"recorded({self.transform!r})"

    def __call__(self, image: Any) -> View:
        """The view of one image."""
        size = _size(image)
        self._check_array(image)
        sample = (image, *_witnesses(size))
        # Only then, as it would repeat every other warning that Python shows once.
        with _no_word_on_points() if self._erases else contextlib.nullcontext():
            result = self._transformed(sample)
        moved, points, box = _checked(result, self._pure)
        return View(moved, _relation(points, box, size, (moved.shape[-2], moved.shape[-1])), {})

    def _check_array(self, image: Any) -> None:
        """Raise on an array that the first transform would pass by, while it moves the points."""
        first = next((part for part in _parts(self.transform) if _inside(part) is None), self.transform)
        name = type(first).__name__
        fine = isinstance(image, Tensor) or not hasattr(image, "__array_interface__") or hasattr(image, "getbands")
        fine = fine or ".v2" not in type(first).__module__ or name in OF_ARRAYS
        given, remedy = f"an array, which v2.{name} passes by", "recorded(v2.Compose([v2.ToImage(), transform]))"
        require(fine, CALL + "(image)", given, "a PIL image or a tensor (C, H, W)", remedy)

    def _transformed(self, sample: tuple[Any, ...]) -> Any:
        try:
            return self.transform(sample)
        except (OSError, SERError):  # a file that cannot be read is no fault of the transform
            raise
        except Exception as error:
            remedy = (
                "transforms of torchvision.transforms.v2 alone; v2.Lambda(f, PIL.Image.Image, tv_tensors.Image) for a "
                "function of images; inside of one that makes several crops: TwoCrops(recorded(transform))"
            )
            if "Padding mode" in str(error):
                remedy = 'padding_mode="constant", the only one with which points can be moved'
            expected = "a transform that takes (image, key points, bounding box) and moves all three alike"
            raise SERError(CALL + "(image)", f"{type(error).__name__}: {error}", expected, remedy) from error


@contextlib.contextmanager
def _no_word_on_points() -> Iterator[None]:
    """RandomErasing warns that it leaves points where they are, as it should."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*passing through inputs of type")
        yield


def _points_of_torchvision() -> Any:
    """The module of torchvision's tensors, after a look at whether it knows points."""
    try:
        import torchvision
        from torchvision import tv_tensors
    except ImportError as error:
        remedy = 'pip install "torchvision>=0.23"'
        raise SERError(CALL, "no torchvision", "torchvision 0.23 or newer", remedy) from error
    given, expected = f"torchvision {torchvision.__version__}", "0.23 or newer, whose transforms move key points"
    remedy = 'pip install "torchvision>=0.23"  # or CroppedViews(...) on whole images'
    require(hasattr(tv_tensors, "KeyPoints"), CALL, given, expected, remedy)
    return tv_tensors


def _parts(transform: Any) -> Iterator[Any]:
    """The transform and all that it is composed of, as far as can be seen from outside."""
    yield transform
    for part in _inside(transform) or ():
        yield from _parts(part)


def _inside(transform: Any) -> list[Any] | None:
    """What a transform is composed of; None where it is composed of nothing."""
    inside = getattr(transform, "transforms", None)  # of Compose, RandomApply, RandomChoice
    if inside is None and isinstance(transform, (torch.nn.Sequential, torch.nn.ModuleList)):
        inside = transform
    return list(inside) if isinstance(inside, (list, tuple, torch.nn.Sequential, torch.nn.ModuleList)) else None


def _check_part(part: Any) -> None:
    """Raise on what is known not to be recordable, before the first image."""
    kind = type(part)
    package, name = kind.__module__, kind.__name__
    remedy = f"from torchvision.transforms import v2  # v2.{name}"
    require(
        not package.startswith("torchvision.transforms.") or ".v2" in package or hasattr(part, "transforms"),
        CALL,
        f"{name} of torchvision.transforms, which takes an image alone",
        "transforms of torchvision.transforms.v2, which have the same names and arguments",
        remedy,
    )
    remedy = "recorded(v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]))"
    given, expected = f"{name} of Albumentations", "transforms of torchvision.transforms.v2"
    require(not package.startswith("albumentations"), CALL, given, expected, remedy)
    if ".v2" in package:
        expected = "crops, flips, rotations, affine and photometric transforms"
        given, remedy = f"v2.{name}, which is no affine map", f"the pipeline without v2.{name}"
        require(name not in NO_AFFINE, CALL, given, expected, remedy)
        given = f"v2.{name}, through which no points can be sent"
        remedy = f"the pipeline without v2.{name}, v2.ColorJitter(0.4, 0.4, 0.2, 0.1) instead"
        require(name not in NO_POINTS, CALL, given, expected, remedy)
        given, remedy = f"v2.{name}, which changes the box of the record", f"the pipeline without v2.{name}"
        require(name not in NO_BOXES, CALL, given, expected, remedy)


def _size(image: Any) -> tuple[int, int]:
    """(height, width) of what goes into the pipeline: a tensor, a PIL image or an array."""
    if isinstance(image, Tensor):
        given = f"a tensor {tuple(image.shape)}"
        require(image.ndim == 3, CALL + "(image)", given, "one image (C, H, W)", "transform(images[0])")
        return image.shape[-2], image.shape[-1]
    shape = getattr(image, "shape", None)
    if isinstance(shape, tuple) and len(shape) in (2, 3):
        return int(shape[0]), int(shape[1])
    size = getattr(image, "size", None)
    fine = isinstance(size, tuple) and len(size) == 2
    given, expected = f"a {type(image).__name__}", "one image: of PIL, or a tensor (C, H, W)"
    require(fine, CALL + "(image)", given, expected, "transform(PIL.Image.open(path).convert('RGB'))")
    width, height = size  # type: ignore[misc]
    return int(height), int(width)


def _witnesses(size: tuple[int, int]) -> tuple[Any, Any]:
    """Nine points over the image, corners included, and the box around it, which nothing clamps."""
    kinds = _points_of_torchvision()
    height, width = size
    points = PARTS * torch.tensor([width, height], dtype=torch.float64)
    box = torch.tensor([[0, 0, width, height]], dtype=torch.float64)
    return (
        kinds.KeyPoints(points, canvas_size=size),
        kinds.BoundingBoxes(box, format="XYXY", canvas_size=size, clamping_mode=None),
    )


def _checked(result: Any, pure: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(image, points, box) as plain tensors, after a look at whether the result is that."""
    call = CALL + "(image)"
    several = isinstance(result, (tuple, list)) and len(result) == 3
    given = f"a {type(result).__name__} from the transform"
    if isinstance(result, (tuple, list)):
        given += f" of {', '.join(type(part).__name__ for part in result)}"
    expected = "what was sent, moved: (image, key points, bounding box)"
    remedy = "recorded(...) around the pipeline that makes one view: TwoCrops(recorded(transform))"
    require(several, call, given, expected, remedy)
    image, points, box = result
    fine = isinstance(points, Tensor) and isinstance(box, Tensor)
    fine = fine and points.shape == PARTS.shape and box.shape == (1, 4)
    require(fine, call, given, expected, remedy)
    remedy = "v2.Compose([transform, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])"
    given = f"a {type(image).__name__} as the image"
    require(isinstance(image, Tensor) and image.ndim == 3, call, given, "a tensor (C, H, W)", remedy)
    size = tuple(image.shape[-2:])
    canvas = getattr(points, "canvas_size", size)  # lost where the pipeline ends in ToPureTensor
    given = f"an image {size}, its key points on {canvas}"
    expected = "transforms that move key points along with the image"
    remedy = "transforms of torchvision.transforms.v2 alone"
    kinds = _points_of_torchvision()
    kept = pure or (isinstance(points, kinds.KeyPoints) and isinstance(box, kinds.BoundingBoxes))
    of_images = "v2.Lambda(f, PIL.Image.Image, tv_tensors.Image), behind v2.ToImage()"
    words = "points or a box that became plain tensors: a function took them for an image"
    require(kept, call, words, "functions of images alone", of_images)
    near = all(abs(side - other) <= 1 for side, other in zip(size, canvas, strict=True))  # rotations that expand
    require(near, call, given, expected, remedy)
    # Plain tensors: a subclass would follow into every product and into the user's batch.
    moved, points, box = (part.as_subclass(Tensor) for part in (image, points, box))
    return moved, points.double().cpu(), box.double().cpu()


def _relation(points: Tensor, box: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Affine:
    """The affine map that moved the points; in pixels first, (x, y) as torchvision has it.

    Torchvision's points are indices to flips and edges of pixels to all else, read one way or the other off by up to a
    pixel. Differences of points do not mind, and boxes are edges to all: linear part from points, centre from the box.
    """
    offset, moved = PARTS - 0.5, points - points.mean(0)
    linear = moved.T @ offset / offset[:, 0].square().sum()  # least squares: columns of the offset are orthogonal
    off = (offset @ linear.T - moved).abs().max().item()
    scale = max(1.0, moved.abs().max().item() / max(new))  # of points far outside of a small crop
    require(
        off <= MISFIT * scale,
        CALL + "(image)",
        f"a transform that moves points by up to {off:.2g} pixels from where an affine map takes them",
        "crops, flips, rotations and affine transforms: a perspective or elastic one has no relation to work with",
        "the pipeline without v2.RandomPerspective and v2.ElasticTransform",
    )
    hull, sides = linear.abs().sum(1), box[0, 2:] - box[0, :2]  # several rotations make the box larger, nothing smaller
    room = 0.1 * hull + 2 * (linear.abs() / torch.tensor([old[1], old[0]])).max().clamp(min=1)
    given = f"key points that span {hull.tolist()} pixels, a box of {sides.tolist()}"
    expected = "transforms that move points and boxes alike"
    remedy = "kernels for tv_tensors.KeyPoints and tv_tensors.BoundingBoxes; no transforms that convert or clamp boxes"
    require(bool((hull - sides <= room).all()), CALL + "(image)", given, expected, remedy)
    centre = torch.stack([box[0, 0] + box[0, 2], box[0, 1] + box[0, 3]]) / 2
    half = torch.tensor([new[1], new[0]], dtype=torch.float64) / 2
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2, :2] = (linear / 2 / half[:, None]).flip(0, 1)  # of half sides, and (row, column) instead of (x, y)
    matrix[:2, 2] = (centre / half - 1).flip(0)
    return Affine(matrix[None])
