"""Where positions are stored: the score of a copy of the model that is told none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backbones import backbone
from ..metrics import equivariance_score
from .base import Column, Picture, Record, Records, Section, Subject
from .scores import Readings
from .style import OFF, SCORE, draw_line, finish, panels, transformations_in

__all__ = ["Positions"]

CAPTION = (
    "The same score of a copy that is told no places: every patch gets the mean of the absolute position embeddings, "
    "and rotary embeddings and relative biases are switched off. Such a ViT treats patches in any order alike, so "
    "what is left to 1 for turns and flips is what happens inside a patch; what lies between the two lines is due to "
    "positions."
)


class Positions(Section):
    heading = "Where positions are stored"

    def measure(self, subject: Subject) -> dict[str, Any]:
        trunk = backbone(subject.model)
        kinds, scores = trunk.position_coding(), {}
        if kinds:
            scores = equivariance_score(trunk.without_positions(), subject.pixels, subject.layers, subject.generator())
        return {"positions": kinds, "scores_without_positions": scores}

    def forwards(self, subject: Subject) -> int:
        known = bool(backbone(subject.model).position_coding())
        return known * len(subject.photographs) * (1 + sum(map(len, subject.elements.values())))

    def draw(self, folder: Path, records: Records) -> list[Picture]:
        """The spatial score by layer, with and without position coding."""
        columns = transformations_in(records, "scores_without_positions")
        if not columns:
            return []
        figure, (row,) = panels(1, columns)
        for panel, column in zip(row, columns, strict=True):
            for i, record in enumerate(records.values()):
                draw_line(panel, i, record["scores"].get(column, {}), "spatial", SCORE)
                draw_line(panel, i, record["scores_without_positions"].get(column, {}), "spatial", OFF)
            panel.set_title(column)
        row[0].set_ylabel("spatial score (cosine)")
        path = folder / "positions.png"
        finish(figure, path, list(records), row, {"as it is": SCORE, "position coding switched off": OFF})
        return [Picture(path, f"Spatial score of {', '.join(records)} with and without positions")]

    def caption(self, records: Records) -> str:
        return CAPTION

    def find(self, record: Record) -> list[str]:
        if record["scores_without_positions"]:
            return [_moved(record["scores"], record["scores_without_positions"])]
        return [] if record["positions"] else ["It has no position coding that could be switched off."]

    def columns(self, record: Record) -> list[Column]:
        return [
            Column(f"{name}: spatial, positions off", {layer: at["spatial"] for layer, at in layers.items()})
            for name, layers in record["scores_without_positions"].items()
        ]


def _moved(scores: Mapping[str, Readings], without: Mapping[str, Readings]) -> str:
    found = []
    for name, layers in without.items():
        gains = {layer: layers[layer]["spatial"] - scores[name][layer]["spatial"] for layer in layers}
        layer = max(gains, key=lambda layer: abs(gains[layer]))
        before, after = scores[name][layer]["spatial"], layers[layer]["spatial"]
        found.append(f"{name} from {before:.2f} to {after:.2f} at layer {layer}")
    return f"Switching its position coding off moves the spatial score most: {', '.join(found)}."
