"""The command line: what it prints, what it ends with, and what it says to type."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

from ser_reg import SERError, export_timm, late_cls
from ser_reg.__main__ import main
from ser_reg.check import Finding
from ser_reg.check import run as asking
from ser_reg.report import NamedEncoders

TINY = ["--image-size", "32", "--layers", "0", "3"]


class TestReport:
    def test_own_function_and_exported_folder(self, tmp_path, monkeypatch, capsys):
        """The exported one with the layer at which [CLS] joined."""
        arguments = {"img_size": 32, "patch_size": 8, "depth": 3, "dynamic_img_size": True}
        model = late_cls(timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments), 2)
        export_timm(model, tmp_path / "encoder", "vit_tiny_patch16_224", **arguments)
        (tmp_path / "mine_for_report.py").write_text(
            "import timm\n"
            "def make():\n"
            "    return timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=3, num_classes=0)\n"
        )
        for i in range(3):
            save(tmp_path / "images" / "sub" / f"{i}.png", 40 + i, 50)
        (tmp_path / "images" / "broken.jpg").write_bytes(b"no")
        monkeypatch.chdir(tmp_path)
        code = main(
            ["report", "encoder", "mine_for_report:make", "--images", "images", "--output-dir", "out", "--layers", "1"]
        )
        printed = capsys.readouterr().out
        assert code == 0
        assert "1 files could not be read: broken.jpg" in printed
        assert "To regularize early, start with layer 1" in printed
        assert "encoder\n  [CLS] joins after 2 blocks. Plain timm lets it in at the first" in printed
        found = json.loads((tmp_path / "out" / "report.json").read_text())
        assert found["models"]["encoder"]["cls_layer"] == 2
        assert found["models"]["mine_for_report:make"]["left_out"][0].startswith("no scale score")
        assert list(found["images"]["unreadable"]) == ["broken.jpg"]

    def test_the_second_of_three_fails(self, tmp_path, capsys):
        for i in range(2):
            save(tmp_path / "images" / f"{i}.png", 40, 40)
        names = ["vit_tiny_patch16_224", "cait_xxs24_224", "deit_tiny_patch16_224"]
        folders = ["--images", str(tmp_path / "images"), "--output-dir", str(tmp_path / "out")]
        assert main(["report", *names, "--untrained", *TINY, *folders]) == 1
        assert "timm's VisionTransformer" in capsys.readouterr().err
        found = json.loads((tmp_path / "out" / "report.json").read_text())["models"]
        assert [name for name in found if "error" in found[name]] == ["cait_xxs24_224"]
        assert list(found["deit_tiny_patch16_224"]["scores"]["scale"]) == ["0", "3"]

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["cait_xxs24_224"], "timm's VisionTransformer"),
            (["no_such_model"], "timm.list_models"),
            (["no/such/folder.safetensors"], "no such file or folder"),
            (["no_module:make"], "package.module:function"),
            (["vit_tiny_patch16_224", "--layers", "40"], "from 0 to 12"),
            (["vit_tiny_patch16_224", "--image-size", "40"], "sides that patches of 16 x 16 fill"),
            (["vit_tiny_patch16_224", "--images", "no_such_folder"], "--images FOLDER"),
            (["vit_tiny_patch16_224", "--images", "empty"], "0 readable of 0 files"),
            (["vit_tiny_patch16_224", "--images", "one"], "1 readable of 2 files"),
            (["vit_tiny_patch16_224", "--images", "one/a.png"], "a folder of images"),
            (["vit_tiny_patch16_224", "--max-images", "1"], "--max-images 64"),
            (["vit_tiny_patch16_224", "--device", "abacus"], "a device of this machine"),
        ],
    )
    def test_says_what_to_type(self, arguments, text, tmp_path, monkeypatch, capsys):
        (tmp_path / "empty").mkdir()
        save(tmp_path / "one" / "a.png", 8, 8)
        (tmp_path / "one" / "broken.png").write_bytes(b"no")
        monkeypatch.chdir(tmp_path)
        assert main(["report", *arguments, "--untrained"]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert "remedy:" in error

    def test_weights_that_cannot_be_had(self, monkeypatch):
        def create(name, pretrained, **arguments):
            if pretrained:
                raise SERError("create", "no network", "weights", "create(name)")
            return torch.nn.Identity()

        monkeypatch.setattr("ser_reg.export.load.create", create)
        with pytest.raises(SERError, match="python -m ser_reg report vit_tiny_patch16_224 --untrained"):
            NamedEncoders(["vit_tiny_patch16_224"])["vit_tiny_patch16_224"]

    @pytest.mark.slow
    def test_offline(self, tmp_path):
        found = run("report", "vit_tiny_patch16_224", "--output-dir", str(tmp_path), HF_HUB_OFFLINE="1")
        assert found.returncode == 2
        assert "--untrained" in found.stderr
        assert "Traceback" not in found.stderr

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name",
        [
            "vit_tiny_patch16_224",
            "vit_small_patch14_reg4_dinov2",
            "vit_medium_patch16_gap_256",
            "vit_base_patch16_siglip_224",
            "deit3_small_patch16_224",
            "deit_tiny_distilled_patch16_224",
            "vit_base_patch16_clip_224",
            "eva02_tiny_patch14_224",
            "vit_small_patch16_dinov3",
            "vit_small_patch16_rope_mixed_ape_224",
        ],
    )
    def test_embedded_photographs(self, name, tmp_path):
        """Names of timm as they are, in a process of their own."""
        size = "56" if "patch14" in name else "64"
        arguments = ["--untrained", "--image-size", size, "--layers", "0", "3", "12", "--output-dir", str(tmp_path)]
        found = run("report", name, *arguments)
        assert found.returncode == 0, found.stderr
        assert len(json.loads((tmp_path / "report.json").read_text())["images"]["names"]) == 20
        assert "chance 25 %" in found.stdout


class TestCheck:
    @pytest.mark.slow
    def test_passes(self):
        found = run("check", "vit_tiny_patch16_224", "--layer", "3", "--batch-size", "64")
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("pass  ") == 5

    @pytest.mark.slow
    def test_a_model_with_stages(self, capsys):
        assert main(["check", "resnet10t", "--layer", "1", "--batch-size", "16"]) == 0
        assert "in 1 stages" in capsys.readouterr().out

    @pytest.mark.slow
    def test_fails(self, capsys):
        assert main(["check", "vit_tiny_patch16_224", "--batch-size", "10000000", "--ratio", "1"]) == 1
        assert capsys.readouterr().out.count("pass  ") == 4

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["no_such_model"], "timm.list_models"),
            (["cait_xxs24_224"], "timm's VisionTransformer"),
            (["vit_tiny_patch16_224", "--layer", "40"], "from 0 to 12"),
            (["vit_tiny_patch16_224", "--layer", "40"], "remedy:   python -m ser_reg check MODEL --layer 3"),
            (["no_module:make"], "package.module:function"),
            (["vit_tiny_patch16_224", "--images", "nowhere"], "--images FOLDER"),
            (["vit_tiny_patch16_224", "--images", "two", "--image-size", "32"], "at least 3 images that can be read"),
            (["vit_tiny_patch16_224", "--image-size", "8"], "sides that a grid of patches fits"),
        ],
    )
    def test_says_what_to_type(self, arguments, text, tmp_path, monkeypatch, capsys):
        for i in range(2):
            save(tmp_path / "two" / f"{i}.png", 40, 40)
        monkeypatch.chdir(tmp_path)
        assert main(["check", *arguments]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert "remedy:" in error

    @pytest.fixture
    def alone(self, monkeypatch):
        """No process is started."""
        monkeypatch.setattr(asking, "processes_finding", lambda case: Finding("processes", True, "not asked"))

    @pytest.mark.usefixtures("alone")
    def test_own_images_at_the_last_layer(self, tmp_path, monkeypatch, capsys):
        """[CLS] then joins for the last block: a name of timm is given late_cls."""
        for i in range(3):
            save(tmp_path / "deep" / f"{i}.png", 40, 50 + i)
        monkeypatch.chdir(tmp_path)
        arguments = ["vit_tiny_patch16_224", "--images", ".", "--image-size", "64", "--layer", "12"]
        assert main(["check", *arguments, "--batch-size", "8"]) in (0, 1)  # untrained, on noise
        lines = capsys.readouterr().out.splitlines()
        assert [line[:6] for line in lines[:2]] == ["pass  "] * 2
        assert lines[0].startswith("pass  [CLS] joins at the layer of the term: after 11 blocks, the term at layer 12")

    @pytest.mark.usefixtures("alone")
    def test_models_of_the_users_are_asked_as_they_are(self, tmp_path, monkeypatch, capsys):
        """A forgotten late_cls is not mended here, and one that is there is not undone; nor of an exported encoder."""
        arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 3}
        build = f"timm.create_model('vit_tiny_patch16_224', num_classes=0, dynamic_img_size=True, **{arguments})"
        (tmp_path / "mine_for_check.py").write_text(
            "import timm\nfrom ser_reg import late_cls\n\n\n"
            f"def forgotten():\n    return {build}\n\n\ndef there():\n    return late_cls({build}, 2)\n"
        )
        vit = late_cls(timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **arguments), 2)
        export_timm(vit, tmp_path / "encoder", "vit_tiny_patch16_224", dynamic_img_size=True, **arguments)
        monkeypatch.chdir(tmp_path)
        printed = {}
        for name in ("mine_for_check:forgotten", "mine_for_check:there", "encoder"):
            code = main(["check", name, "--layer", "2", "--batch-size", "16"])
            printed[name] = code, capsys.readouterr().out.splitlines()[0]
        code, line = printed["mine_for_check:forgotten"]
        assert code == 1
        assert line.startswith("FAIL  [CLS] joins at the layer of the term: after 0 blocks")
        assert line.endswith("type: late_cls(model, 2)")
        for name in ("mine_for_check:there", "encoder"):
            code, line = printed[name]
            assert line.startswith("pass  [CLS] joins")
            assert "plain timm, which lets it in at the first, needs late_cls(model, 2) after loading" in line


def test_without_tyro(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["check", "vit_tiny_patch16_224"]) == 2
    assert capsys.readouterr().err.splitlines() == ['The command line needs tyro: pip install "ser-reg[cli]"']


@pytest.mark.parametrize("arguments", [[], ["check"], ["report", "m", "--layers", "early"], ["walk"]])
def test_what_cannot_be_read(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err


def test_no_model(capsys):
    assert main(["report"]) == 2
    assert "remedy:   python -m ser_reg report vit_small_patch16_224" in capsys.readouterr().err


def save(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(height * width))
    Image.fromarray((noise * 255).byte().numpy()).save(path)


def run(*arguments, **environment):
    command = [sys.executable, "-m", "ser_reg", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
