"""The page of the report: one HTML file with its pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from .report_plots import draw_positions, draw_probes, draw_scores

__all__ = ["write_page"]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100%; height: auto } figure { margin: 1.5rem 0 } figcaption, .small { color: #555; font-size: 0.9rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left;
vertical-align: top; border-bottom: 1px solid #ddd } td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f6f6f6; padding: 0.8rem; white-space: pre-wrap } .wide { overflow-x: auto }
"""
SCORES = (
    "The score is the cosine between g·f(x), the transformed tokens, and f(g·x), the tokens of the transformed image, "
    "over patch tokens and images: 1 is equivariant. The <em>raw</em> one is the paper's (its Table 4), and near 1 "
    "whenever tokens hardly vary over space. The <em>spatial</em> one removes each map's mean token first: read that. "
    "A score means something as far as it lies above its floor, where f(g·x) is another image's. "
    "Rotation is the mean of one, two and three quarter turns, scale that of a smaller and a larger image. "
    "Layer 0 is the embeddings that enter the first block."
)
POSITIONS = (
    "The same score of a copy that is told no places: every patch gets the mean of the absolute position embeddings, "
    "and rotary embedding is switched off. Such a copy treats patches in any order alike, so what is left to 1 for "
    "turns and flips is what happens inside a patch; what lies between the two lines is due to positions."
)
PROBES = (
    "Logistic regression on the mean patch token of frozen features tells which quarter turn, or whether a flip, was "
    "applied (the paper's Table 7). Every image is held out once while the probe is trained on others; bars are the "
    "standard error over images. Of a strictly equivariant model the mean token does not change under turns and "
    "flips, and the probe is at chance."
)
MAPS = (
    "Three principal components of the tokens as red, green and blue, the same components all along a row, each map "
    "without its mean token. In an equivariant model the two maps of a pair match: <em>turned tokens</em> g·f(x) and "
    "<em>tokens of the turned image</em> f(g·x). The score below is that of this one pair."
)


def write_page(result: Mapping[str, Any], folder: Path) -> str:
    """Save the plots that compare models in `folder`, and return the page.

    Args:
        result: what `report` returns.
        folder: where the models' token maps lie already.
    """
    records = {name: record for name, record in result["models"].items() if "error" not in record}
    names = ", ".join(records)
    draw_scores(folder / "scores.png", records)
    body = [
        "<h1>Equivariance report</h1>",
        _models(records),
        *(_failed(name, record["error"]) for name, record in result["models"].items() if "error" in record),
        "<h2>Findings</h2>",
        *(
            f"<h3>{escape(name)}</h3>{_list(record['findings'] + record['left_out'])}"
            for name, record in records.items()
        ),
        "<h2>Equivariance by layer</h2>",
        _figure(folder / "scores.png", f"Equivariance scores by layer of {names}", SCORES),
    ]
    if any(record["scores_without_positions"] for record in records.values()):
        draw_positions(folder / "positions.png", records)
        picture = _figure(folder / "positions.png", f"Spatial score of {names} with and without positions", POSITIONS)
        body += ["<h2>Where positions are stored</h2>", picture]
    draw_probes(folder / "probes.png", records)
    body += [
        "<h2>Transformations read off frozen features</h2>",
        _figure(folder / "probes.png", f"Accuracy of probes on {names} by layer", PROBES),
        "<h2>Token maps</h2>",
        f"<p class=small>{MAPS}</p>",
    ]
    for name, record in records.items():
        body += [_figure(folder / picture, f"Token maps of {name}", "") for picture in record["pictures"]]
    body += ["<h2>Every figure</h2>", *(_details(name, record) for name, record in records.items()), _ground(result)]
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'><title>Equivariance</title>"
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _figure(path: Path, alternative: str, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _list(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _failed(name: str, error: str) -> str:
    return f"<h3>{escape(name)}: failed</h3><pre>{escape(error)}</pre>"


def _table(heading: list[str], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return "<td></td>"
        return f"<td class=n>{value:.3f}</td>" if isinstance(value, float) else f"<td>{escape(str(value))}</td>"

    head = "".join(f"<th>{escape(text)}</th>" for text in heading)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _models(records: Mapping[str, Mapping[str, Any]]) -> str:
    heading = ["model", "blocks", "patch", "image", "prefix tokens join", "position coding", "seconds"]
    rows = [
        [
            name,
            record["depth"],
            f"{record['patch_size']} px",
            "{} × {} px".format(*record["image_size"]),
            f"after block {record['cls_layer']}" if record["cls_layer"] else "at the first block, as in plain timm",
            "; ".join(record["positions"]) or "none",
            f"{record['seconds']:.0f}",
        ]
        for name, record in records.items()
    ]
    return _table(heading, rows)


def _details(name: str, record: Mapping[str, Any]) -> str:
    """Spatial scores and probes by layer, to be unfolded."""
    off, probes = record["scores_without_positions"], record["probes"]
    heading, columns = ["layer"], []
    for kind, layers in record["scores"].items():
        heading += [f"{kind}: spatial", "floor", "raw", "floor"]
        columns += [
            {layer: readings[key] for layer, readings in layers.items()}
            for key in ("spatial", "spatial_floor", "raw", "raw_floor")
        ]
        if kind in off:
            heading.append("spatial, positions off")
            columns.append({layer: readings["spatial"] for layer, readings in off[kind].items()})
    for kind, layers in probes.items():
        heading += [f"{kind} probe"]
        columns.append({layer: found["accuracy"] for layer, found in layers.items()})
    rows = [[layer, *(column.get(layer) for column in columns)] for layer in columns[0]]
    return f"<details><summary>{escape(name)}</summary>{_table(heading, rows)}</details>"


def _ground(result: Mapping[str, Any]) -> str:
    """On which images, with which versions."""
    images, settings = result["images"], result["settings"]
    views = sorted({record["probe_views"] for record in result["models"].values() if "error" not in record})
    said = [
        f"{len(images['names'])} images: {', '.join(images['names'])}.",
        f"Probes saw {' or '.join(map(str, views))} views of them; seed {settings['seed']}.",
        f"{len(images['unreadable'])} files could not be read and were passed over"
        + "".join(f"; {name}: {why}" for name, why in images["unreadable"].items())
        + ".",
        ", ".join(f"{name} {number}" for name, number in result["environment"].items()) + ".",
    ]
    return f"<h2>On what ground</h2>{_list(said)}<p class=small>report.json beside this page holds every figure.</p>"
