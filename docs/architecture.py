"""Draw the rooms of the project and the way of a batch through them, into architecture.png beside this file.

    python docs/architecture.py

Names of files are read from the tree, so that the picture is drawn anew when a room changes.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ser_reg.report.style import COLOURS, GREY, STYLE

__all__ = ["LIBRARY", "draw", "files"]

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ser_reg"
WIDTH, HEIGHT = 140, 116  # of the picture, in tenths of an inch
ROOM, SEAM, DATA = COLOURS[0], COLOURS[1], GREY
INK = "#222222"

# Rooms of the library as bricks: (left, right, bottom, top), what it is for, whether strangers add a file there. A room
# rests on what it may import.
LIBRARY = {
    "__main__.py": ((1, 139, 84.5, 88), "the command line", False),
    "report/": ((1, 139, 76, 84), "models side by side, on one page: a file a section", True),
    "check/": ((1, 69, 72, 75.5), "does my training train?", False),
    "export/": ((70, 139, 72, 75.5), "checkpoints that timm loads", False),
    "objectives/": ((1, 48, 61.5, 71.5), "the terms: features and views → Output(loss, logs)", True),
    "metrics/": ((49, 103, 61.5, 71.5), "how equivariant is a model, by transformation and layer", False),
    "losses/": ((1, 25, 51, 61), "exact on any number of ranks", False),
    "views/": ((26, 67, 51, 61), "images → views that know how they were made", True),
    "distributed.py": ((1, 34, 39.5, 50.5), "ranks and their number, gathering with gradient", False),
    "geometry/": ((35, 67, 39.5, 50.5), "what moves a map, and from where to where", False),
    "backbones/": ((68, 103, 39.5, 61), "all that is asked of a model, and its maps by layer: a file a family", True),
    "images/": ((104, 121, 39.5, 71.5), "image files, photographs, ImageNet's mean and deviation", False),
    "records.py": (
        (122, 139, 39.5, 71.5),
        "files that are whole or not there, and what figures were measured on",
        False,
    ),
    "errors.py": ((1, 139, 35.5, 39), "the one exception: what was given, what is expected, and a line to type", False),
}


def files(folder: Path) -> str:
    """Names of the modules in a folder."""
    return "  ".join(sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__"))


def draw(path: Path) -> None:
    """The picture: the way of a batch, the library, the trainings."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axes.axis("off")
        draw_way(axes)
        draw_library(axes)
        draw_trainings(axes)
        figure.savefig(path, dpi=130)


def draw_way(axes: Axes) -> None:
    """From images to the loss, left to right."""
    title(axes, 113.5, "The way of a batch", "one direction; λ and the sum belong to your loop")
    bottom, top = 100, 110.5
    boxes = [
        ((1, 14), DATA, "images", "whole,\n(B, C, H, W)\nin [0, 1]"),
        ((19, 38), SEAM, "views/", "make_views(images)"),
        ((43, 60), DATA, "views", "View(images,\nrelation, drawn)\nand so on"),
        ((65, 84), SEAM, "backbones/", "patch_tokens(vit,\nview.images, layer)"),
        ((89, 102), DATA, "features", "one map\n(B, D, h, w)\na view"),
        ((107, 123), SEAM, "objectives/", "term(features,\nviews)"),
        ((128, 139), DATA, "Output", "loss\nlogs"),
    ]
    for (left, right), colour, name, text in boxes:
        box(axes, (left, right, bottom, top), colour, name, text)
    for (_, end), (start, _) in zip([b[0] for b in boxes[:-1]], [b[0] for b in boxes[1:]], strict=True):
        arrow(axes, [(end, 105.2), (start, 105.2)])
    arrow(axes, [(51.5, bottom), (51.5, 96.3), (115, 96.3), (115, bottom)])
    axes.text(83, 96.8, "how the views relate, and what was drawn", ha="center", va="bottom", size=9.5, color=INK)


def draw_library(axes: Axes) -> None:
    """The rooms, each on what it may import."""
    title(axes, 91, "The library, src/ser_reg", "a room rests on what it may import")
    for name, (place, text, seam) in LIBRARY.items():
        inside = files(PACKAGE / name) if name.endswith("/") else ""
        box(axes, place, SEAM if seam else ROOM, name, text, inside)


def draw_trainings(axes: Axes) -> None:
    """From a source of images to a table, left to right."""
    title(axes, 31, "The trainings, examples/", "the step cannot tell which base method and which term it joins")
    examples = ROOT / "examples"
    box(
        axes,
        (1, 31, 3.5, 28),
        SEAM,
        "data/",
        "source → recipes → batch of images,\nread by the term or not",
        files(examples / "data"),
    )
    methods = "  ".join(p.stem for p in (examples / "moco_v3.py", examples / "dino.py", examples / "barlow_twins.py"))
    box(axes, (37, 65, 16.5, 28), SEAM, "a base method", "views, heads, momentum, loss", methods)
    box(axes, (37, 65, 3.5, 15), SEAM, "a term", "a word of the command line", "of ser_reg.objectives")
    box(
        axes,
        (71, 101, 3.5, 28),
        ROOM,
        "pretraining/",
        "base loss + λ · term: step, loop,\nsettings, checkpoints, log",
        files(examples / "pretraining"),
    )
    box(
        axes,
        (107, 139, 13, 28),
        SEAM,
        "evaluation/",
        "what the encoder knows: a file a judgement",
        files(examples / "evaluation"),
    )
    box(axes, (107, 139, 3.5, 11.5), ROOM, "ablation/", "many runs → tables", files(examples / "ablation"))
    for start, end, height in (
        (31, 37, 22.2),
        (31, 37, 9.2),
        (65, 71, 22.2),
        (65, 71, 9.2),
        (101, 107, 20.5),
        (101, 107, 7.5),
    ):
        arrow(axes, [(start, height), (end, height)])
    axes.text(1, 1.5, "■", color=SEAM, size=11, va="center")
    axes.text(
        3, 1.5, "one file and one line here add something: CONTRIBUTING.md says which", size=9.5, va="center", color=INK
    )
    axes.text(66, 1.5, "■", color=ROOM, size=11, va="center")
    axes.text(68, 1.5, "another room", size=9.5, va="center", color=INK)
    axes.text(82, 1.5, "■", color=DATA, size=11, va="center")
    axes.text(84, 1.5, "what is handed on", size=9.5, va="center", color=INK)


def title(axes: Axes, height: float, text: str, aside: str) -> None:
    """A heading, and a remark behind it."""
    axes.text(1, height, text, size=15, weight="bold", va="center", color=INK)
    axes.text(139, height, aside, size=11, va="center", ha="right", color=GREY, style="italic")


def box(
    axes: Axes, place: tuple[float, float, float, float], colour: str, name: str, text: str, inside: str = ""
) -> None:
    """A box with a name, what it is for, and the names of its files."""
    left, right, bottom, top = place
    tint = tuple(1 - 0.14 * (1 - part) for part in to_rgb(colour))
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom),
            right - left,
            top - bottom,
            boxstyle="round,pad=0,rounding_size=0.9",
            facecolor="white" if colour == DATA else tint,
            edgecolor=colour,
            linewidth=1.4,
        )
    )
    if top - bottom < 4:  # one line
        axes.text(left + 1.3, (top + bottom) / 2, name, size=11, weight="bold", va="center", color=INK)
        axes.text(right - 1.3, (top + bottom) / 2, text, size=9.5, va="center", ha="right", color=INK)
        return
    width = right - left - 2.4
    axes.text(left + 1.3, top - 1.9, name, size=11, weight="bold", va="center", color=INK)
    wrapped = "\n".join(fill(line, int(width / 0.75)) for line in text.split("\n"))
    axes.text(left + 1.3, top - 3.5, wrapped, size=9.5, va="top", color=INK, linespacing=1.15)
    if inside:
        axes.text(left + 1.3, bottom + 0.9, fill(inside, int(width / 0.68)), size=8.5, va="bottom", color=GREY)


def arrow(axes: Axes, points: list[tuple[float, float]]) -> None:
    """A line through the points with a head at its end."""
    style = {"color": INK, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.plot(*zip(*points[:-1], strict=True), color=INK, lw=1.6, solid_capstyle="butt")
    axes.add_patch(FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=13, **style))


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
