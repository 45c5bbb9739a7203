"""Settings of every test run."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a busy machine stalls spinning threads

import hypothesis
import pytest
import torch
from torchvision import tv_tensors

collect_ignore_glob = ["*conftest.py"]  # have no doctests, and one name, which collecting takes for one module
if not hasattr(tv_tensors, "KeyPoints"):  # before torchvision 0.23, where its example raises
    collect_ignore_glob.append("*/views/recorded.py")

hypothesis.settings.register_profile("ser", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("ser")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
