"""Crop and resize against torchvision, pixel for pixel, and against slices of what is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ser_reg import Affine, SERError
from ser_reg.geometry.resize import crop_and_resize


def whole_boxes(n, size, generator=None):
    """n boxes of whole pixels."""
    found = []
    for _ in range(n):
        sides = [int(torch.randint(1, side + 1, (), generator=generator)) for side in size]
        corner = [int(torch.randint(a - b + 1, (), generator=generator)) for a, b in zip(size, sides, strict=True)]
        found.append([*corner, *sides])
    return found


def in_parts(boxes, size):
    return torch.tensor(boxes, dtype=torch.float64) / torch.tensor([*size, *size])


# One column of pixels, before or after, is left out: torch's own antialiased resampling of float32 is wrong there.
@given(
    st.tuples(*[st.integers(2, 60)] * 2), st.tuples(st.integers(1, 50), st.integers(2, 50)),
    st.sampled_from(["bicubic", "bilinear"]), st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_equals_torchvision(size, new, mode, antialias, seed):
    """Up and down, boxes of whole pixels, each image its own."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 2, *size, generator=generator)
    boxes = [box for box in whole_boxes(6, size, generator) if box[3] > 1][:3]
    images = images[: len(boxes)]
    if not boxes:
        return
    ours = crop_and_resize(images, in_parts(boxes, size), new, mode, antialias)
    interpolation = InterpolationMode(mode)
    theirs = [
        tv.resized_crop(image, *box, new, interpolation, antialias) for image, box in zip(images, boxes, strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_equals_torchvision_at_the_size_of_photographs(mode):
    """Torchvision's own weights of float32 are off by 1e-5 there; against its float64 there is less between them."""
    size, new = (375, 500), (224, 224)
    images = torch.rand(3, 3, *size)
    boxes = [[0, 0, 375, 500], [40, 30, 130, 98], [100, 7, 275, 490]]
    ours = crop_and_resize(images, in_parts(boxes, size), new, mode)
    for image, box, found in zip(images, boxes, ours, strict=True):
        theirs = tv.resized_crop(image, *box, new, InterpolationMode(mode), antialias=True)
        torch.testing.assert_close(found, theirs, rtol=0, atol=3e-5)
        theirs = tv.resized_crop(image.double(), *box, new, InterpolationMode(mode), antialias=True)
        torch.testing.assert_close(found.double(), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_equals_interpolation_in_float64(mode, antialias):
    images, boxes, size = torch.rand(8, 2, 30, 41, dtype=torch.float64), whole_boxes(8, (30, 41)), (13, 19)
    ours = crop_and_resize(images, in_parts(boxes, (30, 41)), size, mode, antialias)
    for image, (top, left, height, width), found in zip(images, boxes, ours, strict=True):
        if width > 1:
            cut = image[None, :, top : top + height, left : left + width]
            theirs = F.interpolate(cut, size, mode=mode, align_corners=False, antialias=antialias)[0]
            torch.testing.assert_close(found, theirs, rtol=0, atol=1e-12)


def test_its_own_size_is_the_slice():
    images = torch.rand(2, 3, 20, 30)
    box = in_parts([[2, 3, 10, 12], [10, 18, 10, 12]], (20, 30))
    expected = torch.stack([images[0, :, 2:12, 3:15], images[1, :, 10:20, 18:30]])
    torch.testing.assert_close(crop_and_resize(images, box, (10, 12)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_pixels_beyond_the_box_have_no_part(mode, antialias):
    """Whatever they are, edges between pixels included."""
    box = torch.tensor([[0.25, 0.3, 0.5, 0.4], [0.21, 0.33, 0.47, 0.31]]).double()
    images = torch.rand(2, 1, 20, 20)
    crops = crop_and_resize(images, box, (9, 9), mode, antialias)
    beyond = images.clone()
    beyond[0, :, :5], beyond[0, :, 15:], beyond[0, :, :, :6], beyond[0, :, :, 14:] = [1e6] * 4
    beyond[1, :, :4], beyond[1, :, 14:], beyond[1, :, :, :7], beyond[1, :, :, 13:] = [1e6] * 4  # centres 4.5 … 13.5
    assert torch.equal(crop_and_resize(beyond, box, (9, 9), mode, antialias), crops)


@given(st.tuples(*[st.floats(0, 0.8)] * 2), st.tuples(*[st.floats(0.001, 0.2)] * 2), st.booleans())
def test_constants_stay_and_everything_is_finite(corner, sides, antialias):
    """Boxes smaller than a pixel included."""
    box = torch.tensor([[*corner, *sides]]).double()
    for mode in ("bicubic", "bilinear"):
        crops = crop_and_resize(torch.ones(1, 1, 12, 17, dtype=torch.float64), box, (5, 6), mode, antialias)
        torch.testing.assert_close(crops, torch.ones(1, 1, 5, 6).double(), rtol=0, atol=1e-9)


def test_a_box_is_that_of_affine():
    """A smooth image, a box whose edges lie between pixels: away from the edge of the box they agree."""
    rows, columns = torch.meshgrid(torch.arange(64.0).double(), torch.arange(80.0).double(), indexing="ij")
    image = torch.stack([rows, columns])[None]
    box = torch.tensor([[0.1234, 0.2345, 0.4321, 0.5432]]).double()
    crop, _ = Affine.crop(box).warp(image, size=(32, 32))
    ours = crop_and_resize(image, box, (32, 32), antialias=False)
    inside = (..., slice(4, -4), slice(4, -4))
    torch.testing.assert_close(ours[inside], crop[inside], rtol=0, atol=1e-10)


def test_batch_equals_loop_and_gradient():
    images = torch.rand(4, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    box = in_parts(whole_boxes(4, (7, 9)), (7, 9))
    loop = torch.cat([crop_and_resize(images[i : i + 1], box[i : i + 1], (4, 5)) for i in range(4)])
    torch.testing.assert_close(crop_and_resize(images, box, (4, 5)), loop, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: crop_and_resize(x, box[:2], (3, 4)), images[:2, :1])
    assert torch.autograd.gradgradcheck(lambda x: crop_and_resize(x, box[:2], (2, 3)) ** 2, images[:2, :1, :5, :6])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_resampled_in_float32(dtype):
    images, box = torch.rand(4, 3, 20, 20).to(dtype), in_parts(whole_boxes(4, (20, 20)), (20, 20))
    expected = crop_and_resize(images.float(), box, (8, 8)).to(dtype)
    assert torch.equal(crop_and_resize(images, box, (8, 8)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(crop_and_resize(images, box, (8, 8)), expected)


def test_layout_and_no_image():
    images, box = torch.rand(2, 3, 20, 20), in_parts(whole_boxes(2, (20, 20)), (20, 20))
    crops = crop_and_resize(images, box, (8, 9))
    assert crops.is_contiguous()
    torch.testing.assert_close(crop_and_resize(images.to(memory_format=torch.channels_last), box, (8, 9)), crops)
    none = torch.zeros(0, 3, 20, 20, requires_grad=True)
    crops = crop_and_resize(none, box[:0], (8, 9))
    assert crops.shape == (0, 3, 8, 9)
    crops.sum().backward()


IMAGES, BOX = torch.zeros(2, 3, 8, 8), torch.tensor([[0, 0, 0.5, 1]] * 2).double()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: crop_and_resize(IMAGES[0], BOX, (4, 4)), "images[None]"),
        (lambda: crop_and_resize(list(IMAGES), BOX, (4, 4)), "torch.stack(list(images))"),
        (lambda: crop_and_resize(IMAGES.byte(), BOX, (4, 4)), "images.float() / 255"),
        (lambda: crop_and_resize(IMAGES, BOX.float(), (4, 4)), "box.double()"),
        (lambda: crop_and_resize(IMAGES, BOX.to("meta"), (4, 4)), "box.cpu()"),
        (lambda: crop_and_resize(IMAGES, BOX[:1], (4, 4)), "1 boxes for 2 images"),
        (lambda: crop_and_resize(IMAGES, BOX * float("nan"), (4, 4)), "finite numbers"),
        (lambda: crop_and_resize(IMAGES, BOX + 0.1, (4, 4)), "boxes inside of their images"),
        (lambda: crop_and_resize(IMAGES, BOX, 4), "size=(224, 224)"),
        (lambda: crop_and_resize(IMAGES, BOX, (4, 4), mode="area"), "mode='bicubic'"),
    ],
)
def test_bad_input_says_what_to_type(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)
