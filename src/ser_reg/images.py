"""Images from disk: files of any kind, folders of them, and photographs that come inside two pip packages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import SERError, require

__all__ = [
    "IMAGENET",
    "IMAGE_ENDINGS",
    "Patches",
    "embedded_photographs",
    "load_patches",
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

TRAIN_PART = 0.7  # of a photograph, or of the images of a class
# Sides of a patch over the shorter side of its photograph. Less than 0.3, so that one fits the held-out part.
CROP_SIDES = (1 / 8, 1 / 4)


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
            images[str(paths[index])] = _pixels(folder / paths[index])
        except SERError as error:
            unreadable[str(paths[index])] = error.given
    given = f"{len(images)} readable of {len(paths)} files with the ending of an image"
    given += "".join(f"; {name}: {why}" for name, why in sorted(unreadable.items())[:3])
    require(len(images) >= 2, call, given, "at least two images: another one is the floor of the score", remedy)
    return dict(sorted(images.items())), dict(sorted(unreadable.items()))


class Patches(NamedTuple):
    """Square patches with values in [0, 1]; labels are indices into `names`."""

    train: Tensor
    """(N, 3, S, S) float32."""
    train_labels: Tensor
    """(N,) int64."""
    test: Tensor
    """(M, 3, S, S) float32, held out."""
    test_labels: Tensor
    """(M,) int64."""
    names: list[str]
    """Classes: photographs, or the sub-folders of a user's folder."""
    task: str
    """What a label means, in words."""


def load_patches(folder: Path | None, image_size: int, per_photo: tuple[int, int], seed: int) -> Patches:
    """The embedded photographs as patches, or a folder of the user's own: a task for a processor and a few minutes.

    Each photograph is cut in two along its longer side: training patches come from one part (70 %), held-out patches
    from the other (30 %), and no pixel is in both. The label of a patch is the photograph that it came from. It asks
    whether features tell textures and scenes apart; it is a sanity task, not a recognition benchmark.

    Args:
        folder: None for the embedded photographs. A folder whose images lie in sub-folders has these as classes, and
            whole images are held out; one that holds images itself has them cut in space like the embedded ones.
        image_size: S, pixels a side of a patch.
        per_photo: training and held-out patches of each photograph; of no meaning for sub-folders.
        seed: of the crops, and of which images are held out.

    Raises:
        SERError: there is no such folder, no image in it, one that cannot be read, or a class of one image.

    Example:
        >>> patches = load_patches(None, image_size=16, per_photo=(2, 1), seed=0)
        >>> patches.train.shape, patches.test.shape, len(patches.names)
        (torch.Size([40, 3, 16, 16]), torch.Size([20, 3, 16, 16]), 20)
    """
    generator = torch.Generator().manual_seed(seed)
    if folder is None:
        return _patches_of_photographs(embedded_photographs(), image_size, per_photo, generator)
    classes = _paths_by_class(folder)
    if "" in classes:
        photographs = {path.name: _pixels(path) for path in classes[""]}
        return _patches_of_photographs(photographs, image_size, per_photo, generator)
    return _held_out_images(folder, classes, image_size, generator)


def _pixels(path: Path) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)


def _split_in_space(photograph: Tensor) -> tuple[Tensor, Tensor]:
    """The training part and the held-out part of (C, H, W): left and right, or top and bottom of a tall one."""
    axis = -1 if photograph.shape[-1] >= photograph.shape[-2] else -2
    length = photograph.shape[axis]
    border = round(TRAIN_PART * length)
    return photograph.narrow(axis, 0, border), photograph.narrow(axis, border, length - border)


def _patches_of_photographs(
    photographs: dict[str, Tensor], image_size: int, per_photo: tuple[int, int], generator: torch.Generator
) -> Patches:
    names = sorted(photographs)
    halves = [_split_in_space(photographs[name]) for name in names]
    shorter = [min(photographs[name].shape[-2:]) for name in names]
    smallest = names[shorter.index(min(shorter))]
    require(
        min(shorter) * CROP_SIDES[0] >= 1,
        "load_patches(folder)",
        f"{smallest} of {min(shorter)} pixels a side",
        f"at least {1 / CROP_SIDES[0]:.0f}",
        f"mv '{smallest}' '{smallest}.small'",
    )
    train, test = (
        torch.cat(
            [
                _random_crops(pair[i], side, image_size, per_photo[i], generator)
                for pair, side in zip(halves, shorter, strict=True)
            ]
        )
        for i in (0, 1)
    )
    train_labels, test_labels = (torch.arange(len(names)).repeat_interleave(n) for n in per_photo)
    task = "from which photograph is this patch? (sanity task; held-out parts share no pixel with the training parts)"
    return Patches(train, train_labels, test, test_labels, names, task)


def _random_crops(half: Tensor, shorter: int, image_size: int, n: int, generator: torch.Generator) -> Tensor:
    """(n, 3, S, S): squares of random side and position in one half of a photograph, resized."""
    from torchvision.transforms.v2 import functional as F  # comes with timm; slow to import

    crops = []
    for u in torch.rand(n, 3, generator=generator).tolist():
        side = max(1, round(shorter * (CROP_SIDES[0] + u[0] * (CROP_SIDES[1] - CROP_SIDES[0]))))
        side = min(side, *half.shape[-2:])
        top, left = (int(v * (length - side + 1)) for v, length in zip(u[1:], half.shape[-2:], strict=True))
        crops.append(F.resized_crop(half, top, left, side, side, [image_size, image_size], antialias=True))
    return torch.stack(crops).float() / 255


def _held_out_images(
    folder: Path, classes: dict[str, list[Path]], image_size: int, generator: torch.Generator
) -> Patches:
    """Whole images, of each class some to train on and the others held out."""
    from torchvision.transforms.v2 import functional as F

    sets: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for label, (name, paths) in enumerate(classes.items()):
        require(
            len(paths) >= 2,
            f"load_patches({str(folder)!r})",
            f"one image in class {name!r}",
            "at least two images a class: one to train on, one held out",
            f"ls '{folder / name}'",
        )
        order = torch.randperm(len(paths), generator=generator).tolist()
        border = min(len(paths) - 1, max(1, round(TRAIN_PART * len(paths))))
        for position, index in enumerate(order):
            image = F.resize(_pixels(paths[index]), [image_size], antialias=True)
            sets[position >= border].append(F.center_crop(image, [image_size, image_size]).float() / 255)
            labels[position >= border].append(label)
    (train, test), (train_labels, test_labels) = map(torch.stack, sets), map(torch.tensor, labels)
    task = "to which sub-folder does this image belong? (30 % of the images held out)"
    return Patches(train, train_labels, test, test_labels, list(classes), task)


def _paths_by_class(folder: Path) -> dict[str, list[Path]]:
    """Image files by sub-folder, or all under "" where they lie in the folder itself."""
    call = f"load_patches({str(folder)!r})"
    remedy = "python examples/quickstart.py --images FOLDER  # FOLDER/*.jpg, or FOLDER/CLASS/*.jpg"
    given = "a file" if folder.exists() else "no such folder"
    require(folder.is_dir(), call, given, "a folder of images", remedy)

    def images(paths: Iterable[Path]) -> list[Path]:
        found = (path for path in paths if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith("."))
        return sorted(path for path in found if path.is_file())

    flat = images(folder.iterdir())
    found = {sub.name: images(sub.rglob("*")) for sub in sorted(folder.iterdir()) if sub.is_dir()}
    found = {name: paths for name, paths in found.items() if paths}
    require(
        not (flat and found),
        call,
        f"{len(flat)} images in the folder itself and sub-folders with images ({', '.join(found)})",
        "either images (photographs) or sub-folders of images (classes)",
        remedy,
    )
    given = f"only {[path.name for path in flat] or list(found)}" if flat or found else "no image in it"
    require(len(flat or found) >= 2, call, given, "at least two photographs, or two sub-folders of images", remedy)
    return {"": flat} if flat else found
