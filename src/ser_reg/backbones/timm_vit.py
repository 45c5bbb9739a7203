"""timm ViT and Eva: prefix tokens first, then the patches in row-major order, through blocks of one width."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any, ClassVar, cast

import timm
import torch
from timm.models import Eva, VisionTransformer, VisionTransformerDistilled
from torch import Tensor, nn

from ..errors import SERError, require
from .timm_model import TimmModel

__all__ = ["DROPS_PREFIX", "TimmViT"]

# Whether this timm leaves out the prefix tokens of a ViT without positions, and takes its first patch for [CLS].
DROPS_PREFIX = tuple(int(number) for number in re.findall(r"\d+", timm.__version__)[:3]) < (1, 0, 26)


class TimmViT(TimmModel):
    """A timm VisionTransformer or Eva. Blocks are told about the prefix by `num_prefix_tokens` alone."""

    described: ClassVar[str] = "timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP) or Eva (EVA-02, DINOv3, RoPE ViT)"
    classes: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformer, VisionTransformerDistilled, Eva)
    untouched: ClassVar[tuple[str, ...]] = ("_pos_embed", "forward_features", "forward_intermediates")
    sequence: ClassVar[bool] = True

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.model.blocks)

    @property
    def entries(self) -> list[nn.Module]:
        return [*self.model.blocks, self.model.norm]

    @property
    def embedding(self) -> nn.Module:
        return cast(nn.Module, self.model.patch_embed)

    @property
    def projection(self) -> nn.Module:
        return cast(nn.Module, self.model.patch_embed.proj)

    @property
    def positions(self) -> nn.Parameter | None:
        return cast("nn.Parameter | None", self.model.pos_embed)

    @property
    def prefix(self) -> int:
        return int(self.model.num_prefix_tokens)

    def width(self, layer: int | None = None) -> int:
        if layer is not None:
            self.check_layer(f"backbone(model).width({layer!r})", layer)
        return int(self.model.embed_dim)

    def stride(self, layer: int | None = None) -> int:
        if layer is not None:
            self.check_layer(f"backbone(model).stride({layer!r})", layer)
        height, width = self._patch
        given, remedy = f"patches of {height} x {width} pixels", f"timm.create_model(..., patch_size={height})"
        require(height == width, "backbone(model).patch_size", given, "square patches", remedy)
        return height

    @property
    def _patch(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels, of all that comes before the first block if that is a network."""
        height, width = self.model.patch_embed.feat_ratio(as_scalar=False)
        return int(height), int(width)

    @property
    def size(self) -> tuple[int, int]:
        rows, columns = self._patch
        height, width = self.model.patch_embed.img_size or (224 // rows * rows, 224 // columns * columns)
        return int(height), int(width)

    @property
    def any_size(self) -> bool:
        return bool(self.model.dynamic_img_size)

    def check_size(self, call: str, size: tuple[int, int], layer: int) -> tuple[int, int]:
        height, width = size
        given, embed = f"images of {height} x {width} pixels", self.model.patch_embed
        rows, columns = self._patch
        if not self.any_size:
            if (height, width) != tuple(embed.img_size):
                expected = "{} x {}, the size that the model was built for".format(*embed.img_size)
                raise SERError(call, given, expected, "timm.create_model(..., dynamic_img_size=True)")
        elif not embed.dynamic_img_pad and (height % rows or width % columns):
            filled = (max(height // rows, 1) * rows, max(width // columns, 1) * columns)
            remedy = f"torch.nn.functional.interpolate(images, {filled}, mode='bicubic')"
            raise SERError(call, given, f"sides that patches of {rows} x {columns} fill", remedy)
        grid: tuple[int, int] = embed.dynamic_feat_size((height, width))
        return grid

    def check_model(self, call: str) -> None:
        wrong = DROPS_PREFIX and isinstance(self.model, VisionTransformer) and self.positions is None and self.prefix
        given, remedy = "a ViT without positions but with [CLS]", 'pip install "timm>=1.0.26"'
        require(not wrong, call, given, f"one whose [CLS] timm {timm.__version__} does not leave out", remedy)

    def check_mode(self, call: str) -> None:
        dropout = self.model.patch_drop
        if isinstance(dropout, nn.Module) and dropout.training and getattr(dropout, "prob", 0.0) > 0:
            given, expected = f"patch dropout {dropout.prob} in training", "every patch, since a map has no holes"
            raise SERError(call, given, expected, "timm.create_model(..., patch_drop_rate=0.0)")

    def as_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return _unflatten(x[:, self.prefix :], grid)

    def run(self, images: Tensor, layers: list[int]) -> dict[int, Tensor]:
        model = self.model
        height, width = images.shape[-2:]
        grid = model.patch_embed.dynamic_feat_size((height, width))
        found: dict[int, Tensor] = {}
        if 0 in layers:  # timm's public forward returns outputs of blocks only
            embedded = model._pos_embed(model.patch_embed(images))
            embedded = embedded[0] if isinstance(embedded, tuple) else embedded  # Eva adds rotary embeddings
            found[0] = self.as_map(model.norm_pre(embedded), grid)
        blocks = sorted({layer - 1 for layer in layers if layer > 0})
        if blocks:
            outputs = model.forward_intermediates(
                images, indices=blocks, stop_early=True, norm=False, output_fmt="NLC", intermediates_only=True
            )
            for block, patches in zip(blocks, outputs, strict=True):
                found[block + 1] = _unflatten(patches, grid)
        return found

    def position_coding(self) -> list[str]:
        kinds = []
        if self.positions is not None:
            kinds.append("absolute (an embedding added to the patches)")
        rope = getattr(self.model, "rope", None)
        if rope is not None:
            kinds.append(f"rotary (in the attention of every block, {type(rope).__name__})")
        return kinds

    def without_positions(self) -> Any:
        """A copy that is not told positions: it treats any order of its patches alike.

        Every patch gets the mean of the absolute embeddings of all positions, so that later blocks still see the
        offset with which they were trained; what prefix tokens get stays. Rotary embedding is switched off.
        """
        copy: Any = deepcopy(self.model)
        if copy.pos_embed is not None:
            positions = copy.pos_embed.data[:, 0 if copy.no_embed_class else copy.num_prefix_tokens :]
            positions.copy_(positions.mean(1, keepdim=True).expand_as(positions))
        if getattr(copy, "rope", None) is not None:
            copy.rope = None
        return copy

    @property
    def has_class_tokens(self) -> bool:
        normalised = not isinstance(getattr(self.model, "norm", None), nn.Identity | None)
        return normalised and getattr(self.model, "cls_token", None) is not None

    def class_tokens(self, images: Tensor, last: int) -> tuple[Tensor, Tensor]:
        if not self.has_class_tokens:
            return super().class_tokens(images, last)
        call, expected = f"backbone(model).class_tokens(images, {last})", f"1 to {self.depth} blocks"
        require(1 <= last <= self.depth, call, f"last={last}", expected, call.replace(str(last), str(self.depth)))
        final, blocks = self.model.forward_intermediates(
            images, indices=last, norm=True, return_prefix_tokens=True, output_fmt="NLC"
        )
        tokens = torch.cat([prefix[:, 0] for _, prefix in blocks], dim=1)
        return self.model.forward_head(final, pre_logits=True), tokens


def _unflatten(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h·w, D) as (B, D, h, w), without a copy."""
    batch, _, dim = patches.shape
    return patches.transpose(1, 2).reshape(batch, dim, *grid)
