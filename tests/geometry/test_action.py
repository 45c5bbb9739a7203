"""The action: direction pinned from outside, laws of composition, the fast path against a literal twin."""

import numpy as np
import pytest
import torch
from elements import DIHEDRAL, dihedral, element
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from ser_reg import GroupElement, SERError, act
from ser_reg.geometry import action as module

# quarter turns counter-clockwise after a left-right flip, in Pillow's words
PILLOW = {
    (0, False): [],
    (1, False): [Image.Transpose.ROTATE_90],
    (2, False): [Image.Transpose.ROTATE_180],
    (3, False): [Image.Transpose.ROTATE_270],
    (0, True): [Image.Transpose.FLIP_LEFT_RIGHT],
    (1, True): [Image.Transpose.TRANSPOSE],
    (2, True): [Image.Transpose.FLIP_TOP_BOTTOM],
    (3, True): [Image.Transpose.TRANSVERSE],
}


def literal(g, x, mode="bicubic", antialias=False):
    """The definition, a sample at a time: scale, then flip, then turn."""
    maps = []
    for turns, flip, scale, z in zip(g.turns.tolist(), g.flip.tolist(), g.scale.tolist(), x.split(1), strict=True):
        size = tuple(round(side * factor) for side, factor in zip(z.shape[-2:], scale, strict=True))
        if size != tuple(z.shape[-2:]):
            z = F.interpolate(z, size, mode=mode, align_corners=False, antialias=antialias)
        maps.append(torch.rot90(z.flip(-1) if flip else z, turns, (-2, -1)))
    return torch.cat(maps)


def on_grid(n, size, new):
    """n elements that take a grid of `size` to one of `new`."""
    g = dihedral(n)
    pre = torch.where((g.turns % 2 == 1)[:, None], torch.tensor(new[::-1]), torch.tensor(new)).double()
    return GroupElement(g.turns, g.flip, pre / torch.tensor(size))


@pytest.mark.parametrize(("turns", "flip"), DIHEDRAL)
@pytest.mark.parametrize("size", [(6, 6), (5, 8), (1, 7)])
def test_equals_pillow(turns, flip, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(image)
    for operation in PILLOW[turns, flip]:
        picture = picture.transpose(operation)
    ours = act(element(turns, flip), torch.from_numpy(image).permute(2, 0, 1)[None])
    assert torch.equal(ours[0].permute(1, 2, 0), torch.from_numpy(np.array(picture)))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_composition_is_bitwise_for_permutations(dtype):
    g, h = dihedral(64), dihedral(64)
    x = (torch.randn(64, 3, 7, 7) * 50).to(dtype)
    assert torch.equal(act(g, act(h, x)), act(g @ h, x))
    assert torch.equal(act(~g, act(g, x)), x)
    assert act(g, x).dtype == dtype


@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 3), st.integers(0, 10**6))
def test_permutations_equal_the_definition(n, side, channels, seed):
    torch.manual_seed(seed)
    x, g = torch.randn(n, channels, side, side), dihedral(n)
    assert torch.equal(act(g, x), literal(g, x))


@given(
    st.integers(1, 5), st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 9)] * 2),
    st.sampled_from(["bicubic", "bilinear"]), st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_scaling_equals_the_definition(n, size, new, mode, antialias, seed):
    """The separable operator against torch's own interpolation, value and gradient; mixed turns of rectangles too."""
    torch.manual_seed(seed)
    antialias = antialias and min(size) > 1  # torch 2.15 itself resamples maps of one column wrongly there
    g = on_grid(n, size, new)
    x = torch.randn(n, 2, *size, dtype=torch.float64, requires_grad=True)
    ours, theirs = act(g, x, mode, antialias=antialias), literal(g, x, mode, antialias)
    assert tuple(ours.shape[-2:]) == new
    weight = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_scaling_composes_on_a_linear_ramp():
    """Bilinear resampling is exact on a ramp away from the border, so that composition shows no discretisation."""
    rows, columns = torch.meshgrid(torch.arange(24.0).double(), torch.arange(24.0).double(), indexing="ij")
    ramp = torch.stack([rows, columns, 2 * rows - 3 * columns])[None]
    for turns, flip in DIHEDRAL:
        for turns2, flip2 in DIHEDRAL:
            h = element(turns, flip, (20 / 24, 30 / 24))
            between = h.output_size((24, 24))
            g = element(turns2, flip2, (28 / between[0], 26 / between[1]))
            twice = act(g, act(h, ramp, "bilinear"), "bilinear")
            once = act(g @ h, ramp, "bilinear")
            assert twice.shape == once.shape
            inside = (..., slice(4, -4), slice(4, -4))
            torch.testing.assert_close(twice[inside], once[inside], rtol=0, atol=1e-12)


def test_commutes_with_patch_pooling():
    x, g = torch.randn(16, 3, 24, 24, dtype=torch.float64), dihedral(16)
    torch.testing.assert_close(F.avg_pool2d(act(g, x), 4), act(g, F.avg_pool2d(x, 4)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("new", [(9, 9), (7, 12)])
def test_batch_equals_loop(new):
    x = torch.randn(12, 4, 9, 9, dtype=torch.float64)
    g = on_grid(12, (9, 9), new)
    loop = torch.cat([act(g[i], x[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(act(g, x), loop, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        act(g[3], x), torch.cat([act(g[3], x[i : i + 1]) for i in range(12)]), rtol=0, atol=1e-13
    )


def test_chunks_change_nothing(monkeypatch):
    x, g = torch.randn(11, 4, 9, 9, dtype=torch.float64), on_grid(11, (9, 9), (7, 12))
    whole = act(g, x)
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * 4 * 84)
    torch.testing.assert_close(act(g, x), whole, rtol=0, atol=1e-14)


def test_gradients():
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    for g in (dihedral(3), on_grid(3, (4, 4), (3, 5))):
        assert torch.autograd.gradcheck(lambda x, g=g: act(g, x), x)
        assert torch.autograd.gradgradcheck(lambda x, g=g: act(g, x) ** 2, x)


def test_layouts_agree():
    """Token maps come channels-last, images channels-first."""
    x, g = torch.randn(6, 8, 9, 9), on_grid(6, (9, 9), (7, 12))
    assert torch.equal(act(g, x), act(g, x.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_resampled_in_float32(dtype):
    x, g = torch.randn(6, 8, 9, 9).to(dtype), on_grid(6, (9, 9), (7, 12))
    expected = act(g, x.float()).to(dtype)
    assert torch.equal(act(g, x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(act(g, x), expected)


def test_tables_cached_in_inference_mode_can_be_trained_with():
    size, new = (13, 13), (11, 17)  # which no other test uses: its tables are made here
    with torch.inference_mode():
        act(on_grid(2, size, new), torch.randn(2, 1, *size))
    x = torch.randn(2, 1, *size, requires_grad=True)
    act(on_grid(2, size, new), x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: act(GroupElement.identity(1), torch.zeros(3, 8, 8)), "act(g, x[None])"),
        (lambda: act(GroupElement.identity(1), torch.zeros(2, 16)), "einops.rearrange"),
        (lambda: act(GroupElement.identity(3), torch.zeros(2, 1, 8, 8)), "3 elements for 2 maps"),
        (lambda: act(GroupElement.identity(2), torch.zeros(2, 1, 8, 8), mode="area"), "mode='bicubic'"),
        (lambda: act(element(0, False, (2.0, 2.0)), torch.zeros(1, 1, 4, 4).long()), "act(g, x.float())"),
        (lambda: act(dihedral(32), torch.zeros(32, 1, 4, 6)), "on rectangles the same parity of turns"),
    ],
)
def test_bad_input_says_what_to_type(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)


def test_no_map_has_a_size_all_the_same():
    x = torch.zeros(0, 3, 4, 8, requires_grad=True)
    for g, size in ((GroupElement.turn(1), (8, 4)), (GroupElement.scaling(0.5, 2), (2, 16))):
        moved = act(g, x)
        assert moved.shape == (0, 3, *size)
        moved.sum().backward()


@pytest.mark.parametrize(
    "pair", [(GroupElement.turn(1), [1]), (1, torch.zeros(1, 1, 2, 2)), (GroupElement.turn(1), None)]
)
def test_other_things_than_elements_and_maps_are_named(pair):
    with pytest.raises(SERError, match="a GroupElement and a tensor"):
        act(*pair)


@pytest.mark.parametrize(("old", "new"), [((16, 16), (12, 20)), ((24, 24), (6, 6))])
def test_temporaries_stay_small_and_chunks_large(old, new, monkeypatch):
    """Whatever the batch: each chunk fits the limit, forward and backward, and two of them would not."""
    chunks, resample = [], module._resample

    def watched(maps, rows, columns):
        moved = resample(maps, rows, columns)
        chunks.append((len(maps), max(maps.numel(), moved.numel()) * 4))
        return moved

    monkeypatch.setattr(module, "_resample", watched)
    monkeypatch.setattr(module, "CHUNK_BYTES", 10 * 4 * 5 * max(old[0] * old[1], new[0] * new[1]) + 1)
    x = torch.randn(35, 5, *old, requires_grad=True)
    act(GroupElement.scaling(new[0] / old[0], new[1] / old[1]), x).sum().backward()
    assert [images for images, _ in chunks] == 2 * [10, 10, 10, 5]
    assert max(size for _, size in chunks) <= module.CHUNK_BYTES
