"""Images on the way between two views: where they lie, what they show, and that nothing tells the angle."""

import contextlib
import pickle
import re

import pytest
import torch
from torch.nn import functional as F

from ser_reg import IMAGENET, SERError, relation
from ser_reg.geometry import Affine
from ser_reg.views import CroppedViews, PathViews, Photometric
from ser_reg.views.path import FAMILIES, GEOMETRIC

ALL = pytest.mark.parametrize("family", FAMILIES)
GEOMETRY = pytest.mark.parametrize("family", GEOMETRIC)
GENTLE = Photometric(0.2, 0.2, 0.1, 0.05, blur=0.2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(n, height, width):
    """Images of a few waves in [0, 1]."""
    noise = torch.rand(n, 3, 6, 6, generator=seeded(), dtype=torch.float64)
    return F.interpolate(noise, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


@ALL
@pytest.mark.parametrize(("targets", "final"), [(1, False), (2, False), (2, True), (3, True)])
def test_how_many_and_how_far(family, targets, final):
    make_views = PathViews(family, targets, size=16, final=final, photometric=GENTLE)
    views = make_views(smooth(5, 24, 32), seeded())
    assert len(views) == 2 + targets + final
    theta = views[1].drawn["theta"]
    assert theta.shape == (5, len(FAMILIES[family]))
    assert not views[0].drawn["theta"].any()
    for k, view in enumerate(views[2:], 1):
        torch.testing.assert_close(view.drawn["theta"], k * theta / (targets + 1))
        assert torch.equal(view.drawn["hue"], views[1].drawn["hue"])
        assert view.images.shape == (5, 3, 16, 16)
    if final:
        assert torch.equal(views[-1].images, views[1].images)
        assert views[-1].relation == views[1].relation


@ALL
def test_theta_is_uniform_in_its_range(family):
    theta = PathViews(family).draw_theta(4000, seeded()).double()
    low, high = torch.tensor(FAMILIES[family]).double().T
    assert (theta >= low).all()
    assert (theta <= high).all()
    levels = torch.linspace(0.1, 0.9, 9).double()
    for column, start, end in zip(theta.T, low, high, strict=True):
        shares = (column < (start + levels * (end - start))[:, None]).double().mean(1)
        assert (shares - levels).abs().max() < 0.04
    if len(low) > 1:
        assert (torch.corrcoef(theta.T) - torch.eye(len(low))).abs().max() < 0.06


@GEOMETRY
def test_each_place_is_where_the_relation_says(family):
    """A view is the whole image, moved by its relation: its crop, then the part of the path that it has gone."""
    images, make_views = smooth(6, 90, 120), PathViews(family, size=40, area=(0.3, 1))
    plan = make_views.draw(6, (90, 120), seeded())
    u = plan.crops.relations[1]
    v1, *others = make_views.render(images, plan)
    for view in (v1, *others):
        expected, seen = view.relation.warp(images, (40, 40))
        if view is not v1:
            seen &= (view.relation @ ~u).valid((40, 40))  # elsewhere is the reflection of u
        inner = -F.max_pool2d(-seen[:, None].double(), 7, 1, 3) > 0
        assert inner.double().mean() > 0.4
        assert ((view.images - expected).abs() * inner).max() < 0.03


@GEOMETRY
def test_the_relation_of_v1_and_a_target(family):
    images = smooth(8, 90, 120)
    v1, *others = PathViews(family, size=40, area=(0.6, 1))(images, seeded())
    for view in others:
        moved, valid = relation(v1, view).warp(v1.images)
        inner = -F.max_pool2d(-valid[:, None].double(), 9, 1, 4) > 0
        inner[..., :10], inner[..., -10:], inner[..., :10, :], inner[..., -10:, :] = (False,) * 4  # reflected
        assert inner.double().mean() > 0.1
        assert ((moved - view.images).abs() * inner).max() < 0.06


def test_elements():
    theta = torch.tensor([[30.0, 0.1, -0.2], [-20.0, 0.0, 0.05]])
    turned, moved = PathViews("rotation"), PathViews("translation")
    assert turned.element(theta[:, :1]).allclose(Affine.rotation(theta[:, 0].double()))
    assert moved.element(theta[:, 1:]).allclose(Affine.translation(*theta[:, 1:].double().T))
    both = moved.element(theta[:, 1:]) @ turned.element(theta[:, :1])  # turned about the middle first, then shifted
    assert PathViews("se2").element(theta).allclose(both)
    assert turned.element(theta[:, :1], (20, 40)).allclose(Affine.rotation(theta[:, 0].double(), (20, 40)))
    assert PathViews("blur").element(theta[:, :1]) == Affine.identity(2)
    dot = torch.zeros(2, 3, 41, 41)
    dot[..., 20, 20] = 1
    shifted, _ = moved.render_path(dot, torch.tensor([[0.1, 0.0], [0.0, -4 / 41]]))
    assert shifted[1, 0].argmax() == 20 * 41 + 16
    assert shifted[0, 0].argmax() == 24 * 41 + 20  # rows are counted downwards
    corner = torch.zeros(1, 3, 41, 41)
    corner[..., 20, 39:41] = 1  # in the middle of the right edge
    up, _ = turned.render_path(corner, torch.tensor([[45.0]]))
    assert up[0, 0, :20, 20:].sum() > 0.9 * up[0, 0].sum()  # counter-clockwise


@ALL
def test_without_theta_all_are_u(family):
    u = (smooth(3, 20, 20) * 255).round() / 255
    v2, targets = PathViews(family).render_path(u, torch.zeros(3, len(FAMILIES[family])))
    for image in (v2, *targets):
        torch.testing.assert_close(image, u, rtol=0, atol=1e-6)


@ALL
def test_the_path_leads_away_from_u_step_by_step(family):
    make_views = PathViews(family, targets=3)
    u = smooth(12, 40, 40)
    high = torch.tensor(FAMILIES[family])[:, 1]
    v2, targets = make_views.render_path(u, high * torch.tensor([1.0, -1.0] * 6)[:, None] ** (family != "blur"))
    distance = torch.stack([(image - u).square().mean((1, 2, 3)) for image in (*targets, v2)])
    assert (distance[0] > 0).all()
    assert (distance.diff(dim=0) > 0).double().mean() > 0.9
    assert (distance.mean(1).diff() > 0).all()


def test_colours_are_those_of_the_photometric_arithmetic():
    u = smooth(4, 20, 20)
    make_views = PathViews("colour", targets=1)
    theta = make_views.draw_theta(4, seeded())
    v2, (half,) = make_views.render_path(u, theta)
    for image, part in ((v2, 1.0), (half, 0.5)):
        drawn = Photometric(jitter=0, grey=0, blur=0).draw(4)
        drawn["jitter"] = torch.ones(4, dtype=torch.bool)
        drawn["brightness"], drawn["contrast"], drawn["saturation"] = 1 + part * theta[:, :3].T
        drawn["hue"] = part * theta[:, 3]
        assert drawn["order"].tolist() == [[0, 1, 2, 3]] * 4
        torch.testing.assert_close(image, Photometric().apply(u, drawn), rtol=0, atol=1e-6)


def test_blur_starts_at_none():
    u = torch.rand(4, 3, 24, 24)
    v2, targets = PathViews("blur").render_path(u, torch.full((4, 1), 2.0))
    for image, sigma in zip((*targets, v2), (2 / 3, 4 / 3, 2.0), strict=True):
        drawn = Photometric(jitter=0, grey=0, blur=1, sigma=(sigma, sigma)).draw(4)
        torch.testing.assert_close(image, Photometric().apply(u, drawn), rtol=0, atol=1e-6)


@GEOMETRY
def test_nothing_at_the_border_tells_how_far(family):
    bright = 0.5 + 0.5 * smooth(8, 48, 48)
    ends = torch.tensor([[end for _, end in FAMILIES[family]]] * 8)
    for fill, zeros in (("reflect", False), ("edge", False), ("zeros", True)):
        v2, targets = PathViews(family, fill=fill).render_path(bright, ends)
        assert all(bool((image < 0.3).any()) == zeros for image in (v2, *targets))


@GEOMETRY
def test_values_stay_in_their_range(family):
    checks = (torch.rand(8, 3, 40, 40) > 0.5).double()
    for view in PathViews(family, size=32, final=True)(checks, seeded()):
        assert view.images.min() >= 0
        assert view.images.max() <= 1


@ALL
def test_targets_are_never_normalised(family):
    images = smooth(4, 40, 40)
    plain = PathViews(family, size=16, photometric=GENTLE, final=True)
    normal = PathViews(family, size=16, photometric=GENTLE, final=True, normalize=IMAGENET)
    for i, (one, other) in enumerate(zip(plain(images, seeded()), normal(images, seeded()), strict=True)):
        if i < 2:
            mean, std = (torch.tensor(values).double()[:, None, None] for values in IMAGENET)
            torch.testing.assert_close(other.images, (one.images - mean) / std)
        else:
            assert torch.equal(other.images, one.images)


def test_v1_and_u_are_crops_with_colours_of_their_own():
    images = smooth(4, 40, 40)
    make_views = PathViews("rotation", size=16, photometric=(GENTLE, Photometric(grey=1)))
    plan = make_views.draw(4, (40, 40), seeded())
    v1, v2, *targets = make_views.render(images, plan)
    first, u = CroppedViews(size=16, photometric=(GENTLE, Photometric(grey=1))).render(images, plan.crops)
    assert torch.equal(v1.images, first.images)
    assert v1.relation == first.relation
    end, steps = make_views.render_path(u.images, plan.theta)
    assert torch.equal(v2.images, end)
    assert all(torch.equal(view.images, step) for view, step in zip(targets, steps, strict=True))
    assert (relation(u, v2).matrix - make_views.element(plan.theta).matrix).abs().max() < 1e-9
    assert v2.drawn["grey"].all()


@ALL
def test_a_draw_is_the_same_in_any_split(family):
    images = smooth(6, 40, 50)
    make_views = PathViews(family, size=16, photometric=GENTLE, normalize=IMAGENET)
    plan = make_views.draw(6, (40, 50), seeded(5))
    state = torch.get_rng_state()
    whole = make_views(images, seeded(5))
    assert torch.equal(state, torch.get_rng_state()), "a generator was given, and the global state has changed"
    for index in (2, slice(1, 4), [5, 0], torch.tensor([3])):
        at = [index] if isinstance(index, int) else index
        for some, all_ in zip(make_views.render(images[at], plan[index]), whole, strict=True):
            torch.testing.assert_close(some.images, all_.images[at], rtol=0, atol=1e-5)
            assert some.relation.allclose(all_.relation[at])
            assert all(torch.equal(some.drawn[name], all_.drawn[name][at]) for name in all_.drawn)
    again = pickle.loads(pickle.dumps(make_views)).render(images, pickle.loads(pickle.dumps(plan)))
    assert all(torch.equal(one.images, other.images) for one, other in zip(again, whole, strict=True))


@ALL
def test_nothing_waits_for_the_device(family, monkeypatch):
    """The meta device has no values: whoever reads one raises."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # which it does not know
    for view in PathViews(family, size=16, normalize=IMAGENET)(torch.rand(4, 3, 40, 50, device="meta"), seeded()):
        assert view.images.device.type == "meta"
        assert view.relation.matrix.device.type == "cpu"
        assert view.drawn["theta"].device.type == "cpu"


def test_no_images():
    views = PathViews("se2", size=8, photometric=GENTLE)(torch.rand(0, 3, 20, 20))
    assert [view.images.shape for view in views] == [(0, 3, 8, 8)] * 4
    assert repr(PathViews("blur", 1, 8)) == (
        f"PathViews(family='blur', targets=1, size=8, area=(0.08, 1), ratio=(0.75, {4 / 3}), flip=0.5, "
        "photometric=None, fill='reflect', final=False, normalize=None)"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"family": "shear"}, "one of rotation, translation, se2, colour, blur"),
        ({"targets": 0}, "at least one image on the path"),
        ({"fill": "grey"}, "one of reflect, edge, zeros"),
        ({"final": 1}, "True or False"),
        ({"size": 0}, "a whole number of pixels"),
        ({"family": ["rotation"]}, "one of rotation, translation, se2, colour, blur"),
        ({"normalize": 0.5}, "normalize=IMAGENET"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(SERError, match=re.escape(words)):
        PathViews(**settings)


def test_images_and_paths_that_cannot_be():
    make_views = PathViews("se2", size=8)
    with pytest.raises(SERError, match=re.escape("make_views(images / 255)")):
        make_views(torch.rand(2, 3, 8, 8) * 255)
    with pytest.raises(SERError, match="the 3 images of the plan"):
        make_views.render(torch.rand(2, 3, 8, 8), make_views.draw(3, (8, 8)))
    with pytest.raises(SERError, match=re.escape("theta (2, 1) for u (2, 3, 8, 8)")):
        make_views.render_path(torch.rand(2, 3, 8, 8), torch.zeros(2, 1))

    with pytest.raises(SERError, match=re.escape("make_views(images.expand(-1, 3, -1, -1))")):
        PathViews("colour", size=8)(torch.rand(2, 1, 8, 8))
    with pytest.raises(SERError, match="a CroppedPlan"):
        make_views.render(torch.rand(2, 3, 8, 8), CroppedViews(size=8).draw(2, (8, 8)))

    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(SERError, match="a generator on cuda"):
        make_views.draw(2, (8, 8), Elsewhere())
    with pytest.raises(SERError, match="a int for a generator"):
        make_views.draw_theta(2, 7)
