"""Results of an ablation as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .tables import Results, summary
from .variants import Ablation

__all__ = ["draw"]

# Okabe and Ito's palette, which colour-blind readers tell apart; markers for those who print in grey.
ACCURACY = {"linear": ("linear", "#0072B2", "o"), "knn": ("k-NN", "#D55E00", "s")}
EQUIVARIANCE = {
    "scale": ("scale", "#009E73", "^"),
    "flip": ("flip", "#CC79A7", "D"),
    "rotation": ("rotation", "#000000", "o"),
}


def draw(path: Path, ablation: Ablation, results: Results) -> None:
    """Save the picture: accuracy and equivariance of each variant, and the trade-off between the two."""
    rows = [[summary(run) for run in results[variant.folder].values()] for variant in ablation.variants]
    labels = [variant.label for variant in ablation.variants]
    figure = Figure(figsize=(12.5, 0.42 * len(labels) + 2.2), layout="constrained")
    accuracy, equivariance, trade_off = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
    _strips(accuracy, rows, labels, ACCURACY, 100)
    accuracy.set_xlabel("held-out accuracy, %")
    _strips(equivariance, rows, labels, EQUIVARIANCE, 1)
    equivariance.set_yticklabels([])
    equivariance.set_xlabel("equivariance of the last layer's tokens (spatial)")
    for number, row in enumerate(rows, start=1):
        x, y = mean(run["rotation"] for run in row), 100 * mean(run["linear"] for run in row)
        trade_off.plot([run["rotation"] for run in row], [100 * run["linear"] for run in row], ".", color="#AAAAAA")
        trade_off.plot(x, y, "o", color="#0072B2")
        trade_off.annotate(f"({number})", (x, y), xytext=(5, 3), textcoords="offset points")
    trade_off.set_xlabel("rotation equivariance (spatial)")
    trade_off.set_ylabel("linear accuracy, %")
    figure.suptitle(f"{ablation.title} ({ablation.source} of the paper, small preset, {len(rows[0])} seeds)")
    figure.savefig(path, dpi=130)


def _strips(
    axes: Axes,
    rows: list[list[dict[str, float]]],
    labels: list[str],
    kinds: dict[str, tuple[str, str, str]],
    factor: int,
) -> None:
    """A row for each variant, with the mean and a dot for every seed."""
    for place, row in enumerate(rows):
        for offset, (key, (name, colour, marker)) in enumerate(kinds.items()):
            values = [factor * run[key] for run in row if key in run]
            if values:
                y = place + 0.22 * (offset - (len(kinds) - 1) / 2)
                axes.plot(values, [y] * len(values), marker=marker, ls="", color=colour, alpha=0.35, ms=4)
                axes.plot(mean(values), y, marker=marker, ls="", color=colour, ms=7, label=name if place == 0 else None)
    axes.set_yticks(range(len(labels)), [f"{label}  ({n})" for n, label in enumerate(labels, start=1)])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", color="#DDDDDD")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(kinds), frameon=False)
