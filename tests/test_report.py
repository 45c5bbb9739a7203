"""The report: right figures for every kind of ViT, probes that cannot cheat, a page that stands alone, and errors."""

import base64
import copy
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ser_reg import SERError, equivariance_score, export_timm, late_cls
from ser_reg.__main__ import main
from ser_reg.photographs import read_folder
from ser_reg.report import NamedEncoders, report
from ser_reg.report_findings import early_layer, findings
from ser_reg.report_images import collect, parts, whole
from ser_reg.report_maps import colours
from ser_reg.report_probes import mean_tokens, probe
from ser_reg.vit import patch_tokens, position_coding, without_positions

DEPTH = 2
DYNAMIC = {"dynamic_img_size": True}


def vit(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 0}
    model = timm.create_model(name, **{**small, **kwargs}).eval()
    with torch.no_grad():  # timm starts with prefix tokens and layer scales near 0, which would hide mistakes
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def photos(n=5, size=(40, 48)):
    """Smooth images, brighter at the top, as scenes are."""
    draw = torch.Generator().manual_seed(1)
    noise = F.interpolate(torch.rand(n, 3, 6, 6, generator=draw), size, mode="bilinear")
    light = torch.linspace(1, 0, size[0])[:, None].expand(size)
    return list(0.4 * noise + 0.6 * light)


def save(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(height * width))
    Image.fromarray((noise * 255).byte().numpy()).save(path)


ABSOLUTE, ROTARY = "absolute", "rotary"
# name: arguments, position coding, left out
ZOO = {
    "static": ({}, [ABSOLUTE], ["no scale score"]),
    "static-rectangle": (
        {"img_size": (24, 40)},
        [ABSOLUTE],
        ["no scale score", "no rotation score", "no rotation probe"],
    ),
    "dynamic": (DYNAMIC, [ABSOLUTE], []),
    "dynamic-rectangle": ({"img_size": (24, 40), **DYNAMIC}, [ABSOLUTE], ["no rotation probe"]),
    "no-positions": ({"pos_embed": "none", **DYNAMIC}, [], []),
    "registers": ({"name": "vit_small_patch14_reg4_dinov2", **DYNAMIC}, [ABSOLUTE], []),
    "gap": ({"name": "vit_medium_patch16_gap_256", **DYNAMIC}, [ABSOLUTE], []),
    "siglip": ({"name": "vit_base_patch16_siglip_224", **DYNAMIC}, [ABSOLUTE], []),
    "deit3": ({"name": "deit3_small_patch16_224", **DYNAMIC}, [ABSOLUTE], []),
    "deit-distilled": ({"name": "deit_tiny_distilled_patch16_224", **DYNAMIC}, [ABSOLUTE], []),
    "clip": ({"name": "vit_base_patch16_clip_224", **DYNAMIC}, [ABSOLUTE], []),
    "eva02": ({"name": "eva02_tiny_patch14_224", **DYNAMIC}, [ABSOLUTE, ROTARY], []),
    "eva02-static": ({"name": "eva02_tiny_patch14_224"}, [ABSOLUTE, ROTARY], ["no scale score"]),
    "dinov3": ({"name": "vit_small_patch16_dinov3", **DYNAMIC}, [ROTARY], []),
    "rope": ({"name": "vit_small_patch16_rope_224", **DYNAMIC}, [ROTARY], []),
    "rope-mixed-ape": ({"name": "vit_small_patch16_rope_mixed_ape_224", **DYNAMIC}, [ABSOLUTE, ROTARY], []),
}
QUICK = ["static", "static-rectangle", "dynamic", "no-positions", "rope-mixed-ape"]
SLOW = pytest.mark.slow


class TestModels:
    @pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in ZOO])
    def test_every_kind(self, name, tmp_path):
        arguments, coding, left_out = ZOO[name]
        model = vit(**arguments)
        record = report({name: model}, photos(), tmp_path, max_images=5)["models"][name]
        assert [kind.split()[0] for kind in record["positions"]] == coding
        assert [reason.split(":")[0] for reason in record["left_out"]] == left_out
        asked = {"rotation", "flip", "scale"} - {reason.split()[1] for reason in left_out if "score" in reason}
        assert set(record["scores"]) == asked
        assert set(record["scores_without_positions"]) == (asked if coding else set())
        assert set(record["probes"]) == {"flip"} | ({"rotation"} - {r.split()[1] for r in left_out if "probe" in r})
        for part in ("scores", "scores_without_positions", "probes"):
            for layers in record[part].values():
                assert list(layers) == [0, 1, 2]
                values = [value for readings in layers.values() for value in readings.values()]
                assert all(math.isfinite(value) and -1.001 <= value <= 1.001 for value in values)
        assert all((tmp_path / picture).stat().st_size > 1000 for picture in record["pictures"])
        assert len(record["pictures"]) == 2

    @pytest.mark.parametrize("late", [0, 1])
    @pytest.mark.parametrize("name", [name for name in ZOO if name != "no-positions"])
    def test_without_positions_the_order_of_patches_is_nothing(self, name, late):
        """And with them it is; the model itself stays as it was."""
        arguments, *_ = ZOO[name]
        model = late_cls(vit(**arguments), late)
        before = copy.deepcopy(model.state_dict())
        size = arguments.get("img_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.rand(1, 3, height, width)
        rows, columns = height // 8, width // 8
        order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(2))
        patches = F.unfold(images, 8, stride=8)[:, :, order]
        shuffled = F.fold(patches, (height, width), 8, stride=8)

        def difference(model):
            with torch.no_grad():
                tokens, moved = (patch_tokens(model, x, DEPTH).flatten(2) for x in (images, shuffled))
            return ((tokens[:, :, order] - moved).norm() / moved.norm()).item()

        copied = without_positions(model)
        assert difference(copied) < 1e-5
        assert difference(model) > 1e-4
        assert position_coding(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_figures_are_those_of_the_score(self, tmp_path):
        model, images = vit(**DYNAMIC), photos()
        scores = report({"m": model}, images, tmp_path, layers=[1, 2], seed=3)["models"]["m"]["scores"]
        mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
        pixels = torch.stack([(whole(image, (32, 32)) - mean) / std for image in images])
        assert scores == equivariance_score(model, pixels, [1, 2], torch.Generator().manual_seed(3))

    def test_leaves_the_model_as_it_was(self, tmp_path):
        model = vit(drop_path_rate=0.5, **DYNAMIC).train()
        model.blocks[0].eval()
        before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        report({"m": model}, photos(), tmp_path, layers=[1])
        assert model.training
        assert not model.blocks[0].training
        assert not model.patch_embed._forward_pre_hooks
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_same_seed_same_figures(self, tmp_path):
        found = [report({"m": vit(**DYNAMIC)}, photos(), tmp_path, seed=4)["models"]["m"] for _ in range(2)]
        for part in ("scores", "scores_without_positions", "probes", "findings"):
            assert found[0][part] == found[1][part]

    def test_image_size(self, tmp_path):
        found = report({"dynamic": vit(**DYNAMIC), "static": vit()}, photos(), tmp_path, layers=[1], image_size=48)
        assert found["models"]["dynamic"]["image_size"] == (48, 48)
        assert "dynamic_img_size=True" in found["models"]["static"]["error"]


PAIRS = [i for i in range(20) for _ in range(2)]  # two views of each of twenty images


class TestProbes:
    def test_noise_is_at_chance(self):
        found = probe(torch.randn(40, 4, 16), PAIRS)
        assert found.chance == 0.25
        assert abs(found.accuracy - 0.25) < 3 * found.standard_error
        assert 0.01 < found.standard_error < 0.08

    def test_features_that_no_element_changes_are_exactly_at_chance(self):
        """The same answer for all elements of a view is right for one of them."""
        assert probe(torch.randn(40, 1, 16).expand(-1, 4, -1), PAIRS).accuracy == pytest.approx(0.25)
        assert probe(torch.randn(40, 1, 16).expand(-1, 2, -1), PAIRS).accuracy == pytest.approx(0.5)

    def test_views_of_an_image_are_held_out_together(self):
        """Equal views of an image would give the label away, were one trained on and the other asked."""
        features = torch.randn(20, 4, 200).repeat_interleave(2, 0)
        assert probe(features, list(range(40))).accuracy > 0.9
        assert probe(features, PAIRS).accuracy < 0.4

    def test_finds_a_turn_that_is_there(self):
        pixels = torch.stack([whole(image, (32, 32)) for image in photos(12)])
        features = mean_tokens(vit(**DYNAMIC), pixels, [0, 2])
        assert features["rotation"][2].shape == (12, 4, 32)
        assert features["flip"][2].shape == (12, 2, 32)
        assert probe(features["rotation"][2], list(range(12))).accuracy > 0.9
        assert probe(features["flip"][2], list(range(12))).accuracy < 0.8  # light from above says nothing of it

    def test_equivariant_network_has_a_mean_token_that_does_not_turn(self):
        model = without_positions(vit(**DYNAMIC))
        with torch.no_grad():
            weight = model.patch_embed.proj.weight
            weight.copy_(weight.mean((2, 3), keepdim=True).expand_as(weight))
        pixels = torch.stack([whole(image, (32, 32)) for image in photos(12)])
        for features in mean_tokens(model, pixels, [2]).values():
            torch.testing.assert_close(features[2], features[2][:, :1].expand_as(features[2]))

    def test_elements_are_those_of_torch(self):
        """Turns are counter-clockwise."""
        model, images = vit(**DYNAMIC), torch.rand(3, 3, 32, 32)
        found = mean_tokens(model, images, [0])
        with torch.no_grad():
            for turns in range(4):
                expected = patch_tokens(model, images.rot90(turns, (-2, -1)), 0).mean((-2, -1))
                torch.testing.assert_close(found["rotation"][0][:, turns], expected)
            torch.testing.assert_close(found["flip"][0][:, 1], patch_tokens(model, images.flip(-1), 0).mean((-2, -1)))

    def test_fewer_images_than_rounds(self):
        assert probe(torch.eye(4).expand(6, 4, 4), [0, 0, 0, 1, 1, 1]).accuracy == 1


class TestImages:
    def test_whole_image_is_the_centre(self):
        image = torch.zeros(3, 10, 30)
        image[:, :, 10:20] = 1
        assert whole(image, (10, 10)).min() > 0.99
        assert whole(image, (20, 60)).shape == (3, 20, 60)

    @pytest.mark.parametrize("size", [(7, 100), (3, 2), (1, 1), (300, 200)])
    def test_parts_lie_inside(self, size):
        image = torch.full((3, *size), 0.5)
        for part in parts(image, (16, 24), 20, torch.Generator().manual_seed(0)):
            assert part.shape == (3, 16, 24)
            torch.testing.assert_close(part, torch.full((3, 16, 24), 0.5))

    def test_bytes_and_fractions_alike(self):
        image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
        found, unreadable = collect([image, image.float() / 255], 2, 0)
        assert found["image 0"].dtype == torch.uint8  # not four times as large in memory
        assert torch.equal(*(whole(image, (8, 8)) for image in found.values()))
        assert not unreadable

    @pytest.mark.parametrize(
        ("images", "text"),
        [
            (photos(1), "at least two"),
            ([], "at least two"),
            ([torch.randn(3, 8, 8)] * 2, r"in \[0, 1\]"),
            ([torch.ones(3, 8, 8, dtype=torch.int64)] * 2, r"in \[0, 1\]"),
            ([torch.rand(8, 8)] * 2, r"\(3, height, width\)"),
            ([torch.rand(1, 8, 8)] * 2, "image.expand"),
        ],
    )
    def test_what_cannot_be_used(self, images, text):
        with pytest.raises(SERError, match=text):
            collect(images, 64, 0)

    def test_more_than_asked_for_are_drawn(self):
        images = {str(i): torch.full((3, 2, 2), i / 50) for i in range(50)}
        first, again, other = (list(collect(images, 10, seed)[0]) for seed in (0, 0, 1))
        assert first == again != other
        assert len(first) == 10
        assert first == sorted(first, key=int)
        with pytest.raises(SERError, match="max_images=1"):
            collect(images, 1, 0)

    def test_folder_at_any_depth_with_broken_ones(self, tmp_path):
        save(tmp_path / "a.png", 20, 30)
        save(tmp_path / "deep" / "er" / "b.JPG", 30, 20)
        save(tmp_path / ".hidden" / "c.png", 20, 20)
        (tmp_path / "deep" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
        (tmp_path / "cut.jpg").write_bytes((tmp_path / "deep" / "er" / "b.JPG").read_bytes()[:300])
        (tmp_path / "notes.txt").write_text("not an image")
        images, unreadable = read_folder(tmp_path, 64)
        assert list(images) == ["a.png", os.path.join("deep", "er", "b.JPG")]
        assert images["a.png"].shape == (3, 20, 30)
        assert list(unreadable) == ["cut.jpg", os.path.join("deep", "broken.png")]
        assert all(unreadable.values())

    def test_broken_ones_are_replaced(self, tmp_path):
        for i in range(6):
            save(tmp_path / f"{i}.png", 8, 8)
            (tmp_path / f"{i}.jpg").write_bytes(b"no")
        for seed in range(4):
            assert len(read_folder(tmp_path, 6, seed)[0]) == 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    models = {
        "first <b>": vit(**DYNAMIC),
        "second": vit("vit_small_patch16_dinov3", depth=3),
        "not a ViT": nn.Linear(2, 2),
    }
    return folder, report(models, photos(), folder)


class TestPage:
    def test_json_is_what_is_returned(self, made):
        folder, found = made
        assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(found))
        assert found["models"]["second"]["scores"]["flip"][3]["raw"] <= 1

    def test_page_stands_alone(self, made):
        folder, _ = made
        page = (folder / "report.html").read_text()
        sources = re.findall(r'src="([^"]*)"', page)
        assert len(sources) == 3 + 2 * 2
        pictures = {path.read_bytes() for path in folder.glob("*.png")}
        assert {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources} == pictures
        assert not re.search(r"https?://|<script|<link|@import|url\(", page)

    def test_page_is_closed_and_escaped(self, made):
        folder, found = made
        page = (folder / "report.html").read_text()
        assert "first &lt;b&gt;" in page
        assert "<b>" not in page
        assert all(line in page for line in found["models"]["second"]["findings"])
        balance = Balance()
        balance.feed(page)
        assert balance.open == []

    def test_one_that_fails_leaves_the_others(self, made):
        _, found = made
        assert list(found["models"]) == ["first <b>", "second", "not a ViT"]
        assert "timm's VisionTransformer" in found["models"]["not a ViT"]["error"]
        assert "findings" in found["models"]["second"]

    def test_nothing_is_lost_when_it_is_stopped(self, tmp_path):
        class Models(dict):
            def __getitem__(self, name):
                if name == "second":
                    raise KeyboardInterrupt
                return super().__getitem__(name)

        with pytest.raises(KeyboardInterrupt):
            report(Models(first=vit(), second=vit()), photos(), tmp_path, layers=[1])
        assert list(json.loads((tmp_path / "report.json").read_text())["models"]) == ["first"]
        assert not list(tmp_path.glob(".*"))

    def test_all_that_fail_raise(self, tmp_path):
        with pytest.raises(SERError, match="timm's VisionTransformer"):
            report({"linear": nn.Linear(2, 2)}, photos(), tmp_path)
        with pytest.raises(SERError, match="at least one"):
            report({}, photos(), tmp_path)

    def test_device_that_is_not_there(self, tmp_path):
        with pytest.raises(SERError, match='device="cpu"'):
            report({"m": vit()}, photos(), tmp_path, device="abacus")

    @pytest.mark.parametrize("package", ["rich.progress", "matplotlib", "sklearn.decomposition"])
    def test_missing_extra(self, package, tmp_path, monkeypatch):
        for name in [name for name in sys.modules if name.startswith("ser_reg.report_")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SERError, match=r'pip install "ser-reg\[report\]"'):
            report({"m": vit()}, photos(), tmp_path)


class Balance(HTMLParser):
    """Tags that were opened and not closed."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


class TestPictures:
    def test_equal_tokens_have_equal_colours(self):
        maps = [torch.randn(8, 4, 5), torch.randn(8, 6, 3)]
        first, second, again = colours([*maps, maps[0]])
        assert first.shape == (3, 4, 5)
        assert second.shape == (3, 6, 3)
        torch.testing.assert_close(first, again)
        assert 0 <= first.min() < first.max() <= 1

    def test_constant_maps_have_a_colour(self):
        assert torch.isfinite(colours([torch.zeros(8, 2, 2)] * 2)[0]).all()

    @pytest.mark.parametrize(("depth", "layer"), [(12, 3), (24, 6), (32, 8), (4, 1), (1, 1)])
    def test_early_layer(self, depth, layer):
        assert early_layer(depth) == layer

    def test_findings_name_the_best_layer(self):
        def readings(spatial, floor):
            return {"raw": 0.9, "raw_floor": 0.9, "spatial": spatial, "spatial_floor": floor}

        record = {
            "depth": 8,
            "positions": ["absolute"],
            "scores": {"flip": {0: readings(0.9, 0.0), 2: readings(0.8, 0.7), 5: readings(0.6, 0.1)}},
            "scores_without_positions": {"flip": {0: readings(0.95, 0.0), 2: readings(0.8, 0), 5: readings(0.99, 0.1)}},
            "probes": {"flip": {2: {"accuracy": 0.7, "standard_error": 0.04, "chance": 0.5}}},
        }
        best, early, positions, told = findings(record)
        assert "flip at layer 5 (0.60, floor 0.10)" in best
        assert "start with layer 2" in early
        assert "flip 0.80 (+0.10 above its floor)" in early
        assert "flip from 0.60 to 0.99 at layer 5" in positions
        assert "70 ± 4 % (chance 50 %)" in told


TINY = ["--image-size", "32", "--layers", "0", "3"]


class TestCommandLine:
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
        names = ["vit_tiny_patch16_224", "resnet18", "deit_tiny_patch16_224"]
        folders = ["--images", str(tmp_path / "images"), "--output-dir", str(tmp_path / "out")]
        assert main(["report", *names, "--untrained", *TINY, *folders]) == 1
        assert "timm's VisionTransformer" in capsys.readouterr().err
        found = json.loads((tmp_path / "out" / "report.json").read_text())["models"]
        assert [name for name in found if "error" in found[name]] == ["resnet18"]
        assert list(found["deit_tiny_patch16_224"]["scores"]["scale"]) == ["0", "3"]

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["resnet18"], "timm's VisionTransformer"),
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
            return vit()

        monkeypatch.setattr("ser_reg.encoders.create", create)
        with pytest.raises(SERError, match="python -m ser_reg report vit_tiny_patch16_224 --untrained"):
            NamedEncoders(["vit_tiny_patch16_224"])["vit_tiny_patch16_224"]

    @pytest.mark.slow
    def test_offline(self, tmp_path):
        found = run("vit_tiny_patch16_224", "--output-dir", str(tmp_path), HF_HUB_OFFLINE="1")
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
        found = run(name, *arguments)
        assert found.returncode == 0, found.stderr
        assert len(json.loads((tmp_path / "report.json").read_text())["images"]["names"]) == 20
        assert "chance 25 %" in found.stdout


def run(*arguments, **environment):
    command = [sys.executable, "-m", "ser_reg", "report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
