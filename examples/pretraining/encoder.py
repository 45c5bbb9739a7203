"""The encoder that is trained: a timm ViT as the base method initialises it, where [CLS] joins late."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from timm.layers import DropPath, build_sincos2d_pos_embed
from torch import nn

from ser_reg import SERError, late_cls
from ser_reg.backbones import backbone, create
from ser_reg.errors import require

from .positive import require_positive

__all__ = [
    "EncoderSettings",
    "build_encoder",
    "fix_patch_projection",
    "fix_positions",
    "follow",
    "momentum_copy",
    "trainable",
]


@dataclass(frozen=True)
class EncoderSettings:
    """The encoder."""

    architecture: str = "vit_small_patch16_224"
    """Any timm ViT."""
    image_size: int = 224
    """Pixels a side of a global view."""
    patch_size: int | None = None
    """Pixels a side; by default that of the architecture, as the next three."""
    width: int | None = None
    """Channels of a token."""
    depth: int | None = None
    """Number of blocks."""
    heads: int | None = None
    """Attention heads of a block. Official MoCo-v3 has 12 in ViT-S, the released code of SER 6, as timm."""
    dynamic_size: bool = True
    """Whether the encoder takes images of any size: scaling and local views need it."""
    cls_layer: int | None = None
    """Blocks that run before [CLS] joins (Figure 3, right). By default as the layer of the added term, all but one at
    most; 0 without a term."""
    drop_path: float = 0.0
    """Highest rate of stochastic depth, in the trained branch."""
    initialisation: Literal["timm", "moco"] = "timm"
    """Of linear layers: truncated normal, or uniform as in official MoCo-v3."""
    positions: Literal["learned", "sincos"] = "learned"
    """Position embedding: learned, or fixed sine-cosine as in official MoCo-v3. The released code of SER learns it."""
    patch_projection: Literal["trained", "fixed", "fixed-default"] = "trained"
    """Trained; not trained after MoCo-v3's initialisation; or not trained after PyTorch's default one, as in the
    released code of SER."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""

    @property
    def block_count(self) -> int:
        """Number of blocks."""
        return _depth(self.architecture) if self.depth is None else self.depth

    @property
    def model_args(self) -> dict[str, Any]:
        """What timm is given besides the name of the architecture, to build or to load the encoder."""
        chosen = {"patch_size": self.patch_size, "embed_dim": self.width, "depth": self.depth, "num_heads": self.heads}
        arguments: dict[str, Any] = {"img_size": self.image_size, "dynamic_img_size": self.dynamic_size}
        return arguments | {name: value for name, value in chosen.items() if value is not None}

    def check(self, script: str) -> None:
        """Raise a SERError for sizes and rates that no encoder has. What timm refuses is found out by building."""
        require_positive(script, self, image_size=224, patch_size=16, width=384, depth=12, heads=6)
        require(
            self.cls_layer is None or 0 <= self.cls_layer < self.block_count,
            script,
            lambda: f"cls_layer={self.cls_layer} of an encoder of {self.block_count} blocks",
            f"0 to {self.block_count - 1}: [CLS] has to pass one block at least",
            lambda: f"python examples/{script} --cls-layer {min(3, self.block_count - 1)}",
        )
        remedy = f"python examples/{script} --drop-path 0.1"
        require(0 <= self.drop_path < 1, script, f"drop_path={self.drop_path}", "a probability below 1", remedy)


def build_encoder(settings: EncoderSettings, late_layer: int) -> nn.Module:
    """A timm ViT without a classifier.

    Args:
        settings: its architecture, and what is done to it.
        late_layer: blocks that run before [CLS] joins.

    Raises:
        SERError: timm has no such architecture, or [CLS] cannot join it late.
    """
    call = f"timm.create_model({settings.architecture!r})"
    training = {"drop_path_rate": settings.drop_path}
    training |= {"weight_init": "moco"} if settings.initialisation == "moco" else {}
    try:
        vit = create(settings.architecture, **settings.model_args, **training)
    except (RuntimeError, TypeError, AssertionError, SERError) as error:
        given = error.given if isinstance(error, SERError) else str(error)
        moco = "weight_init" in given  # of timm's VisionTransformer alone
        remedy = "--initialisation timm" if moco else "--architecture vit_small_patch16_224"
        raise SERError(call, given, "a timm ViT that takes these settings", remedy) from error
    require_whole_patches(call, vit, image_size=settings.image_size)
    if settings.positions == "sincos":
        fix_positions(vit, settings.image_size)
    if settings.patch_projection == "fixed":
        fix_patch_projection(vit)
    elif settings.patch_projection == "fixed-default":
        backbone(vit).projection.requires_grad_(False)
    if settings.gradient_checkpointing:
        vit.set_grad_checkpointing()
    return late_cls(vit, late_layer)


def require_whole_patches(call: str, vit: nn.Module, **sizes: int) -> None:
    """Raise unless images of these sizes, by name of the setting, are whole numbers of patches."""
    patch = backbone(vit).patch_size
    for name, size in sizes.items():
        given, remedy = f"{name}={size}, patches of {patch} pixels", f"--{name.replace('_', '-')} "
        expected = "a whole number of patches"
        require(size % patch == 0, call, given, expected, remedy + str(max(1, round(size / patch)) * patch))


@torch.no_grad()
def fix_positions(vit: nn.Module, image_size: int) -> None:
    """Two-dimensional sine-cosine position embedding, never trained; that of [CLS] is zero (MoCo-v3, Section 4).

    Raises:
        SERError: the model adds no embedding to its patches, or 4 does not divide its width.
    """
    call, facts = f"fix_positions({type(vit).__name__})", backbone(vit)
    width, positions = facts.width(), facts.positions
    if positions is None:
        given = "a model that adds no position embedding to its patches"
        raise SERError(call, given, "one that does", "--positions learned  # its own positions stay as they are")
    remedy = f"--width {max(1, round(width / 4)) * 4}"
    require(width % 4 == 0, call, f"width {width}", "a width that 4 divides", remedy)
    patches = build_sincos2d_pos_embed(list(facts.grid((image_size, image_size))), width)
    first = positions.shape[1] - len(patches)  # 0 for models whose prefix tokens have no position (DeiT-III)
    positions.zero_()[0, first:] = patches
    positions.requires_grad_(False)


@torch.no_grad()
def fix_patch_projection(vit: nn.Module) -> None:
    """A random patch projection, never trained, which MoCo-v3 found to make training stable (its Section 4.1).

    Xavier-uniform, counting one patch as the fan-in and the width as the fan-out, as if it were a linear layer.
    """
    projection = backbone(vit).projection
    bound = math.sqrt(6 / (projection.weight[0].numel() + projection.weight.shape[0]))
    projection.weight.uniform_(-bound, bound).requires_grad_(False)
    projection.bias.zero_().requires_grad_(False)


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that follows by momentum: no gradient, and no paths dropped."""
    copy = deepcopy(module).requires_grad_(False)
    for layer in copy.modules():
        if isinstance(layer, DropPath):
            layer.drop_prob = 0.0
    return copy


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Move the parameters of a momentum copy towards the trained ones; each keeps batch statistics of its own."""
    for target, source in zip(slow.parameters(), fast.parameters(), strict=True):
        target.lerp_(source, 1 - momentum)


def trainable(module: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@lru_cache
def _depth(architecture: str) -> int:
    """Blocks of a timm architecture; 12 for one that there is not, which is found out when it is built."""
    for device in ("meta", "cpu"):  # older timm cannot build on the first, which costs nothing
        try:
            with torch.device(device):
                return backbone(create(architecture)).depth
        except Exception:  # errors of all kinds, and models without blocks
            continue
    return 12
