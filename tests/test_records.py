"""Records: whole on disk or not there, and what they say of the machine."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ser_reg.records import atomically, environment


def test_nothing_is_left_half_written(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def stopped_halfway():
        with atomically(path) as part:
            part.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_halfway()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("results.json", "old")]
    with atomically(path) as part:
        part.write_text("new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("results.json", "new")]


def test_ending_stays_and_processes_do_not_meet(tmp_path):
    with atomically(str(tmp_path / "picture.png")) as part:
        assert part.suffix == ".png"
        assert part.parent == tmp_path
        assert str(os.getpid()) in part.name
        part.write_bytes(b"")
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_environment():
    found = environment("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in found["versions"]["torch"]
    assert list(environment()) == list(found)


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    from ser_reg import records

    monkeypatch.setattr(records, "PACKAGES", ("torch", "no-such-package"))
    assert list(environment()["versions"]) == ["torch"]


def test_needs_no_extra():
    extras = "{'jinja2', 'matplotlib', 'rich', 'skimage', 'sklearn', 'tyro'}"
    code = f"import sys; from ser_reg.records import environment; environment(); assert not {extras} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
