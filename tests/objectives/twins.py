"""Heads and losses of terms as their formulas read: plain, slow, in float64, sharing nothing with the library."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ser_reg.objectives import Objective


def batch_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Of rows (n, d), by their own mean and variance."""
    x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    return x if weight is None else x * weight + bias


def mlp(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Linear, batch norm, ReLU until the last linear map; `p` holds its parameters by name."""
    depth = sum(key.startswith(f"{name}.linears.") and key.endswith(".weight") for key in p)
    for i in range(depth):
        x = F.linear(x, p[f"{name}.linears.{i}.weight"], p.get(f"{name}.linears.{i}.bias"))
        if i < depth - 1:
            x = batch_norm(x, p[f"{name}.norms.{i}.weight"], p[f"{name}.norms.{i}.bias"]).relu()
    return x


def simclr(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent over 2N vectors, all against all but themselves (Chen et al., 2020, Equation 1)."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    n = len(z1)
    losses = []
    for i in range(2 * n):
        logits = torch.stack([z[i] @ z[k] / temperature for k in range(2 * n) if k != i])
        losses.append(logits.logsumexp(0) - z[i] @ z[(i + n) % (2 * n)] / temperature)
    return torch.stack(losses).mean()


def assert_twins(term: Objective, twin: Callable[..., Tensor], features: list[Tensor], views: list) -> None:
    """Equal in value, and in the gradients of features and of every parameter."""
    parameters = dict(term.named_parameters())
    wanted = [*features, *parameters.values()]
    loss = term(features, views).loss
    expected = twin(parameters, features, views)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    grads, others = (torch.autograd.grad(x, wanted) for x in (loss, expected))
    names = [*(f"features {i}" for i in range(len(features))), *parameters]
    for name, grad, other in zip(names, grads, others, strict=True):
        torch.testing.assert_close(
            grad, other, rtol=1e-8, atol=1e-12, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )
        assert grad.abs().max() > 0, name
