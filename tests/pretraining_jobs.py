"""Reference trainings by name and flags, one after another in the same processes.

Tests call `train_job`, and for several processes ``torchrun --standalone --nproc-per-node N tests/pretraining_jobs.py
JOBS.json``, where the start of Python is paid for once. The scripts themselves are run by test_pretraining_runs.py.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from pretraining.loop import train
from pretraining.settings import Settings, parse
from torch import nn

from ser_reg import SERError

__all__ = ["METHODS", "TINY", "parsed", "train_job", "without_batch_statistics"]

METHODS = ("moco_v3", "dino", "barlow_twins")
TINY = (
    "--preset small --steps 3 --batch-size 16 --width 24 --depth 3 --heads 2 --hidden 32 --projection-dim 16 "
    "--log-every 1 --knn-every 0 --tracker none --warmup-epochs 0"
).split()


def parsed(method: str, flags: Sequence[object] = ()) -> Settings:
    """Tiny settings of a method, and other flags on top of them."""
    module = importlib.import_module(method)
    return parse(module.PRESETS, f"{method}.py", [*TINY, *map(str, flags)])


def train_job(method: str, flags: Sequence[object], batch_statistics: bool = True) -> None:
    """What ``python examples/METHOD.py`` does, without or with its batch norm."""
    build = importlib.import_module(method).build
    AcceleratorState._reset_state()
    GradientState._reset_state()
    train(method, parsed(method, flags), build if batch_statistics else lambda s: without_batch_statistics(build(s)))


def without_batch_statistics(module: nn.Module) -> nn.Module:
    """Layer norm in place of batch norm: each process has its own batch statistics on CPUs, where `nn.SyncBatchNorm`
    does not run, and then results would depend on how many processes there are."""
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm1d):
            norm = nn.LayerNorm(part.num_features, elementwise_affine=part.affine)
            trained = all(p.requires_grad for p in part.parameters())  # not in a momentum branch
            setattr(module, name, norm.requires_grad_(trained))
        else:
            without_batch_statistics(part)
    return module


def main(jobs: list[dict[str, Any]]) -> None:
    """Each job's error, if it was one for the user, goes into ERROR in its folder's place."""
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it destroys the process group, which the next job needs
    for job in jobs:
        try:
            train_job(**job)
        except SERError as error:
            folder = Path(job["flags"][job["flags"].index("--output-dir") + 1])
            folder.with_name(f"{folder.name}.error{os.environ.get('RANK', '')}").write_text(str(error))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
