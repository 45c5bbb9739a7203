"""The views of the examples: each operation as often and as strong as published, with Pillow's arithmetic."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from pictures_on_disk import picture
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

for package in ("accelerate", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

import barlow_twins  # noqa: E402
import dino  # noqa: E402
import moco_v3  # noqa: E402
from data.recipe import (  # noqa: E402
    BICUBIC,
    GaussianBlur,
    evaluation_transform,
    normalise,
    recipes,
    training_crop,
)

from ser_reg import SERError  # noqa: E402

SCRIPTS = {"moco_v3": moco_v3, "dino": dino, "barlow_twins": barlow_twins}


def policy(method, size, **changes):
    """Recipes of the views of a base method, for its paper's settings but for these."""
    script = SCRIPTS[method]
    return script.recipes(script.PRESETS["paper"].but(image_size=size, **changes))


@pytest.fixture
def pillow_calls(monkeypatch):
    """What Pillow was asked to do: {operation: [argument]}."""
    calls = defaultdict(list)

    def record(owner, method, name, argument):
        original = getattr(owner, method)

        def recorded(*args, **kwargs):
            value = argument(*args, **kwargs)
            if value is not None:
                calls[name(*args) if callable(name) else name].append(value)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, recorded)

    record(Image.Image, "filter", "blur", lambda image, kernel: kernel.radius)
    record(ImageOps, "solarize", "solarize", lambda image, threshold: threshold)
    record(ImageEnhance._Enhance, "enhance", lambda kind, factor: type(kind).__name__, lambda kind, factor: factor)
    record(Image.Image, "transpose", "flip", lambda image, method: method)
    record(Image.Image, "convert", "hue", lambda image, mode: mode if mode == "HSV" else None)
    return calls


def within_chance(count, n, p):
    return abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize(("view", "blur", "solarize"), [("first", 1.0, 0.0), ("second", 0.1, 0.2), ("local", 0.5, 0.0)])
def test_operations_are_as_frequent_as_published(view, blur, solarize, pillow_calls):
    (first, second), (local,) = policy("dino", 16, local_size=8, local_views=1)
    recipe = {"first": first, "second": second, "local": local}[view]
    n, image, grey = 1500, picture(0, (20, 20)), 0
    for whole in (False, True):
        pillow_calls.clear()
        grey = 0
        for _ in range(n):
            out = recipe.whole(image) if whole else recipe.crops(image)
            grey += bool((out == out[:1]).all())
        counts = Counter({name: len(values) for name, values in pillow_calls.items()})
        jitters = {counts[name] for name in ("Brightness", "Contrast", "Color", "hue")}
        assert len(jitters) == 1
        expected = {"blur": blur, "solarize": solarize, "Brightness": 0.8, "flip": 0.0 if whole else 0.5}
        for name, p in expected.items():
            assert within_chance(counts[name], n, p), (name, whole)
        assert within_chance(grey, n, 0.2)
        assert set(pillow_calls["solarize"]) <= {128}
        assert set(pillow_calls["flip"]) <= {Image.Transpose.FLIP_LEFT_RIGHT}
        ranges = {"blur": (0.1, 2.0), "Brightness": (0.6, 1.4), "Contrast": (0.6, 1.4), "Color": (0.8, 1.2)}
        for name, (low, high) in ranges.items():
            values, slack = pillow_calls[name], 0.05 * (high - low)
            assert low - 1e-6 <= min(values) < low + slack, name
            assert high - slack < max(values) <= high + 1e-6, name


def test_without_blur_the_rest_stays(pillow_calls):
    (first, second), _ = policy("moco_v3", 16, blur=False)
    for _ in range(50):
        first.crops(picture(0)), second.crops(picture(0))
    assert not pillow_calls["blur"]
    assert pillow_calls["solarize"]
    assert pillow_calls["hue"]


def test_colour_jitter_is_pillows():
    jitter = policy("dino", 16)[0][0].photometric.transforms[0].transforms[0]
    image, hues = picture(1), []
    for seed in range(60):
        torch.manual_seed(seed)
        out = jitter(image)
        torch.manual_seed(seed)
        drawn = jitter.make_params([])
        expected = image
        for step in drawn["fn_idx"].tolist():
            if step < 3:
                name = ("Brightness", "Contrast", "Color")[step]
                factor = drawn[("brightness_factor", "contrast_factor", "saturation_factor")[step]]
                expected = getattr(ImageEnhance, name)(expected).enhance(factor)
            else:
                h, s, v = np.asarray(expected.convert("HSV")).transpose(2, 0, 1)
                h = ((h.astype(int) + int(drawn["hue_factor"] * 255)) % 256).astype(np.uint8)
                expected = Image.fromarray(np.stack([h, s, v], -1), "HSV").convert("RGB")
        assert np.array_equal(out, expected)
        hues.append(drawn["hue_factor"])
    assert -0.1 <= min(hues) < -0.09
    assert 0.09 < max(hues) <= 0.1


def test_blur_is_pillows():
    torch.manual_seed(3)
    out = GaussianBlur((0.1, 2.0))(picture(0))
    torch.manual_seed(3)
    radius = 0.1 + 1.9 * torch.rand(1).item()
    assert np.array_equal(out, picture(0).filter(ImageFilter.GaussianBlur(radius)))


OFFICIAL_AREAS = {"moco_v3": (0.08, 1), "dino": (0.14, 1), "barlow_twins": (0.08, 1)}
OFFICIAL_RESAMPLING = {"moco_v3": "BILINEAR", "dino": "BICUBIC", "barlow_twins": "BICUBIC"}


@pytest.mark.parametrize("method", SCRIPTS)
def test_crops_are_pillows(method):
    image, areas, ratios = picture(2, (80, 80)), [], []  # a square, of which a crop can have any area
    for view in policy(method, 32)[0]:
        for seed in range(300):
            torch.manual_seed(seed)
            box = view.crop.make_params([image])
            areas.append(box["height"] * box["width"] / 80**2)
            ratios.append(box["width"] / box["height"])
            if seed >= 20:
                continue
            flip = torch.rand(1) < 0.5
            corners = box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"]
            expected = image.crop(corners).resize((32, 32), Image.Resampling[OFFICIAL_RESAMPLING[method]])
            expected = view.photometric(ImageOps.mirror(expected) if flip else expected)
            torch.manual_seed(seed)
            out = view.crops(image)
            assert out.dtype == torch.uint8
            assert np.array_equal(out.permute(1, 2, 0), expected)
    low, high = OFFICIAL_AREAS[method]
    assert low - 0.01 < min(areas) < low + 0.05
    assert 0.9 < max(areas) <= high
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) <= 1.4  # 4/3 and rounding to pixels


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
    assert [view.crop.scale for view in views] == [area] * 2
    assert [view.crop.scale for view in local_views] == [(0.05, 0.25)] * settings.get("local_views", 0)
    assert [view.crops(picture(0)).shape for view in views] == [(3, 224, 224)] * 2
    assert {view.whole(picture(0)).shape for view in local_views} <= {(3, 96, 96)}
    assert {view.crop.interpolation for view in local_views} <= {views[0].crop.interpolation}


@pytest.mark.parametrize("local_area", [(0.05, 0.4), (0.05, 0.14)])
def test_areas_of_local_views(local_area):
    views, local_views = recipes(224, (0.4, 1), BICUBIC, local_views=8, local_area=local_area)
    assert [view.crop.scale for view in views + local_views] == [(0.4, 1)] * 2 + [local_area] * 8


@pytest.mark.parametrize("method", SCRIPTS)
def test_whole_images_are_neither_cropped_nor_flipped(method):
    image = Image.new("RGB", (90, 60), (90, 90, 90))
    marks = {(0, 0): (250, 0, 0), (80, 0): (0, 250, 0), (0, 50): (0, 0, 250), (80, 50): (250, 250, 0)}
    for corner, colour in marks.items():
        image.paste(colour, (*corner, corner[0] + 10, corner[1] + 10))
    views, local_views = policy(method, 48, local_size=24, local_views=1)
    for view in views + local_views:
        side = view.crop.size[0]
        resized = image.resize((side, side), Image.Resampling.BICUBIC)
        for (left, top), colour in marks.items():
            place = (side - 2 if left else 1, side - 2 if top else 1)
            assert np.abs(np.subtract(resized.getpixel(place), colour)).max() < 40
        for seed in range(10):
            torch.manual_seed(seed)
            expected = view.photometric(resized)
            torch.manual_seed(seed)
            assert np.array_equal(view.whole(image).permute(1, 2, 0), expected)


def test_flip_commutes_with_the_photometric_part():
    for view in policy("moco_v3", 32)[0]:
        for seed in range(30):
            torch.manual_seed(seed)
            flipped_last = ImageOps.mirror(view.photometric(picture(seed, (31, 20))))
            torch.manual_seed(seed)
            assert np.array_equal(flipped_last, view.photometric(ImageOps.mirror(picture(seed, (31, 20)))))


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


def test_local_views_are_smaller():
    with pytest.raises(SERError, match=re.escape("local_size=96, local_views=4")) as error:
        policy("dino", 64, local_views=4)
    assert error.value.remedy == "--local-size 27"
    assert policy("dino", 64, local_size=27, local_views=4)
