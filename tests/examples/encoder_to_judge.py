"""A tiny encoder, pictures on which every turn and flip shows, and evaluate.py in this process."""

import json

import numpy as np
import timm
import torch
from PIL import Image

from ser_reg import export_timm, late_cls

__all__ = ["CLASSES", "LATE", "TINY", "export_tiny", "judge", "picture", "write_pictures"]

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "dynamic_img_size": True}
CLASSES = {"green": (40, 200, 40), "red": (220, 30, 30), "violet": (120, 40, 220)}
LATE = 2


def export_tiny(folder):
    """[CLS] joins after two blocks."""
    torch.manual_seed(0)
    vit = late_cls(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY), LATE)
    export_timm(vit, folder, "vit_tiny_patch16_224", **TINY)
    return folder


def judge(subcommand, model, data, out, *flags):
    """What evaluate.py writes, called in this process."""
    import evaluate

    arguments = ["--model", model, "--data", data, "--output-dir", out, "--workers", 0, "--device", "cpu", *flags]
    evaluate.main([subcommand, *map(str, arguments)])
    return json.loads((out / f"{subcommand}.json").read_text())


def picture(path, colour, draw, noise=8):
    """A colour that is bright on top and dark on the right, so that every turn and flip shows."""
    rows, columns = np.linspace(1, 0.2, 40)[:, None, None], np.linspace(1, 0.4, 40)[None, :, None]
    pixels = np.array(colour) * rows * columns + draw.normal(0, noise, (40, 40, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def write_pictures(root):
    """FOLDER/train/CLASS and FOLDER/val/CLASS; one file of the latter is no image."""
    draw = np.random.default_rng(0)
    for part, n in (("train", 20), ("val", 8)):
        for name, colour in CLASSES.items():
            for i in range(n):
                picture(root / part / name / f"{i:02}.png", colour, draw)
    (root / "val" / "red" / "broken.jpg").write_bytes(b"not a picture")
    return root
