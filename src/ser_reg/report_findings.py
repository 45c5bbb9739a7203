"""What the figures of a model say, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["early_layer", "findings"]

EARLY = 3 / 12  # of the depth: where the paper found accuracy highest

Readings = Mapping[int, Mapping[str, float]]


def early_layer(depth: int) -> int:
    """The layer that one would regularize first: a quarter of the depth.

    Source: Figure 3 of the paper, layer 3 of 12.

    Example:
        >>> early_layer(12), early_layer(24), early_layer(2)
        (3, 6, 1)
    """
    return max(1, round(EARLY * depth))


def findings(record: Mapping[str, Any]) -> list[str]:
    """Sentences about a model: which layer, where positions are stored, what probes tell.

    Args:
        record: of one model, as in report.json, with layers as whole numbers.
    """
    scores, without, probes = (record[part] for part in ("scores", "scores_without_positions", "probes"))
    said = [_best(scores, record["depth"]), _regularize(scores, record["depth"])]
    if without:
        said.append(_positions(scores, without))
    elif not record["positions"]:
        said.append("It has no position coding that could be switched off.")
    said += [_told(name, layers) for name, layers in probes.items()]
    return said


def _above(readings: Mapping[str, float]) -> float:
    return readings["spatial"] - readings["spatial_floor"]


def _best(scores: Mapping[str, Readings], depth: int) -> str:
    parts = []
    for name, layers in scores.items():
        blocks = [layer for layer in layers if layer > 0] or list(layers)
        layer = max(blocks, key=lambda layer: _above(layers[layer]))
        readings = layers[layer]
        parts.append(f"{name} at layer {layer} ({readings['spatial']:.2f}, floor {readings['spatial_floor']:.2f})")
    return f"Of {depth} layers, the spatial score is highest above unrelated images in: {', '.join(parts)}."


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


def _positions(scores: Mapping[str, Readings], without: Mapping[str, Readings]) -> str:
    parts = []
    for name, layers in without.items():
        gains = {layer: layers[layer]["spatial"] - scores[name][layer]["spatial"] for layer in layers}
        layer = max(gains, key=lambda layer: abs(gains[layer]))
        before, after = scores[name][layer]["spatial"], layers[layer]["spatial"]
        parts.append(f"{name} from {before:.2f} to {after:.2f} at layer {layer}")
    return f"Switching its position coding off moves the spatial score most: {', '.join(parts)}."


def _told(name: str, layers: Mapping[int, Mapping[str, float]]) -> str:
    layer = max(layers, key=lambda layer: layers[layer]["accuracy"])
    found = layers[layer]
    return (
        f"A linear probe on the mean patch token tells the {name} best at layer {layer}: "
        f"{100 * found['accuracy']:.0f} ± {100 * found['standard_error']:.0f} % (chance {100 * found['chance']:.0f} %)."
    )
