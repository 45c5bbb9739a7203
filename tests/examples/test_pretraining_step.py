"""One step: what is encoded, what the term compares, and where its gradient goes."""

from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

from data.batch import Group
from pretraining.run import synchronise
from pretraining.step import spread
from pretraining_jobs import METHODS, lines, parsed, train_job
from tiny_batches import batches, tiny_step

from ser_reg import patch_tokens

close = torch.testing.assert_close
pytestmark = pytest.mark.usefixtures("on_cpu")


def first_step(method, flags=()):
    """A step, and the groups of its first batch."""
    settings = parsed(method, flags)
    return tiny_step(method, settings), next(batches(method, settings))


def compared(head, encoders, views, layer=2):
    """The term for two views, each in its own encoder."""
    return head([patch_tokens(vit, view.images, layer) for vit, view in zip(encoders, views, strict=True)], views).loss


@pytest.mark.parametrize("method", METHODS)
def test_first_step_has_the_controls_base_loss(tmp_path, method):
    for name, flags in (("term", ["--steps", 2]), ("control", ["--steps", 2, "--term.weight", 0])):
        train_job(method, [*flags, "--output-dir", tmp_path / name])
    term, control = lines(tmp_path / "term"), lines(tmp_path / "control")
    assert term[0]["base"] == control[0]["base"] == control[0]["loss"]
    assert term[1]["base"] != control[1]["base"]
    assert term[0]["loss"] == pytest.approx(term[0]["base"] + 0.5 * term[0]["term"])
    logs = ("term_chance", "term_accuracy", "term_feature_std", "term_matching")
    more = set(term[0]) - set(control[0])
    assert {"term", *logs} <= more
    assert all(name.startswith("term") for name in more)


def test_what_is_logged_of_embeddings_is_the_first_views(monkeypatch):
    step, groups = first_step("moco_v3")
    seen, encode = [], step._encode
    monkeypatch.setattr(step, "_encode", lambda *given: seen.append(encode(*given)) or seen[-1])
    logged = step(groups)["embedding_std"]
    first, second = map(spread, seen[0].embeddings)
    assert logged == first != second


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["online", "momentum"])
def test_gradient_of_the_term_reaches_its_head_and_the_blocks_ahead_of_its_layer_and_no_others(method, target):
    if (method, target) == ("barlow_twins", "momentum"):
        pytest.skip("no momentum encoder")
    flags = ["--term.target", target, "--drop-path", 0, "--term.layer", 2, "--depth", 4]
    gradients = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        step, groups = first_step(method, flags)
        step.weight = weight
        step(groups)["loss"].backward()
        gradients.append({name: p.grad for name, p in step.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    reached = {name for name in gradients[0] if not torch.equal(gradients[0][name], gradients[1][name])}
    early = ("heads.", "method.encoder.blocks.0.", "method.encoder.blocks.1.", "method.encoder.pos_embed")
    expected = {name for name in gradients[0] if name.startswith((*early, "method.encoder.patch_embed"))}
    # A bias of the keys shifts all logits of a softmax alike: its gradient is rounding alone, which may be the same.
    assert expected - reached <= {name for name in expected if name.endswith("qkv.bias")}
    assert reached <= expected, reached - expected
    assert all(gradients[0][name].abs().max() == 0 for name in expected if name.startswith("heads."))
    assert all(gradients[1][name].abs().max() > 0 for name in expected if name.startswith("heads."))


def test_momentum_target_compares_each_trained_view_with_the_other_slow_view():
    step, groups = first_step("moco_v3", ["--term.target", "momentum", "--depth", 4])
    step.eval()
    fast, slow = step.method.encoder, step.method.target
    with torch.no_grad():
        for p in slow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    first, second = groups[1].views
    (head,) = step.heads
    one, two = (compared(head, (fast, slow), views) for views in ((first, second), (second, first)))
    close(step(groups)["term"], (one + two).detach() / 2)


def test_pairs_of_local_views_have_no_momentum_side_and_count_all_the_same():
    step, groups = first_step("dino", ["--term.target", "momentum", "--local-views", 4])
    step.eval()
    fast, slow, (head,) = step.method.encoder, step.method.target, step.heads
    with torch.no_grad():
        for p in slow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    first, second, *local = groups[1].views
    losses = [compared(head, (fast, slow), views) for views in ((first, second), (second, first))]
    losses += [compared(head, (fast, fast), local[i : i + 2]) for i in (0, 2)]
    close(step(groups)["term"], torch.stack(losses).mean().detach())


def test_all_layers_have_heads_of_their_own_and_their_mean():
    step, groups = first_step("dino", ["--term.all-layers"])
    step.eval()
    vit = step.method.encoder
    losses = [compared(head, (vit, vit), groups[1].views, layer) for layer, head in enumerate(step.heads, start=1)]
    assert len(losses) == 3
    close(step(groups)["term"], torch.stack(losses).mean().detach())


def test_pairs_of_local_views_count_as_the_global_pair():
    step, groups = first_step("dino", ["--local-views", 4])
    step.eval()
    vit, views, (head,) = step.method.encoder, groups[1].views, step.heads
    losses = [compared(head, (vit, vit), views[i : i + 2]) for i in (0, 2, 4)]
    close(step(groups)["term"], torch.stack(losses).mean().detach())


def test_embeddings_of_all_views_are_those_of_the_encoder_alone():
    """One forward for all crops of a size, whatever order and size they have; b2 first."""
    step, groups = first_step("barlow_twins", ["--local-views", 4])
    step.eval()
    method = step.method
    out = method(groups, step._encode)
    crops, wholes = (group.images for group in groups)
    assert [crop.shape[-1] for crop in crops] == [32, 32, 16, 16, 16, 16]
    assert len(out.trained.embeddings) == len(crops) == len(wholes) == 6
    vit = method.encoder
    for found, whole, crop in zip(out.trained.embeddings, wholes, crops, strict=True):
        close(found, torch.cat([vit(whole), vit(crop)]), rtol=1e-4, atol=1e-5)
    assert out.trained.features[0] == [{}] * 6  # crops were not recorded: nothing could be compared
    assert [list(maps) for maps in out.trained.features[1]] == [[2]] * 6


def test_a_process_without_whole_images_runs_the_forwards_of_the_others_and_keeps_nothing():
    """A sharded encoder waits for them."""
    step, (b1, b2) = first_step("moco_v3", ["--term.target", "momentum"])
    empty = Group([x[:0] for x in b2.images], [g[:0] for g in b2.relations])
    sizes = {}
    for groups in ([b1, b2], [b1, empty]):
        seen = sizes[len(groups[1].images[0])] = []
        handles = [
            vit.register_forward_pre_hook(lambda vit, args, seen=seen: seen.append(tuple(args[0].shape)))
            for vit in (step.method.encoder, step.method.target)
        ]
        out = step.method(groups, step._encode)
        for handle in handles:
            handle.remove()
    with_b2, without = sizes.values()
    of_crops = (24, 3, 32, 32)
    assert with_b2.count(of_crops) == 2
    assert without == [shape if shape == of_crops else (1, *shape[1:]) for shape in with_b2]
    assert (1, *b2.images[0].shape[1:]) in without
    assert [len(e) for e in out.trained.embeddings] == [len(b1.images[0])] * 2
    grids = [(x.shape[-2] // 4, x.shape[-1] // 4) for x in b2.images]
    for side in (out.trained, out.momentum):
        assert [maps[2].shape for maps in side.features[1]] == [(0, 24, *grid) for grid in grids]


def test_spread_is_one_for_directions_over_all_dimensions_and_zero_for_one():
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    assert spread(axes) == pytest.approx(1)
    assert spread(axes * torch.tensor([1.0, 5, 0.1, 7, 2, 1])[:, None]) == pytest.approx(1)  # lengths count for nothing
    assert spread(torch.tensor([[1.0, 0, 2]]) * torch.tensor([[1.0], [3.0], [0.5]])) == pytest.approx(0, abs=1e-3)
    assert spread(torch.tensor([[1.0, 0], [0, 1.0]])) == pytest.approx(0.5**0.5)


def test_local_views_never_go_through_the_momentum_encoder():
    step, groups = first_step("dino", ["--local-views", 4])
    sizes = []
    step.method.target.register_forward_pre_hook(lambda vit, args: sizes.append(args[0].shape[0]))
    step(groups)
    assert sum(sizes) == 2 * 4 + 2 * 12  # the whole images of both global views, and the crops of both


def test_batch_statistics_are_those_of_all_processes_on_gpus():
    """`nn.SyncBatchNorm` needs a GPU to run; that it is put in place can be seen without."""
    for method in ("moco_v3", "barlow_twins"):
        kinds = {}
        for device in ("cpu", "cuda"):
            done = synchronise(first_step(method)[0], 2, torch.device(device))
            kinds[device] = Counter(
                type(layer).__name__ for layer in done.modules() if "BatchNorm" in type(layer).__name__
            )
        assert set(kinds["cpu"]) == {"BatchNorm1d"}
        assert set(kinds["cuda"]) == {"SyncBatchNorm"}
        assert kinds["cpu"].total() == kinds["cuda"].total()
        alone = synchronise(first_step(method)[0], 1, torch.device("cuda"))
        assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in alone.modules())
