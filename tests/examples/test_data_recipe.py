"""Views of the examples: crops by torchvision's law, with Pillow's pixels, and changes as often as published."""

import io
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from pictures_on_disk import picture
from PIL import Image, ImageOps

for package in ("accelerate", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

import barlow_twins  # noqa: E402
import dino  # noqa: E402
import moco_v3  # noqa: E402
from data.recipe import (  # noqa: E402
    BICUBIC,
    BILINEAR,
    DRAWS,
    Crop,
    Recipe,
    evaluation_transform,
    normalise,
    original,
    recipes,
    training_crop,
)
from torchvision.transforms import RandomResizedCrop, v2  # noqa: E402

from ser_reg import SERError  # noqa: E402
from ser_reg.images import embedded_photographs, read_image  # noqa: E402

SCRIPTS = {"moco_v3": moco_v3, "dino": dino, "barlow_twins": barlow_twins}
PILLOW = {BILINEAR: Image.Resampling.BILINEAR, BICUBIC: Image.Resampling.BICUBIC}


def policy(method, size, **changes):
    """Recipes of the views of a base method, for its paper's settings but for these."""
    script = SCRIPTS[method]
    return script.recipes(script.PRESETS["paper"].but(image_size=size, **changes))


def uniform(n, seed=0):
    """Draws for n crops."""
    return np.random.default_rng(seed).random((n, DRAWS)).tolist()


@pytest.fixture(scope="module")
def photographs():
    """As Pillow has them: smooth and rough ones."""
    found = embedded_photographs()
    return [v2.functional.to_pil_image(found[name]) for name in ("chelsea", "coffee", "astronaut", "china.jpg")]


# What is drawn


def farthest(a, b):
    """The statistic of Kolmogorov and Smirnov: how far two distributions are apart."""
    places = np.sort(np.concatenate([a, b]))
    shares = [np.searchsorted(np.sort(x), places, side="right") / len(x) for x in (a, b)]
    return np.abs(shares[0] - shares[1]).max()


def facts(boxes, size):
    """What tells distributions of boxes apart: area, aspect, where they lie, their centres."""
    top, left, rows, columns = np.asarray(boxes).T
    free = np.maximum(size[1] - rows, 1), np.maximum(size[0] - columns, 1)
    return rows * columns, columns / rows, top / free[0], left / free[1], top + rows / 2, left + columns / 2


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (80, 80), (300, 60), (31, 200)])
@pytest.mark.parametrize(
    ("area", "ratio"),
    [
        ((0.08, 1.0), (3 / 4, 4 / 3)),
        ((0.05, 0.25), (3 / 4, 4 / 3)),
        ((0.4, 1.0), (3 / 4, 4 / 3)),
        ((0.1, 0.5), (1.0, 3.0)),
    ],
)
def test_boxes_have_torchvisions_law(size, area, ratio):
    n, (width, height) = 1500, size
    recipe = Recipe(224, area, BICUBIC, ratio=ratio)  # no crop is four times as large
    ours = np.array([recipe.crop(size, draws)[:4] for draws in uniform(n)])
    torch.manual_seed(0)
    image = Image.new("L", size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(area), list(ratio)) for _ in range(n)])
    assert ours.dtype.kind == "i"
    top, left, rows, columns = ours.T
    assert min(top.min(), left.min()) >= 0
    assert min(rows.min(), columns.min()) >= 1
    assert (top + rows).max() <= height
    assert (left + columns).max() <= width
    for mine, other in zip(facts(ours, size), facts(theirs, size), strict=True):
        assert farthest(mine, other) < 2.0 * (2 / n) ** 0.5  # one in 1500 by chance


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (33, 7), (1, 1), (1, 5)])
def test_what_fits_no_crop_gives_torchvisions_middle(size):
    recipe = Recipe(8, (0.9, 1.0), BICUBIC)
    expected = RandomResizedCrop.get_params(Image.new("L", size), [0.9, 1.0], [3 / 4, 4 / 3])
    assert {recipe.crop(size, draws)[:4] for draws in uniform(20)} == {tuple(expected)}


def test_the_ends_of_the_draws_stay_inside():
    recipe = Recipe(8, (0.08, 1.0), BICUBIC)
    for end in (0.0, 1 - 2**-53):
        for size in ((500, 375), (64, 64), (3, 2), (1, 1)):
            for draws in (*uniform(20), [0.5] * DRAWS):
                for paired in (None, [end] * DRAWS, [*draws[:-3], end, end, end]):
                    top, left, rows, columns, _ = recipe.crop(size, [*draws[:-3], end, end, end], paired)
                    assert 0 <= top < top + rows <= size[1]
                    assert 0 <= left < left + columns <= size[0]


def test_half_of_the_crops_are_flipped_whatever_their_box():
    crops = [Recipe(32, (0.08, 1), BICUBIC).crop((500, 375), draws) for draws in uniform(2000)]
    flips = np.array([crop.flip for crop in crops])
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / 2000**0.5
    for fact in range(4):
        values = np.array([crop[fact] for crop in crops])
        assert farthest(values[flips], values[~flips]) < 2.0 * (4 / 2000) ** 0.5
    assert not any(Recipe(32, (0.08, 1), BICUBIC, flip=0.0).crop((50, 50), draws).flip for draws in uniform(50))


def test_large_crops_lie_on_pixels_of_a_smaller_image():
    recipe, seen = Recipe(16, (0.004, 1), BICUBIC), set()
    plain = Recipe(10**6, (0.004, 1), BICUBIC)
    for draws in uniform(300):
        crop, unmoved = recipe.crop((701, 503), draws), plain.crop((701, 503), draws)
        k = crop.reduction(16)
        seen.add(k)
        assert all(value % k == 0 for value in crop[:4])
        assert all(0 <= b - a < k for a, b in zip(crop[:4], unmoved[:4], strict=True))
        assert min(crop.height, crop.width) // k >= 2 * 16 or k == 1
        assert k == 8 or min(unmoved.height, unmoved.width) < 4 * k * 16  # as much as may be
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize(("crop", "expected"), [((0, 0, 64, 80), 4), ((0, 0, 63, 80), 1), ((2, 0, 64, 80), 2)])
def test_reduction_leaves_whole_pixels(crop, expected):
    assert Crop(*crop).reduction(8) == expected


def test_pairs_share_parts_of_any_images():
    recipe, n = Recipe(224, (0.08, 1), BICUBIC), 1000
    shared, parts = uniform(n, seed=1), []
    for a, b, box in zip(uniform(n, 2), uniform(n, 3), shared, strict=True):
        same = [recipe.crop((300, 300), draws, box) for draws in (a, b)]
        assert same[0][:4] == same[1][:4]
        wide, high = recipe.crop((500, 375), a, box), recipe.crop((375, 500), b, box)
        edges = [
            np.array([top / h, left / w, (top + rows) / h, (left + columns) / w])
            for (top, left, rows, columns, _), (w, h) in ((wide, (500, 375)), (high, (375, 500)), (same[0], (300, 300)))
        ]
        assert np.abs(edges[0] - edges[1]).max() <= 1 / 375  # half a pixel of each
        parts.append([*edges[2]])
        assert wide.flip == (a[-1] < 0.5)
        assert high.flip == (b[-1] < 0.5)
    torch.manual_seed(0)
    square = Image.new("L", (300, 300))
    theirs = np.array([RandomResizedCrop.get_params(square, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = np.array(parts) * 300
    assert farthest((ours[:, 2] - ours[:, 0]) * (ours[:, 3] - ours[:, 1]), theirs[:, 2] * theirs[:, 3]) < 0.09
    assert farthest(ours[:, 0], theirs[:, 0]) < 0.09
    assert farthest(ours[:, 1], theirs[:, 1]) < 0.09


# What is made of it


@pytest.mark.parametrize(("interpolation", "mean", "most"), [(BILINEAR, 0.3, 1), (BICUBIC, 0.3, 12)])
def test_crops_have_pillows_pixels(interpolation, mean, most, photographs):
    """Mean difference below 1/255, by steps of 1/255: a bicubic one is rounded between its two passes."""
    for image in photographs:
        for draws in uniform(4, seed=image.size[0]):
            recipe = Recipe(64, (0.02, 1), interpolation)
            crop = recipe.crop(image.size, draws)
            out = crop.cut(np.asarray(image), 64, interpolation)
            box = crop.top, crop.left, crop.height, crop.width
            expected = v2.functional.resized_crop(image, *box, [64, 64], interpolation=interpolation, antialias=True)
            expected = np.asarray(ImageOps.mirror(expected) if crop.flip else expected)
            assert (out.shape, out.dtype) == ((3, 64, 64), torch.uint8)
            difference = np.abs(out.permute(1, 2, 0).numpy().astype(int) - expected)
            assert difference.mean() <= mean
            assert difference.max() <= most


@pytest.mark.parametrize("interpolation", PILLOW)
def test_crops_of_scaled_jpegs_are_nearly_those_of_the_whole(interpolation, photographs):
    for image in photographs:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        whole = np.asarray(read_image(io.BytesIO(file.getvalue())))
        for size in (48, 24):
            crops = [Recipe(size, (0.5, 1), interpolation).crop(image.size, draws) for draws in uniform(8)]
            differences = []
            for crop in crops:
                k = crop.reduction(size)
                scaled = read_image(io.BytesIO(file.getvalue()), reduction=lambda asked, k=k: k)
                assert scaled.size == (-(-image.size[0] // k), -(-image.size[1] // k))
                ours, plain = crop.cut(np.asarray(scaled), size, interpolation, k), crop.cut(whole, size, interpolation)
                differences.append((ours.int() - plain.int()).abs().float().mean().item())
            assert np.mean(differences) <= 1
            assert max(differences) <= 2
            assert max(crop.reduction(size) for crop in crops) > 1


def test_a_crop_is_where_its_box_says():
    """Of an image whose pixels say where they are: without flip, with it, and of an image that is scaled."""
    width, height, size = 256, 200, 16
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)
    for reduction in (1, 2):
        seen = pixels.reshape(height // reduction, reduction, width // reduction, reduction, 3).mean((1, 3))
        for flip in (False, True):
            crop = Crop(40, 32, 128, 96, flip)
            out = crop.cut(np.round(seen).astype(np.uint8), size, BILINEAR, reduction).double()
            places = (torch.arange(size) + 0.5) / size
            x = 32 + 96 * (1 - places if flip else places) - 0.5
            y = 40 + 128 * places - 0.5
            assert (out[0] - x).abs().max() < 0.2 * 96 / size
            assert (out[1] - y[:, None]).abs().max() < 0.2 * 128 / size


def test_cutting_leaves_the_image_alone():
    pixels = np.asarray(picture(0, (40, 30)))
    before = pixels.copy()
    for flip in (False, True):
        view = Crop(0, 0, 30, 40, flip).cut(pixels, 40, BILINEAR)
        view.zero_()
    assert np.array_equal(pixels, before)


def test_original_is_what_evaluations_see(photographs):
    image = photographs[1]  # 600 x 400, of which the middle has whole pixels
    crop = original(112).crop(image.size, uniform(1)[0])
    assert crop == Crop(25, 125, 350, 350, flip=False)
    out = crop.cut(np.asarray(image), 112, original(112).interpolation).float()
    assert (out - evaluation_transform(112)(image)).abs().mean() < 1
    assert original(224).crop((500, 375), uniform(1)[0]) == Crop(23, 86, 328, 328)
    assert original(224).photometric is None
    assert original(7).crop((1, 1), uniform(1)[0]) == Crop(0, 0, 1, 1)


# What the base methods ask for

OFFICIAL_AREAS = {"moco_v3": (0.08, 1), "dino": (0.14, 1), "barlow_twins": (0.08, 1)}
OFFICIAL_RESAMPLING = {"moco_v3": BILINEAR, "dino": BICUBIC, "barlow_twins": BICUBIC}


@pytest.mark.parametrize("method", SCRIPTS)
def test_views_are_as_published(method):
    (first, second), (local,) = policy(method, 32, local_size=16, local_views=1, crop_min=OFFICIAL_AREAS[method][0])
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter": 0.8, "grey": 0.2}
    for recipe, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2), (local, 0.5, 0.0)):
        expected = jitter | {"blur": blur, "solarize": solarize, "sigma": (0.1, 2.0)}
        assert {name: getattr(recipe.photometric, name) for name in expected} == expected
        assert recipe.interpolation == OFFICIAL_RESAMPLING[method]
        assert (recipe.flip, recipe.ratio) == (0.5, (3 / 4, 4 / 3))
    views, none = policy(method, 224)
    assert [(view.size, view.area) for view in views] == [(224, OFFICIAL_AREAS[method])] * 2
    assert none == []


def test_without_blur_the_rest_stays():
    (first, second), (local,) = policy("moco_v3", 16, blur=False, local_size=8, local_views=1)
    assert [view.photometric.blur for view in (first, second, local)] == [0.0] * 3
    assert [view.photometric.jitter for view in (first, second, local)] == [0.8] * 3
    assert second.photometric.solarize == 0.2


@pytest.mark.parametrize(
    ("settings", "area"),
    [
        ({"method": "dino", "local_views": 8}, (0.4, 1)),
        ({"method": "dino"}, (0.14, 1)),
        ({"method": "dino", "crop_min": 0.25}, (0.25, 1)),
        ({"method": "moco_v3", "local_views": 4}, (0.08, 1)),
        ({"method": "barlow_twins", "local_views": 4}, (0.08, 1)),
    ],
)
def test_areas_and_sizes(settings, area):
    views, local_views = policy(size=224, **settings)
    assert [(view.size, view.area) for view in views] == [(224, area)] * 2
    assert [(view.size, view.area) for view in local_views] == [(96, (0.05, 0.25))] * settings.get("local_views", 0)
    assert {view.interpolation for view in local_views} <= {views[0].interpolation}


@pytest.mark.parametrize("local_area", [(0.05, 0.4), (0.05, 0.14)])
def test_areas_of_local_views(local_area):
    views, local_views = recipes(224, (0.4, 1), BICUBIC, local_views=8, local_area=local_area)
    assert [view.area for view in views + local_views] == [(0.4, 1)] * 2 + [local_area] * 8


def test_local_views_are_smaller():
    with pytest.raises(SERError, match=re.escape("local_size=96, local_views=4")) as error:
        policy("dino", 64, local_views=4)
    assert error.value.remedy == "--local-size 27"
    assert policy("dino", 64, local_size=27, local_views=4)


def test_flip_commutes_with_the_photometric_part():
    """MoCo-v3 flips last."""
    (_, second), _ = policy("moco_v3", 32)
    images = torch.stack([Crop(0, 0, 16, 24).cut(np.asarray(picture(i)), 16, BICUBIC) / 255 for i in range(40)])
    drawn = second.photometric.draw(40, torch.Generator().manual_seed(0))
    flipped_last = second.photometric.apply(images, drawn).flip(-1)
    assert torch.equal(flipped_last, second.photometric.apply(images.flip(-1), drawn))
    assert any(not torch.equal(a, b) for a, b in pairwise(flipped_last))


# What evaluations ask for


def test_evaluation_sees_the_middle():
    image = picture(0, (600, 400))
    resized = image.resize((384, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(evaluation_transform(224)(image).permute(1, 2, 0), resized.crop((80, 16, 304, 240)))
    assert evaluation_transform(56)(image).shape == training_crop(56)(image).shape == (3, 56, 56)


def test_normalise_is_its_formula():
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = torch.stack([(images[:, c] / 255 - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(normalise(images), expected)
    torch.testing.assert_close(normalise(images / 255), expected)
    assert normalise(images.double()).dtype == torch.float64
    torch.testing.assert_close(normalise(images[0]), expected[0])
