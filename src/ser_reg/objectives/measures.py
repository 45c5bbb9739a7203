"""What terms log: whether they work, in numbers that can be read without knowing the term."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["explained", "feature_std", "matching"]


def explained(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(r2, chance): the share of a target's variance that is explained, and the squared error of its mean.

    Args:
        predicted, target: (n, ...). The mean is over images, each number for itself; r2 is of all together.

    Returns:
        Two detached scalars; r2 is NaN where the target does not vary.

    Example:
        >>> target = torch.tensor([[0.0], [2.0]])
        >>> explained(torch.tensor([[0.5], [1.5]]), target)
        (tensor(0.7500), tensor(1.))
    """
    predicted, target = predicted.detach(), target.detach()
    chance = (target - target.mean(0)).square().mean()
    error = (predicted - target).square().mean()
    varies = chance > torch.finfo(chance.dtype).eps
    return torch.where(varies, 1 - error / chance, math.nan), chance


def feature_std(tokens: Tensor) -> Tensor:
    """Standard deviation of the directions of (..., D), all dimensions together, in [0, 1]: 0 where all are one."""
    directions = nn.functional.normalize(tokens.detach().flatten(0, -2).float(), dim=-1)
    spread: Tensor = (directions - directions.mean(0)).square().mean(0).sum().sqrt()
    return spread


def matching(tokens1: Tensor, tokens2: Tensor, images: int = 8, valid: Tensor | None = None) -> Tensor:
    """How often a token's best match, among the tokens of its own image in the other view, is the one at its place.

    The spatial reading of a dense term: negatives are tokens of other images, so that a term can be content with maps
    that are constant over space, which match nowhere. Chance is 1/N. Ties count as none.

    Args:
        tokens1, tokens2: (B, N, D), aligned: token j of both at the same place.
        images: at most so many are looked at, evenly spaced.
        valid: (B, N) bool, places that both views have seen; others are neither asked for nor found. By default all.

    Returns:
        Scalar in [0, 1], NaN without an image (or a valid place).

    Example:
        >>> z = torch.eye(6).reshape(2, 3, 6)
        >>> matching(z, z), matching(z, z.roll(1, dims=1)), matching(*2 * [z[:, :1].expand(2, 3, 6)])
        (tensor(1.), tensor(0.), tensor(0.))
        >>> matching(z, z.roll(1, dims=1), valid=torch.tensor(2 * [[True, False, False]]))    # alone
        tensor(1.)
    """
    some = torch.arange(min(images, len(tokens1))) * len(tokens1) // max(1, min(images, len(tokens1)))
    x1, x2 = (nn.functional.normalize(z[some].detach().float(), dim=-1) for z in (tokens1, tokens2))
    similar = x1 @ x2.mT
    own = similar.diagonal(dim1=-2, dim2=-1)
    left_out = torch.eye(similar.shape[-1], dtype=torch.bool, device=similar.device)
    if valid is not None:
        left_out = left_out | ~valid[some][:, None, :]
    best = similar.masked_fill(left_out, -math.inf).amax(-1)
    hits = own > best + 1e-6
    share: Tensor = hits.float().mean() if valid is None else (hits & valid[some]).sum() / valid[some].sum()
    return share
