"""Photographs to look at: those that come inside two pip packages, or a folder of the user's own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .errors import SERError

__all__ = ["embedded_photographs", "read_folder", "read_image"]

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


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8, upright as the camera held it.

    Raises:
        SERError: Pillow cannot read the file.
    """
    from PIL import Image, ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        with Image.open(path) as image:
            pixels: Tensor = pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
            return pixels
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, for broken PNGs
        raise SERError(
            f"read_image({str(path)!r})",
            str(error),
            "an image that Pillow can read",
            f"mv '{path}' '{path}.unreadable'  # files of no image ending are passed over",
        ) from error


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
    from PIL import Image

    folder = Path(folder)
    call = f"read_folder({str(folder)!r})"
    remedy = "python -m ser_reg report vit_small_patch16_224 --images FOLDER  # FOLDER/*.jpg, or in folders inside"
    if not folder.is_dir():
        raise SERError(call, "a file" if folder.exists() else "no such folder", "a folder of images", remedy)
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix.lower() in endings]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    paths = [path for path in paths if (folder / path).is_file()]
    images: dict[str, Tensor] = {}
    unreadable: dict[str, str] = {}
    for index in torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(images) == limit:
            break
        try:
            images[str(paths[index])] = read_image(folder / paths[index])
        except SERError as error:
            unreadable[str(paths[index])] = error.given
    if len(images) < 2:
        given = f"{len(images)} readable of {len(paths)} files with the ending of an image"
        given += "".join(f"; {name}: {why}" for name, why in sorted(unreadable.items())[:3])
        raise SERError(call, given, "at least two images: another one is the floor of the score", remedy)
    return dict(sorted(images.items())), dict(sorted(unreadable.items()))
