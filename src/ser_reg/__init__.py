"""Soft equivariance for the vision transformer that you already have."""

from .actions import act
from .check import CheckReport, check
from .encoders import export_timm, load_encoder
from .errors import SERError
from .groups import GroupElement
from .losses import patch_ntxent
from .metrics import equivariance_score
from .photographs import IMAGE_ENDINGS, embedded_photographs, read_image
from .regularizer import SERLoss, SEROutput
from .views import EquivariantViews, ViewPair, partition_size
from .vit import TokenTap, cls_layer, late_cls, patch_tokens

__all__ = [
    "IMAGE_ENDINGS",
    "CheckReport",
    "EquivariantViews",
    "GroupElement",
    "SERError",
    "SERLoss",
    "SEROutput",
    "TokenTap",
    "ViewPair",
    "act",
    "check",
    "cls_layer",
    "embedded_photographs",
    "equivariance_score",
    "export_timm",
    "late_cls",
    "load_encoder",
    "partition_size",
    "patch_ntxent",
    "patch_tokens",
    "read_image",
]
