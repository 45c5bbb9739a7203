"""Results of an ablation as rows of a table."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from .variants import Ablation

__all__ = ["COLUMNS", "markdown", "summary"]

Results = dict[str, dict[str, Any]]  # by run of the variant, by seed: flags, environment, steps and result of a run

# Columns that a table may have: heading, digits and factor.
COLUMNS = {
    "knn": ("k-NN, %", 1, 100),
    "linear": ("linear, %", 1, 100),
    "rotation": ("rotation", 3, 1),
    "flip": ("flip", 3, 1),
    "scale": ("scale", 3, 1),
    "rotation_excess": ("rotation above floor", 3, 1),
    "rotation_raw": ("rotation, raw", 3, 1),
    "matching_rotation": ("turned, matched, %", 1, 100),
    "matching_flip": ("mirrored, matched, %", 1, 100),
    "near_rotation": ("turned, near, %", 1, 100),
    "own_rotation": ("turned, matched by the own action at the term's layer, %", 1, 100),
    "own_flip": ("mirrored, likewise, %", 1, 100),
    "turn_early": ("turn read at layer 2, %", 1, 100),
    "turn_last": ("turn read at the last, %", 1, 100),
    "flip_early": ("flip read at layer 2, %", 1, 100),
    "flip_last": ("flip read at the last, %", 1, 100),
}

COMPARED = ("knn", "linear")


def summary(run: dict[str, Any]) -> dict[str, float]:
    """The numbers of one run that tables and plots show; equivariance at the last layer, spatial reading."""
    result = run["result"]
    last = {name: _last(by_layer) for name, by_layer in result["equivariance"].items()}
    numbers = dict(result["accuracy"])
    numbers |= {name: readings["spatial"] for name, readings in last.items()}
    numbers["rotation_excess"] = last["rotation"]["spatial"] - last["rotation"]["spatial_floor"]
    numbers["rotation_raw"] = last["rotation"]["raw"]
    return numbers | (_summary_of_matching(result) if "matching" in result else {})


def _summary_of_matching(result: dict[str, Any]) -> dict[str, float]:
    """Matching at the last layer by the plain action, at the term's layer by its own; what is read of orientation."""
    matching, own, orientation = result["matching"], result["own"], result["orientation"]
    numbers = {f"matching_{name}": _last(matching[name])["top1"] for name in ("rotation", "flip")}
    numbers["near_rotation"] = _last(matching["rotation"])["near"]
    at_its_layer = own.get("matching", matching)
    numbers |= {f"own_{name}": at_its_layer[name][str(own["layer"])]["top1"] for name in ("rotation", "flip")}
    for task, name in (("rotation", "turn"), ("flip", "flip")):
        numbers |= {f"{name}_early": _first(orientation[task]), f"{name}_last": _last(orientation[task])}
    return numbers


def _first(by_layer: dict[str, Any]) -> Any:
    return by_layer[min(by_layer, key=int)]


def _last(by_layer: dict[str, Any]) -> Any:
    return by_layer[max(by_layer, key=int)]


def markdown(ablation: Ablation, results: Results) -> str:
    """A table: mean ± sample standard deviation over seeds.

    A variant is compared with what it stands against seed by seed, which takes away what seeds share; the paper's
    number stands beside.
    """
    columns = {key: COLUMNS[key] for key in ablation.columns}
    headings = [heading for heading, _, _ in columns.values()]
    compared = [f"{COLUMNS[key][0].removesuffix(', %')}, difference" for key in COMPARED]
    lines = ["| " + " | ".join(["", *headings, *compared, "paper: top-1, %"]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(headings) + len(compared) + 1))
    for variant in ablation.variants:
        runs = {seed: summary(run) for seed, run in results[variant.run].items()}
        cells = []
        for key, (_, digits, factor) in columns.items():
            values = [factor * run[key] for run in runs.values() if key in run]
            cells.append(_spread(values, digits) if values else "")
        other = {seed: summary(run) for seed, run in results[variant.against].items()}
        for key in COMPARED:
            differences = [100 * (run[key] - other[seed][key]) for seed, run in runs.items() if seed in other]
            cells.append("" if variant.run == variant.against else _spread(differences, 1, "+"))
        paper = "" if variant.paper is None else f"{variant.paper:.2f}"
        lines.append("| " + " | ".join([variant.label, *cells, paper]) + " |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int, sign: str = "") -> str:
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{deviation}"
