"""Probes cannot cheat, and find what is there."""

import pytest
import torch
from small_vits import DYNAMIC, photos, vit

from ser_reg import patch_tokens
from ser_reg.backbones import backbone
from ser_reg.report.photographs import whole
from ser_reg.report.probes import mean_tokens, probe

PAIRS = [i for i in range(20) for _ in range(2)]  # two views of each of twenty images


def test_noise_is_at_chance():
    found = probe(torch.randn(40, 4, 16), PAIRS)
    assert found.chance == 0.25
    assert abs(found.accuracy - 0.25) < 3 * found.standard_error
    assert 0.01 < found.standard_error < 0.08


def test_features_that_no_element_changes_are_exactly_at_chance():
    """The same answer for all elements of a view is right for one of them."""
    assert probe(torch.randn(40, 1, 16).expand(-1, 4, -1), PAIRS).accuracy == pytest.approx(0.25)
    assert probe(torch.randn(40, 1, 16).expand(-1, 2, -1), PAIRS).accuracy == pytest.approx(0.5)


def test_views_of_an_image_are_held_out_together():
    """Equal views of an image would give the label away, were one trained on and the other asked."""
    features = torch.randn(20, 4, 200).repeat_interleave(2, 0)
    assert probe(features, list(range(40))).accuracy > 0.9
    assert probe(features, PAIRS).accuracy < 0.4


def test_finds_a_turn_that_is_there():
    pixels = torch.stack([whole(image, (32, 32)) for image in photos(12)])
    features = mean_tokens(vit(**DYNAMIC), pixels, [0, 2])
    assert features["rotation"][2].shape == (12, 4, 32)
    assert features["flip"][2].shape == (12, 2, 32)
    assert probe(features["rotation"][2], list(range(12))).accuracy > 0.9
    assert probe(features["flip"][2], list(range(12))).accuracy < 0.8  # light from above says nothing of it


def test_equivariant_network_has_a_mean_token_that_does_not_turn():
    model = backbone(vit(**DYNAMIC)).without_positions()
    with torch.no_grad():
        weight = model.patch_embed.proj.weight
        weight.copy_(weight.mean((2, 3), keepdim=True).expand_as(weight))
    pixels = torch.stack([whole(image, (32, 32)) for image in photos(12)])
    for features in mean_tokens(model, pixels, [2]).values():
        torch.testing.assert_close(features[2], features[2][:, :1].expand_as(features[2]))


def test_elements_are_those_of_torch():
    """Turns are counter-clockwise."""
    model, images = vit(**DYNAMIC), torch.rand(3, 3, 32, 32)
    found = mean_tokens(model, images, [0])
    with torch.no_grad():
        for turns in range(4):
            expected = patch_tokens(model, images.rot90(turns, (-2, -1)), 0).mean((-2, -1))
            torch.testing.assert_close(found["rotation"][0][:, turns], expected)
        torch.testing.assert_close(found["flip"][0][:, 1], patch_tokens(model, images.flip(-1), 0).mean((-2, -1)))


def test_fewer_images_than_rounds():
    assert probe(torch.eye(4).expand(6, 4, 4), [0, 0, 0, 1, 1, 1]).accuracy == 1
