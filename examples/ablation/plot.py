"""Results of an ablation as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ser_reg.report.style import COLOURS, GREY, STYLE

from .table import Results, summary
from .variants import NOT_IN_PAPER, Ablation

__all__ = ["draw"]

# What a quantity is drawn with: name, colour and marker.
ACCURACY = {"linear": ("linear", COLOURS[0], "o"), "knn": ("k-NN", COLOURS[1], "s")}
EQUIVARIANCE = {
    "scale": ("scale", COLOURS[2], "^"),
    "flip": ("flip", COLOURS[3], "D"),
    "rotation": ("rotation", COLOURS[4], "o"),
}
MATCHING = {
    "matching_flip": ("mirrored", COLOURS[3], "D"),
    "matching_rotation": ("turned", COLOURS[4], "o"),
}


def draw(path: Path, ablation: Ablation, results: Results) -> None:
    """Save the picture: accuracy and equivariance (or matching, if the table has it) of each variant, and the trade-off
    between the two."""
    matched = "matching_rotation" in ablation.columns
    rows = [[summary(run) for run in results[variant.run].values()] for variant in ablation.variants]
    labels = [variant.label for variant in ablation.variants]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 0.42 * len(labels) + 2.2), layout="constrained")
        accuracy, equivariance, trade_off = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
        _strips(accuracy, rows, labels, ACCURACY, 100)
        accuracy.set_xlabel("held-out accuracy, %")
        _strips(equivariance, rows, labels, MATCHING if matched else EQUIVARIANCE, 100 if matched else 1)
        equivariance.set_yticklabels([])
        matching = "tokens of the last layer matched, %"
        equivariance.set_xlabel(matching if matched else "equivariance of the last layer's tokens (spatial)")
        _trade_off(trade_off, rows)
        source = f"{ablation.source} of the paper" if ablation.source != NOT_IN_PAPER else ablation.source
        seeds = sorted({len(row) for row in rows})
        counted = f"{' or '.join(map(str, seeds))} seed{'' if seeds == [1] else 's'}"
        figure.suptitle(f"{ablation.title} ({source}, small preset, {counted})")
        figure.savefig(path, dpi=130)


def _trade_off(axes: Axes, rows: list[list[dict[str, float]]]) -> None:
    """Accuracy against equivariance, a number for each variant."""
    for number, row in enumerate(rows, start=1):
        x, y = mean(run["rotation"] for run in row), 100 * mean(run["linear"] for run in row)
        seeds = [run["rotation"] for run in row], [100 * run["linear"] for run in row]
        axes.plot(*seeds, ".", color=GREY, alpha=0.5)
        axes.plot(x, y, "o", color=COLOURS[0])
        axes.annotate(f"({number})", (x, y), xytext=(5, 3), textcoords="offset points")
    axes.set_xlabel("rotation equivariance (spatial)")
    axes.set_ylabel("linear accuracy, %")


def _strips(
    axes: Axes,
    rows: list[list[dict[str, float]]],
    labels: list[str],
    kinds: dict[str, tuple[str, str, str]],
    factor: int,
) -> None:
    """A row for each variant, with the mean and a dot for every seed."""
    for position, row in enumerate(rows):
        for offset, (key, (name, colour, marker)) in enumerate(kinds.items()):
            values = [factor * run[key] for run in row if key in run]
            if values:
                y = position + 0.22 * (offset - (len(kinds) - 1) / 2)
                axes.plot(values, [y] * len(values), marker=marker, ls="", color=colour, alpha=0.35, ms=4)
                axes.plot(
                    mean(values), y, marker=marker, ls="", color=colour, ms=7, label=name if position == 0 else None
                )
    axes.set_yticks(range(len(labels)), [f"{label}  ({n})" for n, label in enumerate(labels, start=1)])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", color="#DDDDDD")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(kinds), frameon=False)
