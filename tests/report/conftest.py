"""Fixtures of the tests of the report."""

import pytest

from ser_reg.report import maps, page


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are measured and not drawn: pictures take most of the time."""
    monkeypatch.setattr(maps, "_draw", lambda *arguments: None)
    monkeypatch.setattr(page, "write_page", lambda result, folder: "")
