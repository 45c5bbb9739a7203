"""Every term in the trainings: what it is handed, what of the base method it leaves alone, and that a run goes on."""

import pytest
import torch

pytest.importorskip("accelerate")

from pretraining.step import Step
from pretraining_jobs import lines, parsed, train_job
from tiny_batches import batches, tiny_step

from ser_reg import patch_tokens
from ser_reg.objectives import OBJECTIVES

close = torch.testing.assert_close
pytestmark = pytest.mark.usefixtures("on_cpu")
CROPS = ("ser", "--term.crops", "--crop-turns", "--term.ratio", "0.5")
WORDS = [(word,) for word in OBJECTIVES]
LEFT_OUT = [CROPS, ("augself",), ("equimod",), ("essl",)]  # of weight 0


def first_step(*flags):
    settings = parsed("moco_v3", list(flags))
    torch.manual_seed(0)
    return tiny_step("moco_v3", settings), next(batches("moco_v3", settings))


def kept(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


@pytest.mark.parametrize("word", [*WORDS, CROPS], ids=" ".join)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, word):
    for name, stops in (("whole", [None]), ("parts", [2, None])):
        for stop in stops:
            train_job("moco_v3", [*word, "--output-dir", tmp_path / name], stop_after=stop)
    found = lines(tmp_path / "whole")
    assert found == lines(tmp_path / "parts")
    assert len({line["term"] for line in found}) == 3
    weight = parsed("moco_v3", list(word)).term.weight
    for line in found:
        assert line["loss"] == pytest.approx(line["base"] + weight * line["term"])
        assert {"term_chance", "term_feature_std"} <= line.keys()
    ours, others = (kept(tmp_path / name) for name in ("whole", "parts"))
    assert ours.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in ours.items())
    assert (tmp_path / "whole" / "reconstructions.png").exists() == (word == ("reconstruction",))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folders of runs without a term, with crops that are turned and without."""
    folder = tmp_path_factory.mktemp("plain")
    for name, flags in (("--crop-turns", ["--crop-turns"]), ("", [])):
        train_job("moco_v3", ["none", "--cls-layer", 2, *flags, "--output-dir", folder / f"run{name}"])
    return folder


@pytest.mark.parametrize("word", LEFT_OUT, ids=" ".join)
def test_weight_0_is_the_base_method_bit_for_bit(tmp_path, plain, word):
    reference = plain / ("run--crop-turns" if "--crop-turns" in word else "run")
    train_job("moco_v3", [*word, "--term.weight", 0, "--output-dir", tmp_path])
    assert lines(tmp_path) == lines(reference)
    ours, others = kept(tmp_path), kept(reference)
    assert ours.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in ours.items())


@pytest.mark.parametrize("word", [*WORDS, CROPS], ids=" ".join)
def test_a_term_leaves_the_base_methods_loss_and_statistics_alone(word):
    """Views of its own pass no head of the base method; what is left is rounding, of forwards of other sizes."""
    found = []
    for weight in (1.0, 0.0):
        step, groups = first_step(*word)
        step = step if weight else Step(step.method)
        base = step(groups)["base"]
        statistics = {name: value.clone() for name, value in step.method.named_buffers()}
        assert any(name.endswith("running_mean") for name in statistics)
        found.append((base, statistics))
    (base, statistics), (alone, others) = found
    assert torch.equal(base, alone)
    for name, value in statistics.items():
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("word", [*WORDS, CROPS], ids=" ".join)
def test_a_term_is_handed_the_views_of_its_policy_and_their_own_maps(word):
    step, groups = first_step(*word)
    handed = []
    step.heads[0].register_forward_pre_hook(lambda head, args: handed.append(args))
    step.eval()
    step(groups)
    ((features, views),) = handed
    assert len(features) == step.heads[0].encoded
    for z, view in zip(features, views, strict=False):
        close(z, patch_tokens(step.method.encoder, view.images, 2), rtol=1e-4, atol=1e-5)
    group = groups[-1]
    own = [next((i for i, x in enumerate(group.images) if x is view.images), "extra") for view in views]
    expected = {"equimod": ["extra", 0, 1], "essl": ["extra"], "reconstruction": [0, 1, "extra", "extra"]}
    assert own == expected.get(word[0], [0, 1])


@pytest.mark.parametrize(("word", "calls"), [(("ser",), 3), (CROPS, 1), (("augself",), 1)], ids=str)
def test_local_views_are_compared_with_each_other_only_where_images_are_whole(word, calls):
    """Small crops hardly overlap."""
    step, groups = first_step(*word, "--local-views", 4)
    handed = []
    step.heads[0].register_forward_pre_hook(lambda head, args: handed.append(args))
    step(groups)
    assert len(handed) == calls


@pytest.mark.parametrize("word", [("augself",), ("equimod",), ("reconstruction",)], ids=" ".join)
def test_a_term_without_images_on_a_process_still_runs_the_forwards_of_the_others(word):
    """Which a sharded encoder waits for; its heads go over the images of all."""
    settings = parsed("moco_v3", [*word, "--term.ratio", 2 / 16])
    step, sizes = tiny_step("moco_v3", settings), []
    step.method.encoder.register_forward_pre_hook(lambda vit, args: sizes[-1].append(tuple(args[0].shape[1:])))
    found = []
    for rank in (0, 3):
        sizes.append([])
        groups = next(batches("moco_v3", settings, rank, 4))
        out = step.method(groups, step._encode)
        found.append(step.in_order(groups[1], out.trained.features[1]))
    assert sizes[0] == sizes[1]
    (_, views), (none, empty) = found
    assert len(views[0].images) == 1
    assert [len(maps[2]) for maps in none] == [0] * len(none)
    assert [view.images.shape[1:] for view in empty] == [view.images.shape[1:] for view in views]


def test_terms_at_every_layer_have_heads_of_their_own():
    for word in OBJECTIVES:
        step, groups = first_step(word, "--term.all-layers")
        assert len(step.heads) == 3
        terms = step(groups)
        assert torch.isfinite(terms["term"])
        assert len({id(p) for head in step.heads for p in head.parameters()}) == 3 * len([*step.heads[0].parameters()])


def test_the_encoder_tells_the_size_of_its_patches():
    step, _ = first_step("reconstruction")
    assert len(step.heads[0].decoders[0].ups) == 2  # two doublings make 4 pixels
