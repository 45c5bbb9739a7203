"""Fixtures that several tests of the examples share."""

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture
def on_cpu(monkeypatch):
    """A training takes the GPU if there is one, and SIGTERM for itself."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A tiny encoder, [CLS] joining after two blocks, as a training leaves it."""
    from encoder_to_judge import export_tiny

    return export_tiny(tmp_path_factory.mktemp("run") / "encoder")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """FOLDER/train/CLASS and FOLDER/val/CLASS; one file of the latter is no image."""
    from encoder_to_judge import write_pictures

    return write_pictures(tmp_path_factory.mktemp("data"))
