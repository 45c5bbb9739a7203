"""Late [CLS] and patch tokens against literal references, over a zoo of timm models."""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.layers import HybridEmbed, PatchEmbed, set_reentrant_ckpt, use_reentrant_ckpt
from timm.models import Eva, VisionTransformer
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from ser_reg.errors import SERError
from ser_reg.vit import TokenTap, accepts_any_size, depth, late_cls, layer_tokens, patch_size, patch_tokens

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


@pytest.fixture
def reentrant(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(request.param)
    yield request.param
    set_reentrant_ckpt(before)


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


class TestLateCls:
    @zoo
    def test_equals_the_literal_reference(self, name: str) -> None:
        images = photos(name)
        _, expected = literal(original(name), images, LAYER)
        vit = late_cls(model(name), LAYER)
        assert torch.equal(vit(images), expected)
        vit, images = vit.double(), images.double()
        torch.testing.assert_close(vit(images), masked(original(name), images, LAYER))
        if vit.num_prefix_tokens:  # and the reference is another function than plain timm
            assert not torch.allclose(vit(images), late_cls(copy.deepcopy(vit), 0)(images))

    @zoo
    def test_layer_zero_restores_timm(self, name: str) -> None:
        vit, images = model(name), photos(name)
        before = [dict(vars(module)) for module in vit.modules()]
        assert late_cls(vit, LAYER) is vit
        assert late_cls(vit, 0) is vit
        assert torch.equal(vit(images), original(name)(images))
        assert [dict(vars(module)) for module in vit.modules()] == before

    @zoo
    def test_state_dict_and_parameters_are_timms(self, name: str) -> None:
        vit = late_cls(model(name), LAYER)
        plain = ZOO[name].build()
        assert list(vit.state_dict()) == list(plain.state_dict())
        assert [n for n, _ in vit.named_modules()] == [n for n, _ in plain.named_modules()]
        plain.load_state_dict(vit.state_dict())
        assert torch.equal(plain.eval()(photos(name)), original(name)(photos(name)))

    @zoo
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda vit: pickle.loads(pickle.dumps(vit))])
    def test_a_copy_keeps_the_layer_for_itself(self, name: str, duplicate: Callable[[Any], Any]) -> None:
        images, vit = photos(name), late_cls(model(name), LAYER)
        expected = vit(images)
        twin = duplicate(vit)
        assert torch.equal(twin(images), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(vit(images), expected)
        late_cls(twin, 0).load_state_dict(vit.state_dict())
        assert torch.equal(twin(images), original(name)(images))
        assert torch.equal(vit(images), expected)
        late_cls(vit, 1)
        assert torch.equal(twin(images), original(name)(images))

    @zoo
    def test_calling_again_replaces(self, name: str) -> None:
        images = photos(name)
        vit = late_cls(late_cls(late_cls(model(name), 4), LAYER), LAYER)
        assert torch.equal(vit(images), late_cls(model(name), LAYER)(images))
        assert torch.equal(late_cls(vit, 1)(images), late_cls(model(name), 1)(images))

    @checkpointing
    def test_gradient_checkpointing_gives_the_same_gradients(self, name: str, reentrant: bool) -> None:
        images = photos(name).double()
        vit = late_cls(model(name), LAYER).double().train()
        expected = gradients(vit, vit(images).square().sum())
        vit.set_grad_checkpointing(True)
        assert_same(gradients(vit, vit(images).square().sum()), expected)

    @some
    def test_views_of_several_sizes_before_one_backward(self, name: str) -> None:
        vit = late_cls(model(name), LAYER).double().train()
        views = [photos(name).double(), photos(name, batch=3).double()]
        if accepts_any_size(vit):
            views.append(torch.randn(2, 3, 16, 48).double())
        apart = [gradients(vit, vit(view).sum()) for view in views]
        together = gradients(vit, sum(vit(view).sum() for view in views))
        for parameter, gradient in together.items():
            parts = [part[parameter] for part in apart if part[parameter] is not None]
            torch.testing.assert_close(gradient, sum(parts) if parts else None)

    @some
    def test_cls_neither_attends_nor_is_attended_to(self, name: str) -> None:
        vit, images = late_cls(model(name), LAYER), photos(name)
        seen: list[Tensor] = []
        for block in vit.blocks[: LAYER + 1]:
            block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        vit(images)
        prefix = [x[:, : vit.num_prefix_tokens] for x in seen]
        patches = [x[:, vit.num_prefix_tokens :] for x in seen]
        assert all(torch.equal(p, prefix[0]) for p in prefix)
        seen.clear()
        with torch.no_grad():
            vit.cls_token.add_(1)
        vit(images)
        assert all(torch.equal(x[:, vit.num_prefix_tokens :], p) for x, p in zip(seen, patches, strict=True))
        assert not torch.equal(seen[0][:, :1], prefix[0][:, :1])

    @some
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_other_precisions(self, name: str, dtype: torch.dtype) -> None:
        vit, images = late_cls(model(name), LAYER).to(dtype), photos(name).to(dtype)
        expected = literal(late_cls(copy.deepcopy(vit), 0), images, LAYER)[1]
        assert torch.equal(vit(images), expected)

    @some
    def test_autocast(self, name: str) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            expected = literal(original(name), photos(name), LAYER)[1]
            assert torch.equal(late_cls(model(name), LAYER)(photos(name)), expected)

    @pytest.mark.parametrize("name", MASKABLE)
    def test_attention_masks_lose_their_prefix(self, name: str) -> None:
        vit, images = late_cls(model(name), LAYER), photos(name)
        length = vit.num_prefix_tokens + ZOO[name].grid[0] * ZOO[name].grid[1]
        for shape in [(length, length), (2, 1, 1, length), (2, 1, length, length)]:
            mask = torch.ones(shape, dtype=torch.bool)
            torch.testing.assert_close(vit.forward_features(images, attn_mask=mask), vit.forward_features(images))
        mask[..., -1] = False  # nobody looks at the last patch
        other = images.clone()
        other[..., -8:, -8:] = 0
        first, second = (vit.forward_features(x, attn_mask=mask)[:, :-1] for x in (images, other))
        torch.testing.assert_close(first, second)

    def test_patch_dropout_drops_patches_only(self) -> None:
        torch.manual_seed(0)
        vit = late_cls(named("vit_tiny_patch16_224", patch_drop_rate=0.5)().train(), LAYER)
        lengths: list[int] = []
        vit.blocks[0].attn.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        vit(photos())
        assert lengths == [8]

    def test_a_replaced_forward_is_kept_and_given_back(self) -> None:
        vit = model()
        block = vit.blocks[0]
        block.forward = mine = lambda x, forward=block.forward, **kwargs: 2 * forward(x, **kwargs)
        changed = copy.deepcopy(vit)
        tokens = changed.patch_embed(photos()) + changed.pos_embed[:, 1:]
        assert torch.equal(
            patch_tokens(late_cls(vit, LAYER), photos(), 1), as_map("vit", 2 * original("vit").blocks[0](tokens))
        )
        assert late_cls(vit, 0).blocks[0].forward is mine

    def test_subclasses_that_leave_the_sequence_alone(self) -> None:
        class MoCoViT(VisionTransformer):
            def __init__(self, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.pos_embed.requires_grad_(False)

        assert patch_tokens(late_cls(direct(MoCoViT)(), LAYER), photos(), LAYER).shape == (2, 32, 4, 4)


class TestCompilers:
    @pytest.mark.parametrize("name", ["vit", *slow("dinov3", "rope-mixed")])
    def test_compile_whole(self, name: str) -> None:
        vit, images = late_cls(model(name), LAYER).train(), photos(name)
        torch.compiler.reset()
        compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
        assert_same(gradients(vit, compiled(images).sum()), gradients(vit, vit(images).sum()))
        torch.testing.assert_close(compiled(images), vit(images))

    def test_compiled_code_tells_layers_apart(self) -> None:
        torch.compiler.reset()
        compiled = functools.partial(torch.compile, backend="eager", fullgraph=True)
        plain, images = model(), photos()
        for vit in (plain, late_cls(model(), 2), late_cls(model(), LAYER), late_cls(model(), 1)):
            assert torch.equal(compiled(vit)(images), vit(images))
        assert torch.equal(compiled(plain)(images), plain(images))
        late_cls(plain, LAYER)
        assert torch.equal(compiled(plain)(images), late_cls(model(), LAYER)(images))

    @pytest.mark.parametrize("late", [0, LAYER], ids=["before", "after"])
    @pytest.mark.parametrize(
        "wrap",
        [
            functools.partial(torch.compile, backend="eager", fullgraph=True),
            checkpoint_wrapper,
            functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
        ],
        ids=["compile", "checkpoint", "checkpoint-reentrant"],
    )
    @pytest.mark.parametrize("name", ["vit", *slow("dinov2-registers")])
    def test_wrapped_blocks(self, name: str, wrap: Callable[[nn.Module], nn.Module], late: int) -> None:
        vit, images = late_cls(model(name), late), photos(name)
        torch.compiler.reset()
        for index, block in enumerate(vit.blocks):
            vit.blocks[index] = wrap(block)
        for layer in (late, LAYER, LAYER, 1, 0):
            late_cls(vit, layer)
            tokens, expected = literal(original(name), images, layer)
            with TokenTap(vit, LAYER) as tap:
                assert torch.equal(vit(images), expected)
                z = tap.tokens
            assert z.requires_grad
            assert torch.equal(z, as_map(name, tokens[LAYER]))

    @pytest.mark.parametrize("layer", [0, LAYER])
    def test_compile_patch_tokens(self, layer: int) -> None:
        vit, images = late_cls(model("vit-dynamic"), LAYER), photos("vit-dynamic")
        torch.compiler.reset()
        compiled = torch.compile(patch_tokens, backend="eager", fullgraph=True)
        for x in (images, images[..., :32], images[:1]):
            assert torch.equal(compiled(vit, x, layer), patch_tokens(vit, x, layer))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["vit", "dinov3"])
    def test_inductor(self, name: str) -> None:
        vit, images = late_cls(model(name), LAYER), photos(name)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(vit, fullgraph=True)(images), vit(images), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("strict", [False, *slow(True)])
    @pytest.mark.parametrize("name", ["vit", "dinov3", *slow("dinov2-registers")])
    def test_export(self, name: str, strict: bool) -> None:
        vit, images = late_cls(model(name), LAYER), photos(name)
        exported = torch.export.export(vit, (images,), strict=strict).module()
        torch.testing.assert_close(exported(images), vit(images))


class TestPatchTokens:
    @zoo
    @pytest.mark.parametrize("late", [0, LAYER])
    def test_equals_the_literal_reference_and_the_tap(self, name: str, late: int) -> None:
        images, vit = photos(name), late_cls(model(name), late)
        expected, _ = literal(original(name), images, late)
        together = layer_tokens(vit, images, range(DEPTH + 1))
        assert list(together) == list(range(DEPTH + 1))
        for layer in range(DEPTH + 1):
            z = patch_tokens(vit, images, layer)
            assert z.shape == (2, 32, *ZOO[name].grid)
            assert torch.equal(z, as_map(name, expected[layer]))
            assert torch.equal(together[layer], z)
            with TokenTap(vit, layer) as tap:
                vit(images)
                assert torch.equal(tap.tokens, z)

    @zoo
    def test_runs_only_the_first_blocks(self, name: str) -> None:
        vit, images = late_cls(model(name), 2), photos(name)
        calls = count_block_calls(vit)
        for layer in range(DEPTH + 1):
            patch_tokens(vit, images, layer)
            assert calls == list(range(layer))
            calls.clear()
        layer_tokens(vit, images, [2, 0, 4])
        assert calls == [0, 1, 2, 3]

    @zoo
    @pytest.mark.parametrize("late", [0, LAYER])
    def test_gradient_reaches_the_first_blocks_only(self, name: str, late: int) -> None:
        vit = late_cls(model(name), late).train()
        found = gradients(vit, patch_tokens(vit, photos(name), LAYER).square().sum())
        above = [f"blocks.{index}." for index in range(LAYER, DEPTH)]
        for parameter, gradient in found.items():
            if parameter.startswith("patch_embed.") or parameter.startswith("blocks.") and parameter[7] in "012":
                assert not is_zero(gradient), parameter
            elif parameter.startswith((*above, "norm.", "fc_norm.", "head", "attn_pool.")):
                assert gradient is None, parameter
            elif parameter in ("cls_token", "reg_token", "dist_token"):
                assert is_zero(gradient) == (late == LAYER), parameter

    @checkpointing
    def test_honours_gradient_checkpointing(self, name: str, reentrant: bool) -> None:
        vit, images = late_cls(model(name), LAYER).double().train(), photos(name).double()
        expected = gradients(vit, patch_tokens(vit, images, LAYER).square().sum())
        vit.set_grad_checkpointing(True)
        calls = count_block_calls(vit)
        assert_same(gradients(vit, patch_tokens(vit, images, LAYER).square().sum()), expected)
        assert sorted(calls) == [0, 0, 1, 1, 2, 2]

    @some
    def test_one_image_alone(self, name: str) -> None:
        vit, images = late_cls(model(name), LAYER), photos(name)
        alone = torch.cat([patch_tokens(vit, image[None], LAYER) for image in images])
        torch.testing.assert_close(alone, patch_tokens(vit, images, LAYER))

    @zoo
    def test_no_image_gives_gradients_of_zero(self, name: str) -> None:
        vit = late_cls(model(name), LAYER)
        for layer in range(DEPTH + 1):
            assert patch_tokens(vit, photos(name)[:0], layer).shape == (0, 32, *ZOO[name].grid)
        found = gradients(vit, patch_tokens(vit, photos(name)[:0], LAYER).sum())
        assert found["patch_embed.proj.weight"] is not None
        assert all(is_zero(gradient) for gradient in found.values())

    def test_layer_may_lie_beyond_the_late_layer(self) -> None:
        vit = late_cls(model(), 1).train()
        found = gradients(vit, patch_tokens(vit, photos(), LAYER).sum())
        assert not is_zero(found["cls_token"])

    def test_layers_as_asked(self) -> None:
        vit = model()
        assert list(layer_tokens(vit, photos(), iter([3, 1, 3]))) == [3, 1]
        assert layer_tokens(vit, photos(), []) == {}

    def test_frozen_stem(self) -> None:
        vit = model().train()
        vit.patch_embed.requires_grad_(False)
        vit.pos_embed.requires_grad_(False)
        z = patch_tokens(vit, photos(), 1)
        assert z.requires_grad

    def test_autocast_takes_images_of_either_type(self) -> None:
        vit = model()
        with torch.autocast("cpu", torch.bfloat16):
            for dtype in (torch.float32, torch.bfloat16):
                assert patch_tokens(vit, photos().to(dtype), LAYER).isfinite().all()

    @some
    def test_reads_no_values(self, name: str) -> None:
        """On the meta device there are none to read: so no GPU synchronisation."""
        vit, images = late_cls(model(name), LAYER).to("meta").train(), photos(name).to("meta")
        with TokenTap(vit, LAYER) as tap:
            loss = vit(images).sum() + tap.tokens.sum() + patch_tokens(vit, images, LAYER).sum()
        assert loss.device.type == "meta"
        loss.backward()

    def test_an_embedding_of_ones_own(self) -> None:
        class Pixels(PatchEmbed):
            def __init__(self, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.proj = nn.Linear(3 * 8 * 8, 32)

            def forward(self, x: Tensor) -> Tensor:
                return self.proj(nn.functional.unfold(x, 8, stride=8).transpose(1, 2))

        assert patch_tokens(direct(VisionTransformer, embed_layer=Pixels)(), photos(), LAYER).shape == (2, 32, 4, 4)

    def test_geometry(self) -> None:
        assert depth(original("vit")) == DEPTH
        assert [patch_size(original(name)) for name in ("vit", "dinov3", "vit-hybrid")] == [8, 8, 8]
        assert not accepts_any_size(original("vit"))
        assert accepts_any_size(original("dinov3"))


class TestTokenTap:
    @checkpointing
    def test_gradient_of_a_forward_with_two_losses(self, name: str, reentrant: bool) -> None:
        vit, images = late_cls(model(name), LAYER).double().train(), photos(name).double()
        expected = gradients(vit, vit(images).sum() + patch_tokens(vit, images, LAYER).square().sum())
        for checkpointing in (False, True):
            vit.set_grad_checkpointing(checkpointing)
            with TokenTap(vit, LAYER) as tap:
                loss = vit(images).sum()
                assert_same(gradients(vit, loss + tap.tokens.square().sum()), expected)

    @pytest.mark.parametrize("reentrant", [False, True], indirect=True)
    @pytest.mark.parametrize("layer", range(DEPTH + 1))
    def test_recomputation_is_not_a_forward(self, layer: int, reentrant: bool) -> None:
        vit, images = late_cls(model(), LAYER).train(), photos()
        vit.set_grad_checkpointing(True)
        with TokenTap(vit, layer) as tap:
            out = vit(images)
            z = tap.tokens
            assert z.requires_grad
            calls = count_block_calls(vit)
            out.sum().backward()
            assert len(calls) == DEPTH  # it did recompute
            assert tap.tokens is z

    def test_checkpointing_the_whole_vit(self) -> None:
        vit, images = late_cls(model(), LAYER).train(), photos()
        expected = gradients(vit, vit(images).sum() + patch_tokens(vit, images, LAYER).square().sum())
        with TokenTap(vit, LAYER) as tap:
            out = torch.utils.checkpoint.checkpoint(vit, images, use_reentrant=False)
            z = tap.tokens
            assert_same(gradients(vit, out.sum() + z.square().sum()), expected)
            assert tap.tokens is z

    def test_latest_of_several_forwards(self) -> None:
        vit = model("dinov3").train()
        small, large = torch.randn(2, 3, 16, 24), torch.randn(3, 3, 40, 32)
        with TokenTap(vit, LAYER) as tap:
            first = (vit(small), tap.tokens)[1]
            second = (vit(large), tap.tokens)[1]
        assert first.shape == (2, 32, 2, 3)
        assert second.shape == (3, 32, 5, 4)
        assert torch.equal(first, patch_tokens(vit, small, LAYER))
        found = gradients(vit, first.sum() + second.sum())
        apart = [gradients(vit, patch_tokens(vit, x, LAYER).sum()) for x in (small, large)]
        for parameter in ("patch_embed.proj.weight", "blocks.2.mlp.fc2.weight"):
            torch.testing.assert_close(found[parameter], apart[0][parameter] + apart[1][parameter])

    def test_nested(self) -> None:
        vit, images = model(), photos()
        with TokenTap(vit, 2) as outer, TokenTap(vit, DEPTH) as inner, TokenTap(vit, 2) as again:
            vit(images)
            found = outer.tokens, inner.tokens, again.tokens
        for z, layer in zip(found, (2, DEPTH, 2), strict=True):
            assert torch.equal(z, patch_tokens(vit, images, layer))

    def test_reads_ahead_of_what_others_do_to_the_next_block(self) -> None:
        vit, images = model(), photos()
        vit.blocks[LAYER].register_forward_pre_hook(lambda module, args: (2 * args[0],))
        with TokenTap(vit, LAYER) as tap:
            vit(images)
            z = tap.tokens
        assert torch.equal(z, patch_tokens(vit, images, LAYER))

    def test_late_cls_inside_the_block(self) -> None:
        vit, images = model(), photos()
        for layer in range(DEPTH + 1):
            with TokenTap(late_cls(vit, 1), layer) as tap:
                late_cls(vit, LAYER)(images)
                assert torch.equal(tap.tokens, patch_tokens(vit, images, layer))

    def test_leaves_nothing_behind(self) -> None:
        vit = model()
        before = pickle.dumps([vars(module) for module in vit.modules() if not list(module.children())])
        hooks = [dict(module._forward_pre_hooks) for module in vit.modules()]
        tap = TokenTap(vit, LAYER)
        with pytest.raises(ZeroDivisionError), tap:
            1 / vit(photos())[0, 0].mul(0).long().item()
        assert [dict(module._forward_pre_hooks) for module in vit.modules()] == hooks
        assert pickle.dumps([vars(module) for module in vit.modules() if not list(module.children())]) == before
        with pytest.raises(SERError, match="a closed tap, which keeps nothing"):
            _ = tap.tokens
        with tap:  # and it opens again, empty
            with pytest.raises(SERError, match="no forward, or one that stopped before"):
                _ = tap.tokens
            vit(photos())
            assert tap.tokens.shape == (2, 32, 4, 4)

    def test_a_forward_that_stops_early_leaves_no_stale_tokens(self) -> None:
        vit, images = model(), photos()
        with TokenTap(vit, DEPTH) as tap:
            vit(images)
            patch_tokens(vit, images, 2)
            with pytest.raises(SERError, match="no forward, or one that stopped before"):
                _ = tap.tokens

    def test_normed_intermediates_are_not_mistaken_for_the_last_layer(self) -> None:
        vit, images = model(), photos()
        with TokenTap(vit, DEPTH) as tap:
            vit.forward_intermediates(images, indices=[1, 3], norm=True, intermediates_only=True)
            with pytest.raises(SERError, match="no forward, or one that stopped before"):
                _ = tap.tokens
            vit.forward_intermediates(images, indices=[1, 4], norm=True, intermediates_only=True)
            assert torch.equal(tap.tokens, patch_tokens(vit, images, DEPTH))

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda vit: pickle.loads(pickle.dumps(vit))])
    def test_copies_carry_a_closed_tap(self, duplicate: Callable[[Any], Any]) -> None:
        vit, images = late_cls(model(), LAYER).train(), photos()
        with TokenTap(vit, LAYER) as tap:
            vit(images)
            z = tap.tokens
            teacher = duplicate(vit)
            teacher(images + 1)
            assert tap.tokens is z
        hooks = [hook for module in teacher.modules() for hook in module._forward_pre_hooks.values()]
        assert all(hook.__self__._tokens is None for hook in hooks)
        assert torch.equal(teacher(images), vit(images))

    def test_under_no_grad(self) -> None:
        vit = model()
        with torch.no_grad(), TokenTap(vit, LAYER) as tap:
            vit(photos())
            assert not tap.tokens.requires_grad

    def test_a_model_compiled_before_says_so(self) -> None:
        vit, images = model(), photos()
        torch.compiler.reset()
        compiled = torch.compile(vit, backend="eager")
        compiled(images)
        with TokenTap(vit, LAYER) as tap:
            compiled(images)
            with pytest.raises(SERError, match="not compiled before"):
                _ = tap.tokens

    def test_repr(self) -> None:
        assert repr(TokenTap(model(), LAYER)) == "TokenTap(VisionTransformer, 3)"


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    if torch.distributed.is_initialized():
        pytest.skip("another process group is up")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
class TestWrapped:
    @some
    @pytest.mark.parametrize("how", ["tap", "patch_tokens"])
    def test_ddp(self, name: str, how: str) -> None:
        vit, images = late_cls(model(name), LAYER).double().train(), photos(name).double()
        expected = gradients(vit, vit(images).sum() + patch_tokens(vit, images, LAYER).square().sum())
        ddp = nn.parallel.DistributedDataParallel(vit)
        with TokenTap(ddp.module, LAYER) as tap:
            loss = ddp(images).sum()
            z = tap.tokens if how == "tap" else patch_tokens(ddp.module, images, LAYER)
            assert_same(gradients(vit, loss + z.square().sum()), expected)

    @pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has FSDP2 on GPUs only")
    @pytest.mark.parametrize("late_first", [True, False])
    @pytest.mark.parametrize("name", ["vit", "dinov3"])
    def test_fsdp2(self, name: str, late_first: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        reference, images = late_cls(model(name), LAYER).double().train(), photos(name).double()
        out = reference(images).sum() + patch_tokens(reference, images, LAYER).square().sum()
        expected = gradients(reference, out)
        vit, mesh = model(name).double().train(), init_device_mesh("cpu", (1,))
        if late_first:
            late_cls(vit, LAYER)
        for block in vit.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(vit, mesh=mesh)
        late_cls(vit, LAYER)
        for _ in range(2):
            vit.zero_grad()  # before the forward, which swaps the sharded parameters
            with TokenTap(vit, LAYER) as tap:
                found = gradients(vit, vit(images).sum() + tap.tokens.square().sum())
            assert_same({k: None if g is None else g.full_tensor() for k, g in found.items()}, expected)
        with pytest.raises(SERError, match=r"remedy:   with TokenTap\(vit, 3\) as tap: vit\(images\); z = tap.tokens"):
            patch_tokens(vit, images, LAYER)
        late_cls(vit, 0)
        torch.testing.assert_close(vit(images), model(name).double()(images))


class Masked(VisionTransformer):
    """As MAE does it: another sequence in the same class."""

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward_features(x)[:, ::2]


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("cait_xxs24_224", "Cait"),
            ("beit_base_patch16_224", "Beit"),
            ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
            ("resnet10t", "ResNet"),
        ],
    )
    def test_other_families(self, name: str, kind: str) -> None:
        vit = timm.create_model(name, pretrained=False, **({} if name == "resnet10t" else {"depth": 2}))
        images = torch.rand(1, 3, 224, 224)
        for call in (
            lambda: late_cls(vit, 1),
            lambda: patch_tokens(vit, images, 1),
            lambda: layer_tokens(vit, images, [1]),
            lambda: TokenTap(vit, 1),
            lambda: depth(vit),
            lambda: patch_size(vit),
            lambda: accepts_any_size(vit),
        ):
            with pytest.raises(SERError) as error:
                call()
            assert error.value.given == kind
            assert "VisionTransformer (ViT, DeiT, DINOv2, CLIP) or Eva" in error.value.expected
            assert error.value.remedy.startswith('timm.create_model("vit_small_patch16_224"')

    def test_a_subclass_with_another_sequence(self) -> None:
        with pytest.raises(SERError, match="given:    Masked with its own forward_features"):
            late_cls(direct(Masked)(), 1)

    def test_not_a_module(self) -> None:
        with pytest.raises(SERError, match="given:    str"):
            late_cls("vit_tiny_patch16_224", 1)  # type: ignore[type-var]

    @pytest.mark.parametrize(
        ("wrap", "path"),
        [
            (nn.DataParallel, "vit.module"),
            (torch.compile, "vit._orig_mod"),
            (lambda vit: torch.compile(nn.DataParallel(vit)), "vit._orig_mod.module"),
        ],
    )
    def test_wrappers(self, wrap: Callable[[nn.Module], nn.Module], path: str) -> None:
        vit = wrap(model())
        with pytest.raises(SERError, match="a wrapper around the model") as error:
            late_cls(vit, 3)
        assert error.value.remedy == f"late_cls({path}, 3)"
        eval(error.value.remedy)  # the remedy works as typed
        with pytest.raises(SERError) as error:
            patch_tokens(vit, photos(), 3)
        assert error.value.remedy == f"patch_tokens({path}, images, layer=3)"
        with pytest.raises(SERError) as error:
            TokenTap(vit, 3)
        assert error.value.remedy == f"TokenTap({path}, 3)"

    @pytest.mark.parametrize("layer", [-1, DEPTH, 99, True, 2.0, "3", None])
    def test_layer_of_late_cls(self, layer: Any) -> None:
        vit = late_cls(model(), 2)
        with pytest.raises(SERError) as error:
            late_cls(vit, layer)
        assert str(error.value) == (
            f"late_cls(vit, {layer!r})\n"
            f"  given:    layer={layer!r}\n"
            f"  expected: a whole number of blocks from 0 to 4\n"
            f"  remedy:   late_cls(vit, 3)"
        )
        assert torch.equal(vit(photos()), late_cls(model(), 2)(photos()))  # nothing half done

    @pytest.mark.parametrize("layer", [-1, DEPTH + 1, True, 2.0, None])
    def test_layer_elsewhere(self, layer: Any) -> None:
        for call in (
            lambda: patch_tokens(model(), photos(), layer),
            lambda: layer_tokens(model(), photos(), [1, layer]),
            lambda: TokenTap(model(), layer),
        ):
            with pytest.raises(SERError, match="a whole number of blocks from 0 to 5"):
                call()

    @pytest.mark.parametrize(
        ("change", "given", "expected", "remedy"),
        [
            (lambda x: x[0], "images of shape (3, 24, 40)", "(B, C, H, W)", "images[None]"),
            (lambda x: x[None], "images of shape (1, 2, 3, 24, 40)", "(B, C, H, W)", "images.flatten(0, -4)"),
            (list, "a list", "a tensor (B, C, H, W)", "torch.stack(list(images))"),
            (
                lambda x: x[:, :1],
                "images of shape (2, 1, 24, 40)",
                "(B, 3, H, W), as the model was built for",
                "timm.create_model(..., in_chans=1)",
            ),
            (
                lambda x: x.byte(),
                "images of torch.uint8",
                "floating point, normalised as for the model",
                "images.float() / 255",
            ),
            (
                lambda x: x.double(),
                "images of torch.float64",
                "torch.float32, as the model",
                "images.to(torch.float32)",
            ),
            (lambda x: x.to("meta"), "images on meta", "cpu, as the model", 'images.to("cpu")'),
            (
                lambda x: x[..., :20, :],
                "images of 20 x 40 pixels",
                "sides that patches of 8 x 8 fill",
                "torch.nn.functional.interpolate(images, (16, 40), mode='bicubic')",
            ),
            (
                lambda x: x[..., :5],
                "images of 24 x 5 pixels",
                "sides that patches of 8 x 8 fill",
                "torch.nn.functional.interpolate(images, (24, 8), mode='bicubic')",
            ),
        ],
    )
    def test_images(self, change: Callable[[Tensor], Any], given: str, expected: str, remedy: str) -> None:
        vit, images = model("vit-dynamic"), change(photos("vit-dynamic"))
        with pytest.raises(SERError) as error:
            patch_tokens(vit, images, LAYER)
        assert error.value.args == ("patch_tokens(vit, images, layer=3)", given, expected, remedy)
        if remedy.startswith(("images", "torch")) and not isinstance(images, Tensor) or remedy.startswith("torch"):
            images = eval(remedy)
            assert patch_tokens(vit, images, LAYER).isfinite().all()

    def test_static_size(self) -> None:
        with pytest.raises(SERError) as error:
            patch_tokens(model("vit"), torch.rand(1, 3, 32, 48), LAYER)
        assert str(error.value) == (
            "patch_tokens(vit, images, layer=3)\n"
            "  given:    images of 32 x 48 pixels\n"
            "  expected: 32 x 32, the size that the model was built for\n"
            "  remedy:   timm.create_model(..., dynamic_img_size=True)"
        )
        vit = model("vit")
        vit.set_input_size((32, 48))
        assert patch_tokens(vit, torch.rand(1, 3, 32, 48), LAYER).shape == (1, 32, 4, 6)

    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
    def test_patch_dropout(self, name: str) -> None:
        vit = named(name, patch_drop_rate=0.25)()
        plain = named(name)()
        plain.load_state_dict(vit.state_dict())
        assert torch.equal(patch_tokens(vit.eval(), photos(), 2), patch_tokens(plain.eval(), photos(), 2))
        vit.train()
        with pytest.raises(SERError) as error:
            patch_tokens(vit, photos(), LAYER)
        assert error.value.given == "patch dropout 0.25 in training"
        assert error.value.remedy == "timm.create_model(..., patch_drop_rate=0.0)"
        with TokenTap(vit, LAYER), pytest.raises(SERError, match="patch dropout 0.25 in training"):
            vit(photos())

    def test_oblong_patches(self) -> None:
        vit = direct(VisionTransformer, patch_size=(8, 4))()
        assert patch_tokens(vit, photos(), LAYER).shape == (2, 32, 4, 8)
        with pytest.raises(SERError, match="patches of 8 x 4 pixels"):
            patch_size(vit)

    def test_tap_says_how_to_read_it(self) -> None:
        with TokenTap(model(), LAYER) as tap, pytest.raises(SERError) as error:
            _ = tap.tokens
        assert str(error.value) == (
            "tap.tokens\n"
            "  given:    no forward, or one that stopped before\n"
            "  expected: a forward of vit, not compiled before, inside the with-block\n"
            "  remedy:   with TokenTap(vit, 3) as tap: vit(images); z = tap.tokens"
        )
