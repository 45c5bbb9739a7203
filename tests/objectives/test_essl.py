"""E-SSL against its formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from term_cases import CASES, DIM, GRID, all_turns, build, turned
from twins import assert_twins

from ser_reg import GroupElement, SERError, View
from ser_reg.geometry import Affine
from ser_reg.objectives import ESSL
from ser_reg.views import CroppedViews, Photometric


def literal(p, features, views):
    x = features[0].mean((2, 3))
    for i, norm in ((0, 1), (3, 4), (6, 7)):
        x = x @ p[f"head.{i}.weight"].T + p[f"head.{i}.bias"]
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = x * p[f"head.{norm}.weight"] + p[f"head.{norm}.bias"]
        x = x.relu() if norm < 7 else x
    x = x @ p["head.8.weight"].T + p["head.8.bias"]
    losses = [-F.log_softmax(row, 0)[turn] for row, turn in zip(x, views[0].relation.turns, strict=True)]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_formula(seed):
    features, views = CASES["essl"].batch("essl", 5, seed)
    assert_twins(build("essl", seed), literal, features, views)


def test_sizes_are_those_of_the_source():
    linears = [p for p in ESSL(384).parameters() if p.ndim == 2]
    assert [tuple(p.shape) for p in linears] == [(384, 384), (384, 384), (256, 384), (4, 256)]


def test_the_label_is_the_turn_whatever_the_crop():
    (view,) = turned(3)
    assert view.relation.turns.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    term = build("essl")
    z = torch.zeros(12, DIM, dtype=torch.float64)
    z[range(12), view.relation.turns] = 50.0  # features that say the turn
    for _ in range(60):
        loss = term([z.clone().requires_grad_()], [view]).loss
        for p, grad in zip(term.parameters(), torch.autograd.grad(loss, list(term.parameters())), strict=True):
            p.data.sub_(0.1 * grad)
    out = term.eval()([z], [view])
    assert out.logs["accuracy"] == 1
    assert out.loss < 0.1
    assert out.logs["chance"].item() == pytest.approx(math.log(4))


def test_views_that_a_maker_makes():
    make_views = CroppedViews(size=16, area=(0.05, 0.14), views=1, turned="all", photometric=Photometric(blur=0.1))
    views = make_views(torch.rand(3, 3, 32, 32))
    term = ESSL(DIM, maker=make_views)
    out = term([torch.randn(12, DIM, GRID, GRID, requires_grad=True)], views)
    assert out.loss.item() == pytest.approx(math.log(4), rel=0.5)


@pytest.mark.parametrize(
    ("relation", "text"),
    [
        (GroupElement.turn(1, 8), "[0, 8, 0, 0] are turned"),
        (Affine.identity(8), "[8, 0, 0, 0] are turned"),
        (all_turns(2)[:7], "features of view 1 of 8 images, of which the view has 7"),
        (all_turns(2)[[0, 1, 2, 3, 4, 5, 6, 5]], "[2, 2, 3, 1] are turned"),
    ],
)
def test_views_of_another_kind(relation, text):
    with pytest.raises(SERError) as caught:
        ESSL(DIM).eval()([torch.randn(8, DIM)], [View(torch.empty(8, 0), relation, {})])
    assert text in caught.value.given
    assert 'turned="all"' in caught.value.remedy


def test_bad_settings():
    with pytest.raises(SERError, match="hidden=0"):
        ESSL(DIM, hidden=0)
