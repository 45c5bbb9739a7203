"""Models by name."""

from typing import Any

import pytest
import timm
import torch

from ser_reg.backbones import backbone, create
from ser_reg.errors import SERError

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", TINY),
        ("vit_small_patch16_dinov3", TINY),
        ("resnet10t", {}),
        ("convnext_atto", {}),
    ],
)
def test_no_classifier_and_any_size(name: str, arguments: dict[str, Any]) -> None:
    model = create(name, **arguments)
    assert backbone(model).any_size
    assert model.eval()(torch.rand(1, 3, 64, 96)).shape == (1, model.num_features)


def test_arguments_win() -> None:
    assert not backbone(create("vit_tiny_patch16_224", dynamic_img_size=False, **TINY)).any_size


def test_models_of_unknown_families() -> None:
    assert type(create("mobilenetv3_small_050")).__name__ == "MobileNetV3"


def test_there_is_no_such_model() -> None:
    with pytest.raises(SERError) as error:
        create("vit_huge_and_free")
    assert error.value.call == "create('vit_huge_and_free', pretrained=False)"
    assert error.value.expected == "the name of a timm model"
    assert eval(error.value.remedy, {"timm": timm})


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(SERError) as error:
        create("vit_tiny_patch16_224.augreg_in21k", pretrained=True)
    assert error.value.args == (
        "create('vit_tiny_patch16_224.augreg_in21k', pretrained=True)",
        "no network",
        "weights that can be downloaded",
        "create('vit_tiny_patch16_224.augreg_in21k', pretrained=False)  # random weights",
    )


@pytest.mark.parametrize("arguments", [{"deep": 3}, {"embed_dim": 30, "num_heads": 4}])
@pytest.mark.parametrize("pretrained", [False, True])
def test_arguments_that_it_does_not_take(arguments: dict[str, Any], pretrained: bool) -> None:
    with pytest.raises(SERError) as error:
        create("vit_tiny_patch16_224", pretrained, caller="mine", **arguments)
    assert error.value.call == f"mine('vit_tiny_patch16_224', pretrained={pretrained})"
    assert error.value.given.startswith(f"{arguments}: ")
    assert error.value.expected == "arguments of vit_tiny_patch16_224"
    assert eval(error.value.remedy, {"timm": timm})
