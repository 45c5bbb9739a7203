"""Accuracy of frozen features: k-NN against scikit-learn's, and classifiers that find what is there and no more."""

import math

import numpy as np
import pytest
import torch

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

from evaluation import accuracy  # noqa: E402
from evaluation.classifiers import CachedBatches, choose_rate, fit, predict, split, top  # noqa: E402
from evaluation.linear import linear  # noqa: E402
from evaluation.mlp import mlp  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402

from ser_reg import SERError  # noqa: E402

CPU = torch.device("cpu")


def batches(x, y, batch_size=64):
    return CachedBatches(x, y, batch_size, 0, CPU)


@pytest.mark.parametrize(("queries", "bank"), [(4096, 2**14), (7, 11)])
def test_knn_is_scikit_learns(monkeypatch, queries, bank):
    monkeypatch.setattr(accuracy, "QUERIES", queries)
    monkeypatch.setattr(accuracy, "BANK", bank)
    draw = torch.Generator().manual_seed(0)
    train, test = torch.randn(200, 6, generator=draw), torch.randn(90, 6, generator=draw)
    train_labels, test_labels = train.argmax(1), test.argmax(1)
    neighbours = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = neighbours.fit(train.numpy(), train_labels).score(test.numpy(), test_labels)
    assert 0.5 < expected < 1
    assert accuracy.knn_accuracy(train, train_labels, test, test_labels) == pytest.approx(expected, abs=1e-12)


def test_knn_in_parts_finds_the_same_neighbours(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 4, generator=draw), torch.randn(30, 4, generator=draw)
    test = torch.nn.functional.normalize(test, dim=1)
    whole = accuracy._nearest(test, train, 20)
    monkeypatch.setattr(accuracy, "BANK", 9)  # less than there are neighbours
    parts = accuracy._nearest(test, train, 20)
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def clouds(n, classes=4, width=12, spread=0.3):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    return torch.eye(classes, width)[labels] * 3 + spread * torch.randn(n, width, generator=draw), labels


def test_linear_separates_what_is_separable():
    (x, y), (inner, held) = clouds(400), split(400, 0)
    heads = fit(linear(), 12, 4, [0.1, 1.0], batches(x[inner], y[inner]), 10, 0, CPU)
    found = choose_rate(heads, [0.1, 1.0], x[held], y[held])
    assert max(found.values()) == 1


def test_linear_is_at_chance_on_shuffled_labels():
    x, y = clouds(1200)
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    [head] = fit(linear(), 12, 4, [1.0], batches(x[:800], y[:800]), 10, 0, CPU)
    accuracy = top(predict(head, x[800:]), y[800:], 1)
    assert abs(accuracy - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)


def test_mlp_tells_what_no_line_does():
    x = torch.randn(800, 2, generator=torch.Generator().manual_seed(0))
    y = (x.prod(1) > 0).long()
    scores = {}
    for kind, rate in ((linear(), 0.3), (mlp(32), 3e-3)):
        [head] = fit(kind, 2, 2, [rate], batches(x[:600], y[:600]), 20, 0, CPU)
        scores[len(list(head.parameters()))] = top(predict(head, x[600:]), y[600:], 1)
    assert scores[2] < 0.65
    assert scores[6] > 0.9


def test_a_diverged_rate_is_not_chosen():
    x, y = clouds(200)
    heads = fit(linear(), 12, 4, [1.0, 1e38], batches(x, y), 5, 0, CPU)
    assert not predict(heads[1], x).isfinite().all()
    assert choose_rate(heads, [1.0, 1e38], x, y) == {1.0: 1.0, 1e38: 0.0}
    with pytest.raises(SERError, match="diverged"):
        top(predict(heads[1], x), y, 1)


def test_each_rate_is_trained_as_if_alone():
    x, y = clouds(200)
    both = fit(linear(), 12, 4, [0.1, 1.0], batches(x, y), 3, 0, CPU)
    [alone] = fit(linear(), 12, 4, [1.0], batches(x, y), 3, 0, CPU)
    assert torch.equal(both[1].weight, alone.weight)
    assert not torch.equal(both[0].weight, alone.weight)


def test_batches_are_of_the_places_asked_for():
    (x, y), places = clouds(100), torch.arange(0, 100, 3)
    some = CachedBatches(x, y, 10, 0, CPU, places)
    assert (some.steps, len(list(some(0)))) == (3, 3)
    seen = torch.cat([features for features, _ in some(0)])
    assert (seen[:, None] == x[places]).all(-1).any(1).all()
    copied = CachedBatches(x[places], y[places], 10, 0, CPU)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(some(1), copied(1), strict=True))


def test_held_out_images_are_no_training_images():
    inner, held = split(1000, 3)
    assert not set(inner.tolist()) & set(held.tolist())
    assert (len(inner), len(held)) == (900, 100)
    assert len(split(10**6, 0)[1]) == 50_000
    with pytest.raises(SERError, match="two at least"):
        split(1, 0)


def test_top_counts_the_best_scores():
    scores, labels = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]]), torch.tensor([1, 2, 2])
    assert [top(scores, labels, k) for k in (1, 2, 5)] == pytest.approx([1 / 3, 2 / 3, 1])
