"""What a linear classifier reads off features of turns and flips: what is there, and no more."""

import math

import pytest
import timm
import torch

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

from evaluation import encoder, probe  # noqa: E402

from ser_reg import SERError  # noqa: E402


def sets_of(make, n):
    """What Features give for layer 1: `make(element)` is (n, D)."""
    return {f"1/{element}": make(n, number) for number, element in enumerate(probe.ELEMENTS)}


def test_probes_are_at_chance_on_features_that_know_nothing():
    draw = torch.Generator().manual_seed(0)
    train, test = (sets_of(lambda n, number: torch.randn(n, 16, generator=draw), n) for n in (600, 400))
    found = probe.accuracy_by_layer(train, test, [1])
    for task, elements in probe.TASKS.items():
        chance = 1 / len(elements)
        assert abs(found[task][1] - chance) < 4 * math.sqrt(chance * (1 - chance) / (400 * len(elements)))


def test_probes_read_what_is_there():
    def make(n, number):  # tells turns apart, and of flips nothing
        return torch.eye(4, 16)[number % 4] + 0.1 * torch.randn(n, 16)

    found = probe.accuracy_by_layer(sets_of(make, 100), sets_of(make, 100), [1])
    assert found["rotation"][1] == 1
    assert found["flip"][1] < 0.7


def test_probes_are_not_trained_on_what_judges_them():
    # Of noise with more channels than images any labels can be learnt by heart, and none be known.
    sets = [sets_of(lambda n, number: torch.randn(n, 600), 80) for _ in range(2)]
    by_heart, found = probe.accuracy_by_layer(sets[0], sets[0], [1]), probe.accuracy_by_layer(*sets, [1])
    for task, elements in probe.TASKS.items():
        assert by_heart[task][1] == 1
        assert found[task][1] < 1 / len(elements) + 0.2


def test_layers_are_parts_of_the_depth(exported):
    made = encoder.load(str(exported))
    assert probe.layers_of(made, ()) == [1, 2, 3, 4]
    small = {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 12}
    twelve = made._replace(model=timm.create_model("vit_tiny_patch16_224", **small))
    assert probe.layers_of(twelve, ()) == [1, 3, 6, 9, 12]
    with pytest.raises(SERError, match="from 1 to 4"):
        probe.layers_of(made, (5,))
