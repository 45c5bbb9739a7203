"""One step of the optimiser: what reaches it under scaling, clipping and accumulation, and what each rank draws."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate")

from pretraining_jobs import GRADIENTS, as_one_of_several, lines, parsed, train_job, with_scaler
from timm.layers import DropPath
from tiny_batches import batches, tiny_step

close = torch.testing.assert_close
pytestmark = pytest.mark.usefixtures("on_cpu")


def first_gradients(folder, method, *flags):
    """Those that reach the optimiser in the first step, by name."""
    train_job(method, [*flags, "--steps", 1, "--output-dir", folder], gradients=True)
    return torch.load(folder / GRADIENTS, weights_only=True)


def test_gradient_of_accumulated_parts_is_that_of_the_mean_of_their_losses(tmp_path):
    flags = ["--drop-path", 0, "--clip", None]
    found = first_gradients(tmp_path, "dino", *flags, "--accumulate", 2)
    settings = parsed("dino", [*flags, "--batch-size", 8])
    torch.manual_seed(0)
    step = tiny_step("dino", settings)
    parts = batches("dino", settings)
    losses = [step(next(parts))["loss"] for _ in range(2)]
    (sum(losses) / 2).backward()
    for name, gradient in found.items():
        close(gradient, step.method.get_parameter(name).grad)
    assert len(found) > 30


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_scale_of_half_precision_leaves_no_trace(tmp_path, monkeypatch, accumulate):
    """Gradients are clipped as they are without it. Adam would hide any factor that they have in common."""
    norm, found = 0.01, []
    flags = ["--clip", norm, "--accumulate", accumulate, "--precision", "fp16"]
    for scale in (2**4, 2**8):
        with_scaler(monkeypatch, scale)
        found.append(first_gradients(tmp_path / str(scale), "moco_v3", *flags))
    clipped = [{name for name, g in gradients.items() if g.norm() > 0.99 * norm} for gradients in found]
    assert clipped[0] == clipped[1]
    assert len(clipped[0]) > 10
    assert all(gradient.norm() <= 1.001 * norm for gradients in found for gradient in gradients.values())
    for name in clipped[0]:
        one, other = (gradients[name].flatten() for gradients in found)
        assert torch.cosine_similarity(one, other, dim=0) > 0.99, name


def test_gradients_that_overflow_change_nothing_but_the_scale(tmp_path, monkeypatch):
    with_scaler(monkeypatch, 1e38)
    train_job("moco_v3", ["--precision", "fp16", "--steps", 2, "--output-dir", tmp_path / "run"])
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert kept["scaler"]["scale"] == pytest.approx(1e38 / 4)
    torch.manual_seed(0)
    fresh = tiny_step("moco_v3", parsed("moco_v3"))
    for name, parameter in fresh.named_parameters():
        assert torch.equal(kept["model"][name], parameter), name


def dropped(monkeypatch, folder, rank, steps=3):
    """Which images' paths were dropped, by step, as rank `rank` of 4 draws them."""
    as_one_of_several(monkeypatch, rank, 4)
    found = []

    def note(layer, args, out):
        if layer.training and layer.drop_prob:
            found[-1].append(((out == 0).flatten(1).all(1) & (args[0] != 0).flatten(1).any(1)).tolist())

    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda layer, args, out: note(layer, args, out) if isinstance(layer, DropPath) else None
    )
    flags = ["--batch-size", 64, "--drop-path", 0.5, "--steps", steps, "--output-dir", folder]
    train_job("dino", flags, each_step=lambda moment: found.append([]))
    handle.remove()
    return found


def test_each_rank_drops_paths_of_its_own_in_each_step(tmp_path, monkeypatch):
    """Else all would train the same thinned encoder, and a step the one of the step before."""
    found = {rank: dropped(monkeypatch, tmp_path / str(rank), rank) for rank in (0, 1, 2)}
    drawn = [found[rank][step] for rank, step in product(found, range(3))]
    assert all(len(masks) > 4 for masks in drawn)
    assert all(drawn.count(masks) == 1 for masks in drawn)
    assert dropped(monkeypatch, tmp_path / "again", 1) == found[1]


def test_images_a_second_are_those_of_all_processes(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("pretraining.log.time", SimpleNamespace(perf_counter=lambda: clock.now))

    def half_a_second_passes(moment):
        clock.now += 0.5

    for rank in (0, 1):
        as_one_of_several(monkeypatch, rank, 2)
        folder = tmp_path / str(rank)
        train_job("moco_v3", ["--log-every", 2, "--output-dir", folder], each_step=half_a_second_passes)
        assert [line["images_per_second"] for line in lines(folder, without=set())] == [32.0] * 3
