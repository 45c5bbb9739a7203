"""Settings of the trainings: groups that check themselves, presets, the words of the terms, and what goes wrong."""

import importlib
import importlib.util
import json

import dino
import pytest

pytest.importorskip("accelerate")

from data.sampler import whole_images
from pretraining.loop import train
from pretraining.settings import parse
from pretraining.term import TERMS
from pretraining_jobs import METHODS, parsed, train_job

from ser_reg import SERError
from ser_reg.objectives import OBJECTIVES

pytestmark = pytest.mark.usefixtures("on_cpu")
SCRIPTS = {method: importlib.import_module(method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_help_has_groups_and_every_setting_with_its_meaning(method, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(method, ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in ("--term.weight", "--term.ratio", "--term.crops", "--crop-turns", "--path", "--hidden", "--fsdp"):
        assert name in text
    for group in ("run", "data", "encoder", "views", "optimizer", "method", "term"):
        assert f" {group} options " in text
    assert text.count("--") > 45


def test_help_lists_all_terms_with_what_they_are(capsys):
    with pytest.raises(SystemExit):
        parse(dino.PRESETS, "dino.py", ["--help"])
    text = capsys.readouterr().out
    for word in (*OBJECTIVES, "none"):
        assert f"• {word} " in text
    assert "projector" in text  # from the docstring of the term


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["paper", "released", "small"])
def test_presets_go_together(method, preset):
    settings = SCRIPTS[method].PRESETS[preset]
    assert settings.preset == preset
    settings.check(f"{method}.py")
    assert json.loads(json.dumps(settings.plain())) == settings.plain()
    assert settings.same_run(settings.plain()) == []
    names = [name for name in settings.flat() if name != "preset"]
    assert len(names) == sum(len(group) for name, group in settings.plain().items() if name != "preset")
    assert settings.flat()["term.name"] == "ser"


def test_flags_may_stand_before_and_after_the_word():
    """And a flag of the default term without its word."""
    same = (
        ["ser", "--steps", 7, "--term.weight", 2, "--no-rotations"],
        ["--steps", 7, "ser", "--no-rotations", "--term.weight", 2],
        ["--no-rotations", "--steps", 7, "--term.weight", 2],
    )
    first, *others = (parse(dino.PRESETS, "dino.py", list(map(str, flags))) for flags in same)
    assert others == [first, first]
    assert (first.run.steps, first.term.weight, first.views.rotations) == (7, 2.0, False)
    assert first.term.ratio == 0.25  # the preset's
    plain = parse(dino.PRESETS, "dino.py", ["--preset", "paper", "none", "--seed", "3"])
    assert (plain.preset, plain.run.seed, plain.term.name, plain.late_layer) == ("paper", 3, "none", 0)
    assert plain.plain()["term"] == {"name": "none"}


@pytest.mark.parametrize("preset", ["paper", "released", "small"])
def test_each_term_has_weight_and_ratio_of_its_own_and_the_presets_layer(preset):
    """What a preset says of SER's weight and of the side that is compared is not said of others."""
    for method, script in SCRIPTS.items():
        ser = script.PRESETS[preset].term
        for word, objective in OBJECTIVES.items():
            settings = parse(script.PRESETS, f"{method}.py", ["--preset", preset, word])
            if word == "ser":
                assert settings.term == ser
                continue
            expected = 8 if (method, word) == ("barlow_twins", "essl") else objective.default_weight
            assert (settings.term.weight, settings.term.target) == (expected, "online")
            assert (settings.term.layer, settings.term.ratio) == (ser.layer, 1)
            assert settings.late_layer == ser.layer
            assert settings.read == 1
            control = settings.but(term={"weight": 0.0})
            assert control.read == (1 if word in ("stl", "reconstruction") else 0)
            assert control.late_layer == ser.layer  # λ is all that differs from the run with the term
            last = settings.but(term={"layer": settings.encoder.block_count})
            last.check(f"{method}.py")
            assert last.late_layer == settings.encoder.block_count - 1


def test_terms_on_whole_images_can_do_with_crops():
    settings = parse(dino.PRESETS, "dino.py", ["ser", "--term.crops", "--no-dynamic-size"])
    assert not settings.term.policy.whole
    assert settings.read == 0.25
    assert settings.but(term={"weight": 0.0}).read == 0
    assert not any(hasattr(kind, "crops") for word, kind in TERMS.items() if word != "ser")


def test_other_values_by_plain_names():
    settings = dino.PRESETS["small"].but(hidden=7, steps=3, term={"layer": 1})
    assert (settings.method.hidden, settings.run.steps, settings.term.layer) == (7, 3, 1)
    assert settings.term.temperature == 0.5
    with pytest.raises(TypeError, match="hiden"):
        settings.but(hiden=7)


def test_depth_is_that_of_the_architecture():
    settings = dino.PRESETS["paper"].but(architecture="vit_large_patch16_224", term={"layer": 20})
    settings.check("dino.py")
    assert settings.late_layer == 20
    assert settings.but(term={"all_layers": True}).layers == tuple(range(1, 25))
    with pytest.raises(SERError, match="--term.layer 3"):
        settings.but(term={"layer": 25}).check("dino.py")


WRONG = [
    ("dino", ["--term.ratio", 0.05], "1 of 16 images in b2", "--term.ratio 0.125"),
    ("dino", ["--term.ratio", 0], "ratio=0", "none"),
    ("dino", ["--term.ratio", 1.5], "ratio=1.5", "--term.ratio 0.01"),
    ("dino", ["--term.layer", 4], "layer=4 of an encoder of 3 blocks", "--term.layer 3"),
    ("dino", ["--cls-layer", 3], "cls_layer=3", "--cls-layer 2"),
    ("dino", ["--no-dynamic-size", "--local-views", 4], "local_views=4", "--dynamic-size"),
    ("dino", ["--no-dynamic-size"], "scale=(0.7, 1.3)", "--scale 1 1 --aspect 1 1"),
    ("dino", ["--preset", "big"], "preset='big'", "--preset small"),
    ("dino", ["--preset=big"], "preset='big'", "--preset small"),
    ("dino", ["--batch-size", 4000], "1920 images", "--batch-size 1920"),
    ("dino", ["--data", "/nowhere"], "no such folder", "--data "),
    ("dino", ["--fsdp", "--precision", "fp16"], "fsdp with precision=fp16", "--precision bf16"),
    ("dino", ["--fsdp"], "one process", "--fsdp"),
    ("barlow_twins", ["--term.target", "momentum"], "target='momentum'", "--term.target online"),
    ("dino", ["--accumulate", 3], "accumulate=3", "--accumulate 1"),
    ("dino", ["--accumulate", 8], "0 of 2 images in b2", "--term.ratio 1"),
    ("dino", ["--seed", -1], "seed=-1", "--seed 0"),
    ("moco_v3", ["--image-size", 30], "image_size=30", "--image-size 32"),
    ("moco_v3", ["--local-views", 4, "--local-size", 15], "local_size=15", "--local-size 16"),
    ("moco_v3", ["--local-views", 4, "--local-size", 32], "local views of 32", "--local-size 13"),
    ("moco_v3", ["--width", 22], "width 22", "--width 24"),
    ("dino", ["--heads", 5], "divisible by num_heads", "--"),
    ("dino", ["--architecture", "vit_nope"], "Unknown model", "--architecture vit_small_patch16_224"),
    ("dino", ["--architecture", "cait_xxs24_224"], "dynamic_img_size", "--architecture vit_small_patch16_224"),
    ("moco_v3", ["--architecture", "eva02_tiny_patch14_224"], "weight_init", "--initialisation timm"),
    (
        "dino",
        ["--architecture", "vit_small_patch16_dinov3", "--positions", "sincos"],
        "no position embedding",
        "--positions learned",
    ),
    ("dino", ["--scale", 2, 1], "scale=(2.0, 1.0)", "--scale 0.7 1.3"),
    ("dino", ["--prototypes", 0], "prototypes=0", "--prototypes 65536"),
    ("dino", ["--patch-size", 0], "patch_size=0", "--patch-size 16"),
    ("dino", ["--workers", -1], "workers=-1", "--workers 0"),
    ("dino", ["--log-every", 0], "log_every=0", "--log-every 50"),
    ("dino", ["--crop-min", 0], "crop_min=0.0", "--crop-min 0.08"),
    ("dino", ["--drop-path", 1.5], "drop_path=1.5", "--drop-path 0.1"),
    ("dino", ["--warmup-epochs", -1], "warmup_epochs=-1", "--warmup-epochs 10"),
    ("dino", ["--term.weight", -1], "weight=-1", "--term.weight 0.5"),
    ("dino", ["--term.temperature", 0], "temperature=0", "ser --term.temperature 0.3"),
    ("dino", ["--steps", 0], "steps=0", "--steps 100"),
    (
        "dino",
        ["equimod", "--term.target", "momentum"],
        "target='momentum' with equimod",
        "equimod --term.target online",
    ),
    ("dino", ["reconstruction", "--term.target", "momentum"], "target='momentum'", "--term.target online"),
    ("dino", ["augself", "--term.ratio", 0], "ratio=0", "augself --term.ratio 1.0"),
    ("dino", ["augself", "--term.flip", -1], "flip=-1", "augself --term.flip 0.0"),
    ("dino", ["stl", "--batch-size", 17], "17 of 17 images in pairs", "--batch-size 16 --term.ratio 1"),
    ("dino", ["stl", "--batch-size", 18, "--accumulate", 2], "9 of 9 images in pairs", "--batch-size 8 --term.ratio 1"),
    ("dino", ["stl", "--term.ratio", 5 / 16], "5 of 16 images in pairs", "--term.ratio 0.25"),
    ("dino", ["essl", "--no-dynamic-size"], "turned crops of 16 pixels", "essl --local-size 32"),
    ("dino", ["essl", "--local-size", 15], "local_size=15", "--local-size 16"),
    ("dino", ["reconstruction", "--path-targets", 0], "path_targets=0", "--path-targets 2"),
]


@pytest.mark.parametrize(("method", "flags", "given", "remedy"), WRONG)
def test_wrong_settings_end_before_the_training(tmp_path, method, flags, given, remedy):
    with pytest.raises(SERError) as error:
        train_job(method, [*flags, "--output-dir", tmp_path / "run"])
    assert given in error.value.given
    assert remedy in error.value.remedy
    assert not (tmp_path / "run").exists()


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(SERError, match="--batch-size 15"):
        whole_images(16, 0.25, 3)


def test_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SERError, match="pip install wandb"):
        train_job("dino", ["--tracker", "wandb", "--output-dir", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


def test_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(SERError, match="a folder to write to"):
        train_job("dino", ["--output-dir", tmp_path / "run"])
    assert (tmp_path / "run").read_text() == "mine"


def test_two_precisions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SERError, match="remedy:   --precision fp16"):
        train("dino", parsed("dino", ["--output-dir", tmp_path / "run"]), dino.build, dino.recipes)
    assert not (tmp_path / "run").exists()
