"""The benchmark's count of FLOPs is what the loss computes."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ser_reg.losses import streaming

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import flops

Z, OFFSETS = torch.randn(60, 16), torch.tensor([0, 20, 40, 60])  # three images of 20 tokens


def product(out, a, b, *_, **__):
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("others", [None, torch.randn(70, 16)])
def test_counts(others):
    """Counted from inside, with the in-place product that torch's counter takes for nothing."""
    shapes = [None if z is None else z.shape for z in (Z, Z, others, OFFSETS)]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as count:
        streaming._contrast._init_fn(Z, Z, others, OFFSETS, 0.3, None, 1.0, True)
    assert count.get_total_flops() == flops.loss_flops(*shapes)
    with FlopCounterMode(display=False) as count:
        streaming.accuracy._init_fn(Z, Z, others, OFFSETS, 0.3, None)
    assert count.get_total_flops() == flops.accuracy_flops(*shapes)
