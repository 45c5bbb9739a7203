"""Images from disk, and a small task made of them."""

from .patches import Patches, load_patches
from .reading import IMAGE_ENDINGS, IMAGENET, cut, embedded_photographs, pixels, read_folder, read_image

__all__ = [
    "IMAGENET",
    "IMAGE_ENDINGS",
    "Patches",
    "cut",
    "embedded_photographs",
    "load_patches",
    "pixels",
    "read_folder",
    "read_image",
]
