"""The regular representation on channels: a homomorphism, beside which places stay."""

import pytest
import torch
from elements import DIHEDRAL, dihedral, element

from ser_reg import Affine, GroupElement, SERError
from ser_reg.geometry.channels import check_channels, move_channels


def maps(n, dim=24):
    return torch.randn(n, dim, 3, 5)


def test_homomorphism():
    """All pairs of the eight."""
    every = GroupElement(torch.arange(8) % 4, torch.arange(8) >= 4, torch.ones(8, 2).double())
    for g in range(8):
        for h in range(8):
            x = maps(1)
            twice = move_channels(every[g], move_channels(every[h], x, "regular"), "regular")
            assert torch.equal(twice, move_channels(every[g] @ every[h], x, "regular"))


def test_regular_is_faithful_and_free():
    """Every element but the identity moves every block, and no two of them move one to the same place."""
    x = torch.arange(8.0).view(1, 8, 1, 1)
    moved = [tuple(move_channels(element(*each), x, "regular").flatten().tolist()) for each in DIHEDRAL]
    assert moved[0] == tuple(range(8))
    for block in range(8):
        assert {order[block] for order in moved} == set(range(8))


@pytest.mark.parametrize(("turns", "flip"), DIHEDRAL)
def test_equals_the_definition(turns, flip):
    """(ρ(g) f)(k) = f(g⁻¹ k), with matrices in place of the law of composition."""
    elements = [element(*each) for each in DIHEDRAL]
    g, x = element(turns, flip), maps(1)
    blocks = x.chunk(8, 1)
    expected = []
    for k in elements:
        source = torch.linalg.inv(g.matrix()) @ k.matrix()
        (index,) = [i for i, other in enumerate(elements) if torch.allclose(other.matrix(), source)]
        expected.append(blocks[index])
    assert torch.equal(move_channels(g, x, "regular"), torch.cat(expected, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_batch_moves_each_map_by_its_own_element(dtype):
    g, x = dihedral(16), (9 * maps(16)).to(dtype)
    moved = move_channels(g, x, "regular")
    assert moved.dtype == dtype
    for i in range(16):
        assert torch.equal(moved[i : i + 1], move_channels(g[i], x[i : i + 1], "regular"))
    for_all = move_channels(g[3], x, "regular")
    assert torch.equal(for_all, move_channels(g[[3] * 16], x, "regular"))
    assert torch.equal(move_channels(~g, moved, "regular"), x)


def test_crops_move_channels_by_their_turns_and_flips():
    g, x = dihedral(16), maps(16)
    crop = Affine.crop(torch.tensor([[0.1, 0.3, 0.5, 0.6]]).double())
    assert torch.equal(move_channels(g @ crop, x, "regular"), move_channels(g, x, "regular"))
    h = dihedral(16)
    assert torch.equal(move_channels((h @ crop) @ ~(g @ crop), x, "regular"), move_channels(h @ ~g, x, "regular"))
    with pytest.raises(SERError, match="another angle"):
        move_channels(Affine.rotation(30), x, "regular")


def test_scale_has_no_part_in_it():
    g, x = dihedral(4), maps(4)
    assert torch.equal(move_channels(g @ GroupElement.scaling(0.5, 2), x, "regular"), move_channels(g, x, "regular"))


def test_trivial_leaves_channels_alone():
    x = maps(4)
    assert move_channels(dihedral(4), x, "trivial") is x
    assert move_channels(Affine.rotation(30), x, "trivial") is x
    assert move_channels(dihedral(4), maps(4, dim=7), "trivial").shape[1] == 7


def test_gradient_goes_back_the_way_it_came():
    g = dihedral(5)
    x = torch.randn(5, 16, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: move_channels(g, x, "regular"), x)
    weight = torch.randn_like(x)
    (grad,) = torch.autograd.grad((move_channels(g, x, "regular") * weight).sum(), x)
    assert torch.equal(grad, move_channels(~g, weight, "regular"))


def test_no_map():
    assert move_channels(GroupElement.identity(0), maps(0), "regular").shape == maps(0).shape
    assert move_channels(GroupElement.turn(1), maps(0), "regular").shape == maps(0).shape


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: move_channels(dihedral(2), maps(2), "steered"), "channels='trivial'"),
        (lambda: move_channels(dihedral(2), maps(2, dim=12), "regular"), "12 channels"),
        (lambda: move_channels(dihedral(3), maps(2), "regular"), "3 elements for 2 maps"),
        (lambda: check_channels("SERLoss(dim=12, channels='regular')", "regular", 12), "SERLoss(dim=12"),
    ],
)
def test_bad_input_says_what_to_type(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)
