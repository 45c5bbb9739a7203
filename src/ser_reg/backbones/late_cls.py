"""Late [CLS]: prefix tokens that join after some blocks."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .families import FAMILIES, backbone, unknown
from .prefix import admit_prefix, pass_prefix_by

__all__ = ["late_cls"]

Model = TypeVar("Model", bound=nn.Module)


def late_cls(model: Model, layer: int) -> Model:
    """Let [CLS], registers and the distillation token join after `layer` blocks, in place.

    In the first `layer` blocks the prefix tokens neither attend nor are attended to: they wait, as embedded, beside
    the patches, so that the map which is regularized holds spatial tokens only. Between blocks the sequence keeps
    timm's layout. No parameter, buffer or key is added: the state_dict is that of plain timm, which would let [CLS]
    in early again, so a checkpoint should say with which `layer` it was trained.

    Calling again replaces the layer; 0 restores plain timm exactly. Copies (deepcopy, pickle) keep the layer, each
    for itself. Gradient checkpointing, DDP, FSDP2, torch.compile and torch.export see an ordinary forward;
    nn.DataParallel, which copies modules on every step, is not supported.

    Args:
        model: a timm VisionTransformer or Eva, the model itself and not a wrapper around it.
        layer: blocks that run without prefix tokens, 0 <= layer < depth.

    Returns:
        The same module.

    Raises:
        SERError: the model has no sequence of tokens (Swin, ResNet, ...), is of an unknown family (CaiT, BEiT,
            relative position, ...) or wrapped, or the layer is not a whole number in range.

    Source: Section 3.1 and Figure 2 of the paper.

    Example:
        >>> import timm, torch
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=0)
        >>> vit = late_cls(vit, layer=2)
        >>> vit(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 192])
    """
    call = f"late_cls(model, {layer!r})"
    known = backbone(model, call)
    if not known.sequence:
        raise unknown(call, type(model).__name__, [family for family in FAMILIES if family.sequence])
    known.check_layer(call, layer, known.depth - 1)
    for index, block in enumerate(known.layers):
        early = index < layer and known.has_prefix
        module: Any
        for module in block.modules():
            admit_prefix(module)  # of the block or, wrapped since an earlier call, of what is now inside it
            if hasattr(module, "num_prefix_tokens"):  # rotary embeddings skip this many tokens
                module.num_prefix_tokens = 0 if early else known.prefix
        if early:
            pass_prefix_by(block, known.prefix)
    return model
