"""Fixtures that several tests share."""

from processes import run

__all__ = ["run"]
