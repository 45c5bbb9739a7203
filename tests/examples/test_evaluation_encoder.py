"""The encoder that is judged: [CLS] joins where it did in training, sizes that it takes."""

import numpy as np
import pytest
import timm
import torch
from encoder_to_judge import LATE, TINY
from PIL import Image
from plain_timm import plain_timm
from timm.data import create_transform

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

from data import open_source  # noqa: E402
from evaluation import encoder, features  # noqa: E402

from ser_reg import SERError, late_cls, load_encoder  # noqa: E402
from ser_reg.backbones import backbone  # noqa: E402


def test_late_cls_changes_the_features_and_is_refused_where_it_is_missing(exported):
    right, plain = load_encoder(str(exported)), plain_timm(exported).eval()
    assert (backbone(right).cls_layer, backbone(plain).cls_layer) == (LATE, 0)
    images = torch.randn(4, 3, 32, 32)
    assert (right(images) - plain(images)).abs().max() > 0.01
    for name in (str(exported), "my.module:load"):  # by the name that was given, by what timm remembers
        with pytest.raises(SERError, match=r"given:    a model whose \[CLS\] joins after 0 blocks") as error:
            encoder.wrap(plain, name)
        assert error.value.remedy.startswith(f"ser_reg.late_cls(vit, {LATE})")
    assert encoder.wrap(late_cls(plain, LATE), str(exported)).late_cls == LATE
    for trained in (LATE, str(LATE)):
        encoder.check_cls_layer(right, trained)
    with pytest.raises(SERError, match="after 3, as its weights were trained"):
        encoder.check_cls_layer(right, 3)


def test_late_cls_is_in_the_score(exported, folder, tmp_path):
    images = features.read(open_source("embedded", "val"), 32, 0)[0][::4]
    right = encoder.load(str(exported))
    plain = late_cls(load_encoder(str(exported)), 0)
    with torch.no_grad():
        one, other = (model(right.normalise(images)) for model in (right.model, plain.eval()))
    assert (one - other).norm() > 0.05 * one.norm()
    assert encoder._fingerprint(right.model) != encoder._fingerprint(plain)  # so that no cache is shared


@pytest.mark.parametrize("form", ["{}", "{}/model.safetensors", "local-dir:{}"])
def test_every_way_to_an_export_is_corrected(exported, form):
    made = encoder.load(form.format(exported))
    assert (made.late_cls, made.size) == (LATE, 32)
    assert made.mean == pytest.approx((0.485, 0.456, 0.406))  # of the export; timm's own for this name is 0.5


def test_sizes_that_the_model_does_not_take_are_refused(exported):
    assert encoder.load(str(exported), 40).size == 40
    with pytest.raises(SERError, match="a multiple of 4") as error:
        encoder.load(str(exported), 30)
    assert error.value.remedy == "--size 28"
    static = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY | {"dynamic_img_size": False})
    assert encoder.wrap(static, "mine").size == 32
    with pytest.raises(SERError, match="32 x 32 pixels, the only size"):
        encoder.wrap(static, "mine", 40)


def test_images_are_normalised_as_timm_does(exported):
    made = encoder.load(str(exported))._replace(mean=(0.2, 0.5, 0.7), std=(0.1, 0.25, 0.5))
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    theirs = create_transform((3, 32, 32), mean=made.mean, std=made.std, crop_pct=1.0)
    torch.testing.assert_close(made.normalise(pixels[None])[0], theirs(image))
    shades = torch.tensor([made.mean, [m + s for m, s in zip(made.mean, made.std, strict=True)]]) * 255
    normalised = made.normalise(shades.view(2, 3, 1, 1))
    torch.testing.assert_close(normalised.flatten(1), torch.tensor([[0.0] * 3, [1.0] * 3]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (timm.create_model("vit_tiny_patch16_224", **TINY, in_chans=1), "a model for images of 1 channels"),
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8)), "RuntimeError: .*mat1 and mat2 shapes"),
        (torch.nn.Conv2d(3, 4, 3), r"features of shape \(1, 4, 30, 30\)"),
    ],
)
def test_models_that_embed_no_image_are_refused_before_any_is_read(model, given):
    with pytest.raises(SERError, match=f"--model mine\n  given:    {given}"):
        encoder.wrap(model, "mine", 32)
