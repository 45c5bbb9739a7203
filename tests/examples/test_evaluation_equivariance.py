"""Scores of a test set are means over all of its images."""

import pytest
import torch

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

from data import open_source  # noqa: E402
from evaluation import encoder, equivariance, features  # noqa: E402

from ser_reg import SERError  # noqa: E402


def test_scores_are_means_over_all_images(exported, folder, monkeypatch):
    made = encoder.load(str(exported))
    images = features.read(open_source(str(folder), "train"), 32, 0)[0][::6]  # ten, of three classes

    def scores(batch):
        monkeypatch.setattr(equivariance, "BATCH", batch)
        return equivariance.mean_scores(made, images, [2, 4], 0, torch.device("cpu"))

    at_once, some_at_a_time = scores(10), scores(3)  # batches of 4, 3 and 3
    for name, by_layer in at_once.items():
        for layer, readings in by_layer.items():
            for reading in ("raw", "spatial"):  # the floors draw other images
                assert some_at_a_time[name][layer][reading] == pytest.approx(readings[reading], abs=1e-5)
    alone = equivariance.mean_scores(made, images[-3:], [2, 4], 0, torch.device("cpu"))
    assert abs(alone["rotation"][4]["spatial"] - at_once["rotation"][4]["spatial"]) > 1e-3


def test_layers_that_are_not_there_are_named_as_typed(exported):
    made = encoder.load(str(exported))
    assert equivariance.layers_of(made, (), "evaluate.py equivariance") == [1, 2, 3, 4]
    with pytest.raises(SERError, match=r"evaluate.py equivariance\n  given:    --layers 0 9\n  expected: from 0 to 4"):
        equivariance.layers_of(made, (0, 9), "evaluate.py equivariance")
