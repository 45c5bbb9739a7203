"""Views of images that know how they were made."""

from .cropped import CroppedViews
from .equivariant import EquivariantViews
from .partition import partition_size
from .path import PathViews
from .photometric import Photometric
from .recorded import recorded
from .view import View, relation

__all__ = [
    "CroppedViews",
    "EquivariantViews",
    "PathViews",
    "Photometric",
    "View",
    "partition_size",
    "recorded",
    "relation",
]
