"""swap_objective.py: one file from which the loop and the line of any term can be copied."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
import tyro

pytest.importorskip("skimage")

import swap_objective

from ser_reg.objectives import OBJECTIVES

SOURCE = Path(swap_objective.__file__).read_text()
STEP = re.compile(r"step (\d+): SSL (\d+\.\d+), ([a-z-]+) (\d+\.\d+) \((.+)\)")


def test_it_needs_no_file_beside_it_and_can_be_read_at_once():
    modules = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in modules}
    public = {"ser_reg", "timm", "torch", "tyro"}
    assert {name.split(".")[0] for name in names} <= public | set(sys.stdlib_module_names)
    assert SOURCE.count("\n") <= 150


def test_every_term_has_a_word():
    kinds = {getattr(kind, "func", kind) for _, kind in swap_objective.TERMS.values()}
    assert kinds == set(OBJECTIVES.values())
    assert set(OBJECTIVES) <= set(swap_objective.TERMS)


@pytest.mark.parametrize(("word", "layer"), [(word, 12 if word == "equimod" else 3) for word in swap_objective.TERMS])
def test_a_word_swaps_the_term(word, layer, monkeypatch, capfd):
    """Losses of two steps, and logs that show whether the term works."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tyro.cli(swap_objective.main, args=[word, "--steps", "2", "--batch-size", "8", "--layer", str(layer)])
    found = STEP.findall(capfd.readouterr().out)
    assert [int(step) for step, *_ in found] == [0, 1]
    assert {name for *_, name, _, _ in found} == {word}
    assert found[0][3] != found[1][3]
    assert "chance" in found[1][4]
    assert "nan" not in found[1][4]
