"""Results of an ablation as rows of a table."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from .variants import Ablation

__all__ = ["COLUMNS", "markdown", "summary"]

Results = dict[str, dict[str, Any]]  # by run of the variant, by seed: flags, environment, steps and result of a run

# Columns of a table: heading, digits and factor.
COLUMNS = {
    "knn": ("k-NN, %", 1, 100),
    "linear": ("linear, %", 1, 100),
    "rotation": ("rotation", 3, 1),
    "flip": ("flip", 3, 1),
    "scale": ("scale", 3, 1),
    "rotation_excess": ("rotation above floor", 3, 1),
    "rotation_raw": ("rotation, raw", 3, 1),
}

COMPARED = ("knn", "linear")


def summary(run: dict[str, Any]) -> dict[str, float]:
    """The numbers of one run that tables and plots show; equivariance at the last layer, spatial reading."""
    result = run["result"]
    last = {name: by_layer[max(by_layer, key=int)] for name, by_layer in result["equivariance"].items()}
    numbers = dict(result["accuracy"])
    numbers |= {name: readings["spatial"] for name, readings in last.items()}
    numbers["rotation_excess"] = last["rotation"]["spatial"] - last["rotation"]["spatial_floor"]
    numbers["rotation_raw"] = last["rotation"]["raw"]
    return numbers


def markdown(ablation: Ablation, results: Results) -> str:
    """A table: mean ± sample standard deviation over seeds.

    A variant is compared with what it stands against seed by seed, which takes away what seeds share; the paper's
    number stands beside.
    """
    headings = [heading for heading, _, _ in COLUMNS.values()]
    compared = [f"{COLUMNS[key][0].removesuffix(', %')}, difference" for key in COMPARED]
    lines = ["| " + " | ".join(["", *headings, *compared, "paper: top-1, %"]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(headings) + len(compared) + 1))
    for variant in ablation.variants:
        runs = {seed: summary(run) for seed, run in results[variant.run].items()}
        cells = []
        for key, (_, digits, factor) in COLUMNS.items():
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
