"""Time of `act` on token maps, forward and backward, against a Python loop over samples.

Run: python benchmarks/act.py
"""

import time
from collections.abc import Callable

import record
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ser_reg import GroupElement, act

GRID, DIM = 14, 384
IMAGES = (8, 32, 128, 512)
GRIDS = {"permutation": (14, 14), "shrinking": (12, 12), "enlarging": (16, 16)}
RUNS = 9


def loop(g: GroupElement, x: Tensor, size: tuple[int, int]) -> Tensor:
    """What one would write first."""
    maps = []
    for turns, flip, z in zip(g.turns.tolist(), g.flip.tolist(), x.split(1), strict=True):
        z = F.interpolate(z, size, mode="bicubic") if size != (GRID, GRID) else z
        maps.append(torch.rot90(z.flip(-1) if flip else z, turns, (-2, -1)))
    return torch.cat(maps)


def seconds(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(n: int, size: tuple[int, int], device: str) -> dict[str, list[float] | float]:
    """Both forms in turn, so that a drift of the machine's speed meets both."""
    tokens = torch.randn(n, GRID * GRID, DIM, device=device, requires_grad=True)
    weight = torch.randn(n, size[0] * size[1], DIM, device=device)
    g = GroupElement.sample(n, scale=(1, 1), ratio=(1, 1))
    g = GroupElement(g.turns, g.flip, torch.tensor([[side / GRID for side in size]]).double().expand(n, 2))
    maps = {"act": lambda x: act(g, x), "loop": lambda x: loop(g, x, size)}
    results = {name: form(tokens.transpose(1, 2).unflatten(2, (GRID, GRID))) for name, form in maps.items()}
    error = (results["act"] - results["loop"]).abs().max().item()

    def step(form: Callable[[Tensor], Tensor]) -> None:
        """From tokens to tokens, as in the SER term; nothing else is timed."""
        tokens.grad = None
        maps = form(rearrange(tokens, "b (h w) d -> b d h w", h=GRID))
        rearrange(maps, "b d h w -> b (h w) d").backward(weight)

    times: dict[str, list[float]] = {name: [] for name in maps}
    for run in range(RUNS + 2):
        for name, form in maps.items():
            spent = seconds(lambda form=form: step(form), device)
            if run >= 2:  # warm-up
                times[name].append(spent)
    return {**times, "largest_difference": error}


if __name__ == "__main__":
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for kind, size in GRIDS.items():
        for n in IMAGES:
            found = measure(n, size, device)
            ratios = sorted(b / a for a, b in zip(found["act"], found["loop"], strict=True))
            rows.append({"kind": kind, "images": n, "grid": size, "ratios": ratios, **found})
            low, median, high = ratios[0], ratios[len(ratios) // 2], ratios[-1]
            print(f"{kind:12} {n:4} images: {median:5.1f} times as fast ({low:.1f} to {high:.1f})")
    print(record.save("act", rows))
