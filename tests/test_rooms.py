"""Who may import whom, and what the package shows."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ser_reg

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ser_reg"
MAY_IMPORT = {
    "errors": set(),
    "groups": {"errors"},
    "actions": {"errors", "groups"},
    "vit": {"errors"},
    "distributed": {"errors"},
    "losses": {"errors", "distributed"},
    "views": {"errors", "groups", "actions", "distributed"},
    "regularizer": {"errors", "groups", "actions", "vit", "distributed", "losses"},
    "metrics": {"errors", "groups", "actions", "vit", "views"},
    "check": {"distributed", "errors", "groups", "regularizer", "views", "vit"},
    "encoders": {"errors", "vit"},
    "photographs": {"errors"},
    "report_findings": set(),
    "report_images": {"errors", "photographs"},
    "report_maps": {"actions", "groups", "metrics", "report_plots", "vit"},
    "report_page": {"report_plots"},
    "report_plots": {"report_probes"},
    "report_probes": {"actions", "groups", "vit"},
    "report_model": {"metrics", "report_findings", "report_images", "report_maps", "report_probes", "vit"},
    "report": {"encoders", "errors", "report_images", "report_model", "report_page"},
    "__main__": {"check", "encoders", "errors", "report", "vit"},
}
EXTRA = {  # what `pip install "ser-reg[report]"` brings
    "photographs": {"PIL", "numpy", "skimage", "sklearn"},  # the first two come with timm, too
    "report": {"rich"},
    "report_maps": {"matplotlib", "numpy", "sklearn"},
    "report_plots": {"matplotlib"},
    "report_probes": {"numpy", "sklearn", "threadpoolctl"},
}
RUNTIME = {"torch", "timm", "einops", "safetensors"}  # timm brings the last


def imports(path):
    """Modules that a file imports: (those of the package, others)."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            ours.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module)
        elif isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
    return ours, others


def test_every_file_has_a_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*MAY_IMPORT, "__init__"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms(room):
    ours, others = imports(PACKAGE / f"{room}.py")
    assert ours <= MAY_IMPORT[room]
    packages = {name.split(".")[0] for name in others} - set(sys.stdlib_module_names)
    assert packages <= RUNTIME | EXTRA.get(room, set())
    assert ("timm" in packages) == (room == "vit")


def test_top_rooms_are_imported_by_the_package_alone():
    for path in PACKAGE.glob("*.py"):
        ours, _ = imports(path)
        assert path.stem in ("__init__", "check") or "regularizer" not in ours
        assert path.stem in ("__init__", "report_maps", "report_model") or "metrics" not in ours
        assert path.stem in ("__init__", "__main__") or "check" not in ours
        assert path.stem == "__main__" or "report" not in ours


def test_import_leaves_extras_alone():
    extras = "{'matplotlib', 'rich', 'skimage', 'sklearn'}"
    code = f"import sys, ser_reg, ser_reg.__main__; assert not {extras} & set(sys.modules), set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "path", [*ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/*.py")], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_examples_use_the_public_names(path):
    _, others = imports(path)
    assert not {name for name in others if name.startswith("ser_reg.")}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_all_is_sorted_and_complete(room):
    module = importlib.import_module(f"ser_reg.{room}")
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_package_shows_sorted_names():
    assert ser_reg.__all__ == sorted(ser_reg.__all__, key=lambda name: (not name.isupper(), name))  # constants first
    assert all(getattr(ser_reg, name).__doc__ for name in ser_reg.__all__)


def test_import_leaves_the_global_state_alone():
    code = "import torch; s = torch.get_rng_state(); import ser_reg; assert torch.equal(s, torch.get_rng_state())"
    subprocess.run([sys.executable, "-c", code], check=True)
