"""EquiMod against its formula, and what it takes for the policy's mean and deviation."""

import math

import pytest
import torch
from term_cases import CASES, DIM, GRID, build, cropped
from twins import assert_twins, batch_norm, mlp, simclr

from ser_reg import GroupElement, SERError, View
from ser_reg.objectives import EquiMod
from ser_reg.objectives.equimod import DEVIATION, MEAN, NAMES
from ser_reg.views import CroppedViews, PathViews, Photometric


def told(view, i):
    """18 numbers of one image, one by one."""
    flat = [*view.relation.box[i].float().tolist(), float(view.relation.flip[i])]
    drawn = {name: values[i] for name, values in view.drawn.items()}
    flat += [float(drawn["jitter"]), *(float(k) for k in drawn["order"])]
    flat += [float(drawn[name]) for name in ("brightness", "contrast", "saturation", "hue", "grey", "blur", "sigma")]
    return [*flat, float(drawn["solarize"])]


def literal(p, features, views):
    y = batch_norm(mlp(p, "projector", torch.cat([z.mean((2, 3)) for z in features])))
    n = len(features[0])
    y0, y1, y2 = y[:n], y[n : 2 * n], y[2 * n :]
    numbers = torch.tensor([told(view, i) for view in views[1:] for i in range(n)], dtype=torch.float64)
    numbers = (numbers - torch.tensor(MEAN).double()) / torch.tensor(DEVIATION).double()
    code = numbers @ p["parameters_head.linears.0.weight"].T
    code = batch_norm(code, p["parameters_head.last_norm.weight"], p["parameters_head.last_norm.bias"])
    foreseen = torch.cat([torch.cat([y0, y0]), code], 1) @ p["predictor.linears.0.weight"].T
    return simclr(torch.cat([y1, y2]), batch_norm(foreseen), 0.2)


@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_formula(seed):
    features, views = CASES["equimod"].batch("equimod", 6, seed)
    assert_twins(build("equimod", seed), literal, features, views)


def test_sizes_are_those_of_the_source():
    term = EquiMod(384)
    shapes = {name: tuple(p.shape) for name, p in term.named_parameters() if p.ndim == 2}
    assert list(shapes.values()) == [(2048, 384), (2048, 2048), (128, 2048), (128, 18), (128, 256)]
    assert term.temperature == 0.2
    assert "temperature=0.2" in repr(term)
    assert term.predictor.last_norm.weight is None
    assert term.projector.last_norm.weight is None


def test_the_default_policy_is_what_is_drawn():
    """Constants against 100,000 draws, to five standard errors; and draws that leave the random state alone."""
    torch.manual_seed(1)
    term = EquiMod(DIM, maker=CroppedViews(original=True, photometric=Photometric()))
    torch.manual_seed(1)
    assert torch.equal(EquiMod(DIM).projector.linears[0].weight, term.projector.linears[0].weight)
    standard_error = torch.tensor(DEVIATION) / math.sqrt(100_000)  # images; the two views of each are of their own
    off = (term.mean - torch.tensor(MEAN)).abs()
    assert (off < 5 * standard_error + 1e-6).all(), dict(zip(NAMES, (off / standard_error).tolist(), strict=True))
    torch.testing.assert_close(term.deviation, torch.tensor(DEVIATION), rtol=0.01, atol=0)
    assert torch.equal(term.deviation, EquiMod(DIM, maker=term.maker).deviation)


def test_moments_are_those_of_the_policy():
    maker = CroppedViews(original=True, flip=0, photometric=(Photometric(jitter=0), Photometric(jitter=0, solarize=1)))
    term = EquiMod(DIM, maker=maker)
    found = {name: (m, d) for name, m, d in zip(NAMES, term.mean.tolist(), term.deviation.tolist(), strict=True)}
    assert found["flip"] == (0, 1)  # never: a deviation of one, so that it divides
    assert found["hue"] == (0, 1)
    assert found["order 3"] == (2, 1)
    assert found["solarize"] == (0.5, 0.5)  # in one of the two views
    assert found["grey"][0] == pytest.approx(0.2, abs=0.01)


def test_statistics_go_along_with_the_state():
    term = EquiMod(DIM, maker=CroppedViews(original=True, area=(0.5, 1), photometric=Photometric()))
    other = EquiMod(DIM)
    other.load_state_dict(term.state_dict())
    assert torch.equal(other.mean, term.mean)


@pytest.mark.parametrize(
    ("views", "text"),
    [
        (lambda: [*cropped(6), *cropped(6)][:3], "a first view that is no original"),
        (
            lambda: [View(torch.empty(6, 0), GroupElement.turn(1, 6), {}), *cropped(6)],
            "a first view that is no original",
        ),
        (lambda: [cropped(6, original=True)[0]] * 3, ""),  # an original is a crop too
        (lambda: [v._replace(drawn={}) for v in cropped(6, original=True)], "no jitter, order"),
        (lambda: [v._replace(relation=GroupElement.identity(6)) for v in cropped(6, original=True)], "a GroupElement"),
        (lambda: cropped(6), "3 features, 2 views"),
    ],
)
def test_views_of_another_kind(views, text):
    term = EquiMod(DIM, hidden=16, width=8).eval()
    z = torch.randn(3, 6, DIM, GRID, GRID).unbind()
    if not text:
        assert math.isfinite(term(z, views()).loss.item())
        return
    with pytest.raises(SERError) as caught:
        term(z, views())
    assert text in caught.value.given
    assert "original=True" in caught.value.remedy


def test_a_whole_image_is_an_original():
    views = cropped(6, original=True)
    whole = [View(torch.empty(6, 0), GroupElement.identity(1), {}), *views[1:]]
    term, z = build("equimod").eval(), torch.randn(3, 6, DIM, GRID, GRID).unbind()
    assert torch.equal(term(z, whole).loss, term(z, views).loss)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: EquiMod(DIM, temperature=0), "temperature=0"),
        (lambda: EquiMod(DIM, hidden=0), "hidden=0"),
        (lambda: EquiMod(DIM, width=1.5), "width=1.5"),
        (lambda: EquiMod(DIM, maker=Photometric()), "a Photometric without the original"),
        (lambda: EquiMod(DIM, maker=PathViews()), "a PathViews without the original"),
        (lambda: EquiMod(DIM, maker=CroppedViews(views=1, original=True)), "a maker of 1 crop"),
        (lambda: EquiMod(DIM, maker=CroppedViews(photometric=Photometric())), "a CroppedViews without the original"),
        (lambda: EquiMod(DIM, maker=CroppedViews(original=True)), "no jitter, order"),
    ],
)
def test_bad_settings(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)
