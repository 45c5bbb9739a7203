"""Accuracy of frozen features: k-NN against scikit-learn's, and classifiers that find what is there and no more."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

from evaluation import accuracy  # noqa: E402
from evaluation.classifiers import CachedBatches, choose_rate, fit, predict, split, top  # noqa: E402
from evaluation.linear import linear  # noqa: E402
from evaluation.mlp import mlp  # noqa: E402
from evaluation.trained import judged  # noqa: E402
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


def test_five_guesses_are_not_one():
    said, scores, labels = [], torch.randn(210, 7), torch.arange(210) % 7
    session = SimpleNamespace(call="evaluate.py linear", note=said.append, settings=SimpleNamespace(name="linear"))
    found = judged(session, scores, labels)
    better = (scores > scores.gather(1, labels[:, None])).sum(1)
    assert found == {"top1": (better < 1).double().mean().item(), "top5": (better < 5).double().mean().item()}
    assert said == [f"linear: top-1 {100 * found['top1']:.2f} %, top-5 {100 * found['top5']:.2f} % of 210 test images"]
    assert judged(session, scores[:, :5], labels % 5)["top5"] is None  # any five of five are right
    assert "top-5" not in said[1]


def test_every_epoch_has_an_order_of_its_own():
    x = torch.arange(40.0)[:, None]
    make = CachedBatches(x, torch.zeros(40, dtype=torch.long), 8, 0, CPU)
    epochs = [torch.cat([features[:, 0] for features, _ in make(epoch)]) for epoch in range(4)]
    for order in epochs:
        assert torch.equal(order.sort().values, x[:, 0])  # each image once
        assert sum(torch.equal(order, other) for other in epochs) == 1
        assert not torch.equal(order, x[:, 0])
    assert torch.equal(epochs[1], torch.cat([features[:, 0] for features, _ in make(1)]))  # to go on from
    other = CachedBatches(x, torch.zeros(40, dtype=torch.long), 8, 1, CPU)
    assert not torch.equal(epochs[0], torch.cat([features[:, 0] for features, _ in other(0)]))


class Watched(torch.optim.SGD):
    """Notes the rate of each step."""

    def __init__(self, parameters, rate):
        super().__init__(parameters, rate, momentum=0.9)
        self.rates = []

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def test_rates_fall_along_half_a_cosine():
    seen = []

    def watched(parameters, rate):
        seen.append(Watched(parameters, rate))
        return seen[-1]

    x, y = clouds(50)
    fit(linear()._replace(optimizer=watched), 12, 4, [0.5, 2.0], batches(x, y, 10), 4, 0, CPU)
    for optimizer, highest in zip(seen, (0.5, 2.0), strict=True):
        rates = torch.tensor(optimizer.rates, dtype=torch.float64)
        assert len(rates) == 20
        assert rates[0] == highest
        assert (rates.diff() < 0).all()
        torch.testing.assert_close(rates[1:] + rates[1:].flip(0), torch.full_like(rates[1:], highest))  # odd about half
        torch.testing.assert_close(rates[5], rates.new_tensor(highest * (1 + math.cos(math.pi / 4)) / 2))


def test_nearest_neighbours_at_any_temperature():
    draw = torch.Generator().manual_seed(0)
    train, test = torch.randn(200, 6, generator=draw), torch.randn(90, 6, generator=draw)
    sets = train, train.argmax(1), test, test.argmax(1)
    nearest = accuracy.knn_accuracy(*sets, k=1)
    assert nearest < 1
    for temperature in (1e-3, 1e-5):  # exp(1 / 1e-3) is no float32
        assert accuracy.knn_accuracy(*sets, k=20, temperature=temperature) == nearest
