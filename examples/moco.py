"""MoCo-v3 around a timm ViT: heads, momentum branch, loss and initialisation.

Source: Chen, Xie & He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021
(arXiv 2104.02057), and the recipe of its official release, written anew. One process; widths are smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MoCoV3", "contrastive_loss", "fix_patch_projection", "fix_positions", "momentum_at"]


class MoCoV3(nn.Module):
    """The base method: a trained branch with projector and predictor, a momentum branch without predictor.

    The views of a batch may come in parts of different sizes. Their embeddings are joined ahead of the heads, so that
    all images share batch statistics and negatives.

    Args:
        encoder: images to (B, D) embeddings; copied for the momentum branch.
        dim: D.
        hidden: width inside both heads (4096 in the paper).
        out: width of what is compared (256 in the paper).
        temperature: of the loss.
    """

    def __init__(
        self, encoder: nn.Module, dim: int, hidden: int = 512, out: int = 128, temperature: float = 0.2
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = _mlp(dim, hidden, hidden, out)
        self.predictor = _mlp(out, hidden, out)
        self.temperature = temperature
        self.momentum_encoder = deepcopy(encoder).requires_grad_(False)
        self.momentum_projector = deepcopy(self.projector).requires_grad_(False)

    def forward(
        self, embeddings1: Tensor, embeddings2: Tensor, view1: Sequence[Tensor], view2: Sequence[Tensor]
    ) -> Tensor:
        """The symmetric loss of a batch.

        Args:
            embeddings1, embeddings2: (B, D), what the trained encoder makes of the two views.
            view1, view2: the views themselves for the momentum branch, in parts of one size each.
        """
        q1, q2 = (self.predictor(self.projector(e)) for e in (embeddings1, embeddings2))
        with torch.no_grad():
            k1, k2 = (
                self.momentum_projector(torch.cat([self.momentum_encoder(part) for part in view]))
                for view in (view1, view2)
            )
        return contrastive_loss(q1, k2, self.temperature) + contrastive_loss(q2, k1, self.temperature)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the momentum branch towards the trained one. Parameters only: each keeps its own batch statistics."""
        for slow, fast in (
            (self.momentum_encoder, self.encoder),
            (self.momentum_projector, self.projector),
        ):
            for target, source in zip(slow.parameters(), fast.parameters(), strict=True):
                target.lerp_(source, 1 - momentum)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """2τ · cross-entropy of query i finding key i among all keys of the batch (Algorithm 1, `ctr`)."""
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def momentum_at(progress: float, start: float) -> float:
    """The momentum after a part of the training: `start` at 0, along a cosine to 1."""
    return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - start)


@torch.no_grad()
def fix_positions(vit: VisionTransformer) -> None:
    """Two-dimensional sine-cosine position embedding, never trained; that of [CLS] is zero."""
    patches = build_sincos2d_pos_embed(vit.patch_embed.grid_size, vit.embed_dim)
    vit.pos_embed.zero_()[0, vit.num_prefix_tokens :] = patches
    vit.pos_embed.requires_grad_(False)


@torch.no_grad()
def fix_patch_projection(vit: VisionTransformer) -> None:
    """A random patch projection, never trained, which the paper found to make training stable (Section 4.1).

    Xavier-uniform, counting one patch as the fan-in and the width as the fan-out, as if it were a linear layer.
    """
    weight, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    bound = math.sqrt(6 / (weight[0].numel() + weight.shape[0]))
    weight.uniform_(-bound, bound).requires_grad_(False)
    bias.zero_().requires_grad_(False)


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers without bias, batch norm and ReLU between them, batch norm without scale and shift at the end."""
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(pairwise(widths), start=1):
        last = i == len(widths) - 1
        layers += [nn.Linear(width_in, width_out, bias=False), nn.BatchNorm1d(width_out, affine=not last)]
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
