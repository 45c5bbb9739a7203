"""STL against its formula, pair by pair."""

import math

import pytest
import torch
from term_cases import CASES, DIM, GRID, build, cropped, equivariant
from twins import assert_twins, mlp, simclr

from ser_reg import SERError
from ser_reg.objectives import STL
from ser_reg.views import CroppedViews, Photometric


def literal(p, features, views):
    y1, y2 = (z.mean((2, 3)) for z in features)
    n = len(y1)
    t12, t21 = mlp(p, "code", torch.cat([y1, y2], 1)), mlp(p, "code", torch.cat([y2, y1], 1))

    def matrix(code):
        """W of one code, (D, D)."""
        if "transform.matrices.1.weight" in p:
            left, right = ((p[f"transform.matrices.{i}.weight"] @ code).reshape(DIM, -1) for i in (0, 1))
            return left @ right.T
        return (p["transform.matrices.0.weight"] @ code).reshape(DIM, DIM)

    partner = [i + 1 if i % 2 == 0 else i - 1 for i in range(n)]
    foreseen1 = torch.stack([matrix(t21[partner[i]]) @ y2[i] for i in range(n)])
    foreseen2 = torch.stack([matrix(t12[partner[i]]) @ y1[i] for i in range(n)])

    def project(name, *rows):
        return torch.cat([mlp(p, f"projectors.{name}", x) for x in rows])

    equivariance = simclr(
        project("equivariance", y1, y2), project("equivariance", foreseen1, foreseen2), temperature=0.2
    )
    even, odd = (torch.cat([t12[i::2], t21[i::2]]) for i in (0, 1))
    transformation = simclr(project("transformation", even), project("transformation", odd), temperature=0.2)
    invariance = simclr(project("invariance", y1), project("invariance", y2), temperature=0.2)
    return equivariance + 0.1 * transformation + 0.3 * invariance


@pytest.mark.parametrize("rank", [None, 3])
def test_against_the_formula(rank):
    features, views = CASES["stl"].batch("stl", 6)
    term = build("stl") if rank is None else STL(DIM, invariance=0.3, rank=rank).double()
    assert_twins(term, literal, features, views)


def test_sizes_are_those_of_the_source():
    term = STL(384)
    assert term.weights == {"equivariance": 1.0, "transformation": 0.1}
    assert term.transform.matrices[0].weight.shape == (384 * 384, 128)
    assert sum(p.numel() for p in STL(384, rank=8).transform.parameters()) == 2 * 384 * 8 * 128
    shapes = {name: tuple(p.shape) for name, p in term.named_parameters() if p.ndim == 2}
    assert list(shapes.values()) == [
        *((128, 768), (128, 128), (384 * 384, 128)),
        *((512, 384), (128, 512), (128, 128), (128, 128)),
    ]
    assert "equivariance=1, transformation=0.1" in repr(term)


def test_a_head_of_weight_0_is_not_built():
    features, views = CASES["stl"].batch("stl", 6)
    features = [z.detach().float().requires_grad_() for z in features]
    only = STL(DIM, equivariance=0, transformation=0, invariance=1)
    assert {name.split(".")[0] for name, _ in only.named_parameters()} == {"projectors"}
    assert set(only(features, views).logs) == {"accuracy", "chance", "feature_std"}
    codes = STL(DIM, equivariance=0)
    assert codes.transform is None
    codes(features, views).loss.backward()
    assert all(p.grad is not None for p in codes.parameters())
    logs = STL(DIM)(features, views).logs
    assert logs["accuracy"] == logs["accuracy_equivariance"]
    assert logs["chance"].item() == pytest.approx(math.log(1 + 2 * 11) + 0.1 * math.log(1 + 2 * 5))


def test_pairs_are_told_by_what_they_share():
    z = torch.randn(2, 6, DIM, GRID, GRID).unbind()
    term = STL(DIM).eval()
    for maker in (CroppedViews(16, paired=True), CroppedViews(16, paired=True, photometric=Photometric(jitter=1))):
        term(z, maker(torch.rand(6, 3, 24, 24)))
    assert term(z, cropped(6, paired=True)).loss.isfinite()


@pytest.mark.parametrize(
    ("views", "n", "text"),
    [
        (lambda: cropped(6), 6, "images 2i and 2i+1 of different"),
        (lambda: [v[torch.arange(6).roll(1)] for v in cropped(6, paired=True)], 6, "images 2i and 2i+1 of different"),
        (lambda: [v[:5] for v in cropped(6, paired=True)], 5, "5 images"),
        (lambda: CroppedViews(16)(torch.rand(6, 3, 24, 24)), 6, "images 2i and 2i+1 of different box"),
        (lambda: equivariant(6), 6, "a view moved by a GroupElement"),
        (lambda: [v._replace(drawn={"hue": torch.zeros(4)}) for v in cropped(6)], 6, "4 values of hue for 6 images"),
    ],
)
def test_views_of_another_kind(views, n, text):
    with pytest.raises(SERError) as caught:
        STL(DIM).eval()(torch.randn(2, n, DIM, GRID, GRID).unbind(), views())
    assert text in caught.value.given
    assert "paired=True" in caught.value.remedy


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: STL(DIM, equivariance=0, transformation=0), "no loss with a weight"),
        (lambda: STL(DIM, invariance=-1), "invariance=-1"),
        (lambda: STL(DIM, rank=0), "rank=0"),
        (lambda: STL(DIM, temperature=math.inf), "temperature=inf"),
    ],
)
def test_bad_settings(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)
