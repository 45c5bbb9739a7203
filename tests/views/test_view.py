"""Views and how two of them relate."""

import pickle

import pytest
import torch
from elements import elements
from hypothesis import given
from torch.utils.data import default_collate

from ser_reg import Affine, GroupElement, SERError, View, relation


def view(g: GroupElement | Affine) -> View:
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


def crops(n: int) -> Affine:
    return Affine.crop(0.2 + 0.2 * torch.rand(n, 4, dtype=torch.float64)) @ GroupElement.sample(n)


@given(elements())
def test_a_relation_is_of_elements_iff_both_are(g):
    crop1, crop2 = crops(3), crops(3)
    assert isinstance(relation(view(g), view(~g)), GroupElement)
    for first, second in ((crop1, crop2), (g, crop2), (crop1, g)):
        found = relation(view(first), view(second))
        assert isinstance(found, Affine)
        there, back = (each if isinstance(each, Affine) else Affine.of(each) for each in (second, first))
        assert found.allclose(there @ ~back)
        assert (found @ first).allclose(there)


def test_a_relation_for_all_images_stays_one_for_some():
    whole = View(torch.rand(4, 3, 8, 8), Affine.rotation(30.0), {})
    for index, n in ((slice(1, 3), 2), (3, 1), ([0, 2], 2)):
        some = whole[index]
        assert len(some.images) == n
        assert some.relation == whole.relation


def test_views_of_crops_are_views_like_others():
    whole = view(crops(5))
    assert whole[[3, 0]].relation == whole.relation[[3, 0]]
    assert whole[-1].relation == whole.relation[4]
    assert whole.to("cpu").relation == whole.relation
    assert pickle.loads(pickle.dumps(whole)).relation == whole.relation


@pytest.mark.parametrize("relations", [crops(5), GroupElement.sample(5)], ids=["crops", "elements"])
@pytest.mark.parametrize("names", [(), ("hue", "order")])
def test_default_collate_makes_a_batch_of_single_images(relations, names):
    """As a data set gives them: an image, a relation of length one, draws if any; pairs of views and labels too."""
    drawn = {"hue": torch.rand(5), "order": torch.randint(4, (5, 4))}
    single = [View(torch.rand(3, 4, 4), relations[i], {name: drawn[name][i] for name in names}) for i in range(5)]
    batch = default_collate(single)
    assert isinstance(batch, View)
    assert torch.equal(batch.images, torch.stack([each.images for each in single]))
    assert batch.relation == relations
    assert batch.drawn.keys() == set(names)
    assert all(torch.equal(batch.drawn[name], drawn[name]) for name in names)
    (view1, view2), labels = default_collate([((each, each), i) for i, each in enumerate(single)])
    assert isinstance(view1, View)
    assert view2.relation == relations
    assert labels.tolist() == list(range(5))
