"""Backbones: what can be asked of a model, one family a file, and its patch tokens."""

from .base import Backbone
from .create import create
from .families import FAMILIES, backbone
from .late_cls import late_cls
from .tokens import TokenTap, patch_tokens

__all__ = ["FAMILIES", "Backbone", "TokenTap", "backbone", "create", "late_cls", "patch_tokens"]
