"""Images from disk: files of any kind, folders of them, and photographs that come inside two pip packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ..errors import SERError, require

__all__ = [
    "IMAGENET",
    "IMAGE_ENDINGS",
    "cut",
    "embedded_photographs",
    "pixels",
    "read_folder",
    "read_image",
]

# Mean and standard deviation of ImageNet's pixels, in [0, 1]: what most models were trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# What counts as an image in a folder or a shard; Pillow also claims endings such as .mpg and .h5, which it cannot read.
IMAGE_ENDINGS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

COLOUR = (
    "astronaut",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
    "stereo_motorcycle",
)
GREY = ("brick", "camera", "cell", "clock", "coins", "grass", "gravel", "moon", "page", "text")
SAMPLES = ("china.jpg", "flower.jpg")  # scikit-learn's


def embedded_photographs() -> dict[str, Tensor]:
    """The photographs of scikit-image and scikit-learn by name, each (3, H, W) uint8; nothing is downloaded.

    Raises:
        SERError: one of the two packages is missing.
    """
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        expected = "scikit-image and scikit-learn, inside which the photographs come"
        raise SERError("embedded_photographs()", str(error), expected, 'pip install "ser-reg[report]"') from error
    arrays = {name: getattr(skimage.data, name)() for name in COLOUR + GREY}
    arrays["stereo_motorcycle"] = arrays["stereo_motorcycle"][0]  # the left view of three arrays
    arrays |= {name: load_sample_image(name) for name in SAMPLES}
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    return {name: t.permute(2, 0, 1) if t.ndim == 3 else t.expand(3, -1, -1) for name, t in tensors.items()}


def read_image(
    file: str | Path | BinaryIO,
    name: str | None = None,
    remedy: str | None = None,
    reduction: Callable[[tuple[int, int]], int] | None = None,
) -> Image.Image:
    """The image upright as the camera held it, as 8-bit RGB.

    Of an animation the first frame. Transparency is dropped, as torchvision's loader does. 16 bits become the higher 8
    (Pillow alone would clip them at 255: white).

    Args:
        file: path, or an open file at its start.
        name: what to call it in an error; its path by default.
        remedy: a line to type if it cannot be read; by default one that sets the file aside.
        reduction: told the image's upright (width, height), before it is decoded, it says by how much the image may be
            smaller: 1, 2, 4 or 8. A JPEG is then decoded at that scale, which takes less time, its last row and column
            partly beyond the image where its sides do not divide. Others are read whole, and so is a JPEG that has to
            be turned upright.

    Raises:
        SERError: it cannot be read whole. A truncated file is unreadable, not half grey.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> Image.new("L", (4, 3), 255).save(file, "PNG")
        >>> read_image(io.BytesIO(file.getvalue())).getpixel((0, 0))
        (255, 255, 255)
    """
    try:
        with Image.open(file) as image:
            if reduction is not None:
                _reduce(image, reduction)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        name = str(file) if name is None else name
        given = f"{type(error).__name__}: {error}"
        remedy = remedy or f"mv '{name}' '{name}.unreadable'  # files of no image ending are passed over"
        raise SERError(f"read_image({name!r})", given, "an image that Pillow can read whole", remedy) from error


def _reduce(image: Image.Image, reduction: Callable[[tuple[int, int]], int]) -> None:
    """Have a JPEG that is not decoded yet scaled, by libjpeg's shorter transform."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    (width, height), sideways = image.size, orientation in (5, 6, 7, 8)
    factor = reduction((height, width) if sideways else (width, height))
    if factor > 1 and orientation == 1:
        image.draft(None, (width // factor, height // factor))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"values from {values.min()} to {values.max()}: which of them is white is not known")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating point values: which of them is white is not known")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def cut(image: Tensor, size: tuple[int, int], side: float = 1.0, top: float = 0.5, left: float = 0.5) -> Tensor:
    """A part of the shape of `size`, resized to it: by default the largest one, centred.

    Args:
        image: (3, H, W), uint8 or floating point in [0, 1].
        size: (height, width) in pixels.
        side: of the part, over the largest one of this shape that the image holds.
        top, left: where it lies, numbers in [0, 1] between the image's borders.

    Returns:
        (3, height, width), values in [0, 1].

    Example:
        >>> cut(torch.zeros(3, 20, 50, dtype=torch.uint8), (8, 8)).shape
        torch.Size([3, 8, 8])
    """
    height, width = image.shape[-2:]
    unit = side * min(height / size[0], width / size[1])
    rows, columns = (max(1, round(unit * length)) for length in size)
    y, x = round(top * (height - rows)), round(left * (width - columns))
    part = image[None, :, y : y + rows, x : x + columns]
    part = part.float() / 255 if part.dtype == torch.uint8 else part
    return F.interpolate(part, size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def read_folder(
    folder: str | Path,
    limit: int,
    seed: int = 0,
    *,
    fewest: int = 2,
    call: str | None = None,
    remedy: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Images of a folder and all folders in it, drawn at random if there are more than `limit`.

    Files with the ending of an image that cannot be read are passed over, and others drawn in their place.

    Args:
        folder: where images lie, at any depth; hidden files and folders are left out.
        limit: how many to read at most.
        seed: of the draw.
        fewest: how many there have to be.
        call, remedy: what the user called and what to type instead, for errors.

    Returns:
        The images by path inside the folder, sorted, each (3, H, W) uint8; and why others could not be read.

    Raises:
        SERError: no such folder, or fewer images in it that can be read.
    """
    folder = Path(folder).expanduser()
    call = call or f"read_folder({str(folder)!r})"
    remedy = remedy or "read_folder('FOLDER', 64)  # FOLDER/*.jpg, or in folders inside"
    given = "a file" if folder.exists() else "no such folder"
    require(folder.is_dir(), call, given, "a folder of images", remedy)
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    paths = [path for path in paths if (folder / path).is_file()]
    images: dict[str, Tensor] = {}
    unreadable: dict[str, str] = {}
    for index in torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(images) == limit:
            break
        try:
            images[str(paths[index])] = pixels(folder / paths[index])
        except SERError as error:
            unreadable[str(paths[index])] = error.given
    given = f"{len(images)} readable of {len(paths)} files with the ending of an image"
    given += "".join(f"; {name}: {why}" for name, why in sorted(unreadable.items())[:3])
    require(len(images) >= fewest, call, given, f"at least {fewest} images that can be read", remedy)
    return dict(sorted(images.items())), dict(sorted(unreadable.items()))


def pixels(path: Path) -> Tensor:
    """The image of a file, (3, H, W) uint8."""
    return torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)
