"""Encoders on disk: what plain timm makes of them, and what is refused."""

import json
import os
import sys

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ser_reg import SERError, export_timm, late_cls, load_encoder
from ser_reg.backbones import backbone
from ser_reg.export import FORMAT

LOCAL = pytest.mark.skipif(timm.__version__ == "1.0.20", reason="its local-dir reads no safetensors")
NAME = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "dynamic_img_size": True}


@pytest.fixture
def vit():
    torch.manual_seed(0)
    vit = timm.create_model(NAME, num_classes=0, **ARGUMENTS)
    with torch.no_grad():
        vit.cls_token.normal_()  # untrained it is nearly zero, and where it joins hardly matters
    return late_cls(vit, 2).eval()


@pytest.fixture
def folder(vit, tmp_path):
    export_timm(vit, tmp_path / "encoder", NAME, **ARGUMENTS)
    return tmp_path / "encoder"


def output(vit):
    with torch.no_grad():
        return vit(torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(1)))


def test_comes_back_as_it_was_trained(vit, folder):
    for where in (str(folder), str(folder / "model.safetensors"), f"local-dir:{folder}"):
        loaded = load_encoder(where)
        assert backbone(loaded).cls_layer == 2
        assert not loaded.training
        assert torch.equal(output(loaded), output(vit))


@pytest.mark.parametrize("way", [pytest.param("folder", marks=LOCAL), "file"])
def test_plain_timm_loads_it_in_one_line(vit, folder, way):
    weights = folder / "model.safetensors"
    if way == "folder":
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        loaded = timm.create_model(NAME, num_classes=0, checkpoint_path=weights, **ARGUMENTS)
    loaded.eval()
    assert (output(loaded) - output(vit)).abs().max() > 0.01  # [CLS] joins early: why the layer is written down
    assert torch.equal(output(late_cls(loaded, 2)), output(vit))


@LOCAL
def test_says_how_images_were_normalised(vit, folder, tmp_path):
    assert tuple(load_encoder(str(folder)).pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)
    half = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    export_timm(vit, tmp_path / "half", NAME, normalize=half, **ARGUMENTS)
    for loaded in (
        load_encoder(str(tmp_path / "half")),
        timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True),
    ):
        assert list(loaded.pretrained_cfg["std"]) == list(half[1])
        assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 32, 32)


def test_says_with_which_layer_it_was_trained(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert weights.metadata()["late_cls"] == "2"
    assert json.loads((folder / "config.json").read_text())["late_cls"] == 2


def test_the_model_is_left_as_it_was(vit, folder, tmp_path):
    vit.train().double()
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    export_timm(vit, tmp_path / "again", NAME, **ARGUMENTS)
    assert vit.training
    assert backbone(vit).cls_layer == 2
    assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items())
    assert torch.equal(output(load_encoder(str(tmp_path / "again"))), output(load_encoder(str(folder))))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),  # one image size
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2, "embed_dim": 24, "num_heads": 2}),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2, "embed_dim": 24, "num_heads": 2}),
        ("vit_tiny_patch16_224", {"img_size": (32, 48), "depth": 2, "in_chans": 1, "dynamic_img_size": True}),
        ("vit_medium_patch16_gap_256", {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}),
    ],
)
def test_other_architectures(name, arguments, tmp_path):
    vit = late_cls(timm.create_model(name, num_classes=0, **arguments), 1).eval()
    export_timm(vit, tmp_path, name, **arguments)
    loaded = load_encoder(str(tmp_path))
    assert backbone(loaded).cls_layer == backbone(vit).cls_layer
    size = vit.patch_embed.img_size
    images = torch.rand(2, arguments.get("in_chans", 3), *size)
    with torch.no_grad():
        assert torch.equal(loaded(images), vit(images))


def test_wrong_arguments_leave_the_old_export(vit, folder):
    before = (folder / "model.safetensors").read_bytes()
    for wrong in ({"depth": 2}, {"num_heads": 3}, {"embed_dim": 48}):  # num_heads changes no shape, only outputs
        with pytest.raises(SERError):
            export_timm(vit, folder, NAME, **ARGUMENTS | wrong)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_what_a_killed_export_left_goes_with_the_next(vit, folder):
    (folder / ".1-model.safetensors").write_bytes(b"half")
    export_timm(vit, folder, NAME, **ARGUMENTS)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_two_witnesses_that_disagree_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"late_cls": 1}))
    with pytest.raises(SERError, match="late_cls=2 in model.safetensors, 1 in config.json"):
        load_encoder(str(folder))


def test_one_witness_is_enough(vit, folder):
    config = json.loads((folder / "config.json").read_text())
    del config["late_cls"]
    (folder / "config.json").write_text(json.dumps(config))
    assert backbone(load_encoder(str(folder))).cls_layer == 2
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")  # as a tool that drops metadata
    (folder / "config.json").write_text(json.dumps(config | {"late_cls": 2}))
    assert torch.equal(output(load_encoder(str(folder))), output(vit))


def test_damaged_files_say_so(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SERError, match="whole files"):
        load_encoder(str(folder))
    weights.unlink()
    with pytest.raises(SERError, match=r"a folder with config.json and model.safetensors"):
        load_encoder(str(folder))


def test_what_is_not_there_says_so(tmp_path):
    for model in (str(tmp_path / "none"), str(tmp_path), "local-dir:nowhere", "weights.safetensors"):
        with pytest.raises(SERError, match="config.json and model.safetensors"):
            load_encoder(model)
    with pytest.raises(SERError, match="the name of a timm model"):
        load_encoder("vit_gigantic")
    for model in ("nowhere:build", "os.path:nothing", "json:"):
        with pytest.raises(SERError, match="package.module:function"):
            load_encoder(model)


@LOCAL
def test_function_that_loads_an_export_with_plain_timm_is_refused(folder, tmp_path, monkeypatch):
    load = f"timm.create_model('local-dir:{folder}', pretrained=True)"
    (tmp_path / "careless.py").write_text(
        f"import timm, ser_reg\n\n\ndef plain():\n    return {load}\n\n\n"
        f"def right():\n    return ser_reg.late_cls({load}, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SERError, match=r"remedy:   late_cls\(vit, 2\)"):
        load_encoder("careless:plain")
    assert backbone(load_encoder("careless:right")).cls_layer == 2


def test_function_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        f"import timm, ser_reg\n\n\ndef build():\n"
        f"    return ser_reg.late_cls(timm.create_model({NAME!r}, num_classes=0, **{ARGUMENTS}), 1)\n\n\n"
        f"def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert backbone(load_encoder("mine:build")).cls_layer == 1
    with pytest.raises(SERError, match="a function that returns a model"):
        load_encoder("mine:wrong")
    assert sys.path == path


# Formats


def test_says_its_format(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert weights.metadata()["export_format"] == str(FORMAT)
        assert weights.metadata()["format"] == "pt"  # what readers of safetensors expect there
    assert json.loads((folder / "config.json").read_text())["format"] == FORMAT


@pytest.mark.parametrize("version", [None, 1, 3])
def test_other_formats_are_refused(version, folder):
    """Files of the first format did not say it."""
    config = json.loads((folder / "config.json").read_text())
    del config["format"]
    if version is not None:
        config["format"] = version
    (folder / "config.json").write_text(json.dumps(config))
    metadata = {"late_cls": "2", "architecture": NAME, "format": "pt"}
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata)
    with pytest.raises(SERError, match=f"format {version or 1}, where this version of ser_reg reads format {FORMAT}"):
        load_encoder(str(folder))


def test_remedy_for_the_first_format_works(vit, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format": 1}))
    with pytest.raises(SERError) as error:
        load_encoder(str(folder))
    assert error.value.remedy.startswith(f"vit = late_cls(timm.create_model('local-dir:{folder}'")
    if timm.__version__ != "1.0.20":
        names = {"timm": timm, "late_cls": late_cls}
        exec(error.value.remedy, names)
        export_timm(names["vit"], tmp_path / "anew", NAME, **ARGUMENTS)
        assert torch.equal(output(load_encoder(str(tmp_path / "anew"))), output(vit))


def test_exports_of_timm_itself_have_no_format(vit, folder):
    plain = late_cls(vit, 0)
    config = json.loads((folder / "config.json").read_text())
    for key in ("late_cls", "format"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(plain.state_dict(), folder / "model.safetensors")
    assert torch.equal(output(load_encoder(str(folder))), output(plain))


def test_models_with_stages(tmp_path):
    model = timm.create_model("resnet10t", num_classes=0).eval()
    export_timm(model, tmp_path, "resnet10t")
    loaded = load_encoder(str(tmp_path))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
