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
EVERYTHING_BELOW = "errors records distributed geometry views backbones losses objectives metrics images"
ROOMS = {  # a file or a folder of the library: what it may import of the others, and packages besides torch
    "errors": ("", ""),
    "records": ("errors", ""),
    "distributed": ("errors", ""),
    "geometry": ("errors", ""),
    "views": ("errors geometry distributed", "torchvision"),  # timm brings it; imported where it is used
    "backbones": ("errors", "timm"),
    "losses": ("errors distributed", ""),
    "objectives": ("errors geometry views.view losses distributed", "einops"),
    "metrics": ("errors geometry views backbones", ""),
    "images": ("errors", "numpy PIL torchvision skimage sklearn"),  # timm brings the first three
    "export": (EVERYTHING_BELOW, "safetensors"),  # timm brings it
    "check": (f"{EVERYTHING_BELOW} export", ""),
    "report": (f"{EVERYTHING_BELOW} export check", "numpy PIL matplotlib rich jinja2 markupsafe sklearn threadpoolctl"),
    "__main__": ("check report export errors backbones", "tyro"),
}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem != "__init__"]
SCRIPTS = [*ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")]


def name_of(path):
    return str(path.relative_to(ROOT))


def module(path):
    """Its dotted name inside the package."""
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


def imports(path):
    """Modules that a file of the package imports: (those of the package, by dotted name inside it, others)."""
    ours, others = set(), set()
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            ours |= {".".join([*above, name]) for name in names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module)
        elif isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
    return ours, others


def test_every_file_has_a_room():
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rooms(path):
    room = module(path).split(".")[0]
    allowed, packages = (names.split() for names in ROOMS[room])
    ours, others = imports(path)
    for name in ours:
        assert any(f"{name}.".startswith(f"{other}.") for other in [room, *allowed]), f"{module(path)} imports {name}"
    found = {name.split(".")[0] for name in others} - set(sys.stdlib_module_names)
    assert found <= {"torch", *packages}


def body(function):
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(function.body) > 1
    return function.body[-1].end_lineno - function.body[documented].lineno + 1


def docstrings(tree):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node.body[0] for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node)]
    return sum(node.end_lineno - node.lineno + 1 for node in nodes)


@pytest.mark.parametrize("path", [*FILES, *ROOT.glob("examples/**/*.py")], ids=name_of)
def test_files_and_functions_can_be_read_at_once(path):
    source = path.read_text()
    tree = ast.parse(source)
    longest = {"_sweep": 60, "draw": 60}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert body(node) <= longest.get(node.name, 50), f"{node.name} has {body(node)} lines"
    assert source.count("\n") - docstrings(tree) <= (250 if PACKAGE in path.parents else 300)


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=name_of)
def test_models_are_asked_through_backbones_alone(path):
    if PACKAGE / "backbones" in path.parents:
        return
    attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not attributes & {"blocks", "patch_embed", "pos_embed"}


def test_one_term_is_known_by_name_in_its_file_and_as_a_default_alone():
    """Another term is another word: nothing in library or engine depends on which it is."""
    known = {"objectives/ser.py", "objectives/__init__.py", "__init__.py"}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "examples" / "pretraining").glob("*.py")]:
        if PACKAGE in path.parents and str(path.relative_to(PACKAGE)) in known:
            continue
        tree = ast.parse(path.read_text())
        defaults = [d for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for d in node.args.defaults]
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "SERLoss"]
        assert all(node in defaults for node in used), f"{path} uses SERLoss"


def test_import_leaves_extras_alone():
    extras = "{'jinja2', 'matplotlib', 'rich', 'skimage', 'sklearn', 'tyro'}"
    code = f"import sys, ser_reg, ser_reg.__main__; assert not {extras} & set(sys.modules), set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_use_public_names(path):
    """Of the package itself, or of one of its modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ser_reg":
            public = importlib.import_module(node.module).__all__
            assert {alias.name for alias in node.names} <= set(public)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_all_is_sorted_and_complete(path):
    found = importlib.import_module(f"ser_reg.{module(path)}")
    ordered = sorted(found.__all__, key=lambda name: (not name.isupper(), name))  # constants first
    assert found.__all__ in (ordered, sorted(found.__all__))
    assert all(hasattr(found, name) for name in found.__all__)


def test_package_shows_sorted_names():
    assert ser_reg.__all__ == sorted(ser_reg.__all__, key=lambda name: (not name.isupper(), name))  # constants first
    assert all(getattr(ser_reg, name).__doc__ for name in ser_reg.__all__)


def test_import_leaves_the_global_state_alone():
    code = "import torch; s = torch.get_rng_state(); import ser_reg; assert torch.equal(s, torch.get_rng_state())"
    subprocess.run([sys.executable, "-c", code], check=True)
