"""Soft equivariance for the vision transformer that you already have."""

from .actions import act
from .check import CheckReport, check
from .errors import SERError
from .groups import GroupElement
from .losses import patch_ntxent
from .metrics import equivariance_score
from .regularizer import SERLoss, SEROutput
from .views import EquivariantViews, ViewPair, partition_size
from .vit import TokenTap, late_cls, patch_tokens

__all__ = [
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
    "equivariance_score",
    "late_cls",
    "partition_size",
    "patch_ntxent",
    "patch_tokens",
]
