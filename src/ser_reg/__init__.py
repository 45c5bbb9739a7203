"""Soft equivariance for the vision transformer that you already have."""

from .backbones import TokenTap, late_cls, patch_tokens
from .check import check
from .errors import SERError
from .export import export_timm, load_encoder
from .geometry import Affine, GroupElement, act
from .images import IMAGENET
from .losses import PatchNTXent, patch_ntxent
from .metrics import equivariance_score, matching_score
from .objectives import SERLoss
from .views import EquivariantViews, Photometric, View, partition_size, recorded, relation

__all__ = [
    "IMAGENET",
    "Affine",
    "EquivariantViews",
    "GroupElement",
    "PatchNTXent",
    "Photometric",
    "SERError",
    "SERLoss",
    "TokenTap",
    "View",
    "act",
    "check",
    "equivariance_score",
    "export_timm",
    "late_cls",
    "load_encoder",
    "matching_score",
    "partition_size",
    "patch_ntxent",
    "patch_tokens",
    "recorded",
    "relation",
]
