"""Models side by side, in pictures. A section is a file beside this one and a line in `sections.py`."""

from .run import NamedEncoders, report

__all__ = ["NamedEncoders", "report"]
