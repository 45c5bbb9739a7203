"""Reference trainings by name and flags, one after another in the same processes.

Tests call `train_job`, and for several processes ``torchrun --standalone --nproc-per-node N tests/pretraining_jobs.py
JOBS.json``, so that the start of Python is paid for once. Whole scripts are run by test_pretraining_runs.py.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from pretraining.distributed import place
from pretraining.loop import train
from pretraining.schedules import Moment
from pretraining.settings import Settings, parse
from torch import Tensor, nn

__all__ = ["GRADIENTS", "METHODS", "TINY", "parsed", "train_job", "without_batch_statistics"]

METHODS = ("moco_v3", "dino", "barlow_twins")
TINY = (
    "--preset small --steps 3 --batch-size 16 --width 24 --depth 3 --heads 2 --hidden 32 --projection-dim 16 "
    "--log-every 1 --knn-every 0 --tracker none --warmup-epochs 0"
)
GRADIENTS = "gradients.pt"  # in the output folder: of the first step


def parsed(method: str, flags: Sequence[object] = ()) -> Settings:
    """Tiny settings of a method, and other flags on top of them."""
    module = importlib.import_module(method)
    return parse(module.PRESETS, f"{method}.py", [*TINY.split(), *map(str, flags)])


def train_job(
    method: str,
    flags: Sequence[object],
    batch_statistics: bool = True,
    gradients: bool = False,
    stop_after: int | None = None,
    each_step: Callable[[Moment], None] | None = None,
) -> None:
    """What ``python examples/METHOD.py`` does.

    Args:
        method: name of the script.
        flags: on top of the tiny settings.
        batch_statistics: False for layer norm in place of batch norm.
        gradients: write those of the first step down.
        stop_after: steps, of which the last is interrupted by SIGTERM.
        each_step: called ahead of each.
    """
    settings = parsed(method, flags)

    def build(settings: Settings) -> Any:
        made = importlib.import_module(method).build(settings)
        if not batch_statistics:
            without_batch_statistics(made)
        if gradients:
            _watch(made, "before_update", lambda moment: _keep(made, moment, settings.output_dir / GRADIENTS))
        if stop_after is not None:
            _watch(made, "before_step", lambda moment: _stop(moment.step + 1 == stop_after))
        if each_step is not None:
            _watch(made, "before_step", each_step)
        return made

    AcceleratorState._reset_state()
    GradientState._reset_state()
    train(method, settings, build)


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


def _watch(method: nn.Module, name: str, call: Callable[[Moment], None]) -> None:
    """Call ahead of what the loop calls."""
    original = getattr(method, name)

    def watched(moment: Moment) -> None:
        call(moment)
        original(moment)

    setattr(method, name, watched)


def _stop(now: bool) -> None:
    if now:
        os.kill(os.getpid(), signal.SIGTERM)


def _keep(method: nn.Module, moment: Moment, path: Path) -> None:
    def whole(grad: Tensor) -> Tensor:
        return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()

    if moment.step == 0:
        found = {name: whole(p.grad) for name, p in method.named_parameters() if p.grad is not None}
        if place()[0] == 0:
            torch.save(found, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it destroys the process group, which the next job needs
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train_job(**job)
