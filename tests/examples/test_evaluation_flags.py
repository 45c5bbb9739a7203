"""No flag of evaluate.py is ignored: each changes what is found."""

import numpy as np
import pytest
import torch
from encoder_to_judge import CLASSES, judge, picture

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

import evaluate  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from evaluation import finetune, trained  # noqa: E402

TRAINED = {"--epochs": 3, "--batch-size": 9, "--last": 1, "--augment": None, "--seed": 1}
CHANGED = {
    "knn": {"--k": 1, "--temperature": 1e-6},
    "linear": TRAINED | {"--base-rates": 0.3},
    "mlp": TRAINED | {"--base-rates": 0.003, "--hidden": 24},
    "finetune": {
        "--epochs": 3,
        "--batch-size": 9,
        "--base-rate": 1e-3,
        "--warmup-epochs": 1,
        "--weight-decay": 0.5,
        "--layer-decay": 0.5,
        "--label-smoothing": 0.5,
        "--precision": "bf16",
        "--seed": 1,
    },
    "probe": {"--layers": 1, "--train-images": 20, "--test-images": 20, "--seed": 1},
    "equivariance": {"--layers": 1, "--images": 11, "--seed": 1},
    "tsne": {"--classes": 2, "--per-class": 9, "--perplexity": 2, "--seed": 1},
}
USUAL = {
    "knn": {"--k": 9},
    "linear": {"--epochs": 2, "--base-rates": 1},
    "mlp": {"--epochs": 2, "--base-rates": 0.01, "--hidden": 16},
    "finetune": {"--epochs": 2, "--warmup-epochs": 0.5},
    "probe": {"--train-images": 30, "--test-images": 30},
    "equivariance": {"--images": 10},
    "tsne": {"--perplexity": 5, "--per-class": 10},
}
OF_ALL = {"--model", "--data", "--output-dir", "--cache", "--size", "--images-at-a-time", "--workers", "--device"}
SHOWN = {"rate", "batch_size", "protocol", "picture", "perplexity"}  # what a flag changes though it is ignored


@pytest.fixture(autouse=True)
def _accelerate_begins_anew():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """Pictures so noisy that many are taken for another."""
    root, draw = tmp_path_factory.mktemp("hard"), np.random.default_rng(0)
    for split in ("train", "val"):
        for colour, name in enumerate(CLASSES):
            for i in range(12 if split == "train" else 24):
                picture(root / split / name / f"{i}.png", (90 + 12 * colour, 100, 110), draw, noise=60)
    return root


@pytest.fixture(scope="module")
def found(exported, hard, tmp_path_factory):
    """What a judgement finds with these flags, the scores of test images included; features are shared."""
    cache, known, scores, usual = tmp_path_factory.mktemp("cache"), {}, [], trained.judged

    def judged(session, given, labels):
        scores.append(given)
        return usual(session, given, labels)

    def find(name, flags):
        if (key := (name, *flags.items())) not in known:
            AcceleratorState._reset_state(reset_partial_state=True)
            typed = [part for flag, value in flags.items() for part in (flag, value) if part is not None]
            results = judge(name, exported, hard, tmp_path_factory.mktemp(name), "--cache", cache, *typed)["results"]
            results["held_out_accuracy"] = list(results.get("held_out_accuracy", {}).values())
            known[key] = {key: value for key, value in results.items() if key not in SHOWN}
            known[key]["of test images"] = [scores.pop().tolist() for _ in list(scores)]
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (trained, finetune):
            patch.setattr(module, "judged", judged)
        yield find


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name, flags in CHANGED.items() for flag in flags])
def test_a_flag_changes_what_is_found(found, name, flag):
    assert found(name, USUAL[name] | {flag: CHANGED[name][flag]}) != found(name, USUAL[name])


def test_every_flag_is_tried():
    for judgement in evaluate.JUDGEMENTS:
        name = judgement.__name__.lower()
        if name == "shift":
            continue  # its folders and its classifier have tests of their own
        flags = {f"--{field.replace('_', '-')}" for field in judgement.__dataclass_fields__}
        # Random weights of a timm name are the only ones that --pretrained and the seed of k-NN speak of.
        assert flags - OF_ALL - {"--pretrained"} - CHANGED.get(name, {}).keys() <= {"--seed"}, name


def test_random_weights_are_of_the_seed(hard, tmp_path):
    torch.manual_seed(0)
    flags = ("--no-pretrained", "--size", 32, "--k", 9)
    seen = [judge("knn", "resnet10t", hard, tmp_path / f"{i}", *flags, "--seed", i // 2)["model"] for i in range(3)]
    assert seen[0]["fingerprint"] == seen[1]["fingerprint"] != seen[2]["fingerprint"]
