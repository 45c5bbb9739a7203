"""The sections of the report, in the order of the page: a line each."""

from __future__ import annotations

from .base import Section
from .maps import Maps
from .positions import Positions
from .probes import Probes
from .scores import Scores

__all__ = ["SECTIONS"]

SECTIONS: list[Section] = [
    Scores(),
    Positions(),
    Probes(),
    Maps(),
]
