"""Views and how two of them relate."""

import pickle

import pytest
import torch
from elements import elements
from hypothesis import given

from ser_reg import GroupElement, SERError, View, relation


def view(g: GroupElement) -> View:
    n = len(g)
    return View(torch.rand(n, 3, 4, 4), g, {"hue": torch.arange(n), "order": torch.rand(n, 4)})


@given(elements(), elements())
def test_the_relation_takes_the_first_view_to_the_second(g1, g2):
    assert (relation(view(g1), view(g2)) @ g1).allclose(g2)
    assert relation(view(g2), view(g1)).allclose(~relation(view(g1), view(g2)))


def test_some_images_of_a_view():
    whole = view(GroupElement.sample(5))
    for index in (slice(1, 4), [3, 0], torch.tensor([2]), torch.tensor([True, False, True, False, True])):
        some = whole[index]
        assert torch.equal(some.images, whole.images[index])
        assert some.relation == whole.relation[index]
        assert torch.equal(some.drawn["order"], whole.drawn["order"][index])
    assert torch.equal(whole[-1].images, whole.images[4:])
    assert whole[-1].relation == whole.relation[4]
    with pytest.raises(IndexError):
        whole[5]


def test_a_view_is_a_tuple_that_travels():
    whole = view(GroupElement.sample(5))
    images, g, drawn = pickle.loads(pickle.dumps(whole))
    assert torch.equal(images, whole.images)
    assert g == whole.relation
    assert drawn.keys() == whole.drawn.keys()
    moved = whole.to("meta")
    assert {moved.images.device.type, moved.drawn["hue"].device.type} == {"meta"}
    assert moved.relation == whole.relation


def test_what_is_no_view_is_named():
    with pytest.raises(SERError, match="view2 is a Tensor"):
        relation(view(GroupElement.identity(2)), torch.rand(2, 3, 4, 4))
