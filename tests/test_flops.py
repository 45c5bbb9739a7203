"""The benchmark's count of FLOPs is what the loss computes."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ser_reg import losses

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import flops

Z = torch.randn(3, 20, 16)


def product(out, a, b, *_, **__):
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("others", [None, torch.randn(70, 16)])
def test_counts(others):
    """Counted from inside, with the in-place product that torch's counter takes for nothing."""
    shapes = [None if z is None else z.shape for z in (Z, Z, others)]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as count:
        losses._stream._init_fn(Z, Z, others, 0.3, True, None, 1.0, True)
    assert count.get_total_flops() == flops.loss_flops(*shapes, 0.3, True)
    with FlopCounterMode(display=False) as count:
        losses._accuracy._init_fn(Z, Z, others, 0.3, None)
    assert count.get_total_flops() == flops.accuracy_flops(*shapes)
