"""The equivariance score by layer, raw and spatial, beside that of unrelated images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..metrics import equivariance_score
from .base import Column, Picture, Record, Records, Section, Subject, early_layer
from .style import FLOOR, SCORE, draw_line, finish, panels, transformations_in

__all__ = ["Readings", "Scores"]

Readings = Mapping[int, Mapping[str, float]]
"""[layer][reading], as `equivariance_score` names them."""

CAPTION = (
    "The score is the cosine between g·f(x), the transformed tokens, and f(g·x), the tokens of the transformed image, "
    "over patch tokens and images: 1 is equivariant. The <em>raw</em> one is the paper's (its Table 4), and near 1 "
    "whenever tokens hardly vary over space. The <em>spatial</em> one removes each map's mean token first: read that. "
    "A score means something as far as it lies above its floor, where f(g·x) is another image's. "
    "Rotation is the mean of one, two and three quarter turns, scale that of a smaller and a larger image. "
    "Layer 0 is the embeddings that enter the first one."
)


class Scores(Section):
    heading = "Equivariance by layer"

    def measure(self, subject: Subject) -> dict[str, Any]:
        return {"scores": equivariance_score(subject.model, subject.pixels, subject.layers, subject.generator())}

    def forwards(self, subject: Subject) -> int:
        return len(subject.photographs) * (1 + sum(map(len, subject.elements.values())))

    def left_out(self, subject: Subject) -> list[str]:
        said, (height, width) = [], subject.size
        if "scale" not in subject.elements:
            said.append("no scale score: it takes images of one size only")
        if "rotation" not in subject.elements:
            shape = f"images of {height} x {width} pixels have another shape once they are turned"
            said.append(f"no rotation score: {shape}, and it takes one size only")
        return said

    def draw(self, folder: Path, records: Records) -> list[Picture]:
        """Both readings by layer, a column a transformation."""
        columns = transformations_in(records, "scores")
        figure, rows = panels(2, columns)
        for row, reading in zip(rows, ("spatial", "raw"), strict=True):
            for panel, column in zip(row, columns, strict=True):
                for i, record in enumerate(records.values()):
                    scores = record["scores"].get(column, {})
                    draw_line(panel, i, scores, reading, SCORE)
                    draw_line(panel, i, scores, f"{reading}_floor", FLOOR)
            row[0].set_ylabel(f"{reading} score (cosine)")
        for panel, column in zip(rows[0], columns, strict=True):
            panel.set_title(column)
        path = folder / "scores.png"
        finish(figure, path, list(records), rows[-1], {"score": SCORE, "its floor: unrelated images": FLOOR})
        return [Picture(path, f"Equivariance scores by layer of {', '.join(records)}")]

    def caption(self, records: Records) -> str:
        return CAPTION

    def find(self, record: Record) -> list[str]:
        return [_best(record["scores"], record["depth"]), _regularize(record["scores"], record["depth"])]

    def columns(self, record: Record) -> list[Column]:
        headings = {"spatial": "{}: spatial", "spatial_floor": "floor", "raw": "raw", "raw_floor": "floor"}
        return [
            Column(heading.format(name), {layer: readings[key] for layer, readings in layers.items()})
            for name, layers in record["scores"].items()
            for key, heading in headings.items()
        ]


def _above(readings: Mapping[str, float]) -> float:
    return readings["spatial"] - readings["spatial_floor"]


def _best(scores: Mapping[str, Readings], depth: int) -> str:
    found = []
    for name, layers in scores.items():
        blocks = [layer for layer in layers if layer > 0] or list(layers)
        layer = max(blocks, key=lambda layer: _above(layers[layer]))
        readings = layers[layer]
        found.append(f"{name} at layer {layer} ({readings['spatial']:.2f}, floor {readings['spatial_floor']:.2f})")
    return f"Of {depth} layers, the spatial score is highest above unrelated images in: {', '.join(found)}."


def _regularize(scores: Mapping[str, Readings], depth: int) -> str:
    layer = early_layer(depth)
    there = [
        f"{name} {layers[layer]['spatial']:.2f} ({_above(layers[layer]):+.2f} above its floor)"
        for name, layers in scores.items()
        if layer in layers
    ]
    stand = f"; there it scores {', '.join(there)}" if there else ""
    return (
        f"To regularize early, start with layer {layer}, a quarter of the depth as in the paper (layer 3 of 12){stand}."
        " The score alone cannot say at which layer accuracy gains most."
    )
