"""The policy T_eq: what is shared within a view, what is drawn for each sample, and that it all fits together."""

import pytest
import torch
from torch.nn import functional as F

from ser_reg import EquivariantViews, GroupElement, SERError, act, partition_size

PATCH = 4


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
    views = EquivariantViews(PATCH, scale=(1, 1), ratio=(1, 1))
    seen = torch.zeros(8, dtype=torch.long)
    for seed in range(600):  # calls, since the samples of a call share the parity of their turns
        images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
        pair = views(images, torch.Generator().manual_seed(seed))
        g = pair.relative
        torch.testing.assert_close(act(g, patch_means(pair.x1)), patch_means(pair.x2), rtol=0, atol=1e-14)
        seen += torch.bincount(g.turns + 4 * g.flip, minlength=8)
    assert seen.min() > 0.8 * seen.sum() / 8, f"relations are not equally frequent: {seen.tolist()}"
    assert seen.max() < 1.2 * seen.sum() / 8


def test_equivariant_network_error_under_scaling_falls_with_resolution():
    def error(side):
        views = EquivariantViews(PATCH)
        total = 0.0
        for seed in range(10):
            pair = views(smooth(4, side), torch.Generator().manual_seed(seed))
            moved, target = act(pair.relative, patch_means(pair.x1)), patch_means(pair.x2)
            total += (moved - target)[..., 2:-2, 2:-2].abs().mean().item() / target.std().item() / 10
        return total

    errors = [error(side) for side in (32, 64, 128)]
    assert errors[0] < 0.05
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_a_wrong_relation_shows():
    views = EquivariantViews(PATCH, scale=(1, 1), ratio=(1, 1))
    pair = views(torch.randn(64, 3, 24, 24))
    turned = [i for i in range(64) if pair.relative.turns[i] % 2 == 1 and not pair.relative.flip[i]]
    errors = [
        (act((~pair.relative)[i], patch_means(pair.x1[i : i + 1])) - patch_means(pair.x2[i : i + 1])).abs().max()
        for i in turned
    ]
    assert all(e > 0.01 for e in errors)


def test_shared_within_a_view_and_independent_between_views():
    views = EquivariantViews(PATCH)
    flips, halves, grids, parities = [], [], [], []
    for seed in range(200):
        pair = views(torch.zeros(8, 1, 24, 24), torch.Generator().manual_seed(seed))
        for g, x in ((pair.g1, pair.x1), (pair.g2, pair.x2)):
            assert len(set((g.turns % 2).tolist())) == 1
            assert torch.equal(g.scale, g.scale[:1].expand(8, 2))
            assert g.output_size((24, 24)) == tuple(x.shape[-2:])
            assert all(side % PATCH == 0 for side in x.shape[-2:])
        flips.append(torch.stack([pair.g1.flip, pair.g2.flip]))
        halves.append(torch.stack([pair.g1.turns // 2, pair.g2.turns // 2]))
        grids.append(torch.stack([pair.g1.scale[0], pair.g2.scale[0]]))
        parities.append(torch.stack([pair.g1.turns[0] % 2, pair.g2.turns[0] % 2]))
    for draws in (torch.cat(flips, 1), torch.cat(halves, 1), torch.stack(parities, 1)):
        table = torch.bincount((2 * draws[0] + draws[1]).long(), minlength=4) / draws.shape[1]
        assert (table - 0.25).abs().max() < 0.08, f"not independent and uniform: {table}"
    grids = torch.stack(grids, 1)[..., 0]
    assert abs(torch.corrcoef(grids)[0, 1]) < 0.15
    assert all(torch.stack(flips).float().mean(0).ne(0).all(1))


@pytest.mark.parametrize("size", [(24, 24), (20, 32), (23, 29), (30, 17)])
def test_any_size_lands_on_the_patch_grid(size):
    views = EquivariantViews(PATCH)
    for seed in range(10):
        pair = views(torch.rand(3, 3, *size), torch.Generator().manual_seed(seed))
        assert all(side % PATCH == 0 for x in pair[:2] for side in x.shape[-2:])
        assert act(pair.relative, patch_means(pair.x1)).shape == patch_means(pair.x2).shape


def test_switches():
    images = torch.rand(32, 3, 24, 24)
    pair = EquivariantViews(PATCH, rotations=False, flips=False)(images)
    assert not pair.g1.turns.any()
    assert not pair.g2.flip.any()
    pair = EquivariantViews(PATCH, scale=(1, 1), ratio=(1, 1), rotations=False, flips=False)(images)
    assert torch.equal(pair.x1, images)
    assert pair.relative.allclose(GroupElement.identity(32))
    assert repr(EquivariantViews()).startswith("EquivariantViews(patch_size=16, scale=(0.7, 1.3)")


def test_generator_owns_the_randomness_even_of_the_photometric_part():
    def jitter(images):
        return images * torch.rand(len(images), 1, 1, 1)

    views = EquivariantViews(PATCH, photometric=jitter)
    images = torch.rand(4, 3, 24, 24)
    before = torch.get_rng_state()
    first, second = (views(images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.x1, second.x1)
    assert torch.equal(first.x2, second.x2)
    torch.manual_seed(7)
    third = views(images)
    torch.manual_seed(7)
    assert torch.equal(views(images).x1, third.x1)


def test_photometric_part_is_independent_per_view_and_before_the_geometry():
    seen = []

    def record(images):
        seen.append(images.clone())
        return images.add_(len(seen))  # in place, as some do

    images = torch.zeros(2, 3, 24, 24)
    pair = EquivariantViews(PATCH, photometric=record)(images)
    assert len(seen) == 2
    assert all(torch.equal(x, torch.zeros_like(x)) for x in [*seen, images])
    torch.testing.assert_close(pair.x1, torch.ones_like(pair.x1))
    torch.testing.assert_close(pair.x2, 2 * torch.ones_like(pair.x2))


def test_no_image_still_has_a_grid():
    pair = EquivariantViews(PATCH)(torch.zeros(0, 3, 24, 24))
    assert len(pair.g1) == len(pair.x1) == 0
    assert all(side % PATCH == 0 for side in pair.x1.shape[-2:])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: EquivariantViews(16)(torch.rand(3, 32, 32)), "views(images[None])"),
        (lambda: EquivariantViews(16)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), "images.float() / 255"),
        (lambda: EquivariantViews(16)(torch.rand(2, 3, 8, 64)), "EquivariantViews(patch_size=5)"),
        (lambda: EquivariantViews(0), "patch_size=0"),
        (lambda: EquivariantViews(16.0), "patch_size=16.0"),
        (lambda: EquivariantViews(scale=(1.3, 0.7)), "scale=(0.7, 1.3)"),
        (lambda: EquivariantViews(4, photometric=lambda x: x[..., 1:])(torch.rand(2, 3, 24, 24)), "keeps the shape"),
    ],
)
def test_bad_input_says_what_to_type(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)


def test_partition_size_never_leaves_one_image_over_all_ranks():
    for batch in (1, 2, 3, 32, 256):
        for world in (1, 2, 8):
            for ratio in (1e-4, 0.005, 0.01, 0.02, 0.5, 1):
                if batch * world < 2:
                    continue
                n = partition_size(batch, ratio, world)
                assert 1 <= n <= batch
                assert n * world >= 2
                assert abs(n - batch * ratio) <= 1 or n <= 2
    assert partition_size(64, 0) == 0
    assert partition_size(64, 1) == 64


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((1, 0.5), "at least two"), ((64, -0.1), "0 to 1"), ((64, 1.5), "0 to 1"), ((0, 0.5), "at least one of each")],
)
def test_partition_size_refuses(arguments, text):
    with pytest.raises(SERError, match=text):
        partition_size(*arguments)
