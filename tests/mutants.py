"""Would the tests notice? Small faults are planted at random, each is held against the tests of its room.

    pip install cosmic-ray && python tests/mutants.py --count 150 --seed 0

Places are drawn at random, from each room as many as it has lines, and at each place one of Cosmic Ray's mutations.
What changes nothing that runs (annotations, docstrings) or cannot be imported is no fault and drawn anew. A mutant is
killed when a test fails; one that survives, or runs into the time limit, is listed as a diff.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("src", "tests", "examples", "conftest.py", "pyproject.toml", "README.md")
ENGINE = "examples/pretraining"
ROOMS = {  # what is mutated, and the tests of it
    "src/ser_reg/geometry": ("tests/geometry",),
    "src/ser_reg/views": ("tests/views", "tests/test_training.py"),
    "src/ser_reg/losses": ("tests/losses", "tests/test_distributed.py"),
    "src/ser_reg/objectives": ("tests/objectives", "tests/test_training.py"),
    "src/ser_reg/metrics": ("tests/metrics",),
    f"{ENGINE}/step.py": ("tests/examples/test_pretraining_step.py", "tests/examples/test_pretraining_terms.py"),
    f"{ENGINE}/encode.py": ("tests/examples/test_pretraining_step.py", "tests/examples/test_pretraining_terms.py"),
    f"{ENGINE}/update.py": (
        "tests/examples/test_pretraining_update.py",
        "tests/examples/test_dino.py",
        "tests/examples/test_pretraining_loop.py",
    ),
}
SECONDS = 60


class Mutant(NamedTuple):
    """A file with a fault in it."""

    file: Path
    original: str
    mutated: str

    @property
    def diff(self) -> str:
        name = str(self.file.relative_to(ROOT))
        lines = difflib.unified_diff(self.original.splitlines(), self.mutated.splitlines(), name, name, "", "", 0, "")
        return "\n".join(lines)


def files_of(room: str) -> list[Path]:
    path = ROOT / room
    return [path] if path.is_file() else sorted(p for p in path.rglob("*.py") if p.name != "__init__.py")


def running_code(source: str) -> str:
    """What is left of it when it runs: no annotations, no docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                setattr(node, name, ast.Constant(None))
        if isinstance(body := getattr(node, "body", None), list) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value = ast.Constant("")
    return ast.dump(tree)


def mutants_of(files: list[Path], draw: random.Random) -> Iterator[Mutant]:
    """Mutants at places drawn at random, one a place."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    places: dict[tuple[Path, tuple[int, int]], list[tuple[object, int]]] = {}
    operators = [get_operator(name)() for name in operator_names() if "Variable" not in name]
    for file in files:
        nodes = list(ast_nodes(get_ast(file.read_text())))
        for operator in operators:
            occurrence = 0
            for node in nodes:
                for start, _ in operator.mutation_positions(node):
                    places.setdefault((file, start), []).append((operator, occurrence))
                    occurrence += 1
    order = list(places)
    draw.shuffle(order)
    for file, start in order:
        source = file.read_text()
        operator, occurrence = draw.choice(places[file, start])
        mutated = mutate_code(source, operator, occurrence)
        try:
            if mutated is not None and running_code(mutated) != running_code(source):
                yield Mutant(file, source, mutated)
        except SyntaxError:
            continue


def run(folder: Path, *command: str) -> int | None:
    """Exit status, None if it ran out of time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder / "src"), str(folder / "examples")])
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment, stdout=-3, stderr=-3, start_new_session=True
    )
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        return None


def judge(mutant: Mutant, tests: tuple[str, ...], folder: Path) -> str:
    """What became of it: "killed", "survived", "out of time" or "not imported"."""
    planted = folder / mutant.file.relative_to(ROOT)
    planted.write_text(mutant.mutated)
    try:
        module = ".".join(mutant.file.relative_to(ROOT).with_suffix("").parts[1:])
        if run(folder, "-c", f"import {module}") != 0:
            return "not imported"
        status = run(folder, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests)
        return "out of time" if status is None else "survived" if status == 0 else "killed"
    finally:
        planted.write_text(mutant.original)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rooms", nargs="*", default=list(ROOMS))
    given = parser.parse_args()
    lines = {room: sum(len(file.read_text().splitlines()) for file in files_of(room)) for room in given.rooms}
    folders: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory() as temporary:
        for job in range(given.jobs):
            for name in COPIED:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                (Path(temporary) / str(job)).mkdir(exist_ok=True)
                copy(ROOT / name, Path(temporary) / str(job) / name)
            folders.put(Path(temporary) / str(job))

        def judged(room: str, mutant: Mutant) -> tuple[str, Mutant, str]:
            folder = folders.get()
            try:
                return room, mutant, judge(mutant, ROOMS[room], folder)
            finally:
                folders.put(folder)

        found: list[tuple[str, Mutant, str]] = []
        with ThreadPoolExecutor(given.jobs) as pool:
            for room in given.rooms:
                wanted = max(1, round(given.count * lines[room] / sum(lines.values())))
                stream = mutants_of(files_of(room), random.Random(f"{given.seed} {room}"))
                while wanted and (some := [m for m, _ in zip(stream, range(wanted), strict=False)]):
                    fresh = [r for r in pool.map(lambda m, room=room: judged(room, m), some) if r[2] != "not imported"]
                    wanted -= len(fresh)
                    found += fresh
                    for _, mutant, outcome in fresh:
                        print(outcome if outcome == "killed" else f"{outcome}\n{mutant.diff}", flush=True)
    table = {room: dict(Counter(outcome for where, _, outcome in found if where == room)) for room in given.rooms}
    killed = sum(outcome == "killed" for *_, outcome in found)
    print(json.dumps(table, indent=1))
    print(f"{killed} of {len(found)} mutants killed ({100 * killed / max(1, len(found)):.0f} %), seed {given.seed}")


if __name__ == "__main__":
    main()
