"""The equivariance score at the two ends of its range, and beside its floor."""

import pytest
import timm
import torch
from torch import nn

from ser_reg import SERError, equivariance_score


def plain(depth=3, **kwargs):
    return timm.models.VisionTransformer(
        img_size=24, patch_size=4, embed_dim=32, depth=depth, num_heads=2, num_classes=0, **kwargs
    ).eval()


def equivariant(**kwargs):
    """Equivariant by construction: the colour of each patch, no positions, and blocks that look at one token."""
    vit = plain(dynamic_img_size=True, **kwargs)
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.patch_embed.proj.weight.copy_(vit.patch_embed.proj.weight.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4))
    for block in vit.blocks:
        block.attn = Alone()
    return vit


class Alone(nn.Module):
    """Attention of each token to itself."""

    def forward(self, tokens, **_):
        return tokens


def test_one_for_an_equivariant_network():
    scores = equivariance_score(equivariant(), torch.randn(6, 3, 24, 24))
    for transformation in ("rotation", "flip"):
        for readings in scores[transformation].values():
            assert readings["raw"] == pytest.approx(1, abs=1e-5)
            assert readings["spatial"] == pytest.approx(1, abs=1e-5)
            assert abs(readings["spatial_floor"]) < 0.2
    for readings in scores["scale"].values():
        assert readings["spatial"] > readings["spatial_floor"] + 0.3


def test_untrained_network_lies_between():
    scores = equivariance_score(plain(dynamic_img_size=True), torch.randn(6, 3, 24, 24))
    assert list(scores) == ["rotation", "flip", "scale"]
    assert list(scores["rotation"]) == [1, 2, 3]
    for layers in scores.values():
        for readings in layers.values():
            assert readings["spatial"] < 0.99
            assert all(-1 <= value <= 1 for value in readings.values())


def test_a_map_that_hardly_varies_is_high_in_the_raw_reading_only():
    vit = plain(dynamic_img_size=True)
    with torch.no_grad():
        vit.patch_embed.proj.bias.fill_(50)
        vit.pos_embed.normal_()
    readings = equivariance_score(vit, torch.randn(6, 3, 24, 24), layers=[1])["rotation"][1]
    assert readings["raw"] > 0.95
    assert readings["raw_floor"] > 0.95
    assert readings["spatial"] < 0.6


def test_scale_moves_the_smallest_grid_too():
    vit = plain(dynamic_img_size=True)
    readings = equivariance_score(vit, torch.randn(4, 3, 8, 8), layers=[1])["scale"][1]
    assert readings["raw"] < 1 - 1e-4


def test_static_model_is_scored_without_scale():
    assert list(equivariance_score(plain(), torch.randn(2, 3, 24, 24), layers=[3])) == ["rotation", "flip"]


def test_leaves_the_model_as_it_was():
    vit = plain(dynamic_img_size=True, drop_path_rate=0.5).train()
    vit.blocks[0].eval()
    before = torch.get_rng_state()
    images = torch.randn(70, 3, 24, 24)
    torch.set_rng_state(before)
    scores = [equivariance_score(vit, images, [2], torch.Generator().manual_seed(1)) for _ in range(2)]
    assert scores[0] == scores[1]
    assert torch.equal(before, torch.get_rng_state())
    assert vit.training
    assert not vit.blocks[0].training
    assert all(p.grad is None for p in vit.parameters())


@pytest.mark.parametrize("images", [torch.randn(1, 3, 24, 24), torch.randn(3, 24, 24)])
def test_needs_another_image(images):
    with pytest.raises(SERError, match="another image is the floor"):
        equivariance_score(plain(), images)
