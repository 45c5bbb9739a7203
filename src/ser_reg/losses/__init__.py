"""Losses between tokens, which know nothing of geometry or models."""

from .ntxent import PatchNTXent, patch_ntxent

__all__ = ["PatchNTXent", "patch_ntxent"]
