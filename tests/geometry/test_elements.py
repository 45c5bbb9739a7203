"""The laws of the group, over random elements with flips and anisotropic scales."""

import copy
import pickle

import pytest
import torch
from elements import DIHEDRAL, element, elements
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

from ser_reg import Affine, GroupElement, SERError, act


@given(elements(), elements(), elements())
def test_associative(a, b, c):
    assert ((a @ b) @ c).allclose(a @ (b @ c))


@given(elements())
def test_identity_and_inverse(g):
    e = GroupElement.identity(len(g))
    assert (g @ e).allclose(g)
    assert (e @ g).allclose(g)
    assert (g @ ~g).allclose(e)
    assert (~g @ g).allclose(e)
    assert (~~g).allclose(g)


@given(elements(), elements())
def test_closed(a, b):
    product = a @ b
    assert product.turns.dtype == torch.int64
    assert bool(((product.turns >= 0) & (product.turns < 4)).all())
    assert product.flip.dtype == torch.bool
    assert product.scale.dtype == torch.float64
    assert bool((product.scale > 0).all())
    assert (~product).allclose(~b @ ~a)


@given(elements(), elements())
def test_matrix_is_a_homomorphism(a, b):
    torch.testing.assert_close((a @ b).matrix(), a.matrix() @ b.matrix(), rtol=1e-12, atol=0)
    torch.testing.assert_close((~a).matrix(), torch.linalg.inv(a.matrix()), rtol=1e-12, atol=1e-12)


def test_not_commutative():
    turn, flip, stretch = element(1, False), element(0, True), element(0, False, (2.0, 1.0))
    assert not (turn @ flip).allclose(flip @ turn)
    assert not (turn @ stretch).allclose(stretch @ turn)


def test_matrix_moves_offsets_as_the_grid_does():
    """Independent of the composition law: follow one marked cell through torch.rot90 and flip."""
    marked = torch.zeros(5, 5)
    marked[1, 4] = 1  # offset (-1, 2) from the centre
    for turns, flip in DIHEDRAL:
        moved = torch.rot90(marked.flip(-1) if flip else marked, turns)
        offset = moved.nonzero()[0] - 2
        expected = element(turns, flip).matrix()[0] @ torch.tensor([-1.0, 2.0]).double()
        assert torch.equal(offset.double(), expected)


@given(elements(), st.integers(1, 60), st.integers(1, 60))
def test_output_size_follows_the_matrix(g, height, width):
    g = g[0]
    exact = g.matrix()[0].abs() @ torch.tensor([height, width]).double()
    if exact.min() > 1:
        for side, found in zip(exact.tolist(), g.output_size((height, width)), strict=True):
            assert abs(side - found) <= 0.5 + 1e-9


def test_all_eight_equally_often():
    g = GroupElement.sample(8000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(g.turns + 4 * g.flip, minlength=8)
    assert counts.min() > 900  # 1000 expected, standard deviation 30
    assert counts.max() < 1100


def test_default_ranges_are_those_of_the_paper():
    g = GroupElement.sample(2000)
    area, aspect = g.scale.prod(-1), g.scale[:, 0] / g.scale[:, 1]
    assert 0.7 <= area.min() < 0.72
    assert 1.28 < area.max() <= 1.3
    assert 0.75 <= aspect.min() < 0.77
    assert 1.31 < aspect.max() <= 4 / 3
    assert abs(aspect.log().mean()) < 0.02


def test_generator_owns_the_randomness():
    before = torch.get_rng_state()
    first = GroupElement.sample(5, generator=torch.Generator().manual_seed(3))
    second = GroupElement.sample(5, generator=torch.Generator().manual_seed(3))
    assert first.allclose(second)
    assert torch.equal(before, torch.get_rng_state())
    GroupElement.sample(5)
    assert not torch.equal(before, torch.get_rng_state())


def test_batch_access():
    g = GroupElement.sample(5)
    assert len(g) == 5
    assert len(g[2]) == 1
    assert g[-1].allclose(g[4])
    assert g[1:3].allclose(g[[1, 2]])
    assert g[torch.tensor([True, False, False, False, True])].allclose(g[[0, 4]])
    assert sum(1 for _ in g) == 5
    assert g[:0].allclose(GroupElement.identity(0))
    with pytest.raises(IndexError):
        g[5]
    assert (g @ g[0]).allclose(g @ g[[0] * 5])


def test_repr_copy_pickle_and_device():
    g = GroupElement.sample(2)
    assert repr(g).startswith("GroupElement(turns=[")
    assert repr(GroupElement.sample(9)) == "GroupElement(batch of 9)"
    assert copy.deepcopy(g).allclose(g)
    assert pickle.loads(pickle.dumps(g)).allclose(g)
    assert g.to("cpu").allclose(g)
    assert g.to("meta").turns.device.type == "meta"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GroupElement([1], [True], [[1, 1]]), "turns is list"),
        (lambda: GroupElement(torch.zeros(2).long(), torch.zeros(3).bool(), torch.ones(2, 2).double()), "flip (3,)"),
        (lambda: GroupElement(torch.zeros(2), torch.zeros(2).bool(), torch.ones(2, 2).double()), "torch.float32"),
        (lambda: GroupElement(torch.zeros(1).long(), torch.zeros(1).bool(), torch.zeros(1, 2).double()), "positive"),
        (
            lambda: GroupElement(torch.zeros(1).long(), torch.zeros(1).bool(), torch.full((1, 2), torch.nan).double()),
            "positive and finite",
        ),
        (lambda: GroupElement.sample(3, scale=(1.3, 0.7)), "scale=(1.3, 0.7)"),
        (lambda: GroupElement.sample(3, ratio=(0, 1)), "0 < low <= high"),
        (lambda: GroupElement.identity(2) @ GroupElement.identity(3), "g[:2] @ h[:2]"),
        (lambda: element(0, False, (0.01, 1.0)).output_size((8, 8)), "an output of 0 x 8"),
        (lambda: GroupElement.identity(0).output_size((8, 8)), "no element"),
        (
            lambda: GroupElement(torch.tensor([0, 1, 0]), torch.zeros(3).bool(), torch.ones(3, 2).double()).output_size(
                (8, 6)
            ),
            "(6, 8) from samples [1]; (8, 6) from samples [0, 2]",
        ),
    ],
)
def test_bad_input_says_what_to_type(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)
    assert "remedy:" in str(caught.value)


def test_named_elements_and_equality():
    """Equal in every number; direction pinned by the matrix: a turn takes the right (column +1) up (row -1)."""
    assert GroupElement.turn(1) @ GroupElement.turn(2) == GroupElement.turn(3) == GroupElement.turn(-1)
    assert GroupElement.turn(1, n=3) == GroupElement.turn(1, n=3)[[2, 0, 1]]
    assert GroupElement.turn(1) != GroupElement.turn(2)
    assert GroupElement.turn(1) != GroupElement.turn(1, n=2)
    assert GroupElement.mirror() != GroupElement.identity(1)
    assert GroupElement.scaling(2, 1) != GroupElement.scaling(1, 2)
    assert GroupElement.scaling(2, 0.5, n=2) @ GroupElement.scaling(0.5, 2, n=2) == GroupElement.identity(2)
    assert GroupElement.turn(0) != "identity"
    assert (GroupElement.turn(1).matrix() @ torch.tensor([0.0, 1.0]).double()).tolist() == [[-1.0, 0.0]]
    assert (GroupElement.mirror().matrix() @ torch.tensor([2.0, 1.0]).double()).tolist() == [[2.0, -1.0]]
    assert (GroupElement.scaling(2, 3).matrix() @ torch.ones(2).double()).tolist() == [[2.0, 3.0]]
    with pytest.raises(TypeError, match="unhashable"):
        hash(GroupElement.identity(1))


@given(elements())
def test_equality_is_that_of_the_numbers(g):
    assert g == copy.deepcopy(g)
    assert g != g @ GroupElement.mirror()


@given(elements(1), elements(1))
def test_kinds_of_products_and_inverses_are_those_of_their_numbers(g, h):
    """Where one grid is known they are found without a look at the numbers."""
    for product in (g @ h, ~g, g @ ~h, ~(g @ h)):
        assert product.kinds == GroupElement(product.turns, product.flip, product.scale).kinds


def test_a_product_without_a_size_is_refused():
    huge = GroupElement.scaling(1e300, 1)
    with pytest.raises(SERError, match="factors inf and 1"):
        huge @ huge


def test_warp_is_the_action():
    """Called as an Affine is: a loop asks neither which of the two it has."""
    g, x = GroupElement.sample(6, scale=(1, 1), ratio=(1, 1)), torch.randn(6, 2, 5, 5)
    moved, valid = g.warp(x)
    assert torch.equal(moved, act(g, x))
    assert valid is None
    assert torch.equal(g.warp(x, size=(5, 5), fill="edge")[0], moved)
    stretch = GroupElement.turn(1) @ GroupElement.scaling(2, 0.8)
    for mode in ("bicubic", "bilinear"):
        assert torch.equal(stretch.warp(x, size=(4, 10), mode=mode)[0], act(stretch, x, mode))


def test_warp_of_no_map_has_a_size_all_the_same():
    x = torch.zeros(0, 3, 4, 8, requires_grad=True)
    for g, size, made in (
        (GroupElement.turn(1), None, (8, 4)),
        (GroupElement.turn(1), (8, 4), (8, 4)),
        (GroupElement.identity(0), None, (4, 8)),
        (GroupElement.identity(0), (8, 4), (8, 4)),
    ):
        moved, valid = g.warp(x, size=size)
        assert moved.shape == (0, 3, *made)
        assert valid is None
        moved.sum().backward()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"size": (5, 6)}, "elements that make maps of (6, 5)"),
        ({"size": 5}, "elements that make maps of (6, 5)"),
        ({"fill": "zeros"}, "Affine.of(g).warp(maps, size, fill)"),
    ],
)
def test_warp_makes_no_other_size_and_fills_nothing(words, text):
    with pytest.raises(SERError) as caught:
        GroupElement.turn(1).warp(torch.zeros(1, 2, 5, 6), **words)
    assert text in str(caught.value)


def test_other_things_are_left_to_compose_themselves():
    g, a = GroupElement.turn(1, n=2), Affine.rotation(30.0)
    assert g.__matmul__(a) is NotImplemented
    assert isinstance(g @ a, Affine)
    with pytest.raises(TypeError, match="unsupported operand"):
        g @ 3


def test_default_collate_joins_batches():
    g = GroupElement.sample(6)
    assert default_collate(list(g)) == g
    assert default_collate([g[:2], g[2:]]) == g
    assert default_collate([{"g": each} for each in g])["g"] == g
    (joined,) = DataLoader(list(g), batch_size=6, num_workers=1)
    assert joined == g
