"""The report: right figures for every kind of ViT, a page that stands alone, and errors."""

import base64
import copy
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from small_vits import DEPTH, DYNAMIC, photos, vit
from torch import nn
from torch.nn import functional as F

from ser_reg import SERError, equivariance_score, late_cls, patch_tokens
from ser_reg.backbones import backbone
from ser_reg.backbones.timm_vit import DROPS_PREFIX
from ser_reg.report import report
from ser_reg.report.photographs import whole

ABSOLUTE, ROTARY = "absolute", "rotary"
POOLED = {"class_token": False, "global_pool": "avg"}
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
    "no-positions": ({"pos_embed": "none", **DYNAMIC, **(POOLED if DROPS_PREFIX else {})}, [], []),
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
QUICK = ["static-rectangle", "dynamic", "no-positions"]
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
        for key in ("scores", "scores_without_positions", "probes"):
            for layers in record[key].values():
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

        copied = backbone(model).without_positions()
        assert difference(copied) < 1e-5
        assert difference(model) > 1e-4
        assert backbone(model).position_coding()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    @pytest.mark.usefixtures("undrawn")
    def test_figures_are_those_of_the_score(self, tmp_path):
        model, images = vit(**DYNAMIC), photos()
        scores = report({"m": model}, images, tmp_path, layers=[1, 2], seed=3)["models"]["m"]["scores"]
        mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
        pixels = torch.stack([(whole(image, (32, 32)) - mean) / std for image in images])
        assert scores == equivariance_score(model, pixels, [1, 2], torch.Generator().manual_seed(3))

    @pytest.mark.usefixtures("undrawn")
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

    @pytest.mark.usefixtures("undrawn")
    def test_same_seed_same_figures(self, tmp_path):
        found = [report({"m": vit(**DYNAMIC)}, photos(), tmp_path, seed=4)["models"]["m"] for _ in range(2)]
        for key in ("scores", "scores_without_positions", "probes", "findings"):
            assert found[0][key] == found[1][key]

    @pytest.mark.usefixtures("undrawn")
    def test_image_size(self, tmp_path):
        found = report({"dynamic": vit(**DYNAMIC), "static": vit()}, photos(), tmp_path, layers=[1], image_size=48)
        assert found["models"]["dynamic"]["image_size"] == (48, 48)
        assert "dynamic_img_size=True" in found["models"]["static"]["error"]


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

    @pytest.mark.usefixtures("undrawn")
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

    @pytest.mark.parametrize("package", ["rich.progress", "matplotlib", "sklearn.decomposition", "jinja2"])
    def test_missing_extra(self, package, tmp_path, monkeypatch):
        for name in [name for name in sys.modules if name.startswith("ser_reg.report.")]:
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


class TestWrongInput:
    """Named after the call that was made, with what to type instead."""

    pytestmark = pytest.mark.usefixtures("undrawn")

    def refused(self, *arguments, **more):
        with pytest.raises(SERError) as error:
            report(*arguments, **more)
        assert error.value.call.startswith("report(")
        return error.value

    @pytest.mark.parametrize("models", [[vit()], vit(), "vit_tiny_patch16_224", None])
    def test_models_without_names(self, models, tmp_path):
        error = self.refused(models, photos(), tmp_path)
        assert error.args[2:] == ("models by name", 'report({"mine": model})')

    @pytest.mark.parametrize(
        ("layers", "given", "remedy"),
        [
            (1, "layers=1", "report(models, layers=[1])"),
            ("1", "layers='1'", "report(models, layers=[3])"),
            ([9], "layers=[9]", "layers=[2]"),
            ([1, "2"], "layers=[1, '2']", "layers=[2]"),
            ([], "layers=[]", "layers=[2]"),
        ],
    )
    def test_layers(self, layers, given, remedy, tmp_path):
        error = self.refused({"m": vit()}, photos(), tmp_path, layers=layers)
        assert (error.call, error.given, error.remedy) == ("report(models, layers=...)", given, remedy)

    def test_size(self, tmp_path):
        error = self.refused({"m": vit(**DYNAMIC)}, photos(), tmp_path, layers=[1], image_size=44)
        assert error.call == "report(models, image_size=(44, 44))"
        assert error.remedy == "report(models, image_size=(48, 48))"
        found = report({"m": vit(**DYNAMIC)}, photos(), tmp_path, layers=[1], image_size=(48, 48))
        assert found["models"]["m"]["image_size"] == (48, 48)

    def test_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        error = self.refused({"m": vit()}, photos(), tmp_path / "file")
        assert error.args[2:] == ("a folder that can be written", 'report(models, output_dir="report")')

    @pytest.mark.parametrize(
        ("images", "text"),
        [
            (3, "images, a folder or None"),
            ([Image.new("RGB", (40, 40))] * 2, "torchvision.transforms.functional.to_tensor"),
            ([torch.rand(3, 40, 40).numpy()] * 2, "image 0: a ndarray"),
            ("nowhere", "--images FOLDER"),
        ],
    )
    def test_images(self, images, text, tmp_path):
        assert text in str(self.refused({"m": vit()}, images, tmp_path))
