"""A zoo of timm ViTs, small, and literal references of what they compute."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from timm.models import Eva, VisionTransformer
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

DEPTH, LAYER = 5, 3
TINY = {"patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 7}


class Member(NamedTuple):
    build: Callable[[], Any]
    size: tuple[int, int] = (32, 32)
    grid: tuple[int, int] = (4, 4)


def named(name: str, **kwargs: Any) -> Callable[[], Any]:
    return functools.partial(timm.create_model, name, pretrained=False, **{**TINY, "img_size": 32, **kwargs})


def direct(family: type, **kwargs: Any) -> Callable[[], Any]:
    return functools.partial(family, **{**TINY, "img_size": 32, **kwargs})


def hybrid(**kwargs: Any) -> VisionTransformer:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GELU())
    embed = functools.partial(HybridEmbed, backbone=backbone)
    return VisionTransformer(**{**TINY, "img_size": 32, "patch_size": 4, "embed_layer": embed, **kwargs})


DYNAMIC = {"dynamic_img_size": True}
ZOO = {
    "vit": Member(named("vit_tiny_patch16_224")),
    "vit-rectangle": Member(named("vit_tiny_patch16_224", img_size=(24, 40)), (24, 40), (3, 5)),
    "vit-dynamic": Member(named("vit_tiny_patch16_224", **DYNAMIC), (24, 40), (3, 5)),
    "vit-padded": Member(named("vit_tiny_patch16_224", dynamic_img_pad=True, **DYNAMIC), (30, 37), (4, 5)),
    "vit-no-class-token": Member(named("vit_tiny_patch16_224", class_token=False, global_pool="avg")),
    "vit-parallel-things": Member(direct(VisionTransformer, block_fn=ParallelThingsBlock)),
    "vit-parallel-scaling": Member(direct(VisionTransformer, block_fn=ParallelScalingBlock)),
    "vit-post-norm": Member(direct(VisionTransformer, block_fn=ResPostBlock)),
    "vit-hybrid": Member(hybrid),
    "deit": Member(named("deit_tiny_patch16_224")),
    "deit-distilled": Member(named("deit_tiny_distilled_patch16_224", **DYNAMIC), (32, 24), (4, 3)),
    "deit3": Member(named("deit3_small_patch16_224")),
    "dinov2": Member(named("vit_small_patch14_dinov2", **DYNAMIC), (40, 24), (5, 3)),
    "dinov2-registers": Member(named("vit_small_patch14_reg4_dinov2", **DYNAMIC), (40, 24), (5, 3)),
    "clip": Member(named("vit_base_patch16_clip_224")),
    "siglip": Member(named("vit_base_patch16_siglip_224")),
    "registers-only": Member(named("vit_betwixt_patch16_reg4_gap_256")),
    "eva02": Member(named("eva02_tiny_patch14_224")),
    "eva02-dynamic": Member(named("eva02_tiny_patch14_224", **DYNAMIC), (24, 40), (3, 5)),
    "eva-post-norm": Member(direct(Eva, use_post_norm=True)),
    "eva-no-rope": Member(direct(Eva, use_rot_pos_emb=False, qkv_fused=False, scale_attn_inner=True)),
    "dinov3": Member(named("vit_small_patch16_dinov3", **DYNAMIC), (24, 40), (3, 5)),
    "rope-axial": Member(named("vit_small_patch16_rope_224", **DYNAMIC), (24, 40), (3, 5)),
    "rope-mixed": Member(named("vit_small_patch16_rope_mixed_224", **DYNAMIC), (24, 40), (3, 5)),
    "rope-mixed-ape": Member(named("vit_small_patch16_rope_mixed_ape_224", **DYNAMIC)),
    "rope-registers": Member(named("vit_base_patch16_rope_reg1_gap_256")),
    "perception-encoder": Member(named("vit_pe_core_tiny_patch16_384")),
}
# In the oldest timm that the library supports, post-norm Eva cannot be built and Eva takes no attention mask.
if "swiglu_align_to" not in inspect.signature(EvaBlockPostNorm).parameters:
    del ZOO["eva-post-norm"]
MASKABLE = ["vit", "vit-parallel-things"]
if "attn_mask" in inspect.signature(Eva.forward_features).parameters:
    MASKABLE.append("dinov3")
SOME = ["vit", "dinov2-registers", "deit-distilled", "dinov3", "rope-mixed"]


@functools.cache
def original(name: str) -> Any:
    torch.manual_seed(0)
    vit = ZOO[name].build().eval()
    with torch.no_grad():  # timm starts with prefix tokens and layer scales near 0, which would hide mistakes
        for parameter in vit.parameters():
            parameter.normal_(std=0.2)
    return vit


def model(name: str = "vit") -> Any:
    return copy.deepcopy(original(name))


def photos(name: str = "vit", batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *ZOO[name].size, generator=torch.Generator().manual_seed(1))


def embed(vit: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The sequence that enters the first block, and what each block takes besides."""
    x = vit._pos_embed(vit.patch_embed(images))
    x, rope = x if isinstance(x, tuple) else (x, None)
    rope = list(rope) if getattr(vit, "rope_mixed", False) else [rope] * DEPTH
    return vit.norm_pre(x), [{} if r is None else {"rope": r} for r in rope]


def literal(vit: Any, images: Tensor, layer: int) -> tuple[list[Tensor], Tensor]:
    """Patch tokens by layer, and the output, of a plain ViT whose first blocks see patches alone."""
    vit, plain = copy.deepcopy(vit), vit
    for block in vit.blocks:
        if isinstance(vit, Eva):
            block.attn.num_prefix_tokens = 0
    x, extra = embed(vit, images)
    prefix, patches = x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
    tokens = [patches]
    for block, kwargs in zip(vit.blocks[:layer], extra, strict=False):
        patches = block(patches, **kwargs)
        tokens.append(patches)
    x = torch.cat([prefix, patches], dim=1) if vit.num_prefix_tokens else patches
    for block, kwargs in zip(plain.blocks[layer:], extra[layer:], strict=True):
        x = block(x, **kwargs)
        tokens.append(x[:, vit.num_prefix_tokens :])
    return tokens, vit.forward_head(vit.norm(x))


def masked(vit: Any, images: Tensor, layer: int) -> Tensor:
    """The same by other means: patches may not look at the prefix, and the prefix is reset after every block."""
    vit, images = copy.deepcopy(vit).double(), images.double()
    x, extra = embed(vit, images)
    count = vit.num_prefix_tokens
    prefix = x[:, :count]
    allowed = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    allowed[:count, :count] = allowed[count:, count:] = True
    for index, (block, kwargs) in enumerate(zip(vit.blocks, extra, strict=True)):
        if index < layer:
            x = block(x, attn_mask=allowed, **kwargs)
            x = torch.cat([prefix, x[:, count:]], dim=1)
        else:
            x = block(x, **kwargs)
    return vit.forward_head(vit.norm(x))


def as_map(name: str, tokens: Tensor) -> Tensor:
    height, width = ZOO[name].grid
    rows = [[tokens[:, row * width + column] for column in range(width)] for row in range(height)]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def gradients(vit: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    vit.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in vit.named_parameters()}


def is_zero(gradient: Tensor | None) -> bool:
    return gradient is None or not gradient.any()


def assert_same(first: dict[str, Tensor | None], second: dict[str, Tensor | None]) -> None:
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        # timm resamples position embeddings in float32, whatever the model's type
        torch.testing.assert_close(
            gradient, second[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def count_block_calls(vit: Any) -> list[int]:
    calls: list[int] = []
    for index, block in enumerate(vit.blocks):
        block.register_forward_pre_hook(lambda module, args, index=index: calls.append(index))
    return calls


# timm hands rotary embeddings to checkpoint by keyword, which the reentrant variant refuses
REENTRANT = ["vit", "dinov2-registers", "deit-distilled", "vit-parallel-things", "siglip"]
checkpointing = pytest.mark.parametrize(
    ("name", "reentrant"),
    [(name, False) for name in ZOO] + [(name, True) for name in REENTRANT],
    indirect=["reentrant"],
)


def slow(*values: Any) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


zoo = pytest.mark.parametrize("name", ZOO)
some = pytest.mark.parametrize("name", SOME)
