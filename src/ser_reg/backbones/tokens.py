"""Patch tokens: of a forward of their own, which stops early, or of the one that runs anyway."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import SERError
from .families import backbone
from .inputs import warn_if_far

__all__ = ["TokenTap", "patch_tokens"]


@overload
def patch_tokens(model: nn.Module, images: Tensor, layer: int) -> Tensor: ...
@overload
def patch_tokens(model: nn.Module, images: Tensor, layer: Iterable[int]) -> dict[int, Tensor]: ...
def patch_tokens(model: nn.Module, images: Tensor, layer: int | Iterable[int]) -> Tensor | dict[int, Tensor]:
    """Patch tokens after `layer` blocks (or stages), as a map. Runs these blocks and no more.

    The computation is the model's own, with whatever it is set to: late [CLS], gradient checkpointing, training or
    evaluation, autocast. Gradients flow. The final norm is not applied.

    Give it the model itself. Beside the forward of a DDP wrapper that is ``ddp.module``; DDP still averages these
    gradients, as they reach the same parameters. Under FSDP2 the parameters are there only during the normal
    forward, where `TokenTap` reads them.

    Args:
        model: a timm VisionTransformer or Eva, or one with stages (SwinTransformer, ConvNeXt, ResNet).
        images: (B, C, H, W), any B (none included), any H and W that the model takes. With stages both are multiples
            of the stride of the map, so that no token reaches over the border.
        layer: blocks or stages to run, 0 <= layer <= depth; 0 gives what enters the first one. Or several of these.

    Returns:
        (B, D, h, w), on the model's patch grid, row-major; of a ViT a view that is contiguous in D. Of several
        layers a dict of such maps by layer, from one forward.

    Raises:
        SERError: unknown family or wrapper; layer out of range; images of a wrong rank, dtype, device, number of
            channels or size; patch dropout in training, which would leave holes in the map.

    Source: f^(1) of Section 3.1 of the paper.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=4, dynamic_img_size=True)
        >>> images = torch.rand(2, 3, 48, 64)
        >>> patch_tokens(vit, images, layer=3).shape
        torch.Size([2, 192, 3, 4])
        >>> {layer: z.shape[-2:] for layer, z in patch_tokens(vit, images, layer=[1, 4]).items()}
        {1: torch.Size([3, 4]), 4: torch.Size([3, 4])}
    """
    if not isinstance(layer, int) and isinstance(layer, Iterable) and not isinstance(layer, (str, Tensor)):
        layers = list(layer)
        call = f"patch_tokens(model, images, layer={layers!r})"
        return backbone(model, call).maps(images, layers, call)
    call = f"patch_tokens(model, images, layer={layer!r})"
    one: Any = layer
    return backbone(model, call).maps(images, [one], call)[one]


class TokenTap:
    """Patch tokens of the forward that runs anyway, with their gradient.

    While the tap is open, `tokens` is what the latest forward of the model had after `layer` blocks. Read it after each
    forward: of two, the first one's would be lost. The forward may go through DDP or FSDP2 around the model.
    Recomputation by activation checkpointing is not a forward: tokens stay those of the forward, whichever way timm
    checkpoints (checkpointing the whole model with ``use_reentrant=True`` runs its forward without gradients, and then
    they have none). Closing the tap leaves nothing on the model; copies made meanwhile carry a closed tap.

    torch.compile keeps what it compiled before the tap was opened, so that the tap hears nothing and `tokens`
    raises: there, use `patch_tokens`.

    Args:
        model: as of `patch_tokens`, the model itself and not a wrapper around it.
        layer: blocks or stages already run, 0 <= layer <= depth.

    Attributes:
        tokens: (B, D, h, w) of the latest forward, never detached.

    Raises:
        SERError: unknown family or wrapper, layer out of range; on reading `tokens`, when no forward has reached the
            layer, or several have since it was last read; on a forward with patch dropout in training, or with images
            of a size that does not fill the grid of the map.

    Source: f^(1) of Section 3.1 of the paper.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=4, dynamic_img_size=True)
        >>> with TokenTap(vit, layer=3) as tap:
        ...     embedding = vit(torch.rand(2, 3, 48, 64))
        ...     z = tap.tokens
        >>> z.shape
        torch.Size([2, 192, 3, 4])
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self._call = f"TokenTap(model, {layer!r})"
        self._backbone = backbone(model, self._call)
        self._layer = layer
        self._backbone.check_layer(self._call, layer)
        self._handles: list[RemovableHandle] = []
        self._missed = False
        self._forget()

    def __repr__(self) -> str:
        return f"TokenTap({type(self._backbone.model).__name__}, {self._layer})"

    @property
    def tokens(self) -> Tensor:
        if self._tokens is None:
            given = "no forward, or one that stopped before" if self._handles else "a closed tap, which keeps nothing"
            remedy = f"with {self._call} as tap: model(images); z = tap.tokens"
            raise SERError(
                "tap.tokens", given, "a forward of model, not compiled before, inside the with-block", remedy
            )
        if self._missed:
            self._missed = False
            self._forget()
            given, expected = (
                "several forwards since it was last read: of which of them?",
                "one forward, then its tokens",
            )
            remedy = f"with {self._call} as tap: z = [(model(x), tap.tokens)[1] for x in (images1, images2)]"
            raise SERError("tap.tokens", given, expected, remedy)
        self._read_once = True
        return self._tokens

    def __enter__(self) -> TokenTap:
        entries, layer = self._backbone.entries, self._layer
        # Tokens are read where the next module takes them, ahead of its other hooks: with reentrant checkpointing a
        # block's own output has no gradient yet. The final norm may be called more often than for the last block.
        self._handles = [
            self._backbone.embedding.register_forward_pre_hook(self._start),
            entries[layer].register_forward_pre_hook(self._read, prepend=True),
        ]
        if layer > 0:
            self._handles.append(entries[layer - 1].register_forward_pre_hook(self._reach, prepend=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._missed = False
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # Hooks travel with copies of the model, where they must not hold tensors of its graph or hear anything.
        return vars(self) | {"_handles": [], "_grid": None, "_reached": False, "_tokens": None, "_missed": False}

    def _forget(self) -> None:
        self._grid: tuple[int, int] | None = None
        self._reached = False
        self._read_once = False
        self._tokens: Tensor | None = None

    def _hears(self) -> bool:
        # Inside a backward pass a forward is recomputation by activation checkpointing.
        return bool(self._handles) and torch._C._current_graph_task_id() == -1

    def _start(self, embedding: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._hears():
            self._missed = self._missed or (self._tokens is not None and not self._read_once)
            self._forget()
            self._backbone.check_mode(self._call)
            warn_if_far(args[0], self._backbone.mean, self._backbone.std)
            height, width = args[0].shape[-2:]
            self._grid = self._backbone.check_size(self._call, (height, width), self._layer)
            self._reached = self._layer == 0

    def _reach(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._hears():
            self._reached = True

    def _read(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._hears() and self._reached and self._grid is not None:
            with torch.enable_grad():  # reentrant checkpointing calls the next block without
                self._tokens = self._backbone.as_map(args[0], self._grid)
