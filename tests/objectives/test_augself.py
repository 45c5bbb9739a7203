"""AugSelf against its formula, and its targets against crops made by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from term_cases import CASES, DIM, GRID, build, cropped, equivariant
from twins import assert_twins, mlp

from ser_reg import EquivariantViews, SERError, View
from ser_reg.geometry import Affine, GroupElement
from ser_reg.objectives import AugSelf
from ser_reg.views import CroppedViews, Photometric


def literal(p, features, views):
    """Sum over heads of weight times the mean over both orders, image by image."""
    weights = {"crop": 0.5, "colour": 0.5, **{k: v for k, v in CASES["augself"].settings.items() if k != "width"}}
    y = [z.mean((2, 3)) for z in features]
    total = 0.0
    for name, weight in weights.items():
        rows = torch.cat([torch.cat([y[a], y[b]], 1) for a, b in ((0, 1), (1, 0))])
        predicted = mlp(p, f"heads.{name}", rows)
        losses = []
        for row, (a, b) in enumerate([(0, 1)] * len(y[0]) + [(1, 0)] * len(y[0])):
            i = row % len(y[0])
            losses.append(one(name, predicted[row], views[a], views[b], i))
        total = total + weight * torch.stack(losses).mean()
    return total


def one(name, predicted, a, b, i):
    """The loss of one head for one image."""
    if name == "crop":
        told = []
        for view in (a, b):
            top, left, height, width = view.relation.box[i]
            x = left + width / 2
            told.append(torch.stack([top + height / 2, 1 - x if view.relation.flip[i] else x, height, width]))
        return ((torch.tanh(predicted) - (told[1] - told[0])) ** 2).mean()
    if name == "colour":
        told = [
            torch.stack(
                [
                    (v.drawn["brightness"][i] - 1) / 0.4,
                    (v.drawn["contrast"][i] - 1) / 0.4,
                    (v.drawn["saturation"][i] - 1) / 0.2,
                    v.drawn["hue"][i] / 0.1,
                ]
            ).double()
            for v in (a, b)
        ]
        return ((predicted - (told[1] - told[0])) ** 2).mean()
    if name == "flip":
        differ = float(a.relation.flip[i] != b.relation.flip[i])
        p = torch.sigmoid(predicted[0])
        return -(differ * p.log() + (1 - differ) * (1 - p).log())
    if name == "turn":
        return -F.log_softmax(predicted, 0)[(b.relation.turns[i] - a.relation.turns[i]) % 4]
    drawn = "sigma" if name == "blur" else "solarize"
    return (predicted[0] - (b.drawn[drawn][i].double() - a.drawn[drawn][i].double())) ** 2


def doubled(views):
    """What was drawn in float64, as the twin computes with it."""
    return [v._replace(drawn={k: x.double() for k, x in v.drawn.items()}) for v in views]


@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_formula(seed):
    features, views = CASES["augself"].batch("augself", 7, seed)
    assert_twins(build("augself", seed), literal, features, doubled(views))


def by_hand(box, flip, drawn=None):
    moves = GroupElement(torch.zeros(1, dtype=torch.int64), torch.tensor([flip]), torch.ones(1, 2).double())
    relation = moves @ Affine.crop(torch.tensor([box], dtype=torch.float64))
    return View(torch.empty(1, 0), relation, drawn or {})


def test_each_view_is_mirrored_by_its_own_flip():
    """The public code mirrors view 2 by the flip of view 1."""
    term = AugSelf(DIM, colour=0)
    left, right = [0.0, 0.0, 0.5, 0.25], [0.5, 0.75, 0.5, 0.25]
    y = torch.zeros(1, DIM)
    told = [term._describe("", by_hand(*view), y)["crop"] for view in ((left, False), (right, False), (right, True))]
    torch.testing.assert_close(told[0], torch.tensor([[0.25, 0.125, 0.5, 0.25]]))
    torch.testing.assert_close(told[1], torch.tensor([[0.75, 0.875, 0.5, 0.25]]))
    torch.testing.assert_close(told[2], torch.tensor([[0.75, 0.125, 0.5, 0.25]]))


def test_half_ranges_are_those_of_the_maker():
    assert AugSelf(DIM).ranges == (0.4, 0.4, 0.2, 0.1)
    one = CroppedViews(photometric=Photometric(brightness=0.8, hue=0))
    assert AugSelf(DIM, maker=one).ranges == (0.8, 0.4, 0.2, 0)
    two = CroppedViews(photometric=(Photometric(contrast=0.1), Photometric(contrast=0.6)))
    assert AugSelf(DIM, maker=two).ranges == (0.4, 0.6, 0.2, 0.1)
    views = cropped(5)
    told = AugSelf(DIM, maker=one)._describe("", views[0], torch.zeros(5, DIM))["colour"]
    torch.testing.assert_close(told[:, 0], (views[0].drawn["brightness"] - 1) / 0.8)
    assert told.isfinite().all()


def test_a_head_of_weight_0_is_not_built():
    assert list(AugSelf(DIM).heads) == ["crop", "colour"]
    term = AugSelf(DIM, crop=0, colour=0, turn=1)
    assert list(term.heads) == ["turn"]
    assert repr(term).startswith("AugSelf(\n  turn=1")
    logs = term(torch.randn(2, 8, DIM, requires_grad=True).unbind(), equivariant(8)).logs
    assert set(logs) == {"accuracy", "chance", "feature_std"}  # whole images, turned: a turn can be told of them
    assert logs["chance"].item() == pytest.approx(math.log(4))


def test_logs_of_a_head_that_knows():
    """Features that hold the box, and a head that reads it: r2 is 1, chance the variance."""
    term = build("augself")
    z, views = CASES["augself"].batch("augself", 32)
    out = term(z, views)
    weights = term.weights
    targets = [term._describe("", view, z[0].mean((2, 3))) for view in views]
    difference = torch.cat([targets[1]["crop"] - targets[0]["crop"], targets[0]["crop"] - targets[1]["crop"]])
    assert out.logs["chance"].item() > weights["crop"] * difference.square().mean().item() + weights["turn"] * math.log(
        4
    )
    assert out.logs["r2"] == out.logs["r2_crop"]
    assert {"accuracy_flip", "accuracy_turn", "r2_blur", "r2_solarize"} <= set(out.logs)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AugSelf(DIM, crop=-1), "crop=-1"),
        (lambda: AugSelf(DIM, crop=0, colour=0), "no head with a weight"),
        (lambda: AugSelf(DIM, width=0), "width=0"),
        (lambda: AugSelf(DIM, maker=CroppedViews()), "a maker that draws no colour"),
        (lambda: AugSelf(DIM, maker=CroppedViews(photometric=Photometric(jitter=0))), "a maker that draws no colour"),
        (lambda: AugSelf(DIM, maker=EquivariantViews(photometric=Photometric())), "a maker that draws no crop"),
        (lambda: AugSelf(DIM, colour=0, maker=CroppedViews(area=(1, 1))), "a maker that draws no crop"),
        (lambda: AugSelf(DIM, colour=0, flip=1, maker=CroppedViews(flip=0)), "a maker that draws no flip"),
        (lambda: AugSelf(DIM, colour=0, turn=1, maker=CroppedViews()), "a maker that draws no turn"),
        (lambda: AugSelf(DIM, colour=0, turn=1, maker=CroppedViews()), "CroppedViews(turned=True)"),
        (lambda: AugSelf(DIM, solarize=1, maker=CroppedViews(photometric=Photometric())), "draws no solarize"),
        (lambda: AugSelf(DIM, blur=1, maker=CroppedViews(photometric=Photometric(blur=0))), "draws no blur"),
    ],
)
def test_bad_settings(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)


def test_a_name_that_was_not_drawn():
    views = cropped(4)
    bare = [v._replace(drawn={k: x for k, x in v.drawn.items() if k != "hue"}) for v in views]
    short = [v._replace(drawn={k: x[:3] for k, x in v.drawn.items()}) for v in views]
    for given, text in ((bare, "no hue in what was drawn"), (short, "3 values of brightness for 4 images")):
        with pytest.raises(SERError, match=text) as caught:
            AugSelf(DIM).eval()(torch.randn(2, 4, DIM, GRID, GRID).unbind(), given)
        assert "CroppedViews" in caught.value.remedy
