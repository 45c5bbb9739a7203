"""A small task without a download: patches of photographs, cut in space into a training and a held-out part."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import require
from .reading import IMAGE_ENDINGS, embedded_photographs, pixels

__all__ = ["Patches", "load_patches"]

TRAIN_PART = 0.7  # of a photograph, or of the images of a class
# Sides of a patch over the shorter side of its photograph. Less than 0.3, so that one fits the held-out part.
CROP_SIDES = (1 / 8, 1 / 4)


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
        photographs = {path.name: pixels(path) for path in classes[""]}
        return _patches_of_photographs(photographs, image_size, per_photo, generator)
    return _held_out_images(folder, classes, image_size, generator)


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
            image = F.resize(pixels(paths[index]), [image_size], antialias=True)
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
