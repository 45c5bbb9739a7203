"""Geometry, positions and class tokens of timm ViTs."""

from typing import Any

import pytest
import torch
from timm.layers import PatchEmbed
from timm.models import VisionTransformer
from timm_zoo import DEPTH, LAYER, ZOO, direct, embed, hybrid, model, named, original, photos, some, zoo
from torch import Tensor, nn

from ser_reg.backbones import TokenTap, backbone, late_cls, patch_tokens
from ser_reg.errors import SERError


class TestGeometry:
    def test_geometry(self) -> None:
        assert backbone(original("vit")).depth == DEPTH
        assert [backbone(original(name)).patch_size for name in ("vit", "dinov3", "vit-hybrid")] == [8, 8, 8]
        assert not backbone(original("vit")).any_size
        assert backbone(original("dinov3")).any_size

    def test_an_embedding_of_ones_own(self) -> None:
        class Pixels(PatchEmbed):
            def __init__(self, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.proj = nn.Linear(3 * 8 * 8, 32)

            def forward(self, x: Tensor) -> Tensor:
                return self.proj(nn.functional.unfold(x, 8, stride=8).transpose(1, 2))

        assert patch_tokens(direct(VisionTransformer, embed_layer=Pixels)(), photos(), LAYER).shape == (2, 32, 4, 4)

    @zoo
    def test_grids_and_prefix(self, name: str) -> None:
        vit = original(name)
        known = backbone(vit)
        assert known.grid(ZOO[name].size) == ZOO[name].grid
        assert known.prefix == vit.num_prefix_tokens
        assert known.has_prefix == (known.prefix > 0)
        assert known.cls_layer == 0
        assert backbone(late_cls(model(name), LAYER)).cls_layer == (LAYER if known.has_prefix else 0)

    @pytest.mark.parametrize(
        ("name", "size"), [("vit", (32, 32)), ("vit-rectangle", (24, 40)), ("dinov2", (32, 32)), ("dinov3", (32, 32))]
    )
    def test_native_size(self, name: str, size: tuple[int, int]) -> None:
        assert backbone(original(name)).size == size

    def test_native_size_and_pixels_of_a_class_called_by_itself(self) -> None:
        known = backbone(VisionTransformer(img_size=224, patch_size=14, embed_dim=12, depth=1))
        assert known.size == (224, 224)
        assert (known.mean, known.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def test_channels(self) -> None:
        assert backbone(named("vit_tiny_patch16_224", in_chans=5)()).channels == 5
        assert backbone(hybrid()).channels == 3

    def test_oblong_patches(self) -> None:
        vit = direct(VisionTransformer, patch_size=(8, 4))()
        assert patch_tokens(vit, photos(), LAYER).shape == (2, 32, 4, 8)
        with pytest.raises(SERError, match="patches of 8 x 4 pixels"):
            _ = backbone(vit).patch_size

    def test_static_size(self) -> None:
        with pytest.raises(SERError) as error:
            patch_tokens(model("vit"), torch.rand(1, 3, 32, 48), LAYER)
        assert str(error.value) == (
            "patch_tokens(model, images, layer=3)\n"
            "  given:    images of 32 x 48 pixels\n"
            "  expected: 32 x 32, the size that the model was built for\n"
            "  remedy:   timm.create_model(..., dynamic_img_size=True)"
        )
        vit = model("vit")
        vit.set_input_size((32, 48))
        assert patch_tokens(vit, torch.rand(1, 3, 32, 48), LAYER).shape == (1, 32, 4, 6)


class TestPositions:
    @pytest.mark.parametrize(
        ("name", "kinds"),
        [
            ("vit", ["absolute"]),
            ("eva-no-rope", ["absolute"]),
            ("dinov3", ["rotary"]),
            ("eva02", ["absolute", "rotary"]),
        ],
    )
    def test_coding(self, name: str, kinds: list[str]) -> None:
        known = backbone(original(name))
        assert [kind.split()[0] for kind in known.position_coding()] == kinds
        assert known.positions is original(name).pos_embed

    @pytest.mark.parametrize("ask", [backbone, lambda vit: late_cls(vit, 1), lambda vit: TokenTap(vit, 1)])
    def test_a_class_token_and_no_positions(self, ask: Any) -> None:
        """What an old timm runs wrongly is refused, by whatever is asked first; a new one runs it as it should."""
        vit = named("vit_tiny_patch16_224", pos_embed="none")().eval()
        inputs: list[Tensor] = []
        vit.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        vit(photos())
        if inputs[0].shape[1] == 17:
            ask(vit)
            assert torch.equal(inputs[0][:, :1], vit.cls_token.expand(2, -1, -1))
            assert torch.equal(patch_tokens(vit, photos(), 0).flatten(2).mT, inputs[0][:, 1:])
        else:
            assert inputs[0].shape[1] == 16
            with pytest.raises(SERError, match=r'a ViT without positions but with \[CLS\](.|\n)*pip install "timm>='):
                ask(vit)
        pooled = named("vit_tiny_patch16_224", pos_embed="none", class_token=False, global_pool="avg")()
        assert patch_tokens(pooled, photos(), LAYER).shape == (2, 32, 4, 4)

    @some
    def test_without_them_any_order_of_patches_is_alike(self, name: str) -> None:
        vit = backbone(late_cls(model(name), 1)).without_positions()
        images = torch.ones(1, 3, *ZOO[name].size)
        tokens = patch_tokens(vit, images, LAYER)
        torch.testing.assert_close(tokens, tokens[..., :1, :1].expand_as(tokens))
        assert backbone(vit).cls_layer == 1

    @pytest.mark.parametrize("name", ["vit", "dinov2-registers", "deit-distilled", "siglip", "deit3"])
    def test_patches_get_the_mean_of_all_positions_and_the_prefix_its_own(self, name: str) -> None:
        vit = model(name)
        known = backbone(vit)
        rows, columns = known.grid(known.size)
        first = known.positions.shape[1] - rows * columns  # prefix tokens that have a position
        bare = backbone(known.without_positions()).positions
        mean = sum(known.positions[:, first + i] for i in range(rows * columns)) / (rows * columns)
        torch.testing.assert_close(bare[:, first:], mean[:, None].expand_as(bare[:, first:]))
        assert torch.equal(bare[:, :first], known.positions[:, :first])
        with torch.no_grad():  # positions that are alike already: nothing changes
            vit.pos_embed[:, first:] = vit.pos_embed[:, first:].mean(1, keepdim=True)
        torch.testing.assert_close(backbone(vit).without_positions()(photos(name)), vit(photos(name)))


class TestClassTokens:
    @some
    def test_equal_the_literal_reference(self, name: str) -> None:
        vit, images = model(name), photos(name)
        pooled, tokens = backbone(vit).class_tokens(images, 2)
        x, extra = embed(vit, images)
        classes = []
        for block, kwargs in zip(vit.blocks, extra, strict=True):
            x = block(x, **kwargs)
            classes.append(vit.norm(x)[:, 0])
        assert torch.equal(tokens, torch.cat(classes[-2:], dim=1))
        assert torch.equal(pooled, vit.forward_head(vit.norm(x), pre_logits=True))

    def test_who_has_them(self) -> None:
        assert backbone(original("vit")).has_class_tokens
        for name in ("vit-no-class-token", "siglip", "registers-only"):
            assert not backbone(original(name)).has_class_tokens
