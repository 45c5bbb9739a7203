"""Photographs for the report: what is taken, what is drawn, what is refused."""

import pytest
import torch
from small_vits import photos

from ser_reg import SERError
from ser_reg.report.photographs import collect, cuts, whole


def test_whole_image_is_the_centre():
    image = torch.zeros(3, 10, 30)
    image[:, :, 10:20] = 1
    assert whole(image, (10, 10)).min() > 0.99
    assert whole(image, (20, 60)).shape == (3, 20, 60)


@pytest.mark.parametrize("size", [(7, 100), (3, 2), (1, 1), (300, 200)])
def test_cuts_lie_inside(size):
    image = torch.full((3, *size), 0.5)
    for cut in cuts(image, (16, 24), 20, torch.Generator().manual_seed(0)):
        assert cut.shape == (3, 16, 24)
        torch.testing.assert_close(cut, torch.full((3, 16, 24), 0.5))


def test_bytes_and_fractions_alike():
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    found, unreadable = collect([image, image.float() / 255], 2, 0)
    assert found["image 0"].dtype == torch.uint8  # not four times as large in memory
    assert torch.equal(*(whole(image, (8, 8)) for image in found.values()))
    assert not unreadable


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (photos(1), "at least two"),
        ([], "at least two"),
        ([torch.randn(3, 8, 8)] * 2, r"in \[0, 1\]"),
        ([torch.ones(3, 8, 8, dtype=torch.int64)] * 2, r"in \[0, 1\]"),
        ([torch.rand(8, 8)] * 2, r"\(3, height, width\)"),
        ([torch.rand(1, 8, 8)] * 2, "image.expand"),
    ],
)
def test_what_cannot_be_used(images, text):
    with pytest.raises(SERError, match=text):
        collect(images, 64, 0)


def test_more_than_asked_for_are_drawn():
    images = {str(i): torch.full((3, 2, 2), i / 50) for i in range(50)}
    first, again, other = (list(collect(images, 10, seed)[0]) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 10
    assert first == sorted(first, key=int)
    with pytest.raises(SERError, match="max_images=1"):
        collect(images, 1, 0)
