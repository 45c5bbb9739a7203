"""Classifiers on frozen features are trained on the training images: on all of these, and on no other."""

import pytest
import torch
from encoder_to_judge import judge

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

from accelerate.state import AcceleratorState  # noqa: E402
from data import open_source  # noqa: E402
from evaluation import base, finetune, trained  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


@pytest.fixture(autouse=True)
def _accelerate_begins_anew():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def seen(monkeypatch):
    """(split, number) of each image that is read in a training: a list for each training."""
    trainings, now = [], []

    def watch(module, name):
        train = getattr(module, name)

        def watched(*arguments, **more):
            now.append([])
            trainings.append(now[0])
            found = train(*arguments, **more)
            now.clear()
            return found

        monkeypatch.setattr(module, name, watched)

    class Watched:
        def __init__(self, source, split):
            self.source, self.split, self.classes = source, split, source.classes

        def __len__(self):
            return len(self.source)

        def __getattr__(self, name):
            return getattr(self.source, name)

        def image(self, i, reduction=None):
            for training in now:
                training.append((self.split, i))
            return self.source.image(i, reduction)

    watch(trained, "fit")
    watch(finetune, "finetune")
    monkeypatch.setattr(base, "open_source", lambda data, split, seed: Watched(open_source(data, split, seed), split))
    return trainings


def test_random_crops_are_of_all_training_images_in_the_end(exported, folder, tmp_path, seen):
    flags = ("--augment", "--epochs", 4, "--base-rates", 1, "--batch-size", 20)
    judge("linear", exported, folder, tmp_path, *flags)
    choice, final = (set(images) for images in seen)
    everything = {("train", i) for i in range(60)}
    assert final == everything
    assert len(choice) == 54  # without those that choose the rate
    assert choice < everything


def test_kept_features_are_of_all_training_images_in_the_end(exported, folder, tmp_path, monkeypatch):
    """The classifier in the file is the one of a literal training on all features, at the rate that was chosen."""
    found = judge("linear", exported, folder, tmp_path, "--epochs", 3, "--base-rates", 1, 3, "--batch-size", 20)
    [path] = (tmp_path / "features").glob("*-train/last4/*")
    x, y = load_file(path)["cls"].double(), torch.arange(60) // 20
    torch.manual_seed(0)
    weight = torch.nn.init.normal_(torch.nn.Linear(x.shape[1], 3).weight, std=0.01).detach().double()
    bias, momentum, rate = torch.zeros(3, dtype=torch.float64), 0.0, found["results"]["rate"]
    assert rate in (pytest.approx(20 / 256), pytest.approx(3 * 20 / 256))
    for step in range(9):
        epoch, batch = divmod(step, 3)
        order = torch.randperm(60, generator=torch.Generator().manual_seed(1000 * epoch))
        chosen = order[20 * batch : 20 * batch + 20]
        error = (x[chosen] @ weight.T + bias).softmax(1) - torch.eye(3)[y[chosen]]
        gradient = torch.cat([error.T @ x[chosen], error.sum(0)[:, None]], 1) / 20
        momentum = 0.9 * momentum + gradient
        change = rate * (1 + torch.cos(torch.tensor(torch.pi * step / 9))) / 2 * momentum
        weight, bias = weight - change[:, :-1], bias - change[:, -1]
    kept = load_file(tmp_path / "linear.safetensors")
    torch.testing.assert_close(kept["weight"].double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept["bias"].double(), bias, rtol=1e-4, atol=1e-5)


def test_a_network_is_fine_tuned_on_all_training_images(exported, folder, tmp_path, seen):
    judge("finetune", exported, folder, tmp_path, "--epochs", 2, "--warmup-epochs", 0.5, "--batch-size", 20)
    [images] = seen
    assert sorted(images) == sorted([("train", i) for i in range(60)] * 2)
