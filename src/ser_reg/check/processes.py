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
from torch import Tensor, nn

from ..objectives import Objective
from ..views import View
from .base import Case, Finding

__all__ = ["processes_finding"]

SECONDS = 120  # for two processes to start, agree and end
EXACT = 1e-9  # in double precision
NEGLIGIBLE = 1e-4  # of the largest gradient


def processes_finding(case: Case) -> Finding:
    """In double precision, so that what is left are mistakes; with an uneven split, as that is where they hide."""
    question = "one process and two agree on value and gradient"
    features = [z.detach().double().cpu() for z in case.maps[0]]
    term, views = copy.deepcopy(case.term).double().cpu(), [view.to("cpu") for view in case.draws[0]]
    first = 2 if case.term.policy == "paired" else 1  # the two of a pair are on one rank
    rows = case.rows(0, first), case.rows(first, case.images)
    with tempfile.TemporaryDirectory() as folder:
        torch.save((term, features, views, rows), f"{folder}/task.pt")
        failed = _run_ranks(folder)
        if failed:
            return Finding(question, False, failed, _remedy(case))
        two = [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]
    one = _value_and_gradients(term, features, views)
    n = 1 + len(features)
    value = abs(one[0] - (two[0][0] + two[1][0]) / 2).item()
    wanted = [z[rows[0] + rows[1]] for z in one[1:n]] + one[n:]
    found = [torch.cat([a, b]) / 2 for a, b in zip(two[0][1:n], two[1][1:n], strict=True)]
    found += [(a + b) / 2 for a, b in zip(two[0][n:], two[1][n:], strict=True)]
    # Against rounding where a gradient is zero in exact numbers, as of a shift ahead of a batch norm.
    least = NEGLIGIBLE * max(z.norm().item() for z in wanted)
    gradient = max(
        ((a - b).norm() / a.norm().clamp(min=least + 1e-300)).item() for a, b in zip(wanted, found, strict=True)
    )
    figure = f"value differs by {value:.1e}, gradients by {gradient:.1e} of their norm (double precision)"
    return Finding(question, max(value, gradient) < EXACT, figure, _remedy(case))


def _remedy(case: Case) -> str:
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in case.term.modules()):
        return "ser_reg.objectives.heads.BatchNorm(width)(x, group)  # over all ranks, for the term's batch norms"
    return "ser_reg.distributed.all_gather(x, lengths, group)  # with gradient, of what a term compares across images"


def _value_and_gradients(
    term: Objective, features: Sequence[Tensor], views: Sequence[View], group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    features = [z.clone().requires_grad_() for z in features]
    loss = term.requires_grad_(True)(features, views, group).loss
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
    """One of the two processes: the first has one image (or pair), the second the others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    _answer(folder, rank)
    dist.destroy_process_group()


def _answer(folder: str, rank: int, group: dist.ProcessGroup | None = None) -> None:
    """What a rank finds with its own rows."""
    term, features, views, rows = torch.load(
        f"{folder}/task.pt", weights_only=False
    )  # that the parent has just written
    mine = rows[rank]
    found = _value_and_gradients(term, [z[mine] for z in features], [view[mine] for view in views], group)
    torch.save(found, Path(folder, f"{rank}.pt"))
