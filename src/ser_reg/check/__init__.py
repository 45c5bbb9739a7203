"""Does the term train what it should? A question is a function in one of these files; `run.py` asks them."""

from .base import CheckReport, Finding
from .run import check

__all__ = ["CheckReport", "Finding", "check"]
