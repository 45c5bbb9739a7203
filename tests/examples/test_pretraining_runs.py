"""The reference trainings on several processes, and their scripts as they are started, killed and stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")

from golden_curves import CURVES, curve_job, differences
from pictures_on_disk import picture
from pretraining_jobs import GRADIENTS, TINY, lines, train_job

import ser_reg

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_cpu")]
EXAMPLES = Path(__file__).parents[2] / "examples"
JOBS = Path(__file__).with_name("pretraining_jobs.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
SAME = ("loss", "base", "term", "learning_rate")


def start(*command, processes=None):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes else []
    command = [sys.executable, *launcher, *command]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE"))}
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | ENVIRONMENT,
        start_new_session=True,
    )


def finish(process, seconds=300):
    """Exit code and output; nothing that hangs outlives the test."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"hangs after {seconds} s\n{out}\n{err}")
    return process.returncode, out, err


def script(method, *flags, processes=None):
    return start(EXAMPLES / f"{method}.py", *TINY.split(), *flags, processes=processes)


def own_warnings(err):
    """Lines that warn about a file of this project. Other packages may warn of what they are going to change."""
    folders = (str(EXAMPLES), str(Path(ser_reg.__file__).parent))
    return [line for line in err.splitlines() if "Warning: " in line and any(folder in line for folder in folders)]


def wait_for_lines(process, folder, count, seconds=200):
    end = time.monotonic() + seconds
    path = folder / "metrics.jsonl"
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)
    pytest.fail(f"no {count} lines: {finish(process, 1)}")


# The same batch on any number of processes

DDP = {
    "moco_v3": [
        [],
        ["--term.ratio", 5 / 16],  # shares of b2 that differ
        ["--local-views", 4],
        ["--term.target", "momentum", "--term.all-layers"],
        ["--accumulate", 2],
        ["--term.ratio", 2 / 16, "--local-views", 4],  # on four processes, two have none of b2
        ["ser", "--term.crops", "--crop-turns", "--term.ratio", 5 / 16],
        ["augself", "--term.target", "momentum", "--term.turn", 1, "--crop-turns"],
        ["equimod", "--term.ratio", 7 / 16],
        ["essl", "--term.ratio", 3 / 16, "--term.all-layers"],  # on four processes, one has none of the term's images
        ["stl", "--term.ratio", 0.5, "--crop-turns"],
        ["reconstruction", "--term.ratio", 3 / 16],
    ],
    "dino": [
        ["--knn-every", 0.02],
        ["--term.ratio", 5 / 16, "--term.target", "momentum"],
        ["--local-views", 4, "--accumulate", 2],
        ["none"],
        ["essl", "--local-views", 4, "--accumulate", 2],
    ],
    "barlow_twins": [[], ["--term.ratio", 5 / 16, "--term.weight", 0], ["--local-views", 4, "--term.all-layers"]],
}
RECORDED = [name for name, curve in CURVES.items() if curve["processes"] == 2]
CASES = [(method, number) for method, cases in DDP.items() for number in range(len(cases))]
ON_FOUR = [("moco_v3", n) for n in (1, 5, 6, 8, 9, 10, 11)] + [("dino", 1), ("barlow_twins", 2)]
MOVED = ("ser", "stl", "reconstruction")
SHARDED = [("moco_v3", 8), ("dino", 0), ("dino", 4), ("barlow_twins", 0)]


def job(method, flags, folder, **more):
    """Clipping is left out: it would hide gradients that are wrong by a factor, as Adam does."""
    plain = ["--clip", None, *(["--drop-path", 0] if method == "dino" else [])]
    flags = [*flags, *plain, "--output-dir", folder]  # the word of a term comes first
    return {"method": method, "flags": list(map(str, flags)), "batch_statistics": False, **more}


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(20):
        picture(i, (48, 40)).save(folder / f"{i:02}.png")
    for i in (3, 4, 9):
        (folder / f"{i:02}.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, unreadable):
    """Folders of all that is run on two processes and on four, run at once. But for the recorded curves, batch norm
    gives way to layer norm: on CPUs each process has batch statistics of its own."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [job(m, DDP[m][n], folder / f"{m}{n}", gradients=True) for m, n in CASES]
    jobs += [job(m, [*DDP[m][n], "--fsdp"], folder / f"{m}{n}_fsdp", gradients=True) for m, n in SHARDED]
    stopped = job("dino", ["--fsdp", *DDP["dino"][0]], folder / "stopped_fsdp")
    jobs += [stopped | {"stop_after": 2}, stopped]
    before = signal.getsignal(signal.SIGTERM)
    for word in MOVED:
        train_job(**job("dino", [word, "--steps", 4], folder / f"moved_{word}", stop_after=2))
    signal.signal(signal.SIGTERM, before)
    jobs += [job("dino", [word, "--steps", 4], folder / f"moved_{word}") for word in MOVED]
    jobs.append(job("dino", ["--data", unreadable, "--steps", 5], folder / "unreadable"))
    jobs += [curve_job(name, folder / name) for name in RECORDED]
    on_four = [job(m, DDP[m][n], folder / f"four_{m}{n}", gradients=True) for m, n in ON_FOUR]
    (folder / "jobs.json").write_text(json.dumps({2: jobs, 4: on_four}))
    code, out, err = finish(start(JOBS, folder / "jobs.json"), 900)
    assert code == 0, f"{out[-3000:]}\n{err[-6000:]}"
    (folder / "output").write_text(out)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """alone(method, number): the folder of the same on one process."""
    folder = tmp_path_factory.mktemp("alone")

    def train(method, number):
        found = folder / f"{method}{number}"
        if not found.exists():
            train_job(**job(method, DDP[method][number], found, gradients=True))
        return found

    return train


def assert_same(folder, other):
    ours, others = lines(folder), lines(other)
    assert [line["step"] for line in ours] == [line["step"] for line in others]
    for line, twin in zip(ours, others, strict=True):
        assert line.keys() == twin.keys()
        # Of terms that tell how images were changed, each process knows the chance of its own images alone.
        for name in {*SAME, "knn", *(["term_chance"] if "term_valid" in line else [])} & line.keys():
            assert line[name] == pytest.approx(twin[name], rel=1e-4, abs=2e-3 if name == "knn" else 1e-9), name
    assert max(line["loss"] for line in ours) - min(line["loss"] for line in ours) > 1e-3  # it moves


def assert_same_gradients(folder, other):
    ours, others = (torch.load(path / GRADIENTS, weights_only=True) for path in (folder, other))
    assert ours.keys() == others.keys()
    assert len(ours) > 30
    for name, gradient in ours.items():
        error, size = (gradient - others[name]).norm(), others[name].norm()  # small entries are sums that cancel
        assert error <= 1e-5 * size + 1e-6, f"{name}: off by {error / size:.1e} of its norm"


@pytest.mark.parametrize(("processes", "method", "number"), [(2, *c) for c in CASES] + [(4, *c) for c in ON_FOUR])
def test_several_processes_train_as_one(runs, alone, processes, method, number):
    found = runs / f"{'four_' if processes == 4 else ''}{method}{number}"
    assert_same(found, alone(method, number))
    assert_same_gradients(found, alone(method, number))


@pytest.mark.parametrize("name", RECORDED)
def test_two_processes_draw_the_recorded_curve(runs, name):
    assert not differences(lines(runs / name), CURVES[name])


@pytest.mark.parametrize(("method", "number"), SHARDED)
def test_sharded_parameters_train_as_whole_ones(runs, method, number):
    folders = runs / f"{method}{number}_fsdp", runs / f"{method}{number}"
    assert_same(*folders)
    assert_same_gradients(*folders)
    sharded, whole = (folder / "checkpoint.pt" for folder in folders)
    ours, others = (torch.load(path, weights_only=True)["model"] for path in (sharded, whole))
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=2e-4)


def test_stopped_sharded_training_goes_on(runs):
    assert_same(runs / "stopped_fsdp", runs / "dino0_fsdp")


@pytest.mark.parametrize("word", MOVED)
def test_training_goes_on_with_another_number_of_processes(tmp_path, runs, word):
    train_job(**job("dino", [word, "--steps", 4], tmp_path / "one"))
    assert_same(runs / f"moved_{word}", tmp_path / "one")


def test_unreadable_images_of_all_processes_are_counted_once(runs, unreadable):
    found = (runs / "unreadable" / "unreadable.txt").read_text().splitlines()
    assert sorted(found) == [str(unreadable / f"{i:02}.png") for i in (3, 4, 9)]
    assert "3 images could not be read" in (runs / "output").read_text()


# The scripts


@pytest.mark.parametrize(("method", "processes"), [("moco_v3", 2), ("dino", None), ("barlow_twins", None)])
def test_script_trains_as_it_is(tmp_path, method, processes):
    code, out, err = finish(script(method, "--output-dir", tmp_path / "run", processes=processes))
    assert code == 0, err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoint.pt",
        "encoder",
        "metrics.jsonl",
        "settings.json",
    }
    written = {path.name for path in (tmp_path / "run" / "encoder").iterdir()}
    assert written == {"README.md", "config.json", "model.safetensors"}
    assert len(lines(tmp_path / "run")) == 3
    assert out.count("1,920 images; 3 steps of 16 images, 4 of them whole") == 1
    assert "Traceback" not in err
    assert not own_warnings(err)


def test_script_says_what_to_type(tmp_path):
    flags = ["--batch-size", 15, "--output-dir", tmp_path / "run"]
    running = [script("moco_v3", "--term.layer", 9), script("dino", *flags, processes=2)]
    (code, _, err), (shared, _, said) = map(finish, running)
    assert code == 1
    assert err.startswith("moco_v3.py\n  given:    layer=9 of an encoder of 3 blocks")
    assert "remedy:   python examples/moco_v3.py ser --term.layer 3" in err
    assert "Traceback" not in err
    assert shared != 0
    assert "remedy:   --batch-size 1" in said
    assert not (tmp_path / "run").exists()


def test_killed_training_goes_on_bit_for_bit(tmp_path):
    """At random moments, writing a checkpoint as likely as not; dropped paths are drawn anew."""
    flags = ["--steps", 14, "--epochs", 2, "--drop-path", 0.3, "--checkpoint-minutes", 0, "--output-dir"]
    reference = script("dino", *flags, tmp_path / "whole")
    draw, kills = random.Random(), []
    for count in (2, 5, 9):
        running = script("dino", *flags, tmp_path / "killed")
        wait_for_lines(running, tmp_path / "killed", count)
        kills.append(draw.uniform(0, 0.4))
        time.sleep(kills[-1])
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        if (tmp_path / "killed" / "checkpoint.pt").exists():
            torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    for running in (script("dino", *flags, tmp_path / "killed"), reference):
        code, _, err = finish(running)
        assert code == 0, f"killed after {kills}: {err}"
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole"), f"killed after {kills}"
    assert len(lines(tmp_path / "killed")) == 14
    ours, others = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in ours.items())
    assert not list((tmp_path / "killed").glob(".*checkpoint*"))


def test_sigterm_to_all_processes_leaves_a_checkpoint(tmp_path):
    """As schedulers send it, and torchrun passes it on: to those that prepare images as well."""
    folder = tmp_path / "run"
    flags = ["--steps", 4000, "--checkpoint-minutes", 60, "--log-every", 5, "--workers", 1, "--output-dir", folder]
    running = script("moco_v3", *flags, processes=2)
    wait_for_lines(running, folder, 5)
    running.send_signal(signal.SIGTERM)
    code, out, err = finish(running, 200)
    assert code != 0  # torchrun's, which was stopped itself
    assert "stopped after step" in out, err
    assert "DataLoader worker" not in err
    done = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert [line["step"] for line in lines(folder)] == list(range(done))
    assert (folder / "encoder" / "model.safetensors").exists()
