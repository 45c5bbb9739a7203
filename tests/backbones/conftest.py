"""Fixtures of the tests of backbones."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt


@pytest.fixture
def reentrant(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(request.param)
    yield request.param
    set_reentrant_ckpt(before)


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    if torch.distributed.is_initialized():
        pytest.skip("another process group is up")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
