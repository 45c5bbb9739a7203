"""Question to the term: do one process and two agree? Two are started here."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives import Objective
from ..views import View
from .base import Case, Finding

__all__ = ["processes_finding"]

SECONDS = 120  # for two processes to start, agree and end
EXACT = 1e-9  # in double precision


def processes_finding(case: Case) -> Finding:
    """In double precision, so that what is left are mistakes; with an uneven split, as that is where they hide."""
    question = "one process and two agree on value and gradient"
    remedy = "ser_reg.distributed.all_gather(x, lengths, group)  # with gradient, of what a term compares across images"
    features = [z.detach().double().cpu() for z in case.maps[0]]
    term, views = copy.deepcopy(case.term).double().cpu(), [view.to("cpu") for view in case.draws[0]]
    with tempfile.TemporaryDirectory() as folder:
        torch.save((term, features, views), f"{folder}/task.pt")
        failed = _run_ranks(folder)
        if failed:
            return Finding(question, False, failed, remedy)
        two = [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]
    one = _value_and_gradients(term, features, views)
    n = 1 + len(features)
    value = abs(one[0] - (two[0][0] + two[1][0]) / 2).item()
    inputs = [torch.cat([a, b]) / 2 for a, b in zip(two[0][1:n], two[1][1:n], strict=True)]
    weights = [(a + b) / 2 for a, b in zip(two[0][n:], two[1][n:], strict=True)]
    pairs = zip(one[1:], inputs + weights, strict=True)
    gradient = max(((a - b).norm() / a.norm().clamp(min=1e-300)).item() for a, b in pairs)
    figure = f"value differs by {value:.1e}, gradients by {gradient:.1e} of their norm (double precision)"
    return Finding(question, max(value, gradient) < EXACT, figure, remedy)


def _value_and_gradients(term: Objective, features: Sequence[Tensor], views: Sequence[View]) -> list[Tensor]:
    features = [z.clone().requires_grad_() for z in features]
    loss = term.requires_grad_(True)(features, views).loss
    return [loss.detach(), *torch.autograd.grad(loss, [*features, *term.parameters()], materialize_grads=True)]


def _run_ranks(folder: str) -> str:
    """Start the two processes and wait for them; what went wrong, if anything did."""
    code = f"from ser_reg.check.processes import _rank; _rank({folder!r}, "
    ranks = [
        subprocess.Popen([sys.executable, "-c", f"{code}{rank})"], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=SECONDS)[1] for rank in ranks]
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS} seconds"
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    if any(rank.returncode for rank in ranks):
        return next(error for error in errors if error).strip().splitlines()[-1]
    return ""


def _rank(folder: str, rank: int) -> None:
    """One of the two processes: the first has one image, the second the others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    term, features, views = torch.load(f"{folder}/task.pt", weights_only=False)  # that the parent has just written
    mine = slice(0, 1) if rank == 0 else slice(1, None)
    found = _value_and_gradients(term, [z[mine] for z in features], [view[mine] for view in views])
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
