"""The page of the report: one HTML file with its pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .base import Record
from .sections import SECTIONS

__all__ = ["write_page"]

TEMPLATE = "page.html"


def write_page(result: Mapping[str, Any], folder: Path) -> str:
    """Save the pictures of all sections in `folder`, and return the page.

    Args:
        result: what `report` returns.
        folder: where pictures of single models lie already.
    """
    records = {name: record for name, record in result["models"].items() if "error" not in record}
    drawn = [(section, section.draw(folder, records)) for section in SECTIONS]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _cell, "embedded": _embedded}
    return environment.get_template(TEMPLATE).render(
        result=result,
        records=records,
        sections=[(section, pictures, section.caption(records)) for section, pictures in drawn if pictures],
        details={name: _details(record) for name, record in records.items()},
    )


def _embedded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _details(record: Record) -> tuple[list[str], list[list[Any]]]:
    """Heading and rows, a layer each, of every figure of a model."""
    columns = [column for section in SECTIONS for column in section.columns(record)]
    layers = dict.fromkeys(layer for column in columns for layer in column.values)
    rows = [[layer, *(column.values.get(layer) for column in columns)] for layer in layers]
    return ["layer", *(column.heading for column in columns)], rows
