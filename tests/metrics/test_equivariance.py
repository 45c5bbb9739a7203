"""The equivariance score at the two ends of its range, and beside its floor."""

import pytest
import timm
import torch
from equivariant_vits import equivariant, orbit_stack, plain
from torch import nn
from torch.nn import functional as F

from ser_reg import GroupElement, SERError, act, equivariance_score, patch_tokens
from ser_reg.backbones.timm_vit import TimmViT
from ser_reg.metrics import base as module


def test_one_for_an_equivariant_network():
    scores = equivariance_score(equivariant(), torch.randn(6, 3, 24, 24))
    for transformation in ("rotation", "flip"):
        for readings in scores[transformation].values():
            assert readings["raw"] == pytest.approx(1, abs=1e-5)
            assert readings["spatial"] == pytest.approx(1, abs=1e-5)
            assert abs(readings["spatial_floor"]) < 0.2
    for readings in scores["scale"].values():
        assert readings["spatial"] > readings["spatial_floor"] + 0.3


def permuted(self, images, layers, call):
    """The patches' mean colours as tokens, at random places that each call draws anew for each image."""
    tokens = F.avg_pool2d(images, 4)
    # One order for all images would keep some tokens in place by chance, in all images alike.
    order = torch.rand(len(images), 1, tokens[0, 0].numel()).argsort(2).expand(-1, 3, -1)
    return {layer: tokens.flatten(2).gather(2, order).view_as(tokens) for layer in layers}


def test_falls_to_the_floor_when_tokens_lose_their_places(monkeypatch):
    images = torch.randn(256, 3, 24, 24) + torch.randn(256, 3, 1, 1)  # of a colour each, which the raw reading sees
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


def test_equals_the_literal_score():
    """Of two images, each of which is the other one's floor, with torch's own functions: pixels are resampled with
    antialiasing, tokens without."""
    torch.manual_seed(0)
    vit, images = plain(dynamic_img_size=True), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        vit.pos_embed.normal_()
    moves = {
        "rotation": [(lambda x, k=k: x.rot90(k, (-2, -1)),) * 2 for k in (1, 2, 3)],
        "flip": [(lambda x: x.flip(-1),) * 2],
        "scale": [
            (
                lambda x, n=n: F.interpolate(x, (4 * n, 4 * n), mode="bicubic", antialias=True),
                lambda z, n=n: F.interpolate(z, (n, n), mode="bicubic"),
            )
            for n in (5, 7)
        ],
    }
    scores = equivariance_score(vit, images, layers=[1, 3])
    for name, elements in moves.items():
        for layer in (1, 3):
            expected = {"raw": 0.0, "spatial": 0.0, "raw_floor": 0.0, "spatial_floor": 0.0}
            for on_pixels, on_tokens in elements:
                with torch.no_grad():
                    acted = on_tokens(patch_tokens(vit, images, layer)).double()
                    moved = patch_tokens(vit, on_pixels(images), layer).double()
                for reading in expected:
                    a, b = acted, moved.flip(0) if "floor" in reading else moved
                    if "spatial" in reading:
                        a, b = (x - x.mean((2, 3), keepdim=True) for x in (a, b))
                    cosine = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
                    expected[reading] += cosine.mean().item() / len(elements)
            assert scores[name][layer] == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("n", range(2, 12))
def test_a_floor_is_never_of_the_image_itself(n, seed):
    """Each image has another one, and each is another one's."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    other = module.other_images(n, generator).tolist()
    assert sorted(other) == list(range(n))
    assert all(index != partner for index, partner in enumerate(other))


def test_floors_of_images_that_are_all_alike_are_the_score():
    images = torch.randn(1, 3, 24, 24).expand(3, -1, -1, -1)
    for layers in equivariance_score(plain(dynamic_img_size=True), images, layers=[2]).values():
        assert layers[2]["raw"] == pytest.approx(layers[2]["raw_floor"], abs=1e-5)
        assert layers[2]["spatial"] == pytest.approx(layers[2]["spatial_floor"], abs=1e-5)


@pytest.mark.parametrize(
    ("layers", "given", "expected", "remedy"),
    [
        (3, "layers=3", "several numbers of layers", "layers=[3]"),
        ("3", "layers='3'", "several numbers of layers", "layers=[3]"),
        (True, "layers=True", "several numbers of layers", "layers=[3]"),
        ([], "layers=[]", "several numbers of layers", "layers=[3]"),
        ([1, 9], "layers=[1, 9]", "whole numbers of blocks from 0 to 3", "layers=[3]"),
        ([1, "2"], "layers=[1, '2']", "whole numbers of blocks from 0 to 3", "layers=[3]"),
    ],
)
def test_layers_that_are_no_list(layers, given, expected, remedy):
    with pytest.raises(SERError) as error:
        equivariance_score(plain(), torch.randn(2, 3, 24, 24), layers=layers)
    assert error.value.args == ("equivariance_score(model, images, layers=...)", given, expected, remedy)


def test_layers_of_any_kind_of_list():
    vit, images = plain(), torch.randn(2, 3, 24, 24)
    scores = [equivariance_score(vit, images, layers) for layers in ([3, 1, 3], range(1, 4, 2), iter((1, 3)), {1, 3})]
    assert [list(score["flip"]) for score in scores] == [[1, 3]] * 4


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ((torch.randn(2, 3, 24, 24), torch.zeros(2)), "images[0]  # of (images, labels)"),
        (torch.randn(2, 3, 20, 20), "24 x 24, the size that the model was built for"),
        (torch.randn(2, 1, 24, 24), "in_chans=1"),
    ],
)
def test_errors_name_the_score(images, text):
    with pytest.raises(SERError) as error:
        equivariance_score(plain(), images)
    assert error.value.call == "equivariance_score(model, images)"
    assert text in str(error.value)
    with pytest.raises(SERError) as error:
        equivariance_score(nn.Linear(3, 4), torch.randn(2, 3, 24, 24))
    assert error.value.call == "equivariance_score(model, images)"


@pytest.mark.parametrize("patches", [1, 2, 6, 10])
def test_scale_takes_away_and_adds_a_sixth_in_whole_patches(patches):
    images = torch.zeros(2, 3, 4 * patches, 4 * (patches + 3))
    smaller, larger = module.transformations(plain(dynamic_img_size=True), images)["scale"]
    sizes = [[max(1, n + sign * max(1, round(n / 6))) for n in (patches, patches + 3)] for sign in (-1, 1)]
    for g, size in zip((smaller, larger), sizes, strict=True):
        assert g.output_size(tuple(images.shape[-2:])) == tuple(4 * n for n in size)


def test_channels_turn_with_the_tokens(monkeypatch):
    """Of an orbit stack the score under its own action is 1; under the plain one it is not."""
    monkeypatch.setattr(TimmViT, "maps", orbit_stack)
    vit, images = plain(dynamic_img_size=True), torch.randn(4, 3, 24, 24)
    regular, trivial = (equivariance_score(vit, images, [1], channels=word) for word in ("regular", "trivial"))
    for name in ("rotation", "flip"):
        assert regular[name][1]["raw"] == pytest.approx(1, abs=1e-5)
        assert trivial[name][1]["raw"] < 0.7
    assert regular["scale"][1]["raw"] == trivial["scale"][1]["raw"]
    with pytest.raises(SERError, match="channels='odd'"):
        equivariance_score(vit, images, channels="odd")
