"""Encoders on disk: what plain timm makes of them, and what is refused."""

import json
import os
import pickle
import sys

import pytest
import timm
import torch
from plain_timm import OLDEST, plain_timm
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ser_reg import SERError, export_timm, late_cls, load_encoder
from ser_reg.backbones import backbone
from ser_reg.export import FORMAT

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
    for where in (str(folder), str(folder / "model.safetensors"), f"local-dir:{folder}", folder):
        loaded = load_encoder(where)
        assert backbone(loaded).cls_layer == 2
        assert not loaded.training
        assert torch.equal(output(loaded), output(vit))


@pytest.mark.parametrize("way", ["folder", "file"])
def test_plain_timm_loads_it_in_one_line(vit, folder, way):
    weights = folder / "model.safetensors"
    if way == "folder" and OLDEST:
        with pytest.raises(pickle.UnpicklingError):  # as `export_timm` says
            timm.create_model(f"local-dir:{folder}", pretrained=True)
        loaded = plain_timm(folder)
    elif way == "folder":
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        loaded = timm.create_model(NAME, num_classes=0, checkpoint_path=weights, **ARGUMENTS)
    loaded.eval()
    assert (output(loaded) - output(vit)).abs().max() > 0.01  # [CLS] joins early: why the layer is written down
    assert torch.equal(output(late_cls(loaded, 2)), output(vit))


def test_says_how_images_were_normalised(vit, folder, tmp_path):
    assert tuple(load_encoder(str(folder)).pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)
    half = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    export_timm(vit, tmp_path / "half", NAME, normalize=half, **ARGUMENTS)
    for loaded in (
        load_encoder(str(tmp_path / "half")),
        plain_timm(tmp_path / "half"),
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
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]


def test_what_a_killed_export_left_goes_with_the_next(vit, folder):
    for name in ("model.safetensors", "README.md"):
        (folder / f".1-{name}").write_bytes(b"half")
    export_timm(vit, folder, NAME, **ARGUMENTS)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]


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


def test_function_that_loads_an_export_with_plain_timm_is_refused(folder, tmp_path, monkeypatch):
    load = f"plain_timm('{folder}')"
    (tmp_path / "careless.py").write_text(
        f"import ser_reg\nfrom plain_timm import plain_timm\n\n\ndef plain():\n    return {load}\n\n\n"
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


# What the folder says to who finds it


def blocks_of(text):
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]


def test_card_says_first_where_cls_joins(vit, folder, monkeypatch):
    """And the lines that it tells to type give the encoder, by either way."""
    text = (folder / "README.md").read_text()
    first = " ".join(text.splitlines()[:3])
    assert "[CLS] joins after 2 blocks" in first
    assert "other features" in first
    assert "late_cls(vit, 2)" in first
    monkeypatch.chdir(folder)
    (block,) = blocks_of(text)
    ours, theirs = block.split("\n\n")[1:]
    for lines in (ours, theirs):
        names = {}
        exec("import ser_reg, timm\n" + lines, names)
        assert torch.equal(output(names["vit"].eval()), output(vit))
    names = {}
    exec("import timm\n" + theirs.splitlines()[0], names)  # what the card warns of
    assert (output(names["vit"].eval()) - output(vit)).abs().max() > 0.01


def test_card_of_a_plain_encoder(vit, tmp_path, monkeypatch):
    export_timm(late_cls(vit, 0), tmp_path, NAME, **ARGUMENTS)
    text = (tmp_path / "README.md").read_text()
    assert "at the first block, as in plain timm" in text
    assert "late_cls" not in text
    export_timm(late_cls(vit, 1), tmp_path, NAME, **ARGUMENTS)
    assert "after 1 blocks" in (tmp_path / "README.md").read_text()
    bare = timm.create_model("resnet10t", num_classes=0)
    export_timm(bare, tmp_path / "resnet", "resnet10t")
    assert "no [CLS]" in (tmp_path / "resnet" / "README.md").read_text()


def test_a_readme_of_the_users_stays(vit, tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    export_timm(vit, tmp_path, NAME, **ARGUMENTS)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert torch.equal(output(load_encoder(tmp_path)), output(vit))


def test_the_printed_backbone_says_it(vit):
    assert "[CLS] joins after 2 blocks" in repr(backbone(vit))
    assert "late_cls(model, 2)" in repr(backbone(vit))
    assert repr(backbone(late_cls(vit, 0))) == (
        "VisionTransformer: 3 blocks, 24 channels, images of 32 x 32 pixels or any other size"
    )


# What goes wrong, named after the call that was made


def refused(call, *arguments, **more):
    with pytest.raises(SERError) as error:
        call(*arguments, **more)
    return error.value


@pytest.mark.parametrize(
    ("value", "said"), [("2", "'2'"), ("two", "'two'"), (-1, "-1"), (2.0, "2.0"), (True, "True"), ([2], "[2]")]
)
def test_bad_layers_in_a_config(value, said, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"late_cls": value}))
    error = refused(load_encoder, folder)
    assert error.call == f"load_encoder({str(folder)!r})"
    assert error.given == f"late_cls={said} in config.json"
    assert error.expected == "a whole number of blocks, 0 or more"
    assert error.remedy == "export_timm(vit, folder, name, **model_args)"


@pytest.mark.parametrize("value", ["-1", "two", "2.0", ""])
def test_bad_layers_in_the_metadata(value, folder):
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        metadata = weights.metadata()
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata | {"late_cls": value})
    assert refused(load_encoder, folder).given == f"late_cls={value} in model.safetensors"


@pytest.mark.parametrize("value", [3, 40])
def test_layers_that_the_model_does_not_have(value, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"late_cls": value}))
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")  # without metadata
    error = refused(load_encoder, folder)
    assert error.given == f"late_cls={value} in config.json"
    assert error.expected == f"a whole number of blocks from 0 to 2, as {NAME} has"


def test_a_layer_for_what_has_no_cls(tmp_path):
    export_timm(timm.create_model("resnet10t", num_classes=0), tmp_path, "resnet10t")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"late_cls": 1}))
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    assert "from 0 to 0, as resnet10t has" in refused(load_encoder, tmp_path).expected


def test_config_without_an_architecture_of_timm(folder):
    config = json.loads((folder / "config.json").read_text())
    for other, text in (({"architecture": "vit_gigantic"}, "vit_gigantic"), ({"model_args": {"deep": 3}}, "'deep': 3")):
        (folder / "config.json").write_text(json.dumps(config | other))
        error = refused(load_encoder, folder)
        assert error.call == f"load_encoder({str(folder)!r})"
        assert text in str(error)


def test_where_it_cannot_be_written(vit, tmp_path):
    (tmp_path / "file").write_text("a file")
    error = refused(export_timm, vit, tmp_path / "file", NAME, **ARGUMENTS)
    assert str(error) == (
        f"export_timm(vit, {str(tmp_path / 'file')!r}, {NAME!r}, ...)\n"
        "  given:    a file\n"
        "  expected: a folder that can be written\n"
        "  remedy:   export_timm(vit, 'encoder', name)"
    )
    assert (tmp_path / "file").read_text() == "a file"
    for folder in (tmp_path / "file" / "inside", "/proc/nothing/here"):
        error = refused(export_timm, vit, folder, NAME, **ARGUMENTS)
        assert error.expected == "a folder that can be written"
        assert "Error: " in error.given


def test_a_full_disk_leaves_the_old_export(vit, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def save(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ser_reg.export.write.save_file", save)
    assert "No space left" in refused(export_timm, vit, folder, NAME, **ARGUMENTS).given
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "more", "text"),
    [
        (NAME, {"norm_layer": torch.nn.LayerNorm}, "that JSON can hold"),
        (NAME, {"normalize": 0.5}, "normalize=IMAGENET"),
        (NAME, {"normalize": (0.5, 0.5)}, "normalize=IMAGENET"),
        ("vit_gigantic", {}, "the name of a timm model"),
        (NAME, {"deep": 3}, "arguments of vit_tiny_patch16_224"),
    ],
)
def test_what_cannot_be_exported(name, more, text, vit, tmp_path):
    error = refused(export_timm, vit, tmp_path / "new", name, **ARGUMENTS | more)
    assert error.call == f"export_timm(vit, {str(tmp_path / 'new')!r}, {name!r}, ...)"
    assert text in str(error)
    assert not (tmp_path / "new" / "config.json").exists()


def test_other_models_cannot_be_exported(tmp_path):
    error = refused(export_timm, torch.nn.Linear(3, 4), tmp_path / "new", NAME)
    assert error.call.startswith("export_timm(vit, ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear(3, 4)])
def test_what_names_no_encoder(model):
    assert refused(load_encoder, model).expected == "a folder, a function or a timm model, by name"


def test_errors_name_the_call_that_was_made():
    assert refused(load_encoder, "vit_gigantic").call.startswith("load_encoder('vit_gigantic'")


@pytest.mark.parametrize(
    ("function", "given", "remedy"),
    [
        ("number", "number is a int", "def number(): return vit"),
        ("raises", "raises() raises ZeroDivisionError: division by zero", "broken_here.raises()"),
        ("takes", "takes() raises TypeError: takes() missing 1 required", "broken_here.takes()"),
        ("missing", "module 'broken_here' has no attribute 'missing'", "load_encoder('vit_small_patch16_224')"),
        ("leaves", "leaves() raises FileNotFoundError", "broken_here.leaves()"),
    ],
)
def test_functions_of_the_users_that_fail(function, given, remedy, tmp_path, monkeypatch):
    (tmp_path / "broken_here.py").write_text(
        "import os\n\nnumber = 3\n\n\ndef raises():\n    return 1 / 0\n\n\ndef takes(depth):\n    return depth\n\n\n"
        "def leaves():\n    os.chdir('..')\n    open('nothing')\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    error = refused(load_encoder, f"broken_here:{function}")
    assert error.call == f"load_encoder('broken_here:{function}')"
    assert error.given.startswith(given)
    assert remedy in error.remedy
    assert sys.path == path


@pytest.mark.parametrize("text", ["1 / 0", "def (", "import nothing_of_this_name"])
def test_modules_of_the_users_that_fail(text, tmp_path, monkeypatch):
    name = f"fails_{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    error = refused(load_encoder, f"{name}:make")
    assert error.call == f"load_encoder('{name}:make')"
    assert any(word in error.given for word in ("ZeroDivisionError", "SyntaxError", "nothing_of_this_name"))
    assert error.__cause__ is not None


def test_function_that_loads_an_export_with_a_bad_config(folder, tmp_path, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"late_cls": "two"}))
    (tmp_path / "loads_it.py").write_text(
        f"from plain_timm import plain_timm\n\n\ndef plain():\n    return plain_timm('{folder}')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert refused(load_encoder, "loads_it:plain").given == "late_cls='two' in config.json"
