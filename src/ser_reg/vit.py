"""Patch tokens of a timm ViT, and prefix tokens that join late. The only module that imports timm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from types import TracebackType
from typing import Any, TypeVar, cast

import timm
import torch
from timm.models import Eva, VisionTransformer, VisionTransformerDistilled
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import SERError

__all__ = [
    "IMAGENET",
    "TokenTap",
    "accepts_any_size",
    "cls_layer",
    "create",
    "depth",
    "late_cls",
    "layer_tokens",
    "native_pixels",
    "patch_size",
    "patch_tokens",
    "position_coding",
    "without_positions",
]

ViT = TypeVar("ViT", bound=nn.Module)

# The classes whose sequence is known: prefix tokens first, then the patches in row-major order, and blocks that are
# told about the prefix by `num_prefix_tokens` alone. A subclass counts as long as it leaves these methods as they are.
_FAMILIES = (VisionTransformer, VisionTransformerDistilled, Eva)
_SEQUENCE = ("_pos_embed", "forward_features", "forward_intermediates")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # pixels


def late_cls(vit: ViT, layer: int) -> ViT:
    """Let [CLS], registers and the distillation token join after `layer` blocks, in place.

    In the first `layer` blocks the prefix tokens neither attend nor are attended to: they wait, as embedded, beside
    the patches, so that the map which is regularized holds spatial tokens only. Between blocks the sequence keeps
    timm's layout. No parameter, buffer or key is added: the state_dict is that of plain timm, which would let [CLS]
    in early again, so a checkpoint should say with which `layer` it was trained.

    Calling again replaces the layer; 0 restores plain timm exactly. Copies (deepcopy, pickle) keep the layer, each
    for itself. Gradient checkpointing, DDP, FSDP2, torch.compile and torch.export see an ordinary forward;
    nn.DataParallel, which copies modules on every step, is not supported.

    Args:
        vit: a timm VisionTransformer or Eva, the model itself and not a wrapper around it.
        layer: blocks that run without prefix tokens, 0 <= layer < depth.

    Returns:
        The same module.

    Raises:
        SERError: the model is of another family (CaiT, BEiT, relative position, ...) or wrapped, or the layer is
            not a whole number in range.

    Source: Section 3.1 and Figure 2 of the paper.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=0)
        >>> vit = late_cls(vit, layer=2)
        >>> vit(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 192])
    """
    call = f"late_cls(vit, {layer!r})"
    model = _timm(call, vit)
    _check_layer(call, layer, len(model.blocks) - 1)
    # Hooks would do the same, but torch.compile does not guard on their absence: after a plain ViT was compiled, one
    # with hooks silently runs the plain graph. It does guard on an instance's own `forward`.
    for index, block in enumerate(model.blocks):
        early = index < layer and model.num_prefix_tokens > 0
        for module in block.modules():
            _admit_prefix(module)  # of the block or, wrapped since an earlier call, of what is now inside it
            if hasattr(module, "num_prefix_tokens"):  # rotary embeddings skip this many tokens
                module.num_prefix_tokens = 0 if early else model.num_prefix_tokens
        if early:
            block.forward = partial(_forward_patches, block.forward, model.num_prefix_tokens)
    return vit


def _admit_prefix(module: Any) -> None:
    """Undo `late_cls` on one module."""
    late = vars(module).get("forward")
    if isinstance(late, partial) and late.func is _forward_patches:
        del module.forward
        if module.forward != late.args[0]:  # somebody else had replaced it before us
            module.forward = late.args[0]


def _forward_patches(
    forward: Callable[..., Tensor],
    prefix: int,
    tokens: Tensor,
    *args: Any,
    attn_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Run a block's `forward` on the patches, while the first `prefix` tokens pass by."""
    if attn_mask is not None:
        patches = tokens.shape[1] - prefix
        kwargs["attn_mask"] = attn_mask[..., -patches:, -patches:]
    return torch.cat([tokens[:, :prefix], forward(tokens[:, prefix:], *args, **kwargs)], dim=1)


def patch_tokens(vit: nn.Module, images: Tensor, layer: int) -> Tensor:
    """Patch tokens after `layer` blocks, as a map. Runs these blocks and no more.

    The computation is timm's own, with whatever the model is set to: late [CLS], gradient checkpointing, training or
    evaluation, autocast. Gradients flow. The final norm is not applied.

    Give it the model itself. Beside the forward of a DDP wrapper that is ``ddp.module``; DDP still averages these
    gradients, as they reach the same parameters. Under FSDP2 the parameters are there only during the normal
    forward, where `TokenTap` reads them.

    Args:
        vit: a timm VisionTransformer or Eva.
        images: (B, C, H, W), any B (none included), any H and W that the model takes.
        layer: blocks to run, 0 <= layer <= depth; 0 gives the embeddings that enter the first block.

    Returns:
        (B, D, h, w), on the model's patch grid, row-major; a view that is contiguous in D.

    Raises:
        SERError: unknown family or wrapper; layer out of range; images of a wrong rank, dtype, device, number of
            channels or size; patch dropout in training, which would leave holes in the map.

    Source: f^(1) of Section 3.1 of the paper.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=4, dynamic_img_size=True)
        >>> patch_tokens(vit, torch.rand(2, 3, 48, 64), layer=3).shape
        torch.Size([2, 192, 3, 4])
    """
    return _tokens(f"patch_tokens(vit, images, layer={layer!r})", vit, images, [layer])[layer]


def layer_tokens(vit: nn.Module, images: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
    """`patch_tokens` of several layers from one forward, by layer."""
    layers = list(layers)
    return _tokens(f"layer_tokens(vit, images, layers={layers!r})", vit, images, layers)


def _tokens(call: str, vit: nn.Module, images: Tensor, layers: list[int]) -> dict[int, Tensor]:
    model = _timm(call, vit)
    if any(base.__name__ == "FSDPModule" for base in type(vit).__mro__):
        given, expected = "a model sharded by FSDP2", "whole parameters, which it has during its normal forward only"
        remedy = f"with TokenTap(vit, {max(layers, default=0)}) as tap: vit(images); z = tap.tokens"
        raise SERError(call, given, expected, remedy)
    for layer in layers:
        _check_layer(call, layer, len(model.blocks))
    grid = _check_images(call, model, images)
    # timm cannot reshape an empty batch. A rank without images still owes its parameters a gradient, of zeros.
    batch, images = len(images), images if len(images) else images.new_zeros(1, *images.shape[1:])
    found: dict[int, Tensor] = {}
    if 0 in layers:  # timm's public forward returns outputs of blocks only
        embedded = model._pos_embed(model.patch_embed(images))
        embedded = embedded[0] if isinstance(embedded, tuple) else embedded  # Eva adds rotary embeddings
        found[0] = _as_map(model.norm_pre(embedded)[:, model.num_prefix_tokens :], grid)
    blocks = sorted({layer - 1 for layer in layers if layer > 0})
    if blocks:
        outputs = model.forward_intermediates(
            images, indices=blocks, stop_early=True, norm=False, output_fmt="NLC", intermediates_only=True
        )
        for block, patches in zip(blocks, outputs, strict=True):
            found[block + 1] = _as_map(patches, grid)
    return {layer: found[layer][:batch] for layer in layers}


def _as_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h·w, D) as (B, D, h, w), without a copy."""
    batch, _, dim = patches.shape
    return patches.transpose(1, 2).reshape(batch, dim, *grid)


class TokenTap:
    """Patch tokens of the forward that runs anyway, with their gradient.

    While the tap is open, `tokens` is what the latest forward of `vit` had after `layer` blocks. The forward may go
    through DDP or FSDP2 around the model. Recomputation by activation checkpointing is not a forward: tokens stay
    those of the forward, whichever way timm checkpoints (checkpointing the whole ViT with ``use_reentrant=True``
    runs its forward without gradients, and then they have none). Closing the tap leaves nothing on the model;
    copies made meanwhile carry a closed tap.

    torch.compile keeps what it compiled before the tap was opened, so that the tap hears nothing and `tokens`
    raises: there, use `patch_tokens`.

    Args:
        vit: a timm VisionTransformer or Eva, the model itself and not a wrapper around it.
        layer: blocks already run, 0 <= layer <= depth.

    Attributes:
        tokens: (B, D, h, w) of the latest forward, never detached.

    Raises:
        SERError: unknown family or wrapper, layer out of range; on reading `tokens`, when no forward has reached
            the layer; on a forward with patch dropout in training.

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

    def __init__(self, vit: nn.Module, layer: int) -> None:
        self._call = f"TokenTap(vit, {layer!r})"
        self._vit = _timm(self._call, vit)
        self._layer = layer
        _check_layer(self._call, layer, len(self._vit.blocks))
        self._handles: list[RemovableHandle] = []
        self._forget()

    def __repr__(self) -> str:
        return f"TokenTap({type(self._vit).__name__}, {self._layer})"

    @property
    def tokens(self) -> Tensor:
        if self._tokens is None:
            given = "no forward, or one that stopped before" if self._handles else "a closed tap, which keeps nothing"
            remedy = f"with {self._call} as tap: vit(images); z = tap.tokens"
            raise SERError("tap.tokens", given, "a forward of vit, not compiled before, inside the with-block", remedy)
        return self._tokens

    def __enter__(self) -> TokenTap:
        blocks, layer = self._vit.blocks, self._layer
        # Tokens are read where the next module takes them, ahead of its other hooks: with reentrant checkpointing a
        # block's own output has no gradient yet. The final norm may be called more often than for the last block.
        reader = blocks[layer] if layer < len(blocks) else self._vit.norm
        self._handles = [
            self._vit.patch_embed.register_forward_pre_hook(self._start),
            reader.register_forward_pre_hook(self._read, prepend=True),
        ]
        if layer > 0:
            self._handles.append(blocks[layer - 1].register_forward_pre_hook(self._reach, prepend=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # Hooks travel with copies of the model, where they must not hold tensors of its graph or hear anything.
        return vars(self) | {"_handles": [], "_grid": None, "_reached": False, "_tokens": None}

    def _forget(self) -> None:
        self._grid: tuple[int, int] | None = None
        self._reached = False
        self._tokens: Tensor | None = None

    def _hears(self) -> bool:
        # Inside a backward pass a forward is recomputation by activation checkpointing.
        return bool(self._handles) and torch._C._current_graph_task_id() == -1

    def _start(self, patch_embed: Any, args: tuple[Tensor, ...]) -> None:
        if self._hears():
            self._forget()
            _check_no_patch_dropout(self._call, self._vit)
            height, width = args[0].shape[-2:]
            self._grid = patch_embed.dynamic_feat_size((height, width))
            self._reached = self._layer == 0

    def _reach(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._hears():
            self._reached = True

    def _read(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._hears() and self._reached and self._grid is not None:
            with torch.enable_grad():  # reentrant checkpointing calls the next block without
                self._tokens = _as_map(args[0][:, self._vit.num_prefix_tokens :], self._grid)


def cls_layer(vit: nn.Module) -> int:
    """After how many blocks the prefix tokens join: what `late_cls` was last called with, 0 for plain timm.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=0)
        >>> cls_layer(vit), cls_layer(late_cls(vit, layer=2))
        (0, 2)
    """
    forwards = (vars(block).get("forward") for block in _timm("cls_layer(vit)", vit).blocks)
    return sum(isinstance(late, partial) and late.func is _forward_patches for late in forwards)


def create(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """A timm model by name, without a classifier, that takes images of any size if its kind can.

    Raises:
        SERError: there is no such model, or its weights cannot be had.
    """
    call = f"create({name!r}, pretrained={pretrained})"
    try:
        try:
            return timm.create_model(
                name, pretrained=pretrained, num_classes=0, **({"dynamic_img_size": True} | arguments)
            )
        except TypeError:  # not a ViT: what it is used for says so better than its constructor
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except (RuntimeError, OSError, ValueError) as error:  # a hub that cannot be reached raises errors of many kinds
        stem = name.split(".")[0]
        if pretrained and timm.is_model(stem):
            remedy = f"create({name!r}, pretrained=False)  # random weights"
            raise SERError(call, str(error).split("\n")[0], "weights that can be downloaded", remedy) from error
        remedy = f"timm.list_models('*{stem.split('_')[0]}*')"
        raise SERError(call, str(error), "the name of a timm model", remedy) from error


def depth(vit: nn.Module) -> int:
    """Number of blocks."""
    return len(_timm("depth(vit)", vit).blocks)


def patch_size(vit: nn.Module) -> int:
    """Side of a patch in pixels, of all that comes before the first block if the embedding is a network."""
    height, width = _timm("patch_size(vit)", vit).patch_embed.feat_ratio(as_scalar=False)
    if height != width:
        given, remedy = f"patches of {height} x {width} pixels", f"timm.create_model(..., patch_size={height})"
        raise SERError("patch_size(vit)", given, "square patches", remedy)
    return int(height)


def accepts_any_size(vit: nn.Module) -> bool:
    """Whether images may differ in size from the one that the model was built for."""
    return bool(_timm("accepts_any_size(vit)", vit).dynamic_img_size)


def native_pixels(vit: nn.Module) -> tuple[tuple[int, int], list[float], list[float]]:
    """What images the model was built for: (height, width), and mean and standard deviation of its input pixels."""
    model = _timm("native_pixels(vit)", vit)
    rows, columns = model.patch_embed.feat_ratio(as_scalar=False)
    size = model.patch_embed.img_size or (224 // rows * rows, 224 // columns * columns)
    pixels = getattr(model, "pretrained_cfg", None) or {}  # a class that was called by itself has none
    mean, std = (pixels.get(key, default) for key, default in IMAGENET.items())
    return (int(size[0]), int(size[1])), list(mean), list(std)


def position_coding(vit: nn.Module) -> list[str]:
    """How the model is told places, in words; empty if it is not."""
    model = _timm("position_coding(vit)", vit)
    kinds = []
    if model.pos_embed is not None:
        kinds.append("absolute (an embedding added to the patches)")
    if getattr(model, "rope", None) is not None:
        kinds.append(f"rotary (in the attention of every block, {type(model.rope).__name__})")
    return kinds


def without_positions(vit: ViT) -> ViT:
    """A copy that is not told places: it treats any order of its patches alike.

    Every patch gets the mean of the absolute embeddings of all places, so that later blocks still see the offset with
    which they were trained; what prefix tokens get stays. Rotary embedding is switched off.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0).eval()
        >>> tokens = patch_tokens(without_positions(vit), torch.ones(1, 3, 32, 32), layer=1)
        >>> torch.allclose(tokens, tokens[..., :1, :1].expand_as(tokens), atol=1e-5)
        True
    """
    _timm("without_positions(vit)", vit)
    copy: Any = deepcopy(vit)
    if copy.pos_embed is not None:
        places = copy.pos_embed.data[:, 0 if copy.no_embed_class else copy.num_prefix_tokens :]
        places.copy_(places.mean(1, keepdim=True).expand_as(places))
    if getattr(copy, "rope", None) is not None:
        copy.rope = None
    return cast(ViT, copy)


def _overridden(kind: type, family: type) -> list[str]:
    return [name for name in _SEQUENCE if getattr(kind, name) is not getattr(family, name)]


def _known(vit: nn.Module) -> bool:
    return any(isinstance(vit, family) and not _overridden(type(vit), family) for family in _FAMILIES)


def _timm(call: str, vit: nn.Module) -> Any:
    """The same module, if it is one whose sequence of tokens is known."""
    if _known(vit):
        return vit
    inner, path = vit, "vit"
    while isinstance(inner, nn.Module):
        name = next((name for name in ("_orig_mod", "module") if isinstance(getattr(inner, name, None), nn.Module)), "")
        if not name:
            break
        inner, path = getattr(inner, name), f"{path}.{name}"
        if _known(inner):
            given = f"{type(vit).__name__}, a wrapper around the model"
            raise SERError(call, given, "the timm model itself", call.replace("(vit", f"({path}", 1))
    given = type(vit).__name__
    for family in _FAMILIES:
        if isinstance(vit, family):
            given = f"{type(vit).__name__} with its own {', '.join(_overridden(type(vit), family))}"
            break
    expected = "timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP) or Eva (EVA-02, DINOv3, RoPE ViT)"
    raise SERError(call, given, expected, 'timm.create_model("vit_small_patch16_224", dynamic_img_size=True)')


def _check_layer(call: str, layer: int, last: int) -> None:
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
        remedy = call.replace(repr(layer), str(min(3, last)))
        raise SERError(call, f"layer={layer!r}", f"a whole number of blocks from 0 to {last}", remedy)


def _check_no_patch_dropout(call: str, model: Any) -> None:
    dropout = model.patch_drop
    if isinstance(dropout, nn.Module) and dropout.training and getattr(dropout, "prob", 0.0) > 0:
        given, expected = f"patch dropout {dropout.prob} in training", "every patch, since a map has no holes"
        raise SERError(call, given, expected, "timm.create_model(..., patch_drop_rate=0.0)")


def _check_images(call: str, model: Any, images: Tensor) -> tuple[int, int]:
    """The patch grid of these images, if the model takes them."""
    if not isinstance(images, Tensor):
        raise SERError(call, f"a {type(images).__name__}", "a tensor (B, C, H, W)", "torch.stack(list(images))")
    shape = f"images of shape {tuple(images.shape)}"
    if images.ndim != 4:
        remedy = "images[None]" if images.ndim == 3 else "images.flatten(0, -4)"
        raise SERError(call, shape, "(B, C, H, W)", remedy)
    convolutions = [module for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d)]
    if convolutions and images.shape[1] != (channels := convolutions[0].in_channels):
        remedy = f"timm.create_model(..., in_chans={images.shape[1]})"
        raise SERError(call, shape, f"(B, {channels}, H, W), as the model was built for", remedy)
    if not images.is_floating_point():
        given = f"images of {images.dtype}"
        raise SERError(call, given, "floating point, normalised as for the model", "images.float() / 255")
    weight = next(model.patch_embed.parameters())
    dtype, device = weight.dtype, weight.device
    if images.device != device and device.type != "meta":  # offloaded weights arrive during the forward
        raise SERError(call, f"images on {images.device}", f"{device}, as the model", f'images.to("{device}")')
    if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
        raise SERError(call, f"images of {images.dtype}", f"{dtype}, as the model", f"images.to({dtype})")
    _check_no_patch_dropout(call, model)
    height, width = images.shape[-2:]
    embed = model.patch_embed
    rows, columns = embed.feat_ratio(as_scalar=False)
    if not model.dynamic_img_size:
        if (height, width) != tuple(embed.img_size):
            given = f"images of {height} x {width} pixels"
            expected = "{} x {}, the size that the model was built for".format(*embed.img_size)
            raise SERError(call, given, expected, "timm.create_model(..., dynamic_img_size=True)")
    elif not embed.dynamic_img_pad and (height % rows or width % columns):
        given, expected = f"images of {height} x {width} pixels", f"sides that patches of {rows} x {columns} fill"
        size = (max(height // rows, 1) * rows, max(width // columns, 1) * columns)
        raise SERError(call, given, expected, f"torch.nn.functional.interpolate(images, {size}, mode='bicubic')")
    grid: tuple[int, int] = embed.dynamic_feat_size((height, width))
    return grid
