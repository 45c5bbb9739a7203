"""What all terms share, held by a term that gathers nothing and one that does."""

import math

import pytest
import torch
from processes import Here

from ser_reg import GroupElement, SERError, View
from ser_reg.geometry import Affine
from ser_reg.objectives import OBJECTIVES, Objective, Output
from ser_reg.objectives.base import check_number, mean_over_ranks
from ser_reg.objectives.measures import explained, feature_std, matching
from ser_reg.objectives.reading import crops_of, drawn_of


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


@pytest.mark.parametrize(("shape", "remedy"), [((4, 5, 2, 3), "Distance(5)"), ((4, 2, 3, 8), "z.permute(0, 3, 1, 2)")])
def test_another_width_is_named_unless_channels_are_last(shape, remedy):
    with pytest.raises(SERError) as caught:
        Distance(8).eval()([torch.randn(shape), torch.randn(shape)], views(4))
    assert caught.value.remedy.startswith(remedy)


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


def test_matching_asks_for_valid_places_alone():
    """That of the same tokens without the places left out, image by image."""
    z1 = torch.randn(8, 7, 6)
    z2 = z1 + torch.randn(8, 7, 6)
    valid = torch.rand(8, 7) < 0.6
    valid[0] = False
    hits, asked = 0.0, 0
    for image in range(1, 8):
        kept = valid[image]
        hits += matching(z1[image, kept][None], z2[image, kept][None]).item() * int(kept.sum())
        asked += int(kept.sum())
    assert matching(z1, z2, valid=valid).item() == pytest.approx(hits / asked)
    assert matching(z1, z2, valid=torch.ones_like(valid)) == matching(z1, z2)
    assert matching(z1, z2, valid=torch.zeros_like(valid)).isnan()


class Norm(Objective):
    """A term of vectors."""

    wants = "views = EquivariantViews(patch_size=4)(images)"
    dense = False

    def compare(self, features, views, group):
        counts = self.image_counts("Norm", features, group)
        each = features[0].flatten(1).square().mean(1) + features[1].flatten(1).square().mean(1)
        return Output(mean_over_ranks(each, counts, group), {})


def test_vectors_are_for_terms_that_are_not_dense():
    z = torch.randn(2, 3, 8, requires_grad=True).unbind()
    assert Norm(8)(z, views(3)).loss.item() == pytest.approx(sum(x.square().mean().item() for x in z))
    with pytest.raises(SERError, match=r"token maps \(B, 8, h, w\)\n"):
        Distance(8)(z, views(3))
    with pytest.raises(SERError, match=r"or vectors \(B, 8\)"):
        Norm(8)([x[:, :, None] for x in z], views(3))
    with pytest.raises(SERError, match=r"1 images in 1 processes"):
        Norm(8)([x[:1] for x in z], views(1))


def norm_on_a_rank(here: Here, counts: list[int], training: list[bool], gradient: list[bool]) -> float:
    n = counts[here.rank]
    term = Norm(8).train(training[here.rank])
    term._compared = 3  # calls, in which ranks that train compare their parameters
    z = torch.full((2, n, 8), float(here.rank), requires_grad=gradient[here.rank]).unbind()
    with torch.set_grad_enabled(gradient[here.rank]):
        return term(z, views(n), here.group).loss.item()


def test_means_are_over_images_and_ranks_have_to_agree(run):
    both = [True, True]
    assert sum(run(2, norm_on_a_rank, [1, 3], both, both)) / 2 == pytest.approx(2 * 3 / 4)
    assert run(2, norm_on_a_rank, [0, 3], both, both)[0] == 0
    for training, gradient, text in (
        ([True, False], both, "training mode 1 on rank 0, 0 on rank 1"),
        (both, [True, False], "requires_grad 1 on rank 0, 0 on rank 1"),
    ):
        for answer in run(2, norm_on_a_rank, [2, 2], training, gradient):
            assert isinstance(answer, SERError), answer
            assert text in answer.given


def test_crops_and_draws_of_views():
    box = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    one = View(torch.empty(3, 0), Affine.crop(box), {"hue": torch.zeros(3)})
    torch.testing.assert_close(crops_of("call", one, 3, "wants").box, box.expand(3, 4))
    assert len(crops_of("call", one, 0, "wants").box) == 0
    assert list(drawn_of("call", one, ["hue"], 3, "wants")) == ["hue"]
    whole = one._replace(relation=GroupElement.identity(3), drawn={})
    slanted = one._replace(relation=Affine.rotation(30.0))
    for call, text in (
        (lambda: crops_of("call", whole, 3, "wants"), "a view moved by a GroupElement"),
        (lambda: crops_of("call", slanted, 3, "wants"), "another angle or a shear in samples"),
        (lambda: drawn_of("call", whole, ["hue", "grey"], 3, "wants"), r"no hue, grey in what was drawn \(nothing\)"),
        (lambda: drawn_of("call", one, ["hue"], 2, "wants"), "3 values of hue for 2 images"),
    ):
        with pytest.raises(SERError, match=text) as caught:
            call()
        assert caught.value.remedy == "wants"


def test_variance_explained():
    target = torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    r2, chance = explained(target, target)
    assert (r2, chance.item()) == (1, pytest.approx(8 / 3 / 2))
    assert explained(target.mean(0).expand(3, 2), target)[0].item() == pytest.approx(0)
    assert explained(target, torch.ones(3, 2))[0].isnan()
    assert explained(target[:0], target[:0])[0].isnan()


def test_spread_of_directions():
    assert feature_std(torch.eye(4)).item() == pytest.approx(math.sqrt(3 / 4))
    assert feature_std(torch.tensor([[1.0, 0], [3, 0]])).item() == 0
    assert feature_std(torch.randn(2, 3, 5)).item() == pytest.approx(feature_std(torch.randn(6, 5)).item(), abs=0.3)
    assert feature_std(torch.empty(0, 5)).isnan()


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", None])
def test_weights_are_numbers(value):
    with pytest.raises(SERError, match="not below 0"):
        check_number("call", "crop", value, "crop=0.5")
    check_number("call", "crop", 0, "crop=0.5")
    with pytest.raises(SERError, match="a positive number"):
        check_number("call", "temperature", 0, "temperature=0.2", positive=True)
