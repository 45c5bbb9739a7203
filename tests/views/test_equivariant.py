"""The policy T_eq: what is shared within a view, what is drawn for each sample, and that it all fits together."""

import random
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

from ser_reg import IMAGENET, EquivariantViews, GroupElement, SERError, act, relation
from ser_reg.views import Photometric

PATCH = 4
GPU = SimpleNamespace(device=torch.device("cuda"))  # stands for a generator there


def patch_means(images):
    """A network that is truly equivariant: the mean of each patch."""
    return F.avg_pool2d(images, PATCH)


def smooth(n, side):
    """Images of a few random waves, the same ones at every resolution."""
    draw = torch.Generator().manual_seed(0)
    frequency, phase, amplitude = (torch.randn(n, 4, 3, dtype=torch.float64, generator=draw) for _ in range(3))
    axis = (torch.arange(side).double() + 0.5) / side
    angle = 3 * (frequency[..., 0, None, None] * axis[:, None] + frequency[..., 1, None, None] * axis)
    waves = torch.sin(angle + phase[..., :1, None]) * amplitude[..., :1, None]
    return waves.sum(1, keepdim=True)


def test_equivariant_network_has_no_error_for_any_dihedral_relation():
    make_views = EquivariantViews(PATCH, scale=(1, 1), ratio=(1, 1))
    seen = torch.zeros(8, dtype=torch.long)
    for seed in range(600):  # calls, since the samples of a call share the parity of their turns
        images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
        view1, view2 = make_views(images, torch.Generator().manual_seed(seed))
        g = relation(view1, view2)
        moved, target = act(g, patch_means(view1.images)), patch_means(view2.images)
        torch.testing.assert_close(moved, target, rtol=0, atol=1e-14)
        seen += torch.bincount(g.turns + 4 * g.flip, minlength=8)
    assert seen.min() > 0.8 * seen.sum() / 8, f"relations are not equally frequent: {seen.tolist()}"
    assert seen.max() < 1.2 * seen.sum() / 8


def test_equivariant_network_error_under_scaling_falls_with_resolution():
    def error(side):
        make_views = EquivariantViews(PATCH)
        mean = 0.0
        for seed in range(10):
            view1, view2 = make_views(smooth(4, side), torch.Generator().manual_seed(seed))
            moved, target = act(relation(view1, view2), patch_means(view1.images)), patch_means(view2.images)
            mean += (moved - target)[..., 2:-2, 2:-2].abs().mean().item() / target.std().item() / 10
        return mean

    errors = [error(side) for side in (32, 64, 128)]
    assert errors[0] < 0.05
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_a_wrong_relation_shows():
    make_views = EquivariantViews(PATCH, scale=(1, 1), ratio=(1, 1))
    view1, view2 = make_views(torch.randn(64, 3, 24, 24))
    g = relation(view1, view2)
    turned = [i for i in range(64) if g.turns[i] % 2 == 1 and not g.flip[i]]
    errors = [(act((~g)[i], patch_means(view1[i].images)) - patch_means(view2[i].images)).abs().max() for i in turned]
    assert all(e > 0.01 for e in errors)


def test_shared_within_a_view_and_independent_between_views():
    make_views = EquivariantViews(PATCH)
    flips, halves, grids, parities = [], [], [], []
    for seed in range(200):
        views = make_views(torch.zeros(8, 1, 24, 24), torch.Generator().manual_seed(seed))
        for x, g, _ in views:
            assert len(set((g.turns % 2).tolist())) == 1
            assert torch.equal(g.scale, g.scale[:1].expand(8, 2))
            assert g.output_size((24, 24)) == tuple(x.shape[-2:])
            assert all(side % PATCH == 0 for side in x.shape[-2:])
        flips.append(torch.stack([view.relation.flip for view in views]))
        halves.append(torch.stack([view.relation.turns // 2 for view in views]))
        grids.append(torch.stack([view.relation.scale[0] for view in views]))
        parities.append(torch.stack([view.relation.turns[0] % 2 for view in views]))
    for draws in (torch.cat(flips, 1), torch.cat(halves, 1), torch.stack(parities, 1)):
        table = torch.bincount((2 * draws[0] + draws[1]).long(), minlength=4) / draws.shape[1]
        assert (table - 0.25).abs().max() < 0.08, f"not independent and uniform: {table}"
    grids = torch.stack(grids, 1)[..., 0]
    assert abs(torch.corrcoef(grids)[0, 1]) < 0.15
    assert all(torch.stack(flips).float().mean(0).ne(0).all(1))


@pytest.mark.parametrize("size", [(24, 24), (20, 32), (23, 29), (30, 17)])
def test_any_size_lands_on_the_patch_grid(size):
    make_views = EquivariantViews(PATCH)
    for seed in range(10):
        view1, view2 = make_views(torch.rand(3, 3, *size), torch.Generator().manual_seed(seed))
        assert all(side % PATCH == 0 for view in (view1, view2) for side in view.images.shape[-2:])
        moved = act(relation(view1, view2), patch_means(view1.images))
        assert moved.shape == patch_means(view2.images).shape


def test_switches():
    images = torch.rand(32, 3, 24, 24)
    view1, view2 = EquivariantViews(PATCH, rotations=False, flips=False)(images)
    assert not view1.relation.turns.any()
    assert not view2.relation.flip.any()
    view1, view2 = EquivariantViews(PATCH, scale=(1, 1), ratio=(1, 1), rotations=False, flips=False)(images)
    assert torch.equal(view1.images, images)
    assert relation(view1, view2) == GroupElement.identity(32)
    assert repr(EquivariantViews()) == (
        f"EquivariantViews(patch_size=16, scale=(0.7, 1.3), ratio=(0.75, {4 / 3}), rotations=True, flips=True, "
        "photometric=None, normalize=None)"
    )


def test_generator_owns_the_randomness_even_of_the_photometric_part():
    def jitter(images):
        return images * torch.rand(len(images), 1, 1, 1)

    make_views = EquivariantViews(PATCH, photometric=jitter)
    images = torch.rand(4, 3, 24, 24)
    before = torch.get_rng_state()
    first, second = (make_views(images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
    torch.manual_seed(7)
    third = make_views(images)
    torch.manual_seed(7)
    assert torch.equal(make_views(images)[0].images, third[0].images)


@pytest.mark.filterwarnings("ignore:The photometric part draws once")
def test_photometric_part_is_independent_per_view_and_before_the_geometry():
    seen = []

    def record(images):
        seen.append(images.clone())
        return images.add_(len(seen))  # in place, as some do

    images = torch.zeros(2, 3, 24, 24)
    make_views = EquivariantViews(PATCH, photometric=record)
    make_views(images)
    seen.clear()  # the first call looked at what the part does
    view1, view2 = make_views(images)
    assert len(seen) == 2
    assert all(torch.equal(x, torch.zeros_like(x)) for x in [*seen, images])
    torch.testing.assert_close(view1.images, torch.ones_like(view1.images))
    torch.testing.assert_close(view2.images, 2 * torch.ones_like(view2.images))


def test_no_image_still_has_a_grid():
    view, _ = EquivariantViews(PATCH, normalize=IMAGENET)(torch.zeros(0, 3, 24, 24))
    assert len(view.relation) == len(view.images) == 0
    assert all(side % PATCH == 0 for side in view.images.shape[-2:])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: EquivariantViews(16)(torch.rand(3, 32, 32)), "make_views(images[None])"),
        (lambda: EquivariantViews(16)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), "images.float() / 255"),
        (lambda: EquivariantViews(16)(torch.rand(2, 3, 8, 64)), "EquivariantViews(patch_size=5)"),
        (lambda: EquivariantViews(0), "patch_size=0"),
        (lambda: EquivariantViews(16.0), "patch_size=16.0"),
        (lambda: EquivariantViews(scale=(1.3, 0.7)), "scale=(0.7, 1.3)"),
        (lambda: EquivariantViews(4, photometric=lambda x: x[..., 1:])(torch.rand(2, 3, 24, 24)), "keeps the shape"),
        (lambda: EquivariantViews(4, photometric=lambda x: (x, x))(torch.rand(2, 3, 24, 24)), "a tuple from the phot"),
        (lambda: EquivariantViews(4, photometric=lambda x: None)(torch.rand(2, 3, 8, 8)), "a NoneType from the photom"),
        (lambda: EquivariantViews(scale=0.7), "scale=0.7"),
        (lambda: EquivariantViews(ratio=(1, 2, 3)), "ratio=(1, 2, 3)"),
        (lambda: EquivariantViews(rotations="no"), "rotations='no'"),
        (lambda: EquivariantViews(flips=1), "flips=1"),
        (lambda: EquivariantViews(normalize=IMAGENET)(255 * torch.rand(2, 3, 32, 32)), "make_views(images / 255)"),
        (lambda: EquivariantViews(normalize=IMAGENET)(torch.full((2, 3, 32, 32), 2.1)), "from 2.1 to 2.1"),
        (lambda: EquivariantViews(normalize=IMAGENET)(torch.full((2, 3, 32, 32), -1.1)), "from -1.1 to -1.1"),
        (lambda: EquivariantViews(photometric=0.4), "EquivariantViews(photometric=Photometric())"),
        (lambda: EquivariantViews(photometric=(None, None, None)), "one for each view"),
        (lambda: EquivariantViews(4, photometric=Photometric())(torch.rand(2, 1, 32, 32)), "red, green and blue"),
        (lambda: EquivariantViews(4)(torch.rand(2, 3, 32, 32), GPU), "a generator on cuda"),
        (lambda: EquivariantViews(4).draw(2, (32, 32), GPU), "generator = torch.Generator().manual_seed(0)"),
        (lambda: EquivariantViews(4).render(torch.rand(2, 3, 32, 32), None, GPU), "a generator on cuda"),
        (lambda: EquivariantViews()([torch.rand(2, 3, 32, 32), torch.ones(2)]), "images[0]  # of (images, labels)"),
        (lambda: EquivariantViews()(torch.rand(2, 3, 32, 32).numpy()), "torch.from_numpy(images)"),
        (lambda: EquivariantViews()([Image.new("RGB", (32, 32))]), "to_tensor(image) for image in images"),
    ],
)
def test_bad_input_says_what_to_type(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)


def test_draw_and_render_are_the_halves_of_a_call():
    make_views = EquivariantViews(PATCH)
    images = torch.rand(6, 3, 24, 28)
    called = make_views(images, torch.Generator().manual_seed(3))
    plan = make_views.draw(6, (24, 28), torch.Generator().manual_seed(3))
    rendered = make_views.render(images, plan)
    for one, other in zip(called, rendered, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.relation == other.relation
    for one, other in zip(make_views.render(images[1::2], plan[1::2]), called, strict=True):
        assert torch.equal(one.images, other[1::2].images)


def test_photometric_part_sees_the_upright_image_and_each_view_is_resampled_bicubically_with_a_low_pass():
    """The order matters where an image is resampled: a threshold ahead of it leaves values between 0 and 1."""
    images = (torch.rand(4, 3, 32, 32) > 0.5).float()
    plan = EquivariantViews(PATCH).draw(4, (32, 32), torch.Generator().manual_seed(0))
    views = EquivariantViews(PATCH, photometric=lambda x: (x > 0.5).float()).render(images, plan)
    for view, g in zip(views, (plan.first, plan.second), strict=True):
        assert torch.equal(view.images, act(g, images, antialias=True).clamp(0, 1))
        assert not torch.isin(view.images, torch.tensor([0.0, 1.0])).all()
        size = g.output_size((32, 32))[:: -1 if g.turns[0] % 2 else 1]
        resized = F.interpolate(images, size, mode="bicubic", antialias=True)
        for found, x, k, flip in zip(view.images, resized, g.turns.tolist(), g.flip, strict=True):
            moved = torch.rot90(x.flip(-1) if flip else x, k, (-2, -1)).clamp(0, 1)
            torch.testing.assert_close(found, moved, rtol=0, atol=1e-5)


@pytest.mark.parametrize("photometric", [None, Photometric(), (Photometric(solarize=1), None)])
def test_values_stay_in_the_range_that_they_had(photometric):
    """Each image in its own, or in [0, 1]: what bicubic resampling overshoots is clamped."""
    images = (torch.rand(6, 3, 32, 32) > 0.5).float()
    make_views = EquivariantViews(PATCH, photometric=photometric)
    plan = make_views.draw(6, (32, 32), torch.Generator().manual_seed(0))
    for view, g in zip(make_views.render(images, plan), (plan.first, plan.second), strict=True):
        assert 0 <= view.images.min() < view.images.max() <= 1
        assert act(g, images, antialias=True).max() > 1.05
    if photometric is None:
        high = torch.tensor([1.0, 255, 2, 0.5, 1, 1])[:, None, None, None]
        low = torch.tensor([0.0, 0, -2, 0.2, 0, -1])[:, None, None, None]
        for view in make_views.render(low + (high - low) * images, plan):
            assert (view.images >= low.clamp(max=0)).all()
            assert (view.images <= high.clamp(min=1)).all()
            assert view.images[1].max() == 255
            assert view.images[2].min() == -2


def test_geometry_is_the_same_whatever_the_photometric_part():
    images = torch.rand(6, 3, 24, 28)
    plain = EquivariantViews(PATCH)(images, torch.Generator().manual_seed(3))
    for photometric in (Photometric(), (None, Photometric()), torch.ones_like, (Photometric(), torch.ones_like)):
        views = EquivariantViews(PATCH, photometric=photometric)(images, torch.Generator().manual_seed(3))
        for one, other in zip(plain, views, strict=True):
            assert one.relation == other.relation
            assert one.images.shape == other.images.shape


def test_colours_are_drawn_apart_recorded_and_changed_ahead_of_the_geometry():
    images = torch.rand(6, 3, 24, 28)
    photometric = Photometric(solarize=0.5)
    make_views = EquivariantViews(PATCH, photometric=photometric)
    plan = make_views.draw(6, (24, 28), torch.Generator().manual_seed(3))
    called = make_views(images, torch.Generator().manual_seed(3))
    views = zip(called, make_views.render(images, plan), (plan.first, plan.second), plan.photometric, strict=True)
    for view, rendered, g, drawn in views:
        assert torch.equal(view.images, rendered.images)
        assert view.drawn.keys() == drawn.keys()
        assert all(torch.equal(view.drawn[name], drawn[name]) for name in drawn)
        assert torch.equal(view.images, act(g, photometric.apply(images, drawn), antialias=True).clamp(0, 1))
    assert not torch.equal(plan.photometric[0]["brightness"], plan.photometric[1]["brightness"])
    for index in (slice(1, None, 2), [4, 0], 3):
        some = [index] if isinstance(index, int) else index
        for one, other in zip(make_views.render(images[some], plan[index]), called, strict=True):
            assert torch.equal(one.images, other[index].images)
            assert torch.equal(one.drawn["order"], other[index].drawn["order"])


def test_each_view_may_have_a_photometric_part_of_its_own():
    """MoCo-v3 blurs one view always, and solarizes the other now and then."""
    images = torch.rand(4, 3, 24, 24)
    never = {"jitter": 0, "grey": 0, "blur": 0}
    pair = Photometric(**never, solarize=1), Photometric(**never)
    view1, view2 = EquivariantViews(PATCH, (1, 1), (1, 1), photometric=pair)(images)
    assert view1.drawn["solarize"].all()
    assert not view2.drawn["solarize"].any()
    assert view1.images.max() < 0.51
    assert torch.equal(act(~view2.relation, view2.images), images)
    view1, view2 = EquivariantViews(PATCH, (1, 1), (1, 1), photometric=(None, torch.ones_like))(images)
    assert torch.equal(act(~view1.relation, view1.images), images)
    assert (view2.images == 1).all()
    with pytest.raises(SERError, match="moves what is in the image"):
        EquivariantViews(PATCH, photometric=(pair[0], lambda x: x.flip(-1)))(images)


def test_no_image_draws_no_colour_and_nothing_is_read_from_the_device():
    view, _ = EquivariantViews(PATCH, photometric=Photometric())(torch.zeros(0, 3, 24, 24))
    assert {len(values) for values in view.drawn.values()} == {0}
    make_views = EquivariantViews(PATCH, (1, 1), (1, 1), photometric=Photometric(), normalize=IMAGENET)
    plan = make_views.draw(4, (24, 24))
    for view in make_views.render(torch.rand(4, 3, 24, 24, device="meta"), plan):  # whoever reads a value raises
        assert view.images.device.type == "meta"


def test_normalises_last():
    images = torch.rand(4, 3, 24, 24)
    plan = EquivariantViews(PATCH).draw(4, (24, 24))
    plain, normalised = (EquivariantViews(PATCH, normalize=n).render(images, plan)[0].images for n in (None, IMAGENET))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    torch.testing.assert_close(normalised * std + mean, plain)


PHOTOMETRIC = {
    "jitter": v2.ColorJitter(0.4, 0.4, 0.2, 0.1),
    "jitter that may take all contrast away": v2.ColorJitter(contrast=1.0),
    "grey": v2.RandomGrayscale(0.5),
    "blur": v2.GaussianBlur(5, (0.1, 2.0)),
    "solarize": v2.RandomSolarize(0.5, 0.5),
    "invert": v2.RandomInvert(),
    "normalise": v2.Normalize(*IMAGENET),
    "noise": v2.GaussianNoise(sigma=0.1) if hasattr(v2, "GaussianNoise") else v2.Identity(),
    "erasing": v2.RandomErasing(),
    "constant": torch.zeros_like,
}
MOVING = {
    "flip": v2.RandomHorizontalFlip(),
    "flip, seldom": v2.RandomApply([v2.RandomHorizontalFlip(1.0)], 0.5),
    "vertical flip": v2.RandomVerticalFlip(1.0),
    "turn": lambda x: torch.rot90(x, 1, (-2, -1)),
    "transposition": lambda x: x.mT,
    "other transposition": lambda x: torch.rot90(x.mT, 2, (-2, -1)),
    "crop": v2.RandomResizedCrop(32, (0.2, 0.6)),
    "any angle": v2.RandomRotation(40),
    "translation": lambda x: x.roll(4, -1),
    "flip and noise": lambda x: x.flip(-1) + 0.05 * torch.randn_like(x),
}


@pytest.mark.filterwarnings("ignore:The photometric part draws once")
@pytest.mark.parametrize("name", [*PHOTOMETRIC, *MOVING])
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_a_photometric_part_that_moves_geometry_is_found(name, size):
    """A flip commutes with a flip, and yet makes the relation wrong."""
    if name in MOVING and size != (32, 32) and name in ("turn", "transposition", "other transposition", "crop"):
        return  # another shape, which says so by itself
    for seed in range(10):
        torch.manual_seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), random.getstate()
        make_views = EquivariantViews(PATCH, photometric=(PHOTOMETRIC | MOVING)[name])
        if name in MOVING:
            with pytest.raises(SERError, match="moves what is in the image"):
                make_views(torch.rand(2, 3, *size))
            continue
        make_views(torch.rand(2, 3, *size), torch.Generator().manual_seed(0))
        torch.manual_seed(seed)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()


def test_a_part_that_draws_once_for_a_batch_is_told_and_one_that_draws_for_each_image_is_not(recwarn):
    jitter = v2.ColorJitter(0.4, 0.4)
    images = torch.rand(4, 3, 32, 32)
    EquivariantViews(PATCH, photometric=lambda x: torch.stack([jitter(image) for image in x]))(images)
    EquivariantViews(PATCH, photometric=v2.Normalize(*IMAGENET))(images)
    EquivariantViews(PATCH)(images)
    assert not list(recwarn)
    make_views = EquivariantViews(PATCH, photometric=jitter)
    with pytest.warns(UserWarning, match="torch.stack"):
        make_views(images)
    make_views(images)  # once


@pytest.mark.parametrize("values", [(-0.05, 1.05), (-0.9, 1.9)])
def test_values_that_overshoot_can_be_normalised(values):
    """As resampling elsewhere leaves them; far outside, they are other numbers."""
    images = torch.tensor(values).repeat(2, 3, 24, 12)
    for view in EquivariantViews(PATCH, normalize=IMAGENET)(images):
        assert view.images.isfinite().all()


def test_colours_need_three_channels_and_normalize_one_number_for_each():
    make_views = EquivariantViews(patch_size=4, photometric=Photometric(), normalize=IMAGENET)
    for images, words in (
        (torch.rand(2, 1, 16, 16), "make_views(images.expand(-1, 3, -1, -1))"),
        (torch.rand(2, 3, 16, 16) * 255, "make_views(images / 255)"),
    ):
        with pytest.raises(SERError, match=re.escape(words)) as caught:
            make_views(images)
        assert caught.value.call == "EquivariantViews(patch_size=4)(images)"
    with pytest.raises(SERError, match="the 3 channels of normalize="):
        EquivariantViews(patch_size=4, normalize=IMAGENET)(torch.rand(2, 1, 16, 16))
    with pytest.raises(SERError, match="normalize=IMAGENET"):
        EquivariantViews(patch_size=4, normalize="imagenet")
