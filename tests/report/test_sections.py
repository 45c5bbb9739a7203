"""Sections: what they find, and that another one is a file and a line of the list."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ser_reg
from ser_reg.report.base import early_layer
from ser_reg.report.sections import SECTIONS


@pytest.mark.parametrize(("depth", "layer"), [(12, 3), (24, 6), (32, 8), (4, 1), (1, 1)])
def test_early_layer(depth, layer):
    assert early_layer(depth) == layer


def test_findings_name_the_best_layer():
    def readings(spatial, floor):
        return {"raw": 0.9, "raw_floor": 0.9, "spatial": spatial, "spatial_floor": floor}

    record = {
        "depth": 8,
        "positions": ["absolute"],
        "scores": {"flip": {0: readings(0.9, 0.0), 2: readings(0.8, 0.7), 5: readings(0.6, 0.1)}},
        "scores_without_positions": {"flip": {0: readings(0.95, 0.0), 2: readings(0.8, 0), 5: readings(0.99, 0.1)}},
        "probes": {"flip": {2: {"accuracy": 0.7, "standard_error": 0.04, "chance": 0.5}}},
    }
    best, early, positions, probed = [line for section in SECTIONS for line in section.find(record)]
    assert "flip at layer 5 (0.60, floor 0.10)" in best
    assert "start with layer 2" in early
    assert "flip 0.80 (+0.10 above its floor)" in early
    assert "flip from 0.60 to 0.99 at layer 5" in positions
    assert "70 ± 4 % (chance 50 %)" in probed


DUMMY = """
from pathlib import Path
from typing import Any

from ..backbones import patch_tokens
from .base import Column, Picture, Records, Section, Subject
from .style import finish, panels


class Dummy(Section):
    heading = "Norms"

    def measure(self, subject: Subject) -> dict[str, Any]:
        maps = patch_tokens(subject.model, subject.pixels, subject.layers)
        return {"norms": {layer: x.norm(dim=1).mean().item() for layer, x in maps.items()}}

    def draw(self, folder: Path, records: Records) -> list[Picture]:
        figure, (row,) = panels(1, ["norms"])
        finish(figure, folder / "norms.png", list(records), row, {})
        return [Picture(folder / "norms.png", "Norms of tokens")]

    def caption(self, records: Records) -> str:
        return "How long tokens are."

    def find(self, record: Any) -> list[str]:
        return [f"Norms of {len(record['norms'])} layers."]

    def columns(self, record: Any) -> list[Column]:
        return [Column("norm", record["norms"])]
"""
RUN = """
import sys
from pathlib import Path
from small_vits import photos, vit
import ser_reg
from ser_reg.report import report

assert Path(ser_reg.__file__).is_relative_to(sys.argv[1])
record = report({"m": vit(dynamic_img_size=True)}, photos(), sys.argv[2], layers=[1, 2])["models"]["m"]
assert list(record["norms"]) == [1, 2]
assert record["findings"][-1] == "Norms of 2 layers."
page = Path(sys.argv[2], "report.html").read_text()
for text in ("<h2>Norms</h2>", "How long tokens are.", "Norms of tokens", "<th>norm</th>", "Norms of 2 layers."):
    assert text in page, text
"""


@pytest.mark.slow
def test_a_section_is_a_file_and_a_line(tmp_path):
    """In a copy of the library."""
    package = Path(ser_reg.__file__).parent
    copied = tmp_path / "src" / "ser_reg"
    shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__"))
    (copied / "report" / "dummy.py").write_text(DUMMY)
    sections = copied / "report" / "sections.py"
    listed = sections.read_text().replace("    Maps(),\n", "    Maps(),\n    Dummy(),\n")
    sections.write_text(listed.replace("from .maps", "from .dummy import Dummy\nfrom .maps"))
    files = [path.relative_to(copied) for path in copied.rglob("*") if path.is_file()]
    changed = [str(path) for path in files if not same(copied / path, package / path)]
    assert sorted(changed) == [os.path.join("report", name) for name in ("dummy.py", "sections.py")]
    paths = os.pathsep.join([str(tmp_path / "src"), str(Path(__file__).parent)])
    command = [sys.executable, "-c", RUN, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr


def same(path, original):
    return original.exists() and path.read_bytes() == original.read_bytes()
