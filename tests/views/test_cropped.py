"""Crops on the device: where they were taken, what pairs share, and that a draw is the same anywhere."""

import contextlib
import math
import pickle
import re

import pytest
import torch
from torchvision import transforms as v1
from torchvision.transforms import v2

from ser_reg import IMAGENET, SERError, relation
from ser_reg.geometry import Affine
from ser_reg.views import CroppedViews, Photometric
from ser_reg.views.cropped import ALIGNED, TRIES, draw_boxes, share_in_pairs

WHOLE = {"area": (1, 1), "ratio": (1, 1), "flip": 0}
STRONG = Photometric(jitter=0.7, grey=0.3, blur=0.5, solarize=0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(n, height, width):
    """(n, 3, height, width): row and column of each place in parts of the image, and zeros."""
    rows, columns = ((torch.arange(side).double() + 0.5) / side for side in (height, width))
    grid = torch.stack([*torch.meshgrid(rows, columns, indexing="ij"), torch.zeros(height, width)])
    return grid.expand(n, 3, height, width)


def literal_boxes(n, size, area, ratio, generator):
    """Try by try, as torchvision draws them, from the same numbers."""
    height, width = size
    share, aspect = torch.rand(2, n, TRIES, generator=generator, dtype=torch.float64).tolist()
    down, right = torch.rand(2, n, generator=generator, dtype=torch.float64).tolist()
    boxes = []
    for i in range(n):
        box = None
        for k in range(TRIES):
            pixels = height * width * (area[0] + (area[1] - area[0]) * share[i][k])
            factor = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect[i][k])
            w, h = round(math.sqrt(pixels * factor)), round(math.sqrt(pixels / factor))
            if 0 < w <= width and 0 < h <= height:
                box = int(down[i] * (height - h + 1)), int(right[i] * (width - w + 1)), h, w
                break
        if box is None:
            w, h = width, height
            if width / height < min(ratio):
                h = round(w / min(ratio))
            elif width / height > max(ratio):
                w = round(h * max(ratio))
            box = (height - h) // 2, (width - w) // 2, h, w
        boxes.append(box)
    return torch.tensor(boxes).double()


@pytest.mark.parametrize("size", [(48, 64), (64, 20), (9, 200), (1, 1)])
@pytest.mark.parametrize("ends", [((0.08, 1), (3 / 4, 4 / 3)), ((0.9, 1), (0.5, 0.6)), ((0.05, 0.14), (1, 1))])
def test_boxes_are_those_of_the_loop(size, ends):
    boxes = draw_boxes(300, size, *ends, seeded()) * torch.tensor([*size, *size])
    torch.testing.assert_close(boxes, literal_boxes(300, size, *ends, seeded()), rtol=0, atol=1e-9)
    assert (boxes[:, :2] > -1e-9).all()
    assert (boxes[:, :2] + boxes[:, 2:] < torch.tensor(size).double() + 1e-9).all()


@pytest.mark.parametrize("size", [(48, 64), (30, 90)])
def test_boxes_follow_the_law_of_torchvision(size):
    image = torch.zeros(1, *size)
    theirs = [v1.RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = torch.tensor(theirs).double()
    ours = draw_boxes(4000, size, generator=seeded()) * torch.tensor([*size, *size])
    for level in range(max(size)):  # Kolmogorov and Smirnov: of 4,000 draws each, 0.05 happens once in 10,000 times
        assert ((ours <= level).double().mean(0) - (theirs <= level).double().mean(0)).abs().max() < 0.05


def test_views_are_what_torchvision_crops():
    images = torch.rand(6, 3, 40, 50)
    views = CroppedViews(size=24)(images, seeded())
    flips = 0
    for view in views:
        boxes = (view.relation.box * torch.tensor([40, 50, 40, 50])).round().long().tolist()
        for image, shown, box, flip in zip(images, view.images, boxes, view.relation.flip, strict=True):
            expected = v2.functional.resized_crop(image, *box, [24, 24], v2.InterpolationMode.BICUBIC, antialias=True)
            expected = expected.flip(-1) if flip else expected
            torch.testing.assert_close(shown, expected.clamp(0, 1), rtol=0, atol=1e-5)
            flips += int(flip)
        assert not view.relation.turns.any()
        assert view.drawn == {}
    assert 0 < flips < 12


@pytest.mark.parametrize("turned", [False, True, "all"])
def test_each_place_of_a_view_is_where_the_relation_says(turned):
    images = coordinates(20, 60, 80)
    for view in CroppedViews(size=20, turned=turned, area=(0.2, 1))(images, seeded()):
        expected, valid = view.relation.warp(images.repeat(len(view.relation) // 20, 1, 1, 1), (20, 20))
        assert valid.all()
        inner = slice(2, -2)  # a low-pass bends a ramp at its ends
        torch.testing.assert_close(view.images[..., inner, inner], expected[..., inner, inner], rtol=0, atol=2e-3)
        assert len(set(view.relation.turns.tolist())) == (4 if turned else 1)  # of 20 images


def test_the_relation_of_two_crops_moves_one_onto_the_other():
    images, compared = coordinates(16, 90, 120), 0
    view1, view2 = CroppedViews(size=32, area=(0.3, 1), turned=True)(images, seeded())
    moved, valid = relation(view1, view2).warp(view1.images)
    inner = -torch.nn.functional.max_pool2d(-valid.double(), 7, 1, 3) > 0  # away from what either has not seen
    inner[:, [0, 1, 2, -3, -2, -1]] = inner[:, :, [0, 1, 2, -3, -2, -1]] = False
    error = (moved - view2.images).abs().amax(1)[inner]
    compared += inner.sum()
    assert compared > 3000
    assert error.max() < 0.5 / 32
    assert error.mean() < 0.05 / 32


def test_the_original_is_the_middle_of_the_image():
    images = torch.rand(4, 3, 64, 80)
    make_views = CroppedViews(size=28, photometric=STRONG, original=True)
    views = make_views(images, seeded())
    assert len(views) == 3
    original = views[0]
    side = 64 * 224 / 256
    expected = torch.tensor([(64 - side) / 2 / 64, (80 - side) / 2 / 80, side / 64, side / 80]).double()
    torch.testing.assert_close(original.relation.box, expected.expand(4, 4))
    cut = images[:, :, 4:60, 12:68]
    shown = v2.functional.resize(cut, [28, 28], v2.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    torch.testing.assert_close(original.images, shown, rtol=0, atol=1e-5)
    for name, value in original.drawn.items():
        assert value.shape == views[1].drawn[name].shape
        assert torch.equal(value, Photometric(jitter=0, grey=0, blur=0, solarize=0).draw(4)[name])
    without = CroppedViews(size=28, original=True)(images, seeded())
    assert [view.drawn for view in without] == [{}] * 3


def test_all_turns_of_one_crop():
    images = torch.rand(3, 3, 40, 40)
    make_views = CroppedViews(size=16, views=1, turned="all", photometric=STRONG)
    plan = make_views.draw(3, (40, 40), seeded())
    (view,) = make_views.render(images, plan)
    assert view.relation.turns.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3  # turn by turn
    upright = CroppedViews(size=16, views=1, photometric=STRONG).render(images, plan)[0]
    for turn in range(4):
        part = view[3 * turn : 3 * turn + 3]
        assert torch.equal(part.images, torch.rot90(upright.images, turn, (-2, -1)))
        torch.testing.assert_close(part.relation.box, upright.relation.box)
        assert torch.equal(part.drawn["hue"], upright.drawn["hue"])


def test_photometric_comes_after_the_crop_and_is_recorded():
    images = torch.rand(6, 3, 40, 40)
    plan = CroppedViews(size=16, photometric=STRONG).draw(6, (40, 40), seeded())
    plain = CroppedViews(size=16).render(images, plan)
    coloured = CroppedViews(size=16, photometric=STRONG).render(images, plan)
    for one, other, drawn in zip(plain, coloured, plan.drawn, strict=True):
        assert torch.equal(other.images, STRONG.apply(one.images, drawn))
        assert other.drawn.keys() == STRONG.draw(1).keys()
    assert not torch.equal(plan.drawn[0]["hue"], plan.drawn[1]["hue"])
    first, second = CroppedViews(photometric=(Photometric(blur=1), Photometric(blur=0))).draw(50, (40, 40)).drawn
    assert first["blur"].all()
    assert not second["blur"].any()
    _, second = CroppedViews(photometric=(STRONG, None)).draw(50, (40, 40)).drawn
    assert not second["jitter"].any()


def test_pairs_share_what_is_aligned_and_nothing_else():
    make_views = CroppedViews(size=16, photometric=STRONG, paired=True, turned=True)
    plan = make_views.draw(400, (64, 80), seeded())
    for relations, drawn in zip(plan.relations, plan.drawn, strict=True):
        torch.testing.assert_close(relations.box[::2], relations.box[1::2])
        assert torch.equal(relations.turns[::2], relations.turns[1::2])
        assert set(ALIGNED) == {"jitter", "order", "brightness", "contrast", "saturation", "hue", "grey"}
        own = {**{name: drawn[name] for name in drawn if name not in ALIGNED}, "flip": relations.flip}
        assert own.keys() == {"flip", "blur", "sigma", "solarize"}
        for name in ALIGNED:
            assert torch.equal(drawn[name][::2], drawn[name][1::2])
            assert len(drawn[name].unique(dim=0)) > 1
        for name, values in own.items():
            pairs = torch.stack([values[::2], values[1::2]]).double()
            assert abs(torch.corrcoef(pairs)[0, 1]) < 0.25, f"{name} is not each image's own"
        different = relations.box[::2].roll(1, 0) != relations.box[::2]
        assert different.any(1).double().mean() > 0.95
    for draw in (lambda: make_views.draw(3, (8, 8)), lambda: share_in_pairs(STRONG.draw(3))):
        with pytest.raises(SERError, match="an even number"):
            draw()


def test_values_stay_in_their_range():
    checks = (torch.rand(8, 3, 40, 40) > 0.5).double()  # hard edges, which bicubic weights overshoot
    for view in CroppedViews(size=32, photometric=Photometric(jitter=0))(checks, seeded()):
        assert view.images.min() == 0
        assert view.images.max() == 1
    wide = torch.cat([checks[:4], 4 * checks[4:] - 2])  # normalised images keep the range that each has
    for view in CroppedViews(size=32)(wide, seeded()):
        assert view.images[:4].min() == 0
        assert view.images[:4].max() == 1
        assert view.images[4:].min() == -2
        assert view.images[4:].max() == 2


def test_normalised_last():
    images = torch.rand(4, 3, 40, 40)
    plan = CroppedViews(size=16, photometric=STRONG).draw(4, (40, 40), seeded())
    plain = CroppedViews(size=16, photometric=STRONG, original=False).render(images, plan)
    normal = CroppedViews(size=16, photometric=STRONG, normalize=IMAGENET).render(images, plan)
    expected = v2.functional.normalize(plain[0].images, *IMAGENET)
    torch.testing.assert_close(normal[0].images, expected)


@pytest.mark.parametrize(
    "settings", [{}, {"original": True}, {"turned": True}, {"views": 1, "turned": "all"}, {"paired": True}], ids=str
)
def test_a_draw_is_the_same_in_any_split(settings):
    images = torch.rand(6, 3, 40, 50)
    make_views = CroppedViews(size=16, photometric=STRONG, normalize=IMAGENET, **settings)
    plan = make_views.draw(6, (40, 50), seeded(5))
    state = torch.get_rng_state()
    whole = make_views(images, seeded(5))
    assert torch.equal(state, torch.get_rng_state()), "a generator was given, and the global state has changed"
    for index in (2, slice(1, 4), [5, 0], torch.tensor([3])):
        at = [index] if isinstance(index, int) else index
        part = make_views.render(images[at], plan[index])
        for some, all_ in zip(part, whole, strict=True):
            rows = torch.arange(len(all_.images)).view(-1, 6)[:, at].flatten()
            torch.testing.assert_close(some.images, all_.images[rows], rtol=0, atol=1e-5)
            assert some.relation == all_.relation[rows]
            assert all(torch.equal(some.drawn[name], all_.drawn[name][rows]) for name in all_.drawn)
    again = pickle.loads(pickle.dumps(make_views)).render(images, pickle.loads(pickle.dumps(plan)))
    assert all(torch.equal(one.images, other.images) for one, other in zip(again, whole, strict=True))
    other = make_views(images, seeded(6))
    assert not torch.equal(other[-1].images, whole[-1].images)


@pytest.mark.parametrize("settings", [{"original": True}, {"turned": True}, {"turned": "all"}], ids=str)
def test_nothing_waits_for_the_device(settings, monkeypatch):
    """The meta device has no values: whoever reads one raises."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # which it does not know
    make_views = CroppedViews(size=16, photometric=STRONG, normalize=IMAGENET, **settings)
    for view in make_views(torch.rand(4, 3, 40, 50, device="meta")):
        assert view.images.device.type == "meta"
        assert view.relation.matrix.device.type == "cpu"
        assert {values.device.type for values in view.drawn.values()} == {"cpu"}


def test_without_a_generator_the_global_one_draws():
    images = torch.rand(2, 3, 20, 20)
    torch.manual_seed(1)
    first = CroppedViews(size=8, photometric=STRONG)(images)
    torch.manual_seed(1)
    again = CroppedViews(size=8, photometric=STRONG)(images)
    assert torch.equal(first[1].images, again[1].images)


def test_no_images():
    views = CroppedViews(size=8, photometric=STRONG, original=True, normalize=IMAGENET)(torch.rand(0, 3, 20, 20))
    assert [view.images.shape for view in views] == [(0, 3, 8, 8)] * 3
    assert [len(view.relation) for view in views] == [0] * 3
    (view,) = CroppedViews(size=8, views=1, turned="all")(torch.rand(0, 3, 20, 20))
    assert view.images.shape == (0, 3, 8, 8)


def test_whole_images_are_left_as_they_are():
    images = torch.rand(3, 3, 24, 24, dtype=torch.float64)
    for view in CroppedViews(size=24, **WHOLE)(images):
        torch.testing.assert_close(view.images, images)
        assert view.relation.allclose(Affine.identity(3))
    assert repr(CroppedViews(8)) == (
        f"CroppedViews(size=8, area=(0.08, 1), ratio=(0.75, {4 / 3}), flip=0.5, views=2, photometric=None, "
        "original=False, turned=False, paired=False, normalize=None)"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": (8, 8)}, "remedy:   CroppedViews(size=224)"),
        ({"area": (0.5, 2)}, "shares of the image"),
        ({"area": (0, 1)}, "area=(0, 1)"),
        ({"ratio": (2, 1)}, "ratio=(2, 1)"),
        ({"flip": 2}, "a probability"),
        ({"views": 0}, "at least one view"),
        ({"turned": "most"}, "True, False or 'all'"),
        ({"turned": "all", "original": True}, "an original beside turned='all'"),
        ({"photometric": v2.ColorJitter(0.4)}, "a photometric part of ColorJitter"),
        ({"photometric": (STRONG,)}, "1 photometric parts for 2 views"),
        ({"flip": "often"}, "flip='often'"),
        ({"paired": "yes"}, "CroppedViews(paired=True)"),
        ({"original": 1}, "CroppedViews(original=True)"),
        ({"normalize": (0.5, 0.5)}, "normalize=IMAGENET"),
        ({"normalize": ([0.5] * 3, [0.0] * 3)}, "a number for each channel"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(SERError, match=re.escape(words)):
        CroppedViews(**settings)


def test_images_that_cannot_be():
    make_views = CroppedViews(size=8, photometric=STRONG)
    for images, words in (
        (torch.rand(3, 8, 8), "make_views(images[None])"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "make_views(images.float() / 255)"),
        (torch.rand(2, 3, 8, 8) * 255, "make_views(images / 255)"),
        ([1], "a list of int"),
        (torch.rand(2, 1, 8, 8), "make_views(images.expand(-1, 3, -1, -1))"),
        (torch.rand(2, 3, 8, 8) * 1.5, "make_views(images.clamp(0, 1))"),
        (torch.rand(2, 3, 8, 8) * 4 - 2, "make_views(images * std + mean)"),
        (torch.full((2, 3, 8, 8), float("nan")), "torch.isfinite(images).all()"),
        (torch.rand(2, 3, 0, 8), "images with channels and pixels"),
    ):
        with pytest.raises(SERError, match=re.escape(words)) as caught:
            make_views(images)
        assert caught.value.call == "CroppedViews(...)(images)"
    with pytest.raises(SERError, match="the 3 channels of normalize="):
        CroppedViews(size=8, normalize=IMAGENET)(torch.rand(2, 1, 8, 8))  # and not three channels of one
    plan = make_views.draw(3, (8, 8))
    with pytest.raises(SERError, match="the 3 images of the plan"):
        make_views.render(torch.rand(2, 3, 8, 8), plan)
    with pytest.raises(SERError, match="a plan of 2 views"):
        CroppedViews(size=8, original=True).render(torch.rand(3, 3, 8, 8), plan)
    for n, size in ((-1, (8, 8)), (2.0, (8, 8)), (2, 8), (torch.rand(2, 3, 8, 8), (8, 8))):
        with pytest.raises(SERError, match="a number of images"):
            make_views.draw(n, size)
    with pytest.raises(SERError, match="a NoneType"):
        make_views.render(torch.rand(2, 3, 8, 8), None)


def test_a_generator_elsewhere_is_refused():
    class Elsewhere:
        device = torch.device("cuda")

    for draw in (lambda g: CroppedViews(8).draw(2, (8, 8), g), lambda g: draw_boxes(2, (8, 8), generator=g)):
        with pytest.raises(SERError, match="a generator on cuda"):
            draw(Elsewhere())
