"""Views of images that know how they were made."""

from .equivariant import EquivariantViews
from .partition import partition_size
from .view import View, relation

__all__ = ["EquivariantViews", "View", "partition_size", "relation"]
