"""The matching score: the true places against Pillow, the ends of its range, its floor, and the loops it stands for."""

import math

import numpy as np
import pytest
import torch
from elements import DIHEDRAL, element
from equivariant_vits import equivariant, orbit_stack, plain
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ser_reg import GroupElement, SERError, act, patch_tokens
from ser_reg.backbones.timm_vit import TimmViT
from ser_reg.geometry import move_channels
from ser_reg.metrics import matching as module
from ser_reg.metrics import matching_score

READINGS = ["top1", "near", "pck", "chance", "position"]


# Where tokens go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2)])
@pytest.mark.parametrize(("turns", "flip"), DIHEDRAL)
def test_true_places_of_turns_and_flips_are_those_of_pillow(turns, flip, grid):
    coordinates = Image.fromarray(np.arange(math.prod(grid), dtype=np.int32).reshape(grid))
    if flip:
        coordinates = coordinates.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if turns:
        coordinates = coordinates.transpose(
            [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270][turns - 1]
        )
    found = np.asarray(coordinates)
    off = module.distances(element(turns, flip), grid, found.shape)
    for token in range(math.prod(grid)):
        row, column = np.argwhere(found == token)[0]
        k = np.arange(found.size)
        expected = np.stack([k // found.shape[1] - row, k % found.shape[1] - column], 1)
        assert np.allclose(off[token].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("old", "new"), [(6, 7), (12, 14), (5, 11)])
def test_true_places_of_a_scaled_grid_are_those_of_pillow(old, new):
    ramp = Image.fromarray(np.arange(old, dtype=np.float32)[:, None].repeat(3, 1))
    seen = np.asarray(ramp.resize((3, new), Image.Resampling.BILINEAR))[:, 0]  # which row of the source lies where
    off = module.distances(GroupElement.scaling(new / old, 1), (old, 3), (new, 3)).view(old, 3, new, 3, 2)
    inside = range(1, old - 1)  # at the edge, resampling bends the ramp
    place = np.interp(np.array(inside), seen, np.arange(new))
    assert np.allclose(off[1:-1, 0, :, 0, 0].numpy(), np.arange(new) - place[:, None], atol=1e-5)
    assert torch.equal(off[0, :, 0, :, 1], (torch.arange(3)[None, :] - torch.arange(3)[:, None]).double())


# The ends of the range ------------------------------------------------------------------------------------------


def test_one_for_an_equivariant_network():
    images = torch.randn(6, 3, 24, 24)
    scores = matching_score(equivariant(), images)
    assert list(scores) == ["rotation", "flip", "scale"]
    for transformation in ("rotation", "flip"):
        assert list(scores[transformation]) == [1, 2, 3]
        for readings in scores[transformation].values():
            assert list(readings) == READINGS
            assert readings["top1"] == readings["near"] == readings["pck"] == 1
            assert readings["chance"] == pytest.approx(1 / 36)
            assert readings["position"] < 0.1
    smooth = F.interpolate(torch.randn(6, 3, 5, 5), (48, 48), mode="bicubic")
    for readings in matching_score(equivariant(), smooth)["scale"].values():
        assert readings["near"] > 0.5  # not 1: a scaled image has other patches
        assert readings["top1"] > 30 * readings["position"]
        assert readings["chance"] == pytest.approx((1 / 10**2 + 1 / 14**2) / 2)


def test_rectangles_are_matched_too():
    scores = matching_score(equivariant(), torch.randn(4, 3, 16, 24), layers=[1])
    assert scores["rotation"][1]["top1"] == scores["flip"][1]["top1"] == 1


def as_maps(make):
    """`TimmViT.maps` of what a function makes of images: (B, D, h, w), in patches of 4 pixels."""
    return lambda self, images, layers, call: {layer: make(images) for layer in layers}


def test_chance_for_noise(monkeypatch):
    monkeypatch.setattr(TimmViT, "maps", as_maps(lambda x: torch.randn(len(x), 16, x.shape[-2] // 4, x.shape[-1] // 4)))
    images = torch.zeros(256, 3, 24, 24)
    for name, layers in matching_score(plain(dynamic_img_size=True), images, layers=[1]).items():
        readings = layers[1]
        for reading in ("top1", "position"):
            assert readings[reading] == pytest.approx(
                readings["chance"], abs=5 * (readings["chance"] / 256 / 36) ** 0.5
            )
        if name != "scale":
            count = sum(len({*range(6)} & {i - 1, i, i + 1}) for i in range(6)) ** 2 / 36  # a token and its neighbours
            assert readings["near"] == pytest.approx(count / 36, abs=0.02)
            assert readings["pck"] == readings["top1"]  # a tenth of six tokens is less than one


def test_tokens_that_are_alike_match_nothing(monkeypatch):
    monkeypatch.setattr(TimmViT, "maps", as_maps(lambda x: torch.ones(len(x), 5, x.shape[-2] // 4, x.shape[-1] // 4)))
    for layers in matching_score(plain(dynamic_img_size=True), torch.rand(2, 3, 24, 24), layers=[1]).values():
        readings = layers[1]
        assert [readings[key] for key in READINGS if key != "chance"] == [0, 0, 0, 0]


def positions(images):
    """The same for all images: a smooth code of where a token stands, on any grid."""
    axes = [torch.linspace(0, 1, 2 * side // 4 + 1)[1::2] for side in images.shape[-2:]]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    code = torch.stack([f(math.pi * axis) for axis in (rows, columns) for f in (torch.sin, torch.cos)])
    return code.expand(len(images), -1, -1, -1)


def test_the_floor_of_tokens_that_are_positions(monkeypatch):
    """Of them a scaled image's are all found, as are another image's: the score is worth what lies above the floor."""
    monkeypatch.setattr(TimmViT, "maps", as_maps(positions))
    scores = matching_score(plain(dynamic_img_size=True), torch.rand(3, 3, 24, 24), layers=[1])
    for layers in scores.values():
        assert layers[1]["position"] == layers[1]["top1"]
    assert scores["scale"][1]["position"] > 0.95
    assert scores["rotation"][1]["position"] == 0  # no place of an even grid stays where it is
    odd = matching_score(plain(dynamic_img_size=True), torch.rand(3, 3, 20, 20), layers=[1])
    assert odd["rotation"][1]["position"] == pytest.approx(1 / 25)  # but the middle of an odd one does
    assert odd["flip"][1]["position"] == pytest.approx(5 / 25)


# What it stands for ---------------------------------------------------------------------------------------------


def literal_match(z, moved, place):
    """(top1, near, pck) of one image: maps (D, h, w), place(row, column) -> (row, column) in the grid of the other."""
    hits = []
    (_, height, width), (_, rows, columns) = z.shape, moved.shape
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    for i in range(height):
        for j in range(width):
            y, x = place(i, j)
            cosines = [F.cosine_similarity(z[:, i, j], moved[:, row, column], dim=0).item() for row, column in cells]
            row, column = cells[max(range(len(cells)), key=cosines.__getitem__)]
            away = max(abs(row - y), abs(column - x)) - 1e-9
            hits.append((away <= 0.5, away <= 1.5, math.hypot(row - y, column - x) <= 0.1 * max(rows, columns)))
    return torch.tensor(hits, dtype=torch.float64).mean(0)


@pytest.mark.parametrize("size", [(24, 24), (12, 40)])
def test_equals_the_loops_over_tokens(size):
    torch.manual_seed(0)
    vit = plain(dynamic_img_size=True)
    images = F.interpolate(torch.randn(2, 3, 5, 5), size, mode="bicubic")
    (height, width), patch = (side // 4 for side in size), 4.0

    def scaled(i, j, sides):  # through pixels, as the image is resized
        return tuple(
            ((k + 0.5) * patch * new / old) / patch - 0.5
            for k, old, new in zip((i, j), (height, width), sides, strict=True)
        )

    smaller, larger = ([n + sign * max(1, round(n / 6)) for n in (height, width)] for sign in (-1, 1))
    moves = {
        "rotation": [
            (lambda x: x.rot90(1, (-2, -1)), lambda i, j: (width - 1 - j, i)),
            (lambda x: x.rot90(2, (-2, -1)), lambda i, j: (height - 1 - i, width - 1 - j)),
            (lambda x: x.rot90(3, (-2, -1)), lambda i, j: (j, height - 1 - i)),
        ],
        "flip": [(lambda x: x.flip(-1), lambda i, j: (i, width - 1 - j))],
        "scale": [
            (
                lambda x, sides=sides: F.interpolate(x, [4 * n for n in sides], mode="bicubic", antialias=True),
                lambda i, j, sides=sides: scaled(i, j, sides),
            )
            for sides in (smaller, larger)
        ],
    }
    scores = matching_score(vit, images, layers=[0, 2])
    for name, elements in moves.items():
        for layer in (0, 2):
            found, floor = torch.zeros(2, 3).double(), 0.0
            for on_pixels, place in elements:
                with torch.no_grad():
                    z, moved = (patch_tokens(vit, x, layer) for x in (images, on_pixels(images)))
                found += sum(literal_match(z[i], moved[i], place) for i in range(2)) / 2 / len(elements)
                floor += sum(literal_match(z[i], moved[1 - i], place)[0].item() for i in range(2)) / 2 / len(elements)
            readings = scores[name][layer]
            assert [readings[key] for key in ("top1", "near", "pck")] == pytest.approx(found[0].tolist(), abs=1e-6), (
                name
            )
            assert readings["position"] == pytest.approx(floor, abs=1e-6)


def test_how_many_pairs_are_held_at_a_time_changes_nothing(monkeypatch):
    vit, images = plain(dynamic_img_size=True), torch.randn(7, 3, 24, 24)
    scores = [matching_score(vit, images, [2], torch.Generator().manual_seed(0))]
    monkeypatch.setattr(module, "PAIRS", 3 * 36**2)
    scores.append(matching_score(vit, images, [2], torch.Generator().manual_seed(0)))
    for name, layers in scores[0].items():
        assert layers[2] == pytest.approx(scores[1][name][2], abs=1e-6)


def test_channels_turn_with_the_tokens(monkeypatch):
    """An orbit stack is told apart by its own action alone."""
    monkeypatch.setattr(TimmViT, "maps", orbit_stack)
    vit, images = plain(dynamic_img_size=True), torch.randn(4, 3, 24, 24)
    regular, trivial = (matching_score(vit, images, [1], channels=word) for word in ("regular", "trivial"))
    for name in ("rotation", "flip"):
        assert regular[name][1]["top1"] == 1
        assert trivial[name][1]["top1"] < 0.5


# The model and the generators -----------------------------------------------------------------------------------


def test_leaves_model_and_generators_as_they_were():
    vit = plain(dynamic_img_size=True, drop_path_rate=0.5).train()
    vit.blocks[0].eval()
    images, before = torch.randn(70, 3, 24, 24), torch.get_rng_state()
    scores = [matching_score(vit, images, [2], torch.Generator().manual_seed(1)) for _ in range(2)]
    assert scores[0] == scores[1]
    assert torch.equal(before, torch.get_rng_state())
    assert vit.training
    assert not vit.blocks[0].training
    others = [
        matching_score(equivariant(), images, [1], torch.Generator().manual_seed(seed))["flip"][1] for seed in (1, 2)
    ]
    assert others[0]["position"] != others[1]["position"]  # which other image is drawn
    assert others[0]["top1"] == others[1]["top1"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda vit, x: matching_score(vit, x[:1]), "matching_score(model, images[:64])"),
        (lambda vit, x: matching_score(vit, x[0]), "another image is the floor"),
        (lambda vit, x: matching_score(vit, x, layers=3), "matching_score(model, images, layers=...)"),
        (lambda vit, x: matching_score(vit, x, channels="odd"), "matching_score(model, images, channels='odd')"),
        (lambda vit, x: matching_score(nn.Linear(3, 4), x), "matching_score(model, images)"),
        (lambda vit, x: matching_score(vit, x * math.nan, [1]), "features of layer 1 that are not finite"),
        (lambda vit, x: matching_score(plain(), torch.randn(2, 3, 20, 20)), "matching_score(model, images)"),
    ],
)
def test_errors_name_the_score(call, text):
    with pytest.raises(SERError) as error:
        call(plain(dynamic_img_size=True), torch.randn(2, 3, 24, 24))
    assert text in str(error.value)


def test_regular_channels_come_in_eights(monkeypatch):
    monkeypatch.setattr(TimmViT, "maps", as_maps(lambda x: torch.ones(len(x), 12, 6, 6)))
    with pytest.raises(SERError, match="12 channels"):
        matching_score(plain(), torch.randn(2, 3, 24, 24), channels="regular")


def test_a_grid_of_one_token_is_found():
    readings = matching_score(plain(dynamic_img_size=True), torch.randn(2, 3, 4, 4), layers=[1])["flip"][1]
    assert readings == {"top1": 1, "near": 1, "pck": 1, "chance": 1, "position": 1}


def test_moved_channels_and_places_commute():
    """`act` after moving channels is moving channels after `act`, which both scores take for granted."""
    z, g = torch.randn(2, 16, 3, 5), element(1, True, (4 / 3, 1.2))
    torch.testing.assert_close(act(g, move_channels(g, z, "regular")), move_channels(g, act(g, z), "regular"))
