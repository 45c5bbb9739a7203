"""What all terms share, held by a term that gathers nothing and one that does."""

import pytest
import torch
from processes import Here

from ser_reg import GroupElement, SERError, View
from ser_reg.objectives import OBJECTIVES, Objective, Output
from ser_reg.objectives.base import matching


class Distance(Objective):
    """A term without a word between ranks."""

    wants = "views = EquivariantViews(patch_size=4)(images)"
    gathers = False

    def compare(self, features, views, group):
        assert features[0].dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        if not len(features[0]):
            raise SERError("Distance", "no image", "one at least", "images")
        return Output((features[0] - features[1]).square().mean(), {})


def views(n):
    return [View(torch.empty(n, 0), GroupElement.identity(n), {}) for _ in range(2)]


def test_a_term_writes_compare_alone():
    z = torch.randn(2, 3, 8, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = Distance(8)(list(z), views(3))
    assert out.loss.requires_grad
    assert out.loss.item() == pytest.approx((z[0] - z[1]).float().square().mean().item(), rel=1e-2)
    with pytest.raises(NotImplementedError):
        Objective(8).eval()(list(z.detach()), views(3))


def test_terms_are_registered_by_name_and_say_what_they_want():
    assert OBJECTIVES
    for name, term in OBJECTIVES.items():
        assert issubclass(term, Objective)
        assert name == name.lower()
        assert "=" in term.wants
        assert term(8).encoded >= 1
        assert term(8, maker=None).dim == 8
        with pytest.raises(SERError, match="dim=0"):
            term(0)


def on_a_rank(here: Here, images: int) -> float:
    n = images if here.rank == 1 else 2
    z = torch.ones(2, n, 8, 4, 4, requires_grad=True)
    return Distance(8)(list(z), views(n), here.group).loss.item()


def test_what_is_wrong_on_one_rank_is_raised_on_all_even_if_the_term_gathers_nothing(run):
    assert run(2, on_a_rank, 3) == [0.0, 0.0]
    for answer in run(2, on_a_rank, 0):
        assert isinstance(answer, SERError), answer
        assert "on rank 1" in answer.call
        assert answer.given == "no image"


def test_an_output_is_no_number():
    out = Output(torch.ones(()), {})
    for call in (lambda: torch.ones(()) + out, lambda: out + 1, lambda: 0.5 * out, lambda: out * 2, lambda: 1 + out):
        with pytest.raises(SERError, match=r"0.5 \* term\(z, views\).loss"):
            call()


@pytest.mark.parametrize(("value", "text"), [(1e30, "features up to 1.0e+30"), (float("inf"), "NaN or infinity")])
def test_features_that_cannot_be_squared_are_no_features(value, text):
    z = torch.randn(2, 3, 8, 4, 4)
    z[1, 2, 3] = value
    with pytest.raises(SERError, match=text.replace("+", r"\+")):
        Distance(8).eval()(list(z), views(3))


def test_matching_is_that_of_a_loop_over_the_images_looked_at():
    z1 = torch.randn(20, 7, 6)
    z2 = z1 + torch.randn(20, 7, 6)
    hits = []
    for image in [i * 20 // 8 for i in range(8)]:
        for j in range(7):
            cosines = [torch.cosine_similarity(z1[image, j], z2[image, k], dim=0).item() for k in range(7)]
            hits.append(max(range(7), key=lambda k: cosines[k]) == j)
    assert 0.2 < sum(hits) / len(hits) < 0.9
    assert matching(z1, z2).item() == pytest.approx(sum(hits) / len(hits))
    assert matching(z1[:0], z2[:0]).isnan()
    shuffled = z2[:, torch.randperm(7)]
    assert matching(z1, shuffled) < matching(z1, z2)


def test_maps_that_are_constant_over_space_match_nowhere():
    """Though everything else looks perfect: images are told apart, and negatives are of other images alone."""
    z = 5 * torch.randn(6, 8, 1, 1).expand(6, 8, 4, 4)
    out = OBJECTIVES["ser"](8).eval()([z, z.clone()], views(6))
    assert next(iter(out.logs)) == "matching"
    assert out.logs["accuracy"] == 1
    assert out.logs["matching"] == 0
    own = torch.randn(6, 8, 4, 4)
    assert OBJECTIVES["ser"](8).eval()([own, own.clone()], views(6)).logs["matching"] == 1
