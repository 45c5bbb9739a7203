"""Checkpoints: whole or not there, of tensors and plain values only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ser_reg import SERError
from ser_reg.errors import require
from ser_reg.export import FORMAT
from ser_reg.records import atomically

from .settings import Settings, flatten, require_format

__all__ = ["FULL", "discard", "load", "restore", "save"]

NAME = "checkpoint.pt"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of all ranks, however parameters are sharded


def save(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    settings: Settings,
    step: int,
    is_main: bool,
) -> None:
    """Write OUTPUT_DIR/checkpoint.pt. All processes have to call; the main one writes.

    Order of images, crops, geometry and dropped paths are functions of the seed and the number of the step, so that
    these two are all that there is to keep of samplers and random numbers.
    """
    model, optimisation = get_state_dict(module, optimizer, options=FULL)
    if not is_main:
        return
    state = {
        "format": FORMAT,
        "model": model,
        "optimizer": optimisation,
        "scaler": scaler.state_dict() if scaler is not None else {},
        "step": step,
        "seed": settings.run.seed,
        "settings": settings.plain(),
    }
    with atomically(folder / NAME) as path, path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # or the name could outlive a power cut and the content not


def discard(folder: Path, resume: bool) -> None:
    """Remove what a killed run left half-written, and, for one that starts anew, the checkpoint of the run before:
    else the next one would go on from that."""
    for path in folder.glob(f".*-{NAME}"):
        path.unlink()
    if not resume:
        (folder / NAME).unlink(missing_ok=True)


def load(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """The checkpoint of this run, if there is one.

    Raises:
        SERError: it cannot be read, has another format, or belongs to a run of other settings.
    """
    path = folder / NAME
    if not path.exists():
        return None
    call = f"resume from {str(path)!r}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises errors of many kinds for a damaged file
        anew = f"--resume never --output-dir {folder}"
        raise SERError(call, str(error).split("\n")[0], "a whole checkpoint", anew) from error
    require_format(call, path, state)
    different = settings.same_run(state["settings"])
    mine, saved = settings.flat(), flatten(state["settings"])
    values = ", ".join(f"{name}={saved.get(name)} there and {mine.get(name)} here" for name in different)
    elsewhere = f"--output-dir {folder}_2  # --resume never would write over this run"
    require(not different, call, values, "the same settings as in its run", elsewhere)
    return state


def restore(
    state: dict[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> int:
    """Put a checkpoint back; returns the number of steps that are done."""
    set_model_state_dict(module, state["model"], options=FULL)
    # What has not learned yet (DINO's last layer, in the first epoch) has no state to put back. Torch wants one, and
    # does not get it for keeps.
    known = state["optimizer"]["state"]
    like = next(iter(known.values()), {})
    trained = {name.removeprefix("module."): p for name, p in module.named_parameters() if p.requires_grad}
    missing = {name: p for name, p in trained.items() if name not in known}
    for name, parameter in missing.items():
        known[name] = {key: torch.zeros(parameter.shape if value.ndim else ()) for key, value in like.items()}
    set_optimizer_state_dict(module, optimizer, state["optimizer"], options=FULL)
    for parameter in missing.values():
        optimizer.state.pop(parameter, None)
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return int(state["step"])
