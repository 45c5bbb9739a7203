"""A new term is one file and one line: it then trains with every base method, its settings on the command line."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from pretraining_jobs import METHODS, lines

ROOT = Path(__file__).parents[2]
JOBS = Path("tests", "examples", "pretraining_jobs.py")
TERM = '''"""Pooled maps of two views should be alike."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..views.view import View
from .base import Objective, Output

__all__ = ["Alike"]


class Alike(Objective):
    """Maps that are alike.

    Args:
        dim: D, channels of the maps.
        width: of what is compared.
        power: of the distance.
    """

    wants = "views = EquivariantViews(patch_size=16)(images)"
    gathers = False

    def __init__(self, dim: int, width: int = 8, power: float = 2.0, *, maker: object = None) -> None:
        super().__init__(dim, maker=maker)
        self.head = nn.Linear(dim, width)
        self.power = power

    def compare(self, features: list[Tensor], views: list[View], group: "dist.ProcessGroup | None") -> Output:
        one, two = (self.head(z.mean((-2, -1))) for z in features)
        loss = (one - two).abs().pow(self.power).mean()
        return Output(loss, {"size": torch.stack([one, two]).detach().abs().mean()})
'''


def differences(compared, prefix=""):
    """Paths in which two folders differ."""
    found = {prefix + name for name in (*compared.left_only, *compared.right_only, *compared.diff_files)}
    for name, inner in compared.subdirs.items():
        found |= differences(inner, f"{prefix}{name}/")
    return found


def copied(source, folder):
    left_out = shutil.ignore_patterns("__pycache__", "out", "results")
    for room in ("src", "examples"):
        shutil.copytree(source / room, folder / room, ignore=left_out)
    (folder / JOBS).parent.mkdir(parents=True)
    shutil.copy(source / JOBS, folder / JOBS)
    return folder


def register(objectives):
    """What the author of a term types: the file, its import, and its line."""
    (objectives / "alike.py").write_text(TERM)
    registry = objectives / "__init__.py"
    start = "OBJECTIVES: dict[str, type[Objective]] = {"
    text = registry.read_text().replace(start, f'{start}\n    "alike": Alike,')
    registry.write_text(text.replace("from .base import", "from .alike import Alike\nfrom .base import"))


def train(root, flags):
    """Tiny trainings with the library and the examples in a folder: lines of the log, by method."""
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    folders = {method: root.with_name(f"run_{method}") for method in flags}
    jobs = [{"method": m, "flags": [*flags[m], "--steps", "2", "--output-dir", str(folders[m])]} for m in flags]
    root.with_name("jobs.json").write_text(json.dumps({1: jobs}))
    command = [sys.executable, str(JOBS), str(root.with_name("jobs.json"))]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {method: lines(folder) for method, folder in folders.items()}


@pytest.mark.slow
def test_a_new_term_is_one_file_and_one_line(tmp_path):
    before = copied(ROOT, tmp_path / "before")
    after = copied(before, tmp_path / "after")
    register(after / "src" / "ser_reg" / "objectives")
    own = ["alike", "--term.weight", "1", "--term.power", "1.5", "--term.width", "4"]
    more = {"dino": ["--local-views", "4"], "barlow_twins": ["--term.crops", "--term.ratio", "1"]}
    found = train(after, {method: [*own, *more.get(method, [])] for method in METHODS})
    for first, second in found.values():
        assert first["loss"] == pytest.approx(first["base"] + first["term"])
        assert first["term"] > 0
        assert {name for name in second if name.startswith("term_")} == {"term_size"}
    changed = differences(filecmp.dircmp(before, after))
    assert changed == {"src/ser_reg/objectives/__init__.py", "src/ser_reg/objectives/alike.py"}
