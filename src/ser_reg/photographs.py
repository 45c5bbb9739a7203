"""Photographs: those that come inside two pip packages, image files of any kind, and folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import SERError

__all__ = ["IMAGE_ENDINGS", "embedded_photographs", "read_folder", "read_image"]

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


def read_image(file: str | Path | BinaryIO, name: str | None = None, remedy: str | None = None) -> Image.Image:
    """The image upright as the camera held it, as 8-bit RGB.

    Of an animation the first frame. Transparency is dropped, as torchvision's loader does. 16 bits become the higher 8
    (Pillow alone would clip them at 255: white).

    Args:
        file: path, or an open file at its start.
        name: what to call it in an error; its path by default.
        remedy: a line to type if it cannot be read; by default one that sets the file aside.

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
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        name = str(file) if name is None else name
        given = f"{type(error).__name__}: {error}"
        remedy = remedy or f"mv '{name}' '{name}.unreadable'  # files of no image ending are passed over"
        raise SERError(f"read_image({name!r})", given, "an image that Pillow can read whole", remedy) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"values from {values.min()} to {values.max()}: which of them is white is not known")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating point values: which of them is white is not known")
    return image.convert("RGB")


def read_folder(folder: str | Path, limit: int, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Images of a folder and all folders in it, drawn at random if there are more than `limit`.

    Files with the ending of an image that cannot be read are passed over, and others drawn in their place.

    Args:
        folder: where images lie, at any depth; hidden files and folders are left out.
        limit: how many to read at most.
        seed: of the draw.

    Returns:
        The images by path inside the folder, sorted, each (3, H, W) uint8; and why others could not be read.

    Raises:
        SERError: no such folder, or fewer than two images in it that can be read.
    """
    folder = Path(folder).expanduser()
    call = f"read_folder({str(folder)!r})"
    remedy = "python -m ser_reg report vit_small_patch16_224 --images FOLDER  # FOLDER/*.jpg, or in folders inside"
    if not folder.is_dir():
        raise SERError(call, "a file" if folder.exists() else "no such folder", "a folder of images", remedy)
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    paths = [path for path in paths if (folder / path).is_file()]
    images: dict[str, Tensor] = {}
    unreadable: dict[str, str] = {}
    for index in torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(images) == limit:
            break
        try:
            pixels = np.array(read_image(folder / paths[index]))
            images[str(paths[index])] = torch.from_numpy(pixels).permute(2, 0, 1)
        except SERError as error:
            unreadable[str(paths[index])] = error.given
    if len(images) < 2:
        given = f"{len(images)} readable of {len(paths)} files with the ending of an image"
        given += "".join(f"; {name}: {why}" for name, why in sorted(unreadable.items())[:3])
        raise SERError(call, given, "at least two images: another one is the floor of the score", remedy)
    return dict(sorted(images.items())), dict(sorted(unreadable.items()))
