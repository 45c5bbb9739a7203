"""Patch tokens, of a forward of their own and tapped, against literal references, over the zoo."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm_zoo import (
    DEPTH,
    LAYER,
    ZOO,
    as_map,
    assert_same,
    checkpointing,
    count_block_calls,
    gradients,
    is_zero,
    literal,
    model,
    named,
    original,
    photos,
    some,
    zoo,
)
from torch import Tensor, nn

from ser_reg.backbones import TokenTap, late_cls, patch_tokens
from ser_reg.errors import SERError


class TestPatchTokens:
    @zoo
    @pytest.mark.parametrize("late", [0, LAYER])
    def test_equals_the_literal_reference_and_the_tap(self, name: str, late: int) -> None:
        images, vit = photos(name), late_cls(model(name), late)
        expected, _ = literal(original(name), images, late)
        together = patch_tokens(vit, images, range(DEPTH + 1))
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
        patch_tokens(vit, images, [2, 0, 4])
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
        assert list(patch_tokens(vit, photos(), iter([3, 1, 3]))) == [3, 1]
        assert patch_tokens(vit, photos(), []) == {}

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

    @pytest.mark.parametrize("layer", [0, LAYER])
    def test_compile_patch_tokens(self, layer: int) -> None:
        vit, images = late_cls(model("vit-dynamic"), LAYER), photos("vit-dynamic")
        torch.compiler.reset()
        compiled = torch.compile(patch_tokens, backend="eager", fullgraph=True)
        for x in (images, images[..., :32], images[:1]):
            assert torch.equal(compiled(vit, x, layer), patch_tokens(vit, x, layer))


class TestTokenTap:
    @checkpointing
    def test_gradient_of_a_forward_with_two_losses(self, name: str, reentrant: bool) -> None:
        vit, images = late_cls(model(name), LAYER).double().train(), photos(name).double()
        expected = gradients(vit, vit(images).sum() + patch_tokens(vit, images, LAYER).square().sum())
        for enabled in (False, True):
            vit.set_grad_checkpointing(enabled)
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

    def test_tokens_of_which_forward(self) -> None:
        vit, images = model(), photos()
        with TokenTap(vit, LAYER) as tap:
            vit(images)
            vit(images + 1)
            with pytest.raises(SERError) as error:
                _ = tap.tokens
            assert error.value.args[:3] == (
                "tap.tokens",
                "several forwards since it was last read: of which of them?",
                "one forward, then its tokens",
            )
            with pytest.raises(SERError, match="no forward, or one that stopped before"):
                _ = tap.tokens  # those of the second are not handed out after all
            vit(images)
            assert torch.equal(tap.tokens, patch_tokens(vit, images, LAYER))
        with TokenTap(vit, LAYER) as tap:  # nor does the next one remember
            vit(images)
            assert tap.tokens is tap.tokens
        names = {"TokenTap": TokenTap, "model": vit, "images1": images, "images2": images + 1}
        exec(error.value.remedy, names)
        for z, x in zip(names["z"], (images, images + 1), strict=True):
            assert torch.equal(z, patch_tokens(vit, x, LAYER))

    def test_a_forward_that_stops_before_hides_none(self) -> None:
        """What was read may be followed by others; what stops before the layer has no tokens to lose."""
        vit, images = model(), photos()
        with TokenTap(vit, LAYER) as tap:
            patch_tokens(vit, images + 1, 2)
            vit(images)
            assert torch.equal(tap.tokens, patch_tokens(model(), images, LAYER))
            vit(images + 1)
            vit(images)
            patch_tokens(vit, images, 1)
            with pytest.raises(SERError, match="no forward, or one that stopped before"):
                _ = tap.tokens

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
        with pytest.raises(SERError, match=r"with TokenTap\(model, 3\) as tap: model\(images\); z = tap.tokens"):
            patch_tokens(vit, images, LAYER)
        late_cls(vit, 0)
        torch.testing.assert_close(vit(images), model(name).double()(images))


class TestErrors:
    @pytest.mark.parametrize("layer", [-1, DEPTH + 1, True, 2.0, None])
    def test_layer_elsewhere(self, layer: Any) -> None:
        for call in (
            lambda: patch_tokens(model(), photos(), layer),
            lambda: patch_tokens(model(), photos(), [1, layer]),
            lambda: TokenTap(model(), layer),
        ):
            with pytest.raises(SERError, match="a whole number of blocks from 0 to 5"):
                call()

    @pytest.mark.parametrize(
        ("change", "given", "expected", "remedy"),
        [
            (lambda x: x[0], "images of shape (3, 24, 40)", "(B, C, H, W)", "images[None]"),
            (lambda x: x[None], "images of shape (1, 2, 3, 24, 40)", "(B, C, H, W)", "images.flatten(0, -4)"),
            (list, "a list of Tensor", "a tensor (B, C, H, W)", "torch.stack(list(images))"),
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
        assert error.value.args == ("patch_tokens(model, images, layer=3)", given, expected, remedy)
        if remedy.startswith(("images", "torch")) and not isinstance(images, Tensor) or remedy.startswith("torch"):
            images = eval(remedy)
            assert patch_tokens(vit, images, LAYER).isfinite().all()

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

    def test_tap_says_how_to_read_it(self) -> None:
        with TokenTap(model(), LAYER) as tap, pytest.raises(SERError) as error:
            _ = tap.tokens
        assert str(error.value) == (
            "tap.tokens\n"
            "  given:    no forward, or one that stopped before\n"
            "  expected: a forward of model, not compiled before, inside the with-block\n"
            "  remedy:   with TokenTap(model, 3) as tap: model(images); z = tap.tokens"
        )
