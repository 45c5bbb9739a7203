"""The encoder that is trained: a timm ViT as the base method initialises it, where [CLS] joins late."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import timm
import torch
from timm.layers import DropPath, build_sincos2d_pos_embed
from timm.models import VisionTransformer
from torch import nn

from ser_reg import SERError, late_cls

from .settings import Settings

__all__ = ["build_encoder", "fix_patch_projection", "fix_positions", "model_args", "momentum_copy", "trainable"]


def model_args(settings: Settings) -> dict[str, Any]:
    """What `timm.create_model` is given besides the name of the architecture, to build or to load the encoder."""
    chosen = {
        "patch_size": settings.patch_size,
        "embed_dim": settings.width,
        "depth": settings.depth,
        "num_heads": settings.heads,
    }
    arguments: dict[str, Any] = {"img_size": settings.image_size, "dynamic_img_size": settings.dynamic_size}
    return arguments | {name: value for name, value in chosen.items() if value is not None}


def build_encoder(settings: Settings) -> nn.Module:
    """A timm ViT without a classifier.

    Raises:
        SERError: timm has no such architecture, or [CLS] cannot join it late.
    """
    call = f"timm.create_model({settings.architecture!r})"
    training = {"drop_path_rate": settings.drop_path}
    training |= {"weight_init": "moco"} if settings.initialisation == "moco" else {}
    try:
        vit = timm.create_model(settings.architecture, num_classes=0, **model_args(settings), **training)
    except (RuntimeError, TypeError, AssertionError) as error:
        moco = "weight_init" in str(error)  # of timm's VisionTransformer alone
        remedy = "--initialisation timm" if moco else "--architecture vit_small_patch16_224"
        raise SERError(call, str(error), "a timm ViT that takes these settings", remedy) from error
    _check_sizes(call, vit, settings)
    if settings.positions == "sincos":
        fix_positions(vit)
    if settings.patch_projection == "fixed":
        fix_patch_projection(vit)
    elif settings.patch_projection == "fixed-default":
        vit.patch_embed.proj.requires_grad_(False)
    if settings.gradient_checkpointing:
        vit.set_grad_checkpointing()
    return late_cls(vit, settings.late_layer)


def _check_sizes(call: str, vit: nn.Module, settings: Settings) -> None:
    patch = vit.patch_embed.patch_size[0]
    sizes = {"image_size": settings.image_size} | ({"local_size": settings.local_size} if settings.local_views else {})
    for name, size in sizes.items():
        if size % patch:
            remedy = f"--{name.replace('_', '-')} {max(1, round(size / patch)) * patch}"
            raise SERError(call, f"{name}={size}, patches of {patch} pixels", "a whole number of patches", remedy)


@torch.no_grad()
def fix_positions(vit: VisionTransformer) -> None:
    """Two-dimensional sine-cosine position embedding, never trained; that of [CLS] is zero (MoCo-v3, Section 4).

    Raises:
        SERError: the model adds no embedding to its patches, or 4 does not divide its width.
    """
    call = f"fix_positions({type(vit).__name__})"
    if vit.pos_embed is None:
        given = "a model that adds no position embedding to its patches"
        raise SERError(call, given, "one that does", "--positions learned  # its own positions stay as they are")
    if vit.embed_dim % 4:
        remedy = f"--width {max(1, round(vit.embed_dim / 4)) * 4}"
        raise SERError(call, f"width {vit.embed_dim}", "a width that 4 divides", remedy)
    patches = build_sincos2d_pos_embed(vit.patch_embed.grid_size, vit.embed_dim)
    first = vit.pos_embed.shape[1] - len(patches)  # 0 for models whose prefix tokens have no place (DeiT-III)
    vit.pos_embed.zero_()[0, first:] = patches
    vit.pos_embed.requires_grad_(False)


@torch.no_grad()
def fix_patch_projection(vit: VisionTransformer) -> None:
    """A random patch projection, never trained, which MoCo-v3 found to make training stable (its Section 4.1).

    Xavier-uniform, counting one patch as the fan-in and the width as the fan-out, as if it were a linear layer.
    """
    weight, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    bound = math.sqrt(6 / (weight[0].numel() + weight.shape[0]))
    weight.uniform_(-bound, bound).requires_grad_(False)
    bias.zero_().requires_grad_(False)


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that follows by momentum: no gradient, and no paths dropped."""
    copy = deepcopy(module).requires_grad_(False)
    for part in copy.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0
    return copy


def trainable(module: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
