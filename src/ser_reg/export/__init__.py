"""Encoders on disk: exported so that plain timm loads them, and loaded as they were trained."""

from .files import FORMAT
from .load import is_timm_name, load_encoder
from .write import export_timm

__all__ = ["FORMAT", "export_timm", "is_timm_name", "load_encoder"]
