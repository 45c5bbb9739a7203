"""What base methods exchange between processes, on processes."""

import pytest
import torch

pytest.importorskip("accelerate")

from pretraining.distributed import all_gather, all_reduce

close = torch.testing.assert_close
RANKS, ROWS, DIM = 4, 3, 5


def images():
    return torch.randn(RANKS, ROWS, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loss_of_sum(x):
    return (x.mean(0) - 1).square().sum()


def exchange(here):
    mine = images()[here.rank].requires_grad_()
    keys = all_gather(mine)
    loss_of_sum(all_reduce(mine)).backward()
    return keys, keys.requires_grad, mine.grad


def test_keys_are_those_of_all_in_the_order_of_ranks_and_gradients_cross_sums(run):
    """Under DDP's mean over ranks the gradient is that of one process with the whole batch."""
    together = images().requires_grad_()
    loss_of_sum(together.sum(0)).backward()
    for rank, (keys, trained, gradient) in enumerate(run(RANKS, exchange)):
        assert torch.equal(keys, images().flatten(0, 1))
        assert not trained
        close(gradient / RANKS, together.grad[rank])


def test_one_process_keeps_what_it_has():
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(all_gather(x), x)
    assert not all_gather(x).requires_grad
    assert all_reduce(x) is x
