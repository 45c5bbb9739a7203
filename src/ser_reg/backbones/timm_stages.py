"""timm models with stages, each of its own width and stride: Swin, ConvNeXt, ResNet."""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy
from math import prod
from typing import Any, ClassVar, cast

import torch
from timm.models import ConvNeXt, ResNet, SwinTransformer, checkpoint_seq
from torch import Tensor, nn

from ..errors import SERError
from .inputs import first_convolution
from .timm_model import TimmModel

__all__ = ["TimmConvNeXt", "TimmResNet", "TimmStages", "TimmSwin"]


class TimmStages(TimmModel):
    """A timm model with stages: map 0 leaves the stem, map i the i-th stage."""

    untouched: ClassVar[tuple[str, ...]] = ("forward_features", "forward_intermediates")
    unit: ClassVar[str] = "stages"

    @abstractmethod
    def stem(self, images: Tensor) -> Tensor:
        """What enters the first stage, in the model's own layout."""

    @property
    @abstractmethod
    def first_stride(self) -> int:
        """Pixels a side of a token of map 0."""

    def stage(self, number: int, x: Tensor) -> Tensor:
        """One stage, as the model runs it."""
        return cast(Tensor, self.layers[number](x))

    @property
    def projection(self) -> nn.Module:
        convolution = first_convolution(self.embedding)
        assert convolution is not None  # by construction of these families
        return convolution

    def width(self, layer: int | None = None) -> int:
        layer = self.depth if layer is None else layer
        self.check_layer(f"backbone(model).width({layer!r})", layer)
        stem, *_ = self.model.feature_info  # of ResNet; elsewhere the first stage, which keeps the width of the stem
        return int((self._stage_info(layer) if layer else stem)["num_chs"])

    def stride(self, layer: int | None = None) -> int:
        layer = self.depth if layer is None else layer
        self.check_layer(f"backbone(model).stride({layer!r})", layer)
        return int(self._stage_info(layer)["reduction"]) if layer else self.first_stride

    def _stage_info(self, layer: int) -> dict[str, Any]:
        """What timm tells of the map after a stage."""
        return dict(self.model.feature_info[layer - 1 - self.depth])

    @property
    def size(self) -> tuple[int, int]:
        _, height, width = self._pixels.get("input_size") or (3, 224, 224)
        stride = self.stride()  # so that no map has tokens that reach over the border (of 176 pixels, say)
        return int(height) // stride * stride, int(width) // stride * stride

    @property
    def any_size(self) -> bool:
        return True

    def check_size(self, call: str, size: tuple[int, int], layer: int) -> tuple[int, int]:
        height, width = size
        given = f"images of {height} x {width} pixels"
        if not self.any_size and size != self.size:
            expected = "{} x {}, the size that the model was built for".format(*self.size)
            raise SERError(call, given, expected, "timm.create_model(..., strict_img_size=False)")
        stride = self.stride(layer)
        if height % stride or width % stride or not height or not width:
            filled = (max(height // stride, 1) * stride, max(width // stride, 1) * stride)
            remedy = f"torch.nn.functional.interpolate(images, {filled}, mode='bicubic')"
            raise SERError(call, given, f"sides that tokens of {stride} x {stride} fill", remedy)
        return height // stride, width // stride

    def channels_first(self, x: Tensor) -> Tensor:
        """(B, D, h, w) of the model's own layout."""
        return x

    def as_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.channels_first(x)

    def run(self, images: Tensor, layers: list[int]) -> dict[int, Tensor]:
        # Not by timm's forward_intermediates: it gives no map 0, which would need the stem, and its batch statistics,
        # a second time.
        x, found = self.stem(images), {}
        for layer in range(max(layers) + 1):
            x = self.stage(layer - 1, x) if layer else x
            if layer in layers:
                found[layer] = self.channels_first(x)
        return found

    def run_empty(self, images: Tensor, layers: list[int]) -> dict[int, Tensor]:
        # Without running anything: batch norm would take an image that nobody gave into its statistics.
        height, width = images.shape[-2:]
        used = [self.embedding, *self.layers[: max(layers)]]
        touched = torch.stack([p.flatten()[0] for module in used for p in module.parameters()]).sum()
        found = {}
        for layer in layers:
            side = self.stride(layer)
            found[layer] = images.new_zeros(0, self.width(layer), height // side, width // side) + touched
        return found

    def position_coding(self) -> list[str]:
        return []

    def without_positions(self) -> Any:
        return deepcopy(self.model)


class TimmSwin(TimmStages):
    """A timm SwinTransformer, whose maps are (B, h, w, D) inside."""

    described: ClassVar[str] = "timm's SwinTransformer"
    classes: ClassVar[tuple[type[nn.Module], ...]] = (SwinTransformer,)

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.model.layers)

    @property
    def entries(self) -> list[nn.Module]:
        return [*self.model.layers, self.model.norm]

    @property
    def embedding(self) -> nn.Module:
        return cast(nn.Module, self.model.patch_embed)

    def stem(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model.patch_embed(images))

    @property
    def first_stride(self) -> int:
        return int(self.model.patch_embed.patch_size[0])

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.model.patch_embed.img_size
        return int(height), int(width)

    @property
    def any_size(self) -> bool:
        return not self.model.patch_embed.strict_img_size

    def channels_first(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    def position_coding(self) -> list[str]:
        return ["relative (a bias in the attention of every window)"]

    def without_positions(self) -> Any:
        """A copy whose attention has no bias of relative positions. Windows and their shift stay."""
        copy: Any = deepcopy(self.model)
        for name, parameter in copy.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.data.copy_(parameter.data.mean(0).expand_as(parameter))  # which softmax takes away
        return copy


class TimmConvNeXt(TimmStages):
    """A timm ConvNeXt."""

    described: ClassVar[str] = "timm's ConvNeXt"
    classes: ClassVar[tuple[type[nn.Module], ...]] = (ConvNeXt,)

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.model.stages)

    @property
    def entries(self) -> list[nn.Module]:
        return [*self.model.stages, self.model.norm_pre]

    @property
    def embedding(self) -> nn.Module:
        return cast(nn.Module, self.model.stem)

    def stem(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model.stem(images))

    @property
    def first_stride(self) -> int:
        return prod(int(part.stride[0]) for part in self.model.stem.modules() if isinstance(part, nn.Conv2d))


class TimmResNet(TimmStages):
    """A timm ResNet (ResNeXt, SE-ResNet, ...): its stem ends with the pooling, so that the first stage keeps its
    stride."""

    described: ClassVar[str] = "timm's ResNet"
    classes: ClassVar[tuple[type[nn.Module], ...]] = (ResNet,)

    @property
    def layers(self) -> list[nn.Module]:
        return [self.model.layer1, self.model.layer2, self.model.layer3, self.model.layer4]

    @property
    def entries(self) -> list[nn.Module]:
        # First blocks, since a checkpointed forward calls these and not the stages.
        return [*(stage[0] for stage in self.layers), self.model.global_pool]  # type: ignore[index]

    @property
    def embedding(self) -> nn.Module:
        return cast(nn.Module, self.model.conv1)

    def stem(self, images: Tensor) -> Tensor:
        model = self.model
        return cast(Tensor, model.maxpool(model.act1(model.bn1(model.conv1(images)))))

    @property
    def first_stride(self) -> int:
        return self.stride(1)

    def stage(self, number: int, x: Tensor) -> Tensor:
        if self.model.grad_checkpointing:
            return cast(Tensor, checkpoint_seq(self.layers[number], x))
        return super().stage(number, x)
