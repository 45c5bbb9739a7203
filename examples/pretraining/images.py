"""Image files of any kind as upright RGB."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ser_reg import SERError

__all__ = ["ENDINGS", "read_rgb"]

ENDINGS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_rgb(file: str | Path | BinaryIO, name: str, remedy: str) -> Image.Image:
    """The image upright as the camera held it, as 8-bit RGB.

    Of an animation the first frame. Transparency is dropped, as torchvision's loader does. 16 bits become the higher 8
    (Pillow alone would clip them at 255: white).

    Args:
        file: path, or an open file at its start.
        name: what to call it in an error.
        remedy: a line to type if it cannot be read.

    Raises:
        SERError: it cannot be read whole. A truncated file is unreadable, not half grey.
    """
    try:
        with Image.open(file) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        given = f"{type(error).__name__}: {error}"
        raise SERError(f"read_rgb({name!r})", given, "an image that Pillow can read whole", remedy) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"values from {values.min()} to {values.max()}: which of them is white is not known")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating point values: which of them is white is not known")
    return image.convert("RGB")
