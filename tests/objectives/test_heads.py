"""Batch norm over ranks, and perceptrons with it."""

import pytest
import torch
from processes import Here
from torch import nn
from twins import batch_norm, mlp

from ser_reg import SERError
from ser_reg.objectives.heads import MLP, BatchNorm, pooled


@pytest.mark.parametrize(("shape", "kind"), [((7, 5), nn.BatchNorm1d), ((3, 5, 4, 2), nn.BatchNorm2d)])
@pytest.mark.parametrize("affine", [True, False])
def test_on_one_process_it_is_that_of_torch(shape, kind, affine):
    ours, theirs = BatchNorm(5, affine).double(), kind(5, affine=affine).double()
    for _ in range(3):
        x = 3 * torch.randn(shape, dtype=torch.float64) + 5
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def shares(here: Here, splits: list[list[int]], shape: list[int]) -> list:
    answers = []
    for split in splits:
        whole, direction = rows(sum(split), shape)
        mine = slice(sum(split[: here.rank]), sum(split[: here.rank + 1]))
        x = whole[mine].clone().requires_grad_()
        norm = shaken()
        y = norm(x, here.group)
        (y.sin() * direction[mine]).sum().backward()
        answers.append((y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var))
    return answers


def rows(n: int, shape: list[int]) -> torch.Tensor:
    """Far from zero, as sums of squares would lose their digits."""
    generator = torch.Generator().manual_seed(n)
    x, direction = torch.randn(2, n, *shape, generator=generator, dtype=torch.float64)
    return 100 + x, direction


def shaken() -> BatchNorm:
    norm = BatchNorm(3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.5, -1.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, 2.0]))
    return norm


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", [[3], [3, 2, 2]])
def test_over_ranks_it_is_that_of_one_process(run, size, shape):
    splits = {2: [[4, 3], [0, 6], [1, 1]], 4: [[1, 2, 3, 4], [0, 5, 0, 2]]}[size]
    answers = run(size, shares, splits, shape)
    assert not any(isinstance(answer, Exception) for answer in answers), answers
    for i, split in enumerate(splits):
        whole, direction = rows(sum(split), shape)
        x, norm = whole.requires_grad_(), shaken()
        y = norm(x)
        (y.sin() * direction).sum().backward()
        found = [answer[i] for answer in answers]
        close = {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(torch.cat([rank[0] for rank in found]), y.detach(), **close)
        torch.testing.assert_close(torch.cat([rank[1] for rank in found]), x.grad, **close)
        for k, grad in ((2, norm.weight.grad), (3, norm.bias.grad)):
            torch.testing.assert_close(sum(rank[k] for rank in found), grad, **close)
        for rank in found:
            torch.testing.assert_close(rank[4], norm.running_mean, **close)
            torch.testing.assert_close(rank[5], norm.running_var, **close)


def test_one_row_has_no_deviation():
    with pytest.raises(SERError, match="one row or none"):
        BatchNorm(4)(torch.randn(1, 4))
    BatchNorm(4)(torch.randn(1, 4, 2, 2))
    BatchNorm(4).eval()(torch.randn(1, 4))


def test_it_is_not_what_is_converted_to_synchronised_batch_norm():
    head = MLP([4, 8, 2], last_norm="affine")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(head)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in converted.modules())
    assert "affine=True" in repr(head)


@pytest.mark.parametrize("last_norm", [None, "plain", "affine"])
@pytest.mark.parametrize("last_bias", [True, False])
def test_perceptron(last_norm, last_bias):
    head = MLP([4, 6, 5, 3], last_norm, last_bias).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    names = dict(head.named_parameters(prefix="head"))
    expected = mlp(names, "head", x)
    if last_norm is not None:
        expected = batch_norm(expected, names.get("head.last_norm.weight"), names.get("head.last_norm.bias"))
    torch.testing.assert_close(head(x), expected)
    assert ("head.linears.2.bias" in names, "head.last_norm.weight" in names) == (last_bias, last_norm == "affine")
    assert "head.linears.0.bias" not in names


def test_pooled():
    z = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(z), z.flatten(2).mean(2))
    assert torch.equal(pooled(z[:, :, 0, 0]), z[:, :, 0, 0])
