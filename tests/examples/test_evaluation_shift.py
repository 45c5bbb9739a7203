"""Images of the same classes from elsewhere: which folders are taken, and among which classes is chosen."""

import numpy as np
import pytest
import torch
from encoder_to_judge import picture

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

from evaluation.shift import ClassFolders, shifted_accuracies  # noqa: E402

from ser_reg import SERError  # noqa: E402


def unchanged(classes):
    """A classifier whose scores are its features."""
    layer = torch.nn.Linear(classes, classes, bias=False)
    torch.nn.init.eye_(layer.weight)
    return layer


def test_choice_is_among_the_classes_that_occur():
    x, labels = torch.tensor([[2.0, 9, 1], [1, 9, 2], [3, 9, 1]]), torch.tensor([0, 2, 2])
    found = shifted_accuracies(unchanged(3), x, labels)
    assert (found["classes"], found["images"]) == (2, 3)
    assert found["top1"] == pytest.approx(2 / 3)
    assert found["top1_among_all"] == 0
    assert found["top5"] is found["top5_among_all"] is None  # any five of three are right


def test_five_guesses_are_not_one():
    x, labels = torch.randn(120, 8), torch.arange(120) % 6
    x[:, 6:] += 10  # two classes that do not occur, always thought of first
    found = shifted_accuracies(unchanged(8), x, labels)
    better = [int((row[:6] > row[label]).sum()) for row, label in zip(x, labels, strict=True)]
    for name, most in {"top1": 1, "top5": 5, "top5_among_all": 3}.items():
        assert found[name] == sum(n < most for n in better) / 120, name
    assert 0 == found["top1_among_all"] < found["top1"] < found["top5_among_all"] < found["top5"] < 1


def test_class_folders(tmp_path):
    classes = ["n01", "n02", "n03"]
    with pytest.raises(SERError, match="no such folder"):
        ClassFolders(tmp_path / "nowhere", classes)
    for name in ("n03", "n01"):
        picture(tmp_path / "named" / name / "1.png", (1, 2, 3), np.random.default_rng(0))
        picture(tmp_path / "numbered" / str(int(name[1:]) - 1) / "1.png", (1, 2, 3), np.random.default_rng(0))
    for kind in ("named", "numbered"):
        source = ClassFolders(tmp_path / kind, classes)
        assert [source.label(i) for i in range(len(source))] == [0, 2]
    (tmp_path / "named" / "n02").mkdir()
    with pytest.raises(SERError, match="n02") as error:
        ClassFolders(tmp_path / "named", classes)
    assert error.value.remedy == f"find '{tmp_path / 'named'}' -type d -empty"
    (tmp_path / "named" / "n02").rename(tmp_path / "named" / "zebra")
    with pytest.raises(SERError, match="1 of 3 sub-folders that are no class of the classifier: zebra"):
        ClassFolders(tmp_path / "named", classes)
    with pytest.raises(SERError, match="no sub-folder"):
        ClassFolders(tmp_path / "named" / "zebra", classes)
