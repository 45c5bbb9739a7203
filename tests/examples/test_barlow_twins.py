"""Barlow Twins: its loss against a loop over the formula, and its official recipe."""

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

import barlow_twins
from pretraining.optimizer import build_optimizer, set_rates
from pretraining.schedules import Moment

close = torch.testing.assert_close


def literal_redundancy(z1, z2, weight):
    """Equations 1 and 2 of Barlow Twins on projections that are normalised over the batch."""
    n, dim = z1.shape
    loss = 0.0
    for i in range(dim):
        for j in range(dim):
            correlation = sum(float(z1[b, i] * z2[b, j]) for b in range(n)) / n
            loss += (1 - correlation) ** 2 if i == j else weight * correlation**2
    return loss


def test_redundancy_loss_is_its_formula():
    """Over several processes test_pretraining_runs.py compares the loss and its gradient with those of one."""
    z1, z2 = torch.randn(2, 8, 5)
    expected = literal_redundancy(z1.double(), z2.double(), 0.1)
    assert barlow_twins.redundancy_loss(z1, z2, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_correlation_is_over_the_images_of_all_ranks(monkeypatch):
    z1, z2 = torch.randn(2, 12, 5)
    mine, others = slice(8, 12), slice(0, 8)
    monkeypatch.setattr(barlow_twins, "all_reduce", lambda product: product + z1[others].T @ z2[others])
    monkeypatch.setattr(barlow_twins, "rank_and_world_size", lambda: (2, 3))
    expected = literal_redundancy(z1.double(), z2.double(), 0.1)
    assert barlow_twins.redundancy_loss(z1[mine], z2[mine], 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_pairs_with_a_global_view_are_compared_after_one_batch_norm():
    method = barlow_twins.BarlowTwins(nn.Identity(), dim=6, hidden=8, off_diagonal=0.1)
    embeddings = [torch.randn(7, 6) for _ in range(4)]
    z = []
    for e in embeddings:
        projected = method.projector(e).detach().double()
        deviation = (projected.var(0, correction=0) + 1e-5).sqrt()
        z.append((projected - projected.mean(0)) / deviation)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    expected = sum(literal_redundancy(z[i], z[j], 0.1) for i, j in pairs) / 5
    assert method.loss(embeddings).item() == pytest.approx(expected, rel=1e-4)


def test_lars_is_the_official_recipe():
    settings = barlow_twins.PRESETS["official"].but(warmup_epochs=0, weight_decay=1e-3)
    own, batch_size = settings.optimizer, settings.run.batch_size
    assert own.learning_rate * batch_size / 256 == pytest.approx(1.6)
    assert own.final_learning_rate == pytest.approx(1.6e-3)
    module = nn.Linear(5, 4).double()
    optimizer = build_optimizer(module, own)
    twins = [p.detach().clone() for p in module.parameters()]
    speeds = [torch.zeros_like(p) for p in twins]
    for step in range(4):
        rate = set_rates(optimizer, own, batch_size, Moment(step, 4, 1000))
        for i, p in enumerate(module.parameters()):
            p.grad = torch.randn_like(p)
            update = p.grad.clone()
            if p.ndim > 1:
                update += 1e-3 * twins[i]
                update *= 0.001 * twins[i].norm() / update.norm()
            speeds[i] = 0.9 * speeds[i] + update
            twins[i] = twins[i] - (rate if p.ndim > 1 else 0.0048 / 0.2 * rate) * speeds[i]
        optimizer.step()
    for p, twin in zip(module.parameters(), twins, strict=True):
        close(p.detach(), twin, rtol=1e-4, atol=1e-6)  # timm adds norms where official LARS takes that of the sum
