"""Affine maps: laws with group elements mixed in, coordinates followed through images, what is seen and what is not."""

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from elements import DIHEDRAL, dihedral, element, elements
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ser_reg import Affine, GroupElement, SERError, act
from ser_reg.geometry import concatenate


def float64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@st.composite
def affines(draw, n=3):
    """n maps with rotations, shears, mirrors, zooms up to 3 and offsets."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    angles = 360 * torch.rand(2, n, generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    sides = 0.35 + 2.6 * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    offset = 2 * torch.rand(2, n, generator=generator, dtype=torch.float64) - 1
    squeeze = Affine.crop(torch.cat([torch.zeros(n, 2).double(), sides], 1))
    turned = Affine.rotation(angles[0]) @ squeeze @ Affine.rotation(angles[1])
    return Affine.translation(*offset) @ turned @ GroupElement(torch.zeros(n).long(), flip, torch.ones(n, 2).double())


def boxes(n, generator=None, least=0.2):
    """n boxes inside of the whole."""
    u = torch.rand(n, 4, generator=generator, dtype=torch.float64)
    sides = least + (1 - least) * u[:, 2:]
    return torch.cat([u[:, :2] * (1 - sides), sides], 1)


def places(size):
    """(3, h·w): row, column, 1 of each place of a grid."""
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) * 2 / n - 1 for n in size)
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([*grid, torch.ones_like(grid[0])]).flatten(1)


def coordinates(size):
    """(1, 2, H, W): an image that says where it is."""
    return places(size)[:2].view(1, 2, *size)


def of_crop(box, turns, flip, size):
    """(2, h, w): whole-image coordinates, in parts of it, that a view shows: told pixel by pixel, without Affine."""
    top, left, height, width = box.tolist()
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in size)
    grid = torch.stack(torch.meshgrid(top + height * rows, left + width * columns, indexing="ij"))
    return torch.rot90(grid.flip(-1) if flip else grid, turns, (-2, -1))


@given(affines(), affines(), affines())
def test_associative(a, b, c):
    assert ((a @ b) @ c).allclose(a @ (b @ c))


@given(affines())
def test_identity_and_inverse(a):
    e = Affine.identity(len(a))
    assert a @ e == a
    assert e @ a == a
    assert (a @ ~a).allclose(e)
    assert (~a @ a).allclose(e)
    assert (~~a).allclose(a)
    torch.testing.assert_close((~a).matrix, torch.linalg.inv(a.matrix), rtol=1e-9, atol=1e-9)


@given(affines(), affines(), elements(), elements())
def test_group_elements_join_in_from_either_side(a, b, g, h):
    """Flips and anisotropic scales included, and the scale drops out."""
    assert isinstance(g @ a, Affine)
    assert isinstance(a @ g, Affine)
    assert (g @ a) == Affine.of(g) @ a
    assert (a @ g) == a @ Affine.of(g)
    assert Affine.of(g @ h) == Affine.of(g) @ Affine.of(h)
    assert Affine.of(~g) == ~Affine.of(g)
    assert ((g @ h) @ a).allclose(g @ (h @ a))
    assert ((a @ g) @ b).allclose(a @ (g @ b))
    assert ((a @ g) @ h).allclose(a @ (g @ h))
    assert (~(g @ a)).allclose(~a @ ~g)
    assert Affine.of(g @ GroupElement.scaling(0.3, 2)) == Affine.of(g)


@pytest.mark.parametrize(("turns", "flip"), DIHEDRAL)
def test_of_is_the_matrix_of_the_element(turns, flip):
    g = element(turns, flip)
    assert torch.equal(Affine.of(g).matrix[0, :2, :2], g.matrix()[0])
    assert Affine.of(g).matrix[0, :, 2].tolist() == [0, 0, 1]


def test_not_commutative():
    crop, turn = Affine.crop(float64([[0, 0, 0.5, 1]])), GroupElement.turn(1)
    assert not (turn @ crop).allclose(crop @ turn)
    assert not (Affine.rotation(30) @ crop).allclose(crop @ Affine.rotation(30))


def test_one_for_all():
    a, b = Affine.crop(boxes(5)), Affine.rotation(20.0)
    assert (a @ b) == a @ b[[0] * 5]
    assert (b @ a) == b[[0] * 5] @ a
    assert (GroupElement.turn(1) @ a) == GroupElement.turn(1, n=5) @ a
    with pytest.raises(SERError, match="len\\(a\\) is 5, len\\(b\\) is 2"):
        a @ a[:2]


@given(affines(), st.sampled_from(["bicubic", "bilinear"]), st.tuples(*[st.integers(9, 24)] * 2))
def test_content_at_p_goes_to_matrix_times_p(a, mode, size):
    """A ramp is resampled exactly by the bilinear kernel, and to a twentieth of a pixel by torch's bicubic one, where
    neither reaches over the edge of the source."""
    source = (20, 26)
    maps, _ = a.warp(coordinates(source).expand(len(a), -1, -1, -1), size=size, mode=mode)
    expected = torch.linalg.inv(a.matrix)[:, :2] @ places(size)
    inside = (expected.abs() < torch.tensor([[1 - 4 / 20], [1 - 4 / 26]])).all(1)
    off = (maps.flatten(2) - expected).transpose(1, 2)[inside] * torch.tensor(source) / 2  # in pixels
    assert (off.abs() < (1e-11 if mode == "bilinear" else 0.05)).all()


@pytest.mark.parametrize("size", [(24, 24), (20, 28)])
def test_relation_of_two_crops_moves_one_to_the_other(size):
    """Both made of the same image, flipped and turned, followed by their coordinates."""
    generator = torch.Generator().manual_seed(0)
    box1, box2 = boxes(48, generator), boxes(48, generator)
    g1, g2 = dihedral(48), dihedral(48)
    if size[0] != size[1]:  # crops of rectangles that are turned are tested square, as views are
        g1, g2 = (GroupElement(g.turns // 2 * 2, g.flip, g.scale) for g in (g1, g2))
    relation = (g2 @ Affine.crop(box2)) @ ~(g1 @ Affine.crop(box1))
    view1, view2 = (
        torch.stack([of_crop(b, t, f, size) for b, t, f in zip(box, g.turns.tolist(), g.flip.tolist(), strict=True)])
        for box, g in ((box1, g1), (box2, g2))
    )
    moved, valid = relation.warp(view1, mode="bilinear")
    inside = (view2 >= box1[:, :2, None, None]) & (view2 <= (box1[:, :2] + box1[:, 2:])[:, :, None, None])
    assert torch.equal(valid, inside.all(1))
    margin = 2 * box1[:, 2:] / torch.tensor(size) * (1 + 1e-9)  # of the kernel, on either side
    if size[0] == size[1]:
        low, high = (box1[:, :2] + margin)[:, :, None, None], (box1[:, :2] + box1[:, 2:] - margin)[:, :, None, None]
        away = ((view2 > low) & (view2 < high)).all(1)
        assert away.sum() > 1000
        off = ((moved - view2).abs() / box1[:, 2:, None, None] * torch.tensor(size)[:, None, None]).amax(1)
        assert off[away].max() < 1e-10  # in places of the first view
        assert off[valid].max() < 0.5 + 1e-9  # beyond its last centres there is nothing to interpolate with
        bicubic, _ = relation.warp(view1)
        off = ((bicubic - view2).abs() / box1[:, 2:, None, None] * torch.tensor(size)[:, None, None]).amax(1)
        assert off[away].max() < 0.05


def brute_force(box1, box2, n):
    """Valid places of a view of box2, in whole numbers: is the centre of the place inside of box1?"""
    top1, left1, height1, width1 = box1
    top2, left2, height2, width2 = box2
    valid = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            row, column = top2 + height2 * Fraction(2 * i + 1, 2 * n), left2 + width2 * Fraction(2 * j + 1, 2 * n)
            valid[i, j] = top1 <= row <= top1 + height1 and left1 <= column <= left1 + width1
    return valid


@given(st.integers(0, 10**6), st.integers(1, 9))
def test_valid_equals_brute_force_over_centres(seed, n):
    """Boxes of whole pixels, in exact arithmetic: centres that lie on the edge are there, and count."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 24
    pair = []
    for _ in range(2):
        sides = torch.randint(1, pixels + 1, (2,), generator=generator)
        corner = [int(torch.randint(pixels - side + 1, (), generator=generator)) for side in sides.tolist()]
        pair.append([*corner, *sides.tolist()])
    crop1, crop2 = (Affine.crop(float64([box]) / pixels) for box in pair)
    assert torch.equal((crop2 @ ~crop1).valid((n, n))[0], brute_force(*pair, n))


@pytest.mark.parametrize(
    ("box2", "share"),
    [
        ([0.0, 0.0, 0.5, 0.5], 1.0),  # all of it: the same crop
        ([0.125, 0.125, 0.25, 0.25], 1.0),  # inside
        ([0.25, 0.0, 0.5, 0.5], 0.5),
        ([0.25, 0.25, 0.5, 0.5], 0.25),
        ([0.0, 0.0, 1.0, 1.0], 0.25),  # a whole of which the source is a quarter
        ([0.5, 0.5, 0.5, 0.5], 0.0),  # corners meet, no centre does
        ([0.484375, 0.484375, 0.5, 0.5], 1 / 256),  # one place
        ([0.0, 0.484375, 0.5, 0.5], 1 / 16),  # one column
    ],
)
def test_overlaps_of_which_the_area_is_known(box2, share):
    crop1 = Affine.crop(float64([[0, 0, 0.5, 0.5]]))
    for g in (GroupElement.identity(1), GroupElement.turn(1) @ GroupElement.mirror()):
        valid = (g @ Affine.crop(float64([box2])) @ ~crop1).valid((16, 16))
        assert valid.shape == (1, 16, 16)
        assert valid.double().mean() == share


def test_valid_is_that_of_warp():
    relation = Affine.crop(boxes(6)) @ ~Affine.crop(boxes(6))
    _, valid = relation.warp(torch.randn(6, 2, 7, 9))
    assert torch.equal(valid, relation.valid((7, 9)))
    _, valid = relation.warp(torch.randn(6, 2, 7, 9), size=(5, 4))
    assert torch.equal(valid, relation.valid((5, 4)))
    assert torch.equal(relation.warp(torch.ones(6, 2, 7, 9), size=[5, 4])[1], valid)
    _, valid = relation[0].warp(torch.randn(6, 2, 7, 9))
    assert torch.equal(valid, relation.valid((7, 9))[[0] * 6])


@pytest.mark.parametrize(("turns", "flip"), DIHEDRAL)
@pytest.mark.parametrize("scale", [(1.0, 1.0), (20 / 12, 10 / 15), (6 / 12, 30 / 15)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_agrees_with_act(turns, flip, scale, mode):
    g, x = element(turns, flip, scale, n=2), torch.randn(2, 3, 12, 15, dtype=torch.float64)
    moved, valid = Affine.of(g).warp(x, size=g.output_size((12, 15)), mode=mode)
    assert bool(valid.all())
    torch.testing.assert_close(moved, act(g, x, mode), rtol=0, atol=1e-12)


def test_turns_and_flips_are_bitwise_permutations():
    g = dihedral(32)
    crop = Affine.crop(boxes(32))
    relation = (g @ crop) @ ~crop  # up to rounding the elements
    assert relation != Affine.of(g)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        x = (50 * torch.randn(32, 2, 9, 9)).to(dtype)
        assert torch.equal(relation.warp(x)[0], act(g, x))
    x = torch.randn(32, 2, 6, 9)
    turned = GroupElement(g.turns // 2 * 2 + 1, g.flip, g.scale)
    assert torch.equal(Affine.of(turned).warp(x, size=(9, 6))[0], act(turned, x))
    assert Affine.of(turned).warp(x)[0].shape == x.shape  # on the own grid it is no permutation


def test_what_is_nearly_a_permutation_is_none():
    ramp = coordinates((9, 9))
    for little in (1e-2, 1e-8):
        moved, _ = Affine.translation(little, 0).warp(ramp, mode="bilinear")
        assert (ramp - moved)[0, 0, 1:].sub(2 * little).abs().max() < 1e-12


def test_turns_and_flips_beside_crops_are_exact_to_rounding():
    """One crop in the batch, and all are resampled."""
    g, x = dihedral(32), torch.randn(33, 2, 9, 9, dtype=torch.float64)
    batch = Affine(torch.cat([Affine.of(g).matrix, Affine.crop(float64([[0, 0, 0.3, 0.7]])).matrix]))
    torch.testing.assert_close(batch.warp(x)[0][:32], act(g, x[:32]), rtol=0, atol=1e-12)


@given(
    st.integers(0, 3), st.booleans(),
    st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.05, 3), st.floats(0.05, 3)),
)  # fmt: skip
def test_parts_of_a_relation(turns, flip, box):
    box = torch.tensor([box], dtype=torch.float64)
    relation = element(turns, flip, (0.7, 1.2)) @ Affine.crop(box)
    assert relation.turns.tolist() == [turns]
    assert relation.flip.tolist() == [flip]
    assert (relation.turns.dtype, relation.flip.dtype, relation.box.dtype) == (torch.int64, torch.bool, torch.float64)
    torch.testing.assert_close(relation.box, box, rtol=1e-9, atol=1e-9)
    product = relation @ Affine.crop(float64([[0.1, 0.2, 0.5, 0.25]]))
    assert (element(product.turns.item(), product.flip.item()) @ Affine.crop(product.box)).allclose(product)
    inverse = ~relation
    assert (element(inverse.turns.item(), inverse.flip.item()) @ Affine.crop(inverse.box)).allclose(inverse)


@given(st.integers(0, 10**6))
def test_crop_then_turn_then_flip_has_turns_flip_and_box(seed):
    generator = torch.Generator().manual_seed(seed)
    box, turn = boxes(4, generator), GroupElement.turn(seed % 4)
    relation = GroupElement.mirror() @ turn @ Affine.crop(box)  # F R = R^-1 F
    assert relation.flip.all()
    assert relation.turns.tolist() == [-seed % 4] * 4
    torch.testing.assert_close(relation.box, box, rtol=0, atol=1e-12)


@pytest.mark.parametrize("degrees", [0.1, 45, 89, -1])
@pytest.mark.parametrize("name", ["turns", "flip", "box"])
def test_other_angles_and_shears_have_no_such_parts(degrees, name):
    crop = Affine.crop(boxes(3))
    mixed = Affine(torch.cat([crop.matrix, (Affine.rotation(degrees) @ crop[0]).matrix]))
    with pytest.raises(SERError, match=f"relation.{name}") as caught:
        getattr(mixed, name)
    assert "another angle or a shear in samples [3]" in str(caught.value)
    shear = torch.eye(3, dtype=torch.float64)[None].repeat(2, 1, 1)
    shear[1, 0, 1] = 0.01
    with pytest.raises(SERError, match="in samples \\[1\\]"):
        getattr(Affine(shear), name)


def test_rounding_of_a_hundredth_of_a_pixel_is_no_other_angle():
    """As key points of float32 leave it behind."""
    relation = Affine.rotation(90 + 1e-3) @ Affine.crop(float64([[0.2, 0.1, 0.5, 0.6]]))
    assert relation.turns.tolist() == [1]
    torch.testing.assert_close(relation.box, float64([[0.2, 0.1, 0.5, 0.6]]), rtol=0, atol=1e-4)


@given(st.floats(-400, 400), st.floats(-400, 400), st.floats(0.3, 3))
def test_rotations_add_up_and_keep_distances_in_pixels(first, second, ratio):
    size = (60.0, 60 * ratio)
    a, b = Affine.rotation(first, size), Affine.rotation(float64([second]), size)
    assert (a @ b).allclose(Affine.rotation(first + second, size), atol=1e-8)
    pixels = torch.diag(float64(size))
    linear = pixels @ a.matrix[0, :2, :2] @ pixels.inverse()
    torch.testing.assert_close(linear @ linear.T, torch.eye(2).double(), rtol=0, atol=1e-9)
    assert torch.linalg.det(linear) > 0


@pytest.mark.parametrize("turns", range(-4, 5))
def test_quarter_rotations_are_those_of_the_group(turns):
    assert Affine.rotation(90 * turns) == Affine.of(GroupElement.turn(turns))


@pytest.mark.parametrize("degrees", [30.0, -75.0, 180.0])
@pytest.mark.parametrize("size", [(40, 40), (32, 48)])
def test_rotation_is_that_of_torchvision(degrees, size):
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    theirs = tv.rotate(image, degrees, InterpolationMode.BILINEAR)
    ours, valid = Affine.rotation(degrees, size).warp(image, fill="zeros", mode="bilinear")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # whose matrix is of float32
    shown = tv.rotate(torch.ones_like(image), degrees, InterpolationMode.NEAREST)[:, 0] > 0
    assert (shown != valid).double().mean() < 0.01


def test_translation_moves_content_down_and_right():
    x = torch.randn(1, 2, 8, 10, dtype=torch.float64)
    moved, valid = Affine.translation(2 / 8, 3 / 10).warp(x, fill="zeros")
    expected = F.pad(x, (3, 0, 2, 0))[..., :8, :10]
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
    assert torch.equal(valid[0], F.pad(torch.ones(6, 7), (3, 0, 2, 0)).bool())
    each = Affine.translation(float64([0.25, 0]), float64([0, 0.3]))
    assert each == Affine(torch.cat([Affine.translation(0.25, 0).matrix, Affine.translation(0, 0.3).matrix]))


def test_what_is_seen_where_the_source_has_nothing():
    """By whole places, so that nothing is blended."""
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    relation = Affine.translation(2 / 4, 0)
    for fill, above in (("edge", x[:, :, [0, 0]]), ("reflect", x[:, :, [1, 0]]), ("zeros", 0 * x[:, :, :2])):
        moved, valid = relation.warp(x, fill=fill)
        torch.testing.assert_close(moved, torch.cat([above, x[:, :, :2]], 2), rtol=0, atol=1e-12)
        assert valid[0, :, 0].tolist() == [False, False, True, True]
    far, valid = Affine.translation(50, 0).warp(x)
    torch.testing.assert_close(far, x[:, :, :1].expand_as(far), rtol=0, atol=1e-12)
    assert not valid.any()


def test_crop_of_whole_pixels_is_the_slice():
    x = torch.randn(2, 3, 8, 10, dtype=torch.float64)
    crop = Affine.crop(float64([[2 / 8, 3 / 10, 4 / 8, 5 / 10]]))
    torch.testing.assert_close(crop.warp(x, size=(4, 5))[0], x[..., 2:6, 3:8], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("fill", ["edge", "reflect", "zeros"])
def test_gradients(mode, fill):
    relation = Affine.rotation(torch.tensor([20.0, 65.0])) @ Affine.crop(boxes(2))
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: relation.warp(x, size=(3, 4), fill=fill, mode=mode)[0], x)
    assert torch.autograd.gradcheck(lambda x: Affine.of(GroupElement.turn(1)).warp(x[..., :4])[0], x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_resampled_in_float32(dtype):
    x, relation = torch.randn(4, 8, 9, 9).to(dtype), Affine.crop(boxes(4)) @ Affine.rotation(30.0)
    expected = relation.warp(x.float())[0].to(dtype)
    assert torch.equal(relation.warp(x)[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(relation.warp(x)[0], expected)
        assert torch.equal(relation.warp(x.float())[0].to(dtype), expected)


def test_float32_is_near_float64():
    x, relation = torch.randn(4, 8, 56, 56, dtype=torch.float64), Affine.crop(boxes(4)) @ Affine.rotation(30.0)
    difference = relation.warp(x)[0] - relation.warp(x.float())[0]
    assert difference.abs().max() < 1e-4


def test_batch_equals_loop():
    x, relation = torch.randn(6, 3, 9, 11, dtype=torch.float64), Affine.rotation(30.0) @ Affine.crop(boxes(6))
    loop = torch.cat([relation[i].warp(x[i : i + 1])[0] for i in range(6)])
    torch.testing.assert_close(relation.warp(x)[0], loop, rtol=0, atol=1e-14)
    alike = torch.cat([relation[2].warp(x[i : i + 1])[0] for i in range(6)])
    torch.testing.assert_close(relation[2].warp(x)[0], alike, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [0, 1])
def test_no_map_has_a_size_all_the_same(n):
    x = torch.zeros(0, 3, 4, 8, requires_grad=True)
    moved, valid = Affine.crop(boxes(n)).warp(x, size=(5, 6))
    assert moved.shape == (0, 3, 5, 6)
    assert valid.shape == (0, 5, 6)
    assert valid.dtype == torch.bool
    moved.sum().backward()


def test_default_collate_joins_batches():
    a = Affine.crop(boxes(5))
    assert default_collate(list(a)) == a
    assert default_collate([a[:2], a[2:]]) == a
    assert default_collate([(torch.zeros(3), a[i]) for i in range(5)])[1] == a
    g = GroupElement.sample(2)
    assert concatenate([g[0], a, g[1]]) == concatenate([Affine.of(g[0]), a, Affine.of(g[1])])
    assert concatenate([g, a])[:2] == Affine.of(g)
    with pytest.raises(SERError, match="one at least"):
        concatenate([])


def test_values_that_travel():
    a = Affine.crop(boxes(5))
    assert len(a) == 5
    assert len(a[2]) == 1
    assert a[-1] == a[4]
    assert a[1:3] == a[[1, 2]]
    assert a[torch.tensor([True, False, False, False, True])] == a[[0, 4]]
    assert [len(each) for each in a] == [1] * 5
    assert len(a[:0]) == 0
    with pytest.raises(IndexError):
        a[5]
    assert copy.deepcopy(a) == a
    assert pickle.loads(pickle.dumps(a)) == a
    assert a.to("cpu") == a
    assert a.to("meta").matrix.device.type == "meta"
    assert a != a[:4]
    assert not a.allclose(a[:4])
    assert a != "a"
    assert a != a @ Affine.rotation(1e-12)
    assert a.allclose(a @ Affine.rotation(1e-12))
    assert not a.allclose(a @ Affine.rotation(1e-3))
    assert repr(a) == "Affine(batch of 5)"
    assert repr(Affine.identity(1)) == "Affine([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])"
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)
    with pytest.raises(TypeError, match="unsupported operand"):
        a @ 3
    with pytest.raises(TypeError, match="unsupported operand"):
        3 @ a


def matrix(*rows):
    return torch.tensor([rows], dtype=torch.float64)


MAPS = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Affine([[1, 0, 0]]), "a list"),
        (lambda: Affine(torch.eye(3).double()), "Affine(matrix[None])"),
        (lambda: Affine(torch.zeros(2, 2, 3).double()), "matrix (2, 2, 3)"),
        (lambda: Affine(torch.eye(3)[None]), "Affine(matrix.double())"),
        (lambda: Affine(matrix([1, 0, torch.nan], [0, 1, 0], [0, 0, 1])), "not finite in samples [0]"),
        (lambda: Affine(matrix([1, 0, 0], [0, 1, 0], [0, 0.1, 1])), "a perspective is no affine map"),
        (lambda: Affine(matrix([1, 2, 0], [2, 4, 0], [0, 0, 1])), "singular matrices in samples [0]"),
        (lambda: Affine.crop(torch.rand(4).double()), "box[None]"),
        (lambda: Affine.crop(torch.rand(2, 4)), "box.double()"),
        (lambda: Affine.crop([0, 0, 1, 1]), "box is list"),
        (
            lambda: Affine.crop(float64([[0, 0, 1, 1], [0, 0, 0, 1]])),
            "[0.0, 0.0, 0.0, 1.0] in samples [1]",
        ),
        (lambda: Affine.rotation(torch.nan), "finite numbers (B,)"),
        (lambda: Affine.rotation(30, size=(0, 4)), "size=(0, 4)"),
        (lambda: Affine.rotation(30, size=224), "size=224"),
        (lambda: Affine.translation(torch.zeros(2, 2), 0), "(2, 2)"),
        (lambda: Affine.translation(torch.zeros(2), torch.zeros(3)), "2 rows, 3 columns"),
        (lambda: Affine.rotation("left"), "a str"),
        (lambda: Affine.of(Affine.identity(1)), "g is a Affine"),
        (lambda: Affine.identity(1).allclose(GroupElement.identity(1)), "a.allclose(Affine.of(g))"),
        (lambda: Affine.identity(1).warp(MAPS[0]), "relation.warp(maps[None])"),
        (lambda: Affine.identity(1).warp(torch.zeros(2, 16)), "einops.rearrange"),
        (lambda: Affine.identity(1).warp(None), "a NoneType"),
        (lambda: Affine.identity(3).warp(MAPS), "3 relations for 2 maps"),
        (lambda: Affine.identity(1).warp(MAPS, fill="wrap"), "fill='edge'"),
        (lambda: Affine.identity(1).warp(MAPS, mode="area"), "mode='bicubic'"),
        (lambda: Affine.identity(1).warp(MAPS, size=(0, 4)), "whole numbers above 0"),
        (lambda: Affine.identity(1).warp(MAPS, size=14), "size=(14, 14)"),
        (lambda: Affine.rotation(30).warp(MAPS.long()), "relation.warp(maps.float())"),
        (lambda: Affine.identity(1).valid((4.5, 4)), "size=(4.5, 4)"),
    ],
)
def test_bad_input_says_what_to_type(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)
    assert "remedy:" in str(caught.value)
