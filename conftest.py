"""Settings of every test run."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a busy machine stalls spinning threads

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ser", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("ser")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
