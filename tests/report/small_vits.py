"""Small ViTs, smooth images and image files for the tests of the report."""

import timm
import torch
from PIL import Image
from torch.nn import functional as F

__all__ = ["DEPTH", "DYNAMIC", "photos", "save", "vit"]

DEPTH = 2
DYNAMIC = {"dynamic_img_size": True}


def vit(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 0}
    model = timm.create_model(name, **{**small, **kwargs}).eval()
    with torch.no_grad():  # timm starts with prefix tokens and layer scales near 0, which would hide mistakes
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def photos(n=5, size=(40, 48)):
    """Smooth images, brighter at the top, as scenes are."""
    draw = torch.Generator().manual_seed(1)
    noise = F.interpolate(torch.rand(n, 3, 6, 6, generator=draw), size, mode="bilinear")
    light = torch.linspace(1, 0, size[0])[:, None].expand(size)
    return list(0.4 * noise + 0.6 * light)


def save(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(height * width))
    Image.fromarray((noise * 255).byte().numpy()).save(path)
