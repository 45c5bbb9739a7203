"""Late [CLS] against literal references, over the zoo."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from timm_zoo import (
    DEPTH,
    LAYER,
    MASKABLE,
    ZOO,
    as_map,
    assert_same,
    checkpointing,
    direct,
    gradients,
    literal,
    masked,
    model,
    named,
    original,
    photos,
    slow,
    some,
    zoo,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from ser_reg.backbones import TokenTap, backbone, late_cls, patch_tokens
from ser_reg.errors import SERError


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
        if backbone(vit).any_size:
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


class TestErrors:
    @pytest.mark.parametrize("layer", [-1, DEPTH, 99, True, 2.0, "3", None])
    def test_layer_of_late_cls(self, layer: Any) -> None:
        vit = late_cls(model(), 2)
        with pytest.raises(SERError) as error:
            late_cls(vit, layer)
        assert str(error.value) == (
            f"late_cls(model, {layer!r})\n"
            f"  given:    layer={layer!r}\n"
            f"  expected: a whole number of blocks from 0 to 4\n"
            f"  remedy:   late_cls(model, 3)"
        )
        assert torch.equal(vit(photos()), late_cls(model(), 2)(photos()))  # nothing half done
