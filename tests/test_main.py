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
        code = main(["report", "encoder", "mine_for_report:make", "--images", "images", "--output-dir", "out"])
        printed = capsys.readouterr().out
        assert code == 0
        assert "1 files could not be read: broken.jpg" in printed
        assert "To regularize early, start with layer 1" in printed
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

        monkeypatch.setattr("ser_reg.export.create", create)
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
        assert found.stdout.count("pass  ") == 4

    @pytest.mark.slow
    def test_a_model_with_stages(self, capsys):
        assert main(["check", "resnet10t", "--layer", "1", "--batch-size", "16"]) == 0
        assert "in 1 stages" in capsys.readouterr().out

    @pytest.mark.slow
    def test_fails(self, capsys):
        assert main(["check", "vit_tiny_patch16_224", "--batch-size", "10000000", "--ratio", "1"]) == 1
        assert capsys.readouterr().out.count("pass  ") == 3

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["no_such_model"], "timm.list_models"),
            (["cait_xxs24_224"], "timm's VisionTransformer"),
            (["vit_tiny_patch16_224", "--layer", "40"], "from 0 to 11"),
            (["no_module:make"], "package.module:function"),
        ],
    )
    def test_says_what_to_type(self, arguments, text, capsys):
        assert main(["check", *arguments]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert "remedy:" in error


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
