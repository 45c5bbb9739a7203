"""The loss as its formula reads (paper, Section 3.3, Equation 3): slow twins of `ser_reg.patch_ntxent`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dense_ntxent", "literal_ntxent", "released_ntxent"]


def literal_ntxent(
    z1: Sequence[Tensor] | Tensor,
    z2: Sequence[Tensor] | Tensor,
    temperature: float = 0.3,
    symmetric: bool = True,
    valid: Sequence[Tensor] | Tensor | None = None,
) -> Tensor:
    """Anchor by anchor, candidate by candidate. An image is an (N, D) tensor; N may differ between images.

    Of each image `valid` has N truth values: which tokens are there at all. Zero where there is nothing to tell apart.
    """

    def seen(i: int, j: int) -> bool:
        return valid is None or bool(valid[i][j])

    if sum(any(seen(i, j) for j in range(len(z1[i]))) for i in range(len(z1))) < 2:
        return 0 * sum(z.nan_to_num().sum() for z in [*z1, *z2])

    def s(x: Tensor, y: Tensor) -> Tensor:
        return F.cosine_similarity(x, y, dim=0, eps=1e-12) / temperature

    losses = []
    for za, zb in ((z1, z2), (z2, z1)) if symmetric else ((z1, z2),):
        for i in range(len(za)):
            for j in range(len(za[i])):
                if not seen(i, j):
                    continue
                positive = s(za[i][j], zb[i][j])
                candidates = [positive]
                for m in range(len(za)):
                    if m != i:
                        candidates += [s(za[i][j], token) for n, token in enumerate(za[m]) if seen(m, n)]
                        candidates += [s(za[i][j], token) for n, token in enumerate(zb[m]) if seen(m, n)]
                losses.append(torch.stack(candidates).logsumexp(0) - positive)
    return torch.stack(losses).mean()


def dense_ntxent(
    z1: Sequence[Tensor] | Tensor, z2: Sequence[Tensor] | Tensor, temperature: float = 0.3, symmetric: bool = True
) -> Tensor:
    """All logits in one matrix, those of the own image masked: for sizes at which the loops take too long."""
    x1, x2 = (F.normalize(torch.cat(list(z)), dim=-1, eps=1e-12) for z in (z1, z2))
    image = torch.tensor([i for i, tokens in enumerate(z1) for _ in tokens], device=x1.device)
    own = image[:, None] == image
    losses = []
    for xa, xb in ((x1, x2), (x2, x1)) if symmetric else ((x1, x2),):
        positive = (xa * xb).sum(1, keepdim=True) / temperature
        negatives = [(xa @ keys.mT / temperature).masked_fill(own, float("-inf")) for keys in (xa, xb)]
        losses.append(torch.cat([positive, *negatives], 1).logsumexp(1) - positive[:, 0])
    return torch.cat(losses).mean()


def released_ntxent(z1: Tensor, z2: Tensor, temperature: float = 0.3, symmetric: bool = True) -> Tensor:
    """The released form told again with its defects repaired: a full M x 2M matrix, exp, a mask filled in a loop.

    No running maximum: the exponentials overflow where 1/temperature is large.
    """
    images, tokens, _ = z1.shape
    x1, x2 = (F.normalize(z, dim=-1).flatten(0, 1) for z in (z1, z2))
    negative = torch.ones(len(x1), 2 * len(x1), dtype=torch.bool, device=z1.device)
    for i in range(images):
        own = slice(i * tokens, (i + 1) * tokens)
        negative[own, own] = False
        negative[own, len(x1) + own.start : len(x1) + own.stop] = False
    losses = []
    for xa, xb in ((x1, x2), (x2, x1)) if symmetric else ((x1, x2),):
        exponentials = torch.exp(xa @ torch.cat([xa, xb]).mT / temperature)
        positive = torch.exp((xa * xb).sum(1) / temperature)
        losses.append(-torch.log(positive / (positive + (exponentials * negative).sum(1))))
    return torch.cat(losses).mean()
