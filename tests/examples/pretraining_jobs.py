"""Reference trainings by name and flags, one after another in the same processes.

Tests call `train_job`, and for several processes ``python tests/examples/pretraining_jobs.py JOBS.json``, with lists of
jobs by number of processes, so that the start of Python is paid for once. Whole scripts are run by
test_pretraining_runs.py.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from pretraining.base import BaseMethod
from pretraining.loop import train
from pretraining.schedules import Moment
from pretraining.settings import Settings, parse
from pretraining.term import TERMS
from torch import Tensor, nn

from ser_reg.distributed import rank_and_world_size

__all__ = [
    "GRADIENTS",
    "METHODS",
    "TIMES",
    "TINY",
    "as_one_of_several",
    "lines",
    "parsed",
    "train_job",
    "with_own_weights",
    "with_scaler",
    "without_batch_statistics",
]

METHODS = ("moco_v3", "dino", "barlow_twins")
TINY = (
    "--preset small --steps 3 --batch-size 16 --width 24 --depth 3 --heads 2 --hidden 32 --log-every 1 --knn-every 0 "
    "--tracker none --warmup-epochs 0"
)
NARROW = {  # flags of a term
    "ser": ("--term.projection-dim", "16"),
    "augself": ("--term.width", "16"),
    "equimod": ("--term.hidden", "16", "--term.width", "8"),
    "essl": ("--term.hidden", "16"),
    "stl": ("--term.rank", "2"),
    "reconstruction": ("--term.width", "8"),
}
GRADIENTS = "gradients.pt"  # in the output folder: of the first step
TIMES = {"images_per_second", "data_wait"}


def parsed(method: str, flags: Sequence[object] = ()) -> Settings:
    """Tiny settings of a method, and other flags on top of them; the word of a term, if any, comes first."""
    module, typed = importlib.import_module(method), list(map(str, flags))
    word = typed.pop(0) if typed and typed[0] in TERMS else "ser"
    return parse(module.PRESETS, f"{method}.py", [word, *TINY.split(), *NARROW.get(word, ()), *typed])


def lines(folder: Path, without: set[str] = TIMES) -> list[dict[str, Any]]:
    """What metrics.jsonl in a run's folder has, but for times."""
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in without} for line in found]


def train_job(
    method: str,
    flags: Sequence[object],
    batch_statistics: bool = True,
    gradients: bool = False,
    stop_after: int | None = None,
    each_step: Callable[[Moment], None] | None = None,
    own_weights: bool = False,
) -> None:
    """What ``python examples/METHOD.py`` does.

    Args:
        method: name of the script.
        flags: on top of the tiny settings.
        batch_statistics: False for layer norm in place of batch norm.
        gradients: write those of the first step down.
        stop_after: steps, of which the last is interrupted by SIGTERM.
        each_step: called ahead of each.
        own_weights: begin with weights that are the same whatever the releases of torch and timm.
    """
    module, settings = importlib.import_module(method), parsed(method, flags)

    def build(settings: Settings) -> BaseMethod:
        made = module.build(settings)
        if own_weights:
            with_own_weights(made)
        if not batch_statistics:
            without_batch_statistics(made)
        if gradients:
            _watch(made, "before_update", lambda moment: _keep(made, moment, settings.run.output_dir / GRADIENTS))
        if stop_after is not None:
            _watch(made, "before_step", lambda moment: _stop(moment.step + 1 == stop_after))
        if each_step is not None:
            _watch(made, "before_step", each_step)
        return made

    AcceleratorState._reset_state()
    GradientState._reset_state()
    train(method, settings, build, module.recipes)


def as_one_of_several(monkeypatch: Any, rank: int, world_size: int) -> None:
    """Trainings have a rank's images from here on, and hear nothing of the others."""
    monkeypatch.setattr(Accelerator, "process_index", property(lambda self: rank))
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: world_size))


def with_scaler(monkeypatch: Any, scale: float) -> None:
    """Trainings scale their gradients from here on, which Accelerate leaves out on CPUs."""

    def scaling(**arguments: Any) -> Accelerator:
        accelerator = Accelerator(**arguments)
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    monkeypatch.setattr("pretraining.run.Accelerator", scaling)


def without_batch_statistics(module: nn.Module) -> nn.Module:
    """Layer norm in place of batch norm: each process has its own batch statistics on CPUs, where `nn.SyncBatchNorm`
    does not run, and then results would depend on how many processes there are."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d):
            norm = nn.LayerNorm(child.num_features, elementwise_affine=child.affine)
            trained = all(p.requires_grad for p in child.parameters())  # not in a momentum branch
            setattr(module, name, norm.requires_grad_(trained))
        else:
            without_batch_statistics(child)
    return module


@torch.no_grad()
def with_own_weights(method: nn.Module) -> None:
    """Matrices from NumPy's numbers, by their names: what timm and torch draw differs between releases.

    A momentum branch begins as the trained one does; what is built afterwards draws from a fresh seed.
    """
    for name, parameter in method.named_parameters():
        trained = name.replace("target.", "encoder.", 1) if name.startswith("target.") else name.removeprefix("target_")
        if parameter.ndim > 1 and not name.endswith("original0"):  # which are lengths of rows
            numbers = np.random.default_rng(zlib.crc32(trained.encode())).standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(numbers / parameter[0].numel() ** 0.5))
        elif name.endswith("bias"):
            parameter.zero_()
    torch.manual_seed(0)


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
    def full(grad: Tensor) -> Tensor:
        return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()

    if moment.step == 0:
        found = {name: full(p.grad) for name, p in method.named_parameters() if p.grad is not None}
        if rank_and_world_size()[0] == 0:
            torch.save(found, path)


def _work(rank: int, processes: int, port: int, jobs: list[dict[str, Any]]) -> None:
    """The jobs, as one of several processes that torchrun had started."""
    if processes > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {k: str(v) for k, v in here.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for job in jobs:
        train_job(**job)


def _fork(processes: int, jobs: list[dict[str, Any]]) -> None:
    """Copies of this process, which has imported everything, share the jobs; if one fails, none goes on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(rank, processes, port, jobs)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    running = list(workers)
    while running:
        multiprocessing.connection.wait([worker.sentinel for worker in running])
        running = [worker for worker in running if worker.is_alive()]
        if any(worker.exitcode for worker in workers):
            for worker in running:
                worker.kill()
            sys.exit(f"jobs on {processes} processes ended with {[worker.exitcode for worker in workers]}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it destroys the process group, which the next job needs
    for count, its_jobs in json.loads(Path(sys.argv[1]).read_text()).items():
        for method in METHODS:
            importlib.import_module(method)
        _fork(int(count), its_jobs)
