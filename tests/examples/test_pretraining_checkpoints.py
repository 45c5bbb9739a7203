"""Stop and go on: as if the training had not been stopped, from whole checkpoints of the same run only."""

import json

import pytest
import torch
from plain_timm import plain_timm

pytest.importorskip("accelerate")

from pretraining import checkpoints
from pretraining.encoder import build_encoder
from pretraining.optimizer import build_optimizer, set_rates
from pretraining.schedules import Moment
from pretraining.settings import read_run
from pretraining_jobs import METHODS, lines, parsed, train_job, with_scaler
from tiny_batches import batches, tiny_step

from ser_reg import SERError, late_cls, load_encoder
from ser_reg.backbones import backbone
from ser_reg.export import FORMAT

pytestmark = pytest.mark.usefixtures("on_cpu")


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("moco_v3", []),
        ("dino", ["--drop-path", 0.3, "--epochs", 2, "--teacher-warmup-epochs", 2]),
        ("dino", ["--precision", "fp16", "--accumulate", 2]),
        ("barlow_twins", ["--local-views", 4, "--workers", 1]),
        ("barlow_twins", ["--optimizer", "lars", "--learning-rate", 0.2]),
    ],
)
def test_stopped_training_goes_on_as_if_it_had_not_been(tmp_path, method, more):
    flags = ["--steps", 6, *more]  # DINO's last layer learns from the third of two epochs' six steps on
    whole, parts = [*flags, "--output-dir", tmp_path / "whole"], [*flags, "--output-dir", tmp_path / "parts"]
    train_job(method, whole)
    train_job(method, parts, stop_after=2)
    assert [line["step"] for line in lines(tmp_path / "parts")] == [0, 1]
    assert checkpoint(tmp_path / "parts")["step"] == 2
    assert load_encoder(str(tmp_path / "parts" / "encoder"))
    train_job(method, parts, stop_after=5)
    train_job(method, parts)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    ours, other = (checkpoint(tmp_path / name)["model"] for name in ("parts", "whole"))
    assert ours.keys() == other.keys()
    for name, value in ours.items():
        assert torch.equal(value, other[name]), name
    before = (tmp_path / "parts" / "metrics.jsonl").read_text()
    train_job(method, parts)  # nothing is left to do
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == before


def test_scale_of_half_precision_goes_on_as_well(tmp_path, monkeypatch):
    flags = ["--steps", 3, "--precision", "fp16", "--output-dir"]
    for name, stops in (("whole", [None]), ("parts", [2, None])):
        for stop in stops:
            with_scaler(monkeypatch, 2.0**40)  # too much, so that it becomes less
            train_job("moco_v3", [*flags, tmp_path / name], stop_after=stop)
    whole, parts = (checkpoint(tmp_path / name)["scaler"] for name in ("whole", "parts"))
    assert whole == parts
    assert whole["scale"] < 2.0**40


def test_lines_after_the_checkpoint_and_a_line_that_was_cut_off_are_dropped(tmp_path):
    flags = ["--steps", 4, "--output-dir", tmp_path / "run"]
    train_job("moco_v3", flags, stop_after=2)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    train_job("moco_v3", flags)
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2, 3]


def test_only_whole_checkpoints_are_picked_up(tmp_path):
    flags = ["--output-dir", tmp_path / "run"]
    train_job("moco_v3", flags, stop_after=2)
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    stale = path.with_name(".123-checkpoint.pt")
    stale.write_bytes(whole[: len(whole) // 2])
    train_job("moco_v3", flags)
    assert len(lines(tmp_path / "run")) == 3
    assert not stale.exists()
    for cut_off in (b"", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(cut_off)
        with pytest.raises(SERError, match="a whole checkpoint") as error:
            train_job("moco_v3", flags)
        assert error.value.remedy.startswith(f"--resume never --output-dir {tmp_path / 'run'}")
        assert path.read_bytes() == cut_off
    train_job("moco_v3", [*flags, "--resume", "never"])
    assert len(lines(tmp_path / "run")) == 3


def test_resume_with_other_settings_is_refused(tmp_path):
    flags = ["--output-dir", tmp_path / "run"]
    train_job("dino", flags, stop_after=2)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(SERError, match="the same settings") as error:
        train_job("dino", [*flags, "--term.weight", 0.25, "--center-momentum", 0.8])
    assert error.value.remedy.startswith(f"--output-dir {tmp_path / 'run'}_2")
    assert error.value.given == "center_momentum=0.9 there and 0.8 here, term.weight=0.5 there and 0.25 here"
    with pytest.raises(SERError, match=r"term.name=ser there and none here"):
        train_job("dino", ["none", *flags])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    train_job("dino", [*flags, "--log-every", 2, "--checkpoint-minutes", 1])  # these may differ
    assert len(lines(tmp_path / "run")) == 3


@pytest.mark.parametrize("version", [None, 1, FORMAT + 1])
def test_another_format_is_refused_with_one_line_that_names_both(tmp_path, version):
    """Format 1, before there was a number, had settings without groups."""
    flags, run = ["--output-dir", tmp_path / "run"], tmp_path / "run"
    train_job("dino", flags, stop_after=2)
    state, written = checkpoint(run), read_run(run)
    for kept in (state, written):
        kept |= {"settings": {"ser_lambda": 0.5}, "format": version}
        if version is None:
            del kept["format"]
    torch.save(state, run / "checkpoint.pt")
    (run / "settings.json").write_text(json.dumps(written))
    for reads, path in ((lambda: train_job("dino", flags), "checkpoint.pt"), (lambda: read_run(run), "settings.json")):
        with pytest.raises(SERError) as error:
            reads()
        found = f"format {version or 1} in {run / path}, where this version of ser_reg has format {FORMAT}"
        assert error.value.given == found


def test_a_run_that_starts_anew_leaves_no_checkpoint_of_the_one_before(tmp_path):
    """Else the next run after a kill would go on from there."""
    flags = ["--output-dir", tmp_path / "run"]
    train_job("moco_v3", flags)

    def die(moment):
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_job("moco_v3", [*flags, "--resume", "never"], each_step=die)


def test_checkpoint_is_restored_into_an_optimizer_that_has_stepped(tmp_path):
    settings = parsed("moco_v3")
    step = tiny_step("moco_v3", settings)
    optimizer = build_optimizer(step, settings.optimizer)
    set_rates(optimizer, settings.optimizer, settings.run.batch_size, Moment(0, 3, 5))
    step(next(batches("moco_v3", settings)))["loss"].backward()
    optimizer.step()
    checkpoints.save(tmp_path, step, optimizer, None, settings, 1, is_main=True)
    other = tiny_step("moco_v3", settings)
    fresh = build_optimizer(other, settings.optimizer)
    assert checkpoints.restore(checkpoints.load(tmp_path, settings), other, fresh, None) == 1
    for (name, value), restored in zip(step.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, restored), name
    for group, restored in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        names = ("lr", "weight_decay", "decays", "factor")
        assert [group[name] for name in names] == [restored[name] for name in names]
        for p, q in zip(group["params"], restored["params"], strict=True):
            assert torch.equal(optimizer.state[p]["exp_avg_sq"], fresh.state[q]["exp_avg_sq"])


@pytest.mark.parametrize("method", METHODS)
def test_exported_encoder_is_the_trained_one(tmp_path, method):
    flags = ["--output-dir", tmp_path / "run"]
    train_job(method, [*flags, "--term.layer", 2])
    folder = tmp_path / "run" / "encoder"
    plain = plain_timm(folder).eval()
    vit = load_encoder(str(folder))
    assert (backbone(vit).cls_layer, backbone(plain).cls_layer) == (2, 0)
    branch = "target" if method == "dino" else "encoder"
    kept = checkpoint(tmp_path / "run")
    weights = {k.removeprefix(f"method.{branch}."): v for k, v in kept["model"].items()}
    settings = parsed(method, flags)
    trained, untrained = (build_encoder(settings.encoder, settings.late_layer).eval() for _ in range(2))
    trained.load_state_dict({k: v for k, v in weights.items() if k in trained.state_dict()})
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(vit(images), trained(images))
    assert torch.equal(late_cls(plain, 2)(images), trained(images))
    assert not torch.equal(vit(images), untrained(images))
    recorded = read_run(tmp_path / "run")
    assert recorded["method"] == method
    assert recorded["settings"] == settings.plain() == kept["settings"]
    assert recorded["format"] == kept["format"] == FORMAT
