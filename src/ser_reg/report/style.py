"""Palette, markers and plot style of every figure of the project, and panels by layer in that style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .base import Records

__all__ = [
    "COLOURS",
    "FLOOR",
    "GREY",
    "MARKERS",
    "OFF",
    "SCORE",
    "STYLE",
    "draw_line",
    "finish",
    "marks",
    "panels",
    "short",
    "transformations_in",
]

STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}
# What is compared is told by colour (Okabe and Ito's palette, without its yellow) and by marker, a quantity by line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#666666"  # of what all are compared with: chance, a reference
SCORE, FLOOR, OFF = "-", ":", "--"
LONGEST = 40  # characters of a name in a legend


def short(name: str) -> str:
    """The end of a long name, which is what tells paths apart.

    Example:
        >>> short("out/moco_v3"), len(short("out/" * 30))
        ('out/moco_v3', 40)
    """
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def marks(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th of what is compared."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "ms": 5}


def transformations_in(records: Records, key: str) -> list[str]:
    """Those that any model has under a key of its record, in the order in which the score gives them."""
    return [name for name in ("rotation", "flip", "scale") if any(name in record[key] for record in records.values())]


def panels(rows: int, columns: list[str], shared_axis: bool = True) -> tuple[Figure, Any]:
    """A figure of panels by layer, a column a transformation; `shared_axis`: one vertical axis a row."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.7 + 3.3 * len(columns), 0.9 + 2.6 * rows), layout="constrained")
        return figure, figure.subplots(
            rows, len(columns), squeeze=False, sharex=True, sharey="row" if shared_axis else False
        )


def draw_line(panel: Axes, i: int, scores: Mapping[int, Mapping[str, float]], reading: str, style: str) -> None:
    """One reading of the i-th model by layer."""
    found = marks(i)
    if style != SCORE:
        found |= {"markerfacecolor": "white", "ms": 3.5 if style == FLOOR else 5}
    values = [readings[reading] for readings in scores.values()]
    panel.plot(list(scores), values, ls=style, lw=1.6 if style != FLOOR else 1.1, **found)


def finish(figure: Figure, path: Path, names: Sequence[str], lowest: Any, quantities: Mapping[str, str]) -> None:
    """Label the layers, explain models and line styles below the panels, save.

    Args:
        figure: of `panels`.
        path: where to.
        names: of the models.
        lowest: the last row of panels.
        quantities: what the line styles mean.
    """
    for panel in figure.axes:
        panel.grid(axis="y", color="#E6E6E6", lw=0.8)
        panel.set_axisbelow(True)
    for panel in lowest:
        panel.set_xlabel("layers run")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    models = [Line2D([], [], ls=SCORE, label=short(name), **marks(i)) for i, name in enumerate(names)]
    lines = [Line2D([], [], color=GREY, ls=style, label=label) for label, style in quantities.items()]
    if len(lowest) == 1:
        figure.legend(handles=models + lines, loc="outside lower left", frameon=False)
    else:
        columns = 2 if len(lowest) > 2 and max(len(short(name)) for name in names) < 30 else 1
        figure.legend(handles=models, loc="outside lower left", ncols=columns, frameon=False)
        figure.legend(handles=lines, loc="outside lower right", frameon=False)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=110)
