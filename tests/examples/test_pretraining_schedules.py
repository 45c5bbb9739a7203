"""What changes along a training, and the optimiser that it is set in."""

import importlib
import math
from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

from pretraining.optimizer import build_optimizer, clip, set_rates
from pretraining.schedules import Moment, cosine, ramp, warm_cosine
from pretraining_jobs import METHODS, parsed
from tiny_batches import batches, tiny_step

close = torch.testing.assert_close


def test_cosine_and_warm_up_at_their_ends():
    assert cosine(0, 0.04, 0.4) == pytest.approx(0.04)
    assert cosine(0.5, 0.04, 0.4) == pytest.approx(0.22)
    assert cosine(1, 0.04, 0.4) == 0.4
    moments = [Moment(step, 100, 100) for step in range(101)]
    rates = [warm_cosine(moment, 10, 2.0, 0.5) for moment in moments]
    assert (rates[0], rates[5], rates[10]) == (0, 1, 2)
    assert rates[55] == pytest.approx(1.25)
    assert rates[100] == pytest.approx(0.5)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert warm_cosine(Moment(0, 100, 100), 0, 2.0, 0.5) == 2


def test_a_ramp_grows_by_epochs():
    # numpy.linspace(0.04, 0.07, 4), held within an epoch
    found = [ramp(epoch, 4, 0.04, 0.07) for epoch in (0, 0.99, 1, 2.5, 3, 4, 9)]
    assert found == pytest.approx([0.04, 0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert ramp(0, 0, 0.04, 0.07) == 0.07
    assert ramp(0, 1, 0.04, 0.07) == 0.04


@pytest.mark.parametrize("method", METHODS)
def test_recipe_of_the_paper(method):
    """Section 4.1 and the official releases, at batch 2048: rate and decay at the start, the peak, and the end."""
    settings = importlib.import_module(method).PRESETS["paper"]
    peak, end, decay, last_decay = {
        "moco_v3": (1.2e-3, 0, 0.1, 0.1),
        "dino": (4e-3, 1e-6, 0.04, 0.4),
        "barlow_twins": (8e-4, 8e-7, 0.1, 0.1),
    }[method]
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(module, settings.optimizer)
    matrices, vectors = optimizer.param_groups
    assert [p.ndim for p in matrices["params"]] == [2]
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1]
    assert matrices["betas"] == (0.9, 0.999)
    for epoch, rate, part in ((0, 0, 0), (10, peak, 0.1), (100, end, 1)):
        found = set_rates(optimizer, settings.optimizer, settings.run.batch_size, Moment(epoch * 625, 62500, 100))
        assert found == pytest.approx(rate)
        assert matrices["lr"] == vectors["lr"] == pytest.approx(rate)
        expected = last_decay + 0.5 * (1 + math.cos(math.pi * part)) * (decay - last_decay)
        assert matrices["weight_decay"] == pytest.approx(expected)
        assert vectors["weight_decay"] == (0 if method == "dino" else pytest.approx(expected))
    assert settings.optimizer.clip == {"moco_v3": None, "dino": 3.0, "barlow_twins": 0.3}[method]
    assert (settings.run.batch_size, settings.run.epochs, settings.optimizer.warmup_epochs) == (2048, 100, 10)
    assert settings.term.name == "ser"
    assert settings.term.temperature == (0.5 if method == "dino" else 0.3)
    assert (settings.term.weight, settings.term.ratio, settings.term.layer) == (0.5, 0.01, 3)


def test_gradients_are_shortened_parameter_by_parameter():
    long, short, none = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    long.grad, short.grad = torch.full((4,), 3.0), torch.full((4,), 0.1)
    clip([long, short, none], 3.0)
    close(long.grad, torch.full((4,), 1.5))
    close(short.grad, torch.full((4,), 0.1))


@pytest.mark.parametrize("method", METHODS)
def test_every_trained_parameter_is_in_one_group_and_moves(method):
    settings = parsed(method)
    step = tiny_step(method, settings)
    optimizer = build_optimizer(step, settings.optimizer)
    counts = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    assert counts == {id(p): 1 for p in step.parameters() if p.requires_grad}
    step(next(batches(method, settings)))["loss"].backward()
    for name, p in step.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
