"""Laws of all terms: exact on any number of ranks, gradient where it belongs, an error for views of another kind."""

import copy
import inspect
import math

import pytest
import timm
import torch
from processes import Here
from term_cases import CASES, DIM, GRID, all_turns, build, cropped, equivariant, paths

from ser_reg import GroupElement, SERError, View, late_cls, patch_tokens
from ser_reg.objectives import OBJECTIVES

NAMES = sorted(OBJECTIVES)
SPLITS = {2: [(0, 8)], 3: [(5, 0, 3)], 4: [(2, 0, 4, 2)]}  # images of each rank, of which one has none
for _size, _splits in SPLITS.items():
    _ranks = torch.randint(_size, (10,), generator=torch.Generator().manual_seed(_size))
    _splits.append(tuple(torch.bincount(_ranks, minlength=_size).tolist()))


def test_every_term_has_a_case():
    assert set(CASES) == set(OBJECTIVES)


def found(term, features, views, group=None):
    """Loss, gradients of features and parameters, and buffers."""
    out = term(features, views, group)
    out.loss.backward()
    grads = [z.grad for z in features], [p.grad for p in term.parameters()]
    return out.loss.item(), *grads, [b.clone() for b in term.buffers()]


def on_a_rank(here: Here, size: int) -> list:
    """For every term and split, what this rank finds with its images."""
    answers = []
    for name in NAMES:
        for split in SPLITS[size]:
            unit = CASES[name].unit
            n = sum(split) * unit
            start = sum(split[: here.rank]) * unit
            features, views = CASES[name].batch(name, n)
            rows = CASES[name].chosen(start, start + split[here.rank] * unit, n)
            mine = [z.detach()[rows].requires_grad_() for z in features]
            loss, grads, own, buffers = found(build(name), mine, [view[rows] for view in views], here.group)
            answers.append((loss, rows, grads, own, buffers))
    return answers


@pytest.mark.parametrize("size", SPLITS)
def test_ranks_find_what_one_process_finds(run, size):
    """Value, gradients of features and of all parameters, and running statistics; a rank without images included."""
    answers = run(size, on_a_rank, size)
    assert not any(isinstance(answer, Exception) for answer in answers), answers
    cases = [(name, split) for name in NAMES for split in SPLITS[size]]
    for i, (name, split) in enumerate(cases):
        n = sum(split) * CASES[name].unit
        loss, grads, own, buffers = found(build(name), *CASES[name].batch(name, n))
        ranks = [answer[i] for answer in answers]
        close = {"rtol": 1e-9, "atol": 1e-11, "msg": lambda text, name=name, split=split: f"{name} {split}: {text}"}
        torch.testing.assert_close(sum(rank[0] for rank in ranks) / size, loss, **close)
        for rank_loss, rows, mine, *_ in ranks:
            assert math.isfinite(rank_loss)
            for whole, part in zip(grads, mine, strict=True):
                torch.testing.assert_close(part / size, whole[rows], **close)
        for k, whole in enumerate(own):
            torch.testing.assert_close(sum(rank[3][k] for rank in ranks) / size, whole, **close)
        for rank in ranks:
            torch.testing.assert_close(rank[4], buffers, **close)


def too_few(here: Here, name: str, images: int) -> object:
    """One rank with images, the other without any."""
    n = images if here.rank == 1 else 0
    features, views = CASES[name].batch(name, n)
    return build(name)(features, views, here.group).loss.item()


@pytest.mark.parametrize("name", ["augself", "equimod", "essl", "reconstruction"])
def test_too_few_images_over_all_ranks_are_an_error_on_all(run, name):
    few = 0 if name in ("essl", "reconstruction") else 1
    for answer in run(2, too_few, name, few):
        assert isinstance(answer, SERError), answer
        assert f"{few} images in 2 processes" in answer.given


def wrong_on_one(here: Here) -> object:
    features, views = CASES["augself"].batch("augself", 4)
    views = equivariant(4) if here.rank == 1 else views
    return build("augself")(features, views, here.group)


def test_views_of_another_kind_on_one_rank_are_an_error_on_all(run):
    for answer in run(2, wrong_on_one):
        assert isinstance(answer, SERError), answer
        assert "on rank 1" in answer.call


@pytest.mark.parametrize("name", NAMES)
def test_trains_its_heads_and_the_early_blocks_and_nothing_else(name):
    layer, case = 2, CASES[name]
    vit = late_cls(
        timm.models.VisionTransformer(
            img_size=12, patch_size=4, embed_dim=DIM, depth=3, num_heads=2, num_classes=0, dynamic_img_size=True
        ),
        layer,
    )
    _, views = case.batch(name, 4)
    term = build(name).float()
    features = [patch_tokens(vit, torch.rand(4 * case.rows, 3, 12, 12), layer) for _ in range(term.encoded)]
    term(features, views).loss.backward()
    for key, parameter in [*vit.named_parameters(), *(("term." + n, p) for n, p in term.named_parameters())]:
        block = int(key.split(".")[1]) + 1 if key.startswith("blocks.") else 0
        late = block > layer or key in ("cls_token", "norm.weight", "norm.bias")
        if late:
            assert parameter.grad is None or not parameter.grad.any(), f"{key} should have no gradient"
        else:
            assert parameter.grad is not None, f"{key} has no gradient"
            assert parameter.grad.abs().max() > 0, f"{key} has a zero gradient"


@pytest.mark.parametrize("name", NAMES)
def test_logs_are_detached_scalars_that_show_whether_it_works(name):
    term = build(name)
    out = term(*CASES[name].batch(name, 16))
    assert {"accuracy", "r2"} & set(out.logs)
    assert {"chance", "feature_std"} <= set(out.logs)
    assert ("matching" in out.logs) == term.dense
    for key, value in out.logs.items():
        assert value.ndim == 0, key
        assert not value.requires_grad, key
        assert math.isfinite(value), key
    if "accuracy" in out.logs:  # losses of classes: of what is untrained, near chance
        assert 0.5 < out.loss.item() / out.logs["chance"].item() < 2
    assert 0 < out.logs["feature_std"] <= 1


@pytest.mark.parametrize("name", [name for name in NAMES if not OBJECTIVES[name].dense])
def test_maps_are_averaged_over_their_places(name):
    features, views = CASES[name].batch(name, 6)
    vectors = [z.detach().mean((2, 3)).requires_grad_() for z in features]
    maps, means = (found(build(name), z, views) for z in (features, vectors))
    assert maps[0] == pytest.approx(means[0], rel=1e-12)
    for of_map, of_mean in zip(maps[1], means[1], strict=True):
        torch.testing.assert_close(of_map.sum((2, 3)), of_mean)


@pytest.mark.parametrize("name", NAMES)
def test_one_float32_island_under_autocast(name):
    features, views = CASES[name].batch(name, 4)
    half = [z.detach().to(torch.bfloat16) for z in features]
    term = build(name).float().eval()
    expected = term([z.float() for z in half], views).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(half, views).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_leaves_running_statistics_alone_and_images_for_themselves(name):
    features, views = CASES[name].batch(name, 4)
    term = build(name)
    term(features, views)
    before = copy.deepcopy(dict(term.named_buffers()))
    term.eval()
    whole = term([z.detach() for z in features], views).loss
    assert torch.equal(whole, term([z.detach() for z in features], views).loss)
    torch.testing.assert_close(dict(term.named_buffers()), before)


WRONG = {  # term: (views of another kind, what the remedy says)
    "augself": (equivariant, "CroppedViews(size=224, photometric=Photometric())"),
    "equimod": (lambda n: [*cropped(n), *cropped(n)][:3], "CroppedViews(size=224, photometric=Photometric(), original"),
    "essl": (lambda n: cropped(n)[:1], 'turned="all"'),
    "stl": (cropped, "paired=True"),
    "reconstruction": (cropped, 'PathViews("se2", size=224)'),
    "ser": (lambda n: [View(torch.empty(n, 0), all_turns(1)[[0, 1] * (n // 2)], {})] * 2, "EquivariantViews"),
}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"ser"}))
def test_views_of_another_kind_name_the_maker_to_use(name):
    make, text = WRONG[name]
    term = build(name).eval()
    z = [torch.randn(8, DIM, GRID, GRID) for _ in range(term.encoded)]
    with pytest.raises(SERError) as caught:
        term(z, make(8))
    assert text in caught.value.remedy


@pytest.mark.parametrize("name", ["augself", "equimod", "stl", "essl"])
def test_what_was_moved_by_other_angles_is_no_crop(name):
    """Views of a path, which turn by any angle."""
    term = build(name).eval()
    views = [View(torch.empty(8, 0), view.relation, cropped(8)[0].drawn) for view in paths(8)[1:]]
    views = [View(torch.empty(8, 0), GroupElement.identity(8), {}), *views] if name == "equimod" else views
    views = [v._replace(drawn={}) for v in views] if name == "stl" else views
    with pytest.raises(SERError, match="quarter turns") as caught:
        term([torch.randn(8, DIM, GRID, GRID) for _ in range(term.encoded)], views[: term.encoded])
    assert "CroppedViews" in caught.value.remedy


@pytest.mark.parametrize("name", NAMES)
def test_of_more_views_than_it_compares_it_does_not_choose(name):
    """Such as an original ahead of two crops, which a term of two would take for the first."""
    features, views = CASES[name].batch(name, 4)
    with pytest.raises(SERError) as caught:
        build(name).eval()(features, [*views, views[-1]])
    assert "views" in caught.value.given


@pytest.mark.parametrize("name", NAMES)
def test_a_map_of_another_width_says_what_to_type(name):
    features, views = CASES[name].batch(name, 4)
    term = build(name)
    with pytest.raises(SERError, match=f"{type(term).__name__}\\(5\\)"):
        term([z[:, :5] for z in features], views)
    with pytest.raises(SERError) as caught:
        term([z.mean(3) for z in features], views)
    assert ("vectors" in caught.value.expected) != term.dense


def test_a_training_can_ask_for_the_kind_of_views():
    policies = {"equivariant", "cropped", "original", "turned", "paired", "path"}
    assert {term.policy for term in OBJECTIVES.values()} == policies
    assert OBJECTIVES["essl"].default_weight == 0.4


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_documented_by_its_name(name):
    """The trainings' flags take their help from there."""
    documented = OBJECTIVES[name].__doc__
    for setting in inspect.signature(OBJECTIVES[name]).parameters:
        assert f"\n        {setting}: " in documented, setting


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_for_features_and_for_terms_that_say_so(name):
    features, views = CASES[name].batch(name, 4)
    half = [z.detach().to(torch.bfloat16).requires_grad_() for z in features]
    term = build(name).bfloat16()
    if term.half_precision:
        assert term(half, views).loss.isfinite()
        return
    with pytest.raises(SERError, match=r"term\.float\(\)"):
        term(half, views)
    assert term.float()(half, views).loss.isfinite()


def test_features_and_views_come_in_lists():
    features, views = CASES["ser"].batch("ser", 4)
    term = build("ser")
    for z, some in (((each for each in features), views), (features, iter(views)), (None, views), (features, None)):
        with pytest.raises(SERError, match="a list or a tuple of each"):
            term(z, some)
