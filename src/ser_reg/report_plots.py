"""The plots of the report: scores, positions and probes by layer, all models in the same panels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

__all__ = ["STYLE", "draw_positions", "draw_probes", "draw_scores", "short"]

STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}
# A model is told by colour (Okabe and Ito's palette, without its yellow) and by marker, a quantity by line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SCORE, FLOOR, OFF = "-", ":", "--"
GREY = "#666666"
LONGEST = 40  # characters of a name in a legend

Records = Mapping[str, Mapping[str, Any]]


def short(name: str) -> str:
    """The end of a long name, which is what tells paths apart."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def draw_scores(path: Path, records: Records) -> None:
    """Both readings of the equivariance score by layer, a column a transformation, beside their floors."""
    columns = _transformations(records, "scores")
    figure, panels = _panels(2, columns)
    for row, reading in zip(panels, ("spatial", "raw"), strict=True):
        for panel, column in zip(row, columns, strict=True):
            for i, record in enumerate(records.values()):
                scores = record["scores"].get(column, {})
                _line(panel, i, scores, reading, SCORE)
                _line(panel, i, scores, f"{reading}_floor", FLOOR)
        row[0].set_ylabel(f"{reading} score (cosine)")
    for panel, column in zip(panels[0], columns, strict=True):
        panel.set_title(column)
    quantities = {"score": SCORE, "its floor: unrelated images": FLOOR}
    _finish(figure, path, records, panels[-1], quantities)


def draw_positions(path: Path, records: Records) -> None:
    """The spatial score by layer, with and without position coding."""
    columns = _transformations(records, "scores_without_positions")
    figure, (panels,) = _panels(1, columns)
    for panel, column in zip(panels, columns, strict=True):
        for i, record in enumerate(records.values()):
            _line(panel, i, record["scores"].get(column, {}), "spatial", SCORE)
            _line(panel, i, record["scores_without_positions"].get(column, {}), "spatial", OFF)
        panel.set_title(column)
    panels[0].set_ylabel("spatial score (cosine)")
    _finish(figure, path, records, panels, {"as it is": SCORE, "position coding switched off": OFF})


def draw_probes(path: Path, records: Records) -> None:
    """How well linear probes tell turns and flips by layer, with the standard error over images, beside chance."""
    columns = _transformations(records, "probes")
    figure, (panels,) = _panels(1, columns, share=False)
    for panel, column in zip(panels, columns, strict=True):
        for i, record in enumerate(records.values()):
            found = record["probes"].get(column, {})
            percent = [[100 * found[layer][key] for layer in found] for key in ("accuracy", "standard_error")]
            if found:
                panel.errorbar(list(found), percent[0], percent[1], ls=SCORE, lw=1.6, capsize=2, **_look(i))
                chance = next(iter(found.values()))["chance"]
        panel.axhline(100 * chance, color=GREY, ls=FLOOR, lw=1.6)
        panel.set(title=f"{column}: {round(1 / chance)} classes", ylim=(0, 103))
    panels[0].set_ylabel("held-out accuracy (%)")
    _finish(figure, path, records, panels, {"chance": FLOOR})


def _transformations(records: Records, part: str) -> list[str]:
    """Those that any model has, in the order in which the score gives them."""
    return [name for name in ("rotation", "flip", "scale") if any(name in record[part] for record in records.values())]


def _panels(rows: int, columns: list[str], share: bool = True) -> tuple[Figure, Any]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.7 + 3.3 * len(columns), 0.9 + 2.6 * rows), layout="constrained")
        return figure, figure.subplots(rows, len(columns), squeeze=False, sharex=True, sharey="row" if share else False)


def _look(model: int) -> dict[str, Any]:
    return {"color": COLOURS[model % len(COLOURS)], "marker": MARKERS[model % len(MARKERS)], "ms": 5}


def _line(panel: Axes, model: int, scores: Mapping[int, Mapping[str, float]], reading: str, style: str) -> None:
    look = _look(model)
    if style != SCORE:
        look |= {"markerfacecolor": "white", "ms": 3.5 if style == FLOOR else 5}
    values = [readings[reading] for readings in scores.values()]
    panel.plot(list(scores), values, ls=style, lw=1.6 if style != FLOOR else 1.1, **look)


def _finish(figure: Figure, path: Path, records: Records, lowest: Any, quantities: Mapping[str, str]) -> None:
    """Label the layers, explain models and line styles below the panels, save."""
    for panel in figure.axes:
        panel.grid(axis="y", color="#E6E6E6", lw=0.8)
        panel.set_axisbelow(True)
    for panel in lowest:
        panel.set_xlabel("layer (blocks run)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    models = [Line2D([], [], ls=SCORE, label=short(name), **_look(i)) for i, name in enumerate(records)]
    lines = [Line2D([], [], color=GREY, ls=style, label=label) for label, style in quantities.items()]
    if len(lowest) == 1:
        figure.legend(handles=models + lines, loc="outside lower left", frameon=False)
    else:
        columns = 2 if len(lowest) > 2 and max(len(short(name)) for name in records) < 30 else 1
        figure.legend(handles=models, loc="outside lower left", ncols=columns, frameon=False)
        figure.legend(handles=lines, loc="outside lower right", frameon=False)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=110)
