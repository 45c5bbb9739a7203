"""The equivariance score at the two ends of its range, and beside its floor."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from ser_reg import GroupElement, SERError, act, equivariance_score
from ser_reg.backbones.timm_vit import TimmViT
from ser_reg.metrics import equivariance as module


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


def permuted(self, images, layers):
    """The patches' mean colours as tokens, at random places that each call draws anew."""
    tokens = F.avg_pool2d(images, 4)
    order = torch.randperm(tokens[0, 0].numel())
    return {layer: tokens.flatten(2)[:, :, order].view_as(tokens) for layer in layers}


def test_falls_to_the_floor_when_tokens_lose_their_places(monkeypatch):
    images = torch.randn(64, 3, 24, 24) + torch.randn(64, 3, 1, 1)  # of a colour each, which the raw reading sees
    before = equivariance_score(equivariant(), images, layers=[1])
    monkeypatch.setattr(TimmViT, "maps", permuted)
    after = equivariance_score(equivariant(), images, layers=[1])
    for transformation, layers in after.items():
        assert before[transformation][1]["spatial"] > 0.5
        assert layers[1]["spatial"] == pytest.approx(layers[1]["spatial_floor"], abs=0.05)
        assert layers[1]["raw"] > layers[1]["raw_floor"] + 0.3  # the colour is kept by any order


@pytest.mark.parametrize(
    ("turns", "flip", "scale", "tolerance"),
    [(1, False, 1.0, 1e-5), (2, False, 1.0, 1e-5), (3, True, 1.0, 1e-5), (0, True, 1.0, 1e-5), (0, False, 4 / 3, 0.05)],
)
def test_an_element_and_its_inverse_score_alike(turns, flip, scale, tolerance, monkeypatch):
    """From x to g·x as from g·x back to x: exactly for permutations, up to resampling for scale."""
    vit = plain(dynamic_img_size=True)
    images = F.interpolate(torch.randn(8, 3, 4, 4), (24, 24), mode="bicubic")
    g = GroupElement(torch.tensor([turns]), torch.tensor([flip]), torch.full((1, 2), scale, dtype=torch.float64))
    scores = []
    for element, x in ((g, images), (~g, act(g, images))):
        monkeypatch.setattr(module, "transformations", lambda vit, images, element=element: {"g": [element]})
        scores.append(equivariance_score(vit, x)["g"])
    for layer in scores[0]:
        for reading in ("raw", "spatial"):
            assert scores[0][layer][reading] == pytest.approx(scores[1][layer][reading], abs=tolerance)
            assert scores[0][layer][reading] < 0.999


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


def test_rectangles():
    """A model of one size does not take the turned image; one of any size does."""
    kwargs = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0, "img_size": (16, 24)}
    images = torch.randn(2, 3, 16, 24)
    static = timm.models.VisionTransformer(**kwargs)
    assert list(equivariance_score(static, images)) == ["flip"]
    dynamic = timm.models.VisionTransformer(**kwargs, dynamic_img_size=True)
    assert list(equivariance_score(dynamic, images)) == ["rotation", "flip", "scale"]


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
