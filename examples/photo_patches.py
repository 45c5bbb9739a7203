"""Photo patches: a self-supervised sanity task from photographs that come inside two pip packages.

Eighteen photographs of scikit-image and two of scikit-learn, each cut in two along its longer side: training patches
come from one part (70 %), held-out patches from the other (30 %), and no pixel is in both. The label of a patch is the
photograph that it came from. It asks whether features tell twenty textures and scenes apart; it is a sanity task, not
a recognition benchmark.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ser_reg import IMAGE_ENDINGS, SERError, embedded_photographs, read_image

__all__ = ["PatchData", "load_patches", "split_in_space"]

TRAIN_PART = 0.7
# Sides of a crop over the shorter side of its photograph. Less than 0.3, so that one fits the held-out part.
CROP_SIDES = (1 / 8, 1 / 4)


class PatchData(NamedTuple):
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


def load_patches(folder: Path | None, image_size: int, per_photo: tuple[int, int], seed: int) -> PatchData:
    """The embedded photographs as patches, or a folder of the user's own.

    Args:
        folder: None for the embedded photographs. A folder whose images lie in sub-folders has these as classes, and
            whole images are held out; one that holds images itself has them cut in space like the embedded ones.
        image_size: pixels a side of a patch.
        per_photo: training and held-out patches of each photograph; of no meaning for sub-folders.
        seed: of the crops, and of which images are held out.

    Raises:
        SERError: there is no such folder, no image in it, one that cannot be read, or a class of one image.
    """
    generator = torch.Generator().manual_seed(seed)
    if folder is None:
        return _patches_of_photographs(embedded_photographs(), image_size, per_photo, generator)
    classes = _image_paths(folder)
    if "" in classes:
        photographs = {path.name: F.pil_to_tensor(read_image(path)) for path in classes[""]}
        return _patches_of_photographs(photographs, image_size, per_photo, generator)
    return _whole_images(folder, classes, image_size, generator)


def split_in_space(photograph: Tensor) -> tuple[Tensor, Tensor]:
    """The training part and the held-out part of (C, H, W): left and right, or top and bottom of a tall one."""
    axis = -1 if photograph.shape[-1] >= photograph.shape[-2] else -2
    length = photograph.shape[axis]
    border = round(TRAIN_PART * length)
    return photograph.narrow(axis, 0, border), photograph.narrow(axis, border, length - border)


def _patches_of_photographs(
    photographs: dict[str, Tensor], image_size: int, per_photo: tuple[int, int], generator: torch.Generator
) -> PatchData:
    names = sorted(photographs)
    parts = [split_in_space(photographs[name]) for name in names]
    shorter = [min(photographs[name].shape[-2:]) for name in names]
    if min(shorter) * CROP_SIDES[0] < 1:
        name = names[shorter.index(min(shorter))]
        given = f"{name} of {min(shorter)} pixels a side"
        raise SERError(
            "load_patches(folder)", given, f"at least {1 / CROP_SIDES[0]:.0f}", f"mv '{name}' '{name}.small'"
        )
    train, test = (
        torch.cat(
            [
                _random_crops(pair[i], side, image_size, per_photo[i], generator)
                for pair, side in zip(parts, shorter, strict=True)
            ]
        )
        for i in (0, 1)
    )
    train_labels, test_labels = (torch.arange(len(names)).repeat_interleave(n) for n in per_photo)
    task = "from which photograph is this patch? (sanity task; held-out parts share no pixel with the training parts)"
    return PatchData(train, train_labels, test, test_labels, names, task)


def _random_crops(part: Tensor, shorter: int, image_size: int, n: int, generator: torch.Generator) -> Tensor:
    """(n, 3, S, S): squares of random side and place in one part, resized."""
    crops = []
    for u in torch.rand(n, 3, generator=generator).tolist():
        side = max(1, round(shorter * (CROP_SIDES[0] + u[0] * (CROP_SIDES[1] - CROP_SIDES[0]))))
        side = min(side, *part.shape[-2:])
        top, left = (int(v * (length - side + 1)) for v, length in zip(u[1:], part.shape[-2:], strict=True))
        crops.append(F.resized_crop(part, top, left, side, side, [image_size, image_size], antialias=True))
    return torch.stack(crops).float() / 255


def _whole_images(
    folder: Path, classes: dict[str, list[Path]], image_size: int, generator: torch.Generator
) -> PatchData:
    sets: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for label, (name, paths) in enumerate(classes.items()):
        if len(paths) < 2:
            raise SERError(
                f"load_patches({str(folder)!r})",
                f"one image in class {name!r}",
                "at least two images a class: one to train on, one held out",
                f"ls '{folder / name}'",
            )
        order = torch.randperm(len(paths), generator=generator).tolist()
        border = min(len(paths) - 1, max(1, round(TRAIN_PART * len(paths))))
        for place, index in enumerate(order):
            image = F.resize(F.pil_to_tensor(read_image(paths[index])), [image_size], antialias=True)
            sets[place >= border].append(F.center_crop(image, [image_size, image_size]).float() / 255)
            labels[place >= border].append(label)
    (train, test), (train_labels, test_labels) = sets, labels
    task = "to which sub-folder does this image belong? (30 % of the images held out)"
    return PatchData(
        torch.stack(train),
        torch.tensor(train_labels),
        torch.stack(test),
        torch.tensor(test_labels),
        list(classes),
        task,
    )


def _image_paths(folder: Path) -> dict[str, list[Path]]:
    """Image files by sub-folder, or all under "" where they lie in the folder itself."""
    call = f"load_patches({str(folder)!r})"
    remedy = "python examples/quickstart.py --images FOLDER  # FOLDER/*.jpg, or FOLDER/CLASS/*.jpg"
    if not folder.is_dir():
        given = "a file" if folder.exists() else "no such folder"
        raise SERError(call, given, "a folder of images", remedy)

    def images(paths: Iterable[Path]) -> list[Path]:
        found = (path for path in paths if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith("."))
        return sorted(path for path in found if path.is_file())

    flat = images(folder.iterdir())
    found = {sub.name: images(sub.rglob("*")) for sub in sorted(folder.iterdir()) if sub.is_dir()}
    found = {name: paths for name, paths in found.items() if paths}
    if flat and found:
        raise SERError(
            call,
            f"{len(flat)} images in the folder itself and sub-folders with images ({', '.join(found)})",
            "either images (photographs) or sub-folders of images (classes)",
            remedy,
        )
    if len(flat or found) < 2:
        given = f"only {[path.name for path in flat] or list(found)}" if flat or found else "no image in it"
        raise SERError(call, given, "at least two photographs, or two sub-folders of images", remedy)
    return {"": flat} if flat else found
