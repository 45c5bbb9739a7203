"""Small models for the scores: one as it comes, one equivariant by construction, one whose channels turn too."""

import timm
import torch
from elements import DIHEDRAL, element
from torch import nn
from torch.nn import functional as F

from ser_reg import act

__all__ = ["equivariant", "orbit_stack", "plain"]


def plain(depth=3, **kwargs):
    return timm.models.VisionTransformer(
        img_size=24, patch_size=4, embed_dim=32, depth=depth, num_heads=2, num_classes=0, **kwargs
    ).eval()


def equivariant(**kwargs):
    """Equivariant by construction: the colour of each patch, no positions, and blocks that look at one token."""
    vit = plain(dynamic_img_size=True, **kwargs)
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.patch_embed.proj.weight.copy_(vit.patch_embed.proj.weight.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4))
    for block in vit.blocks:
        block.attn = Alone()
    return vit


class Alone(nn.Module):
    """Attention of each token to itself."""

    def forward(self, tokens, **_):
        return tokens


def orbit_stack(self, images, layers, call):
    """In place of `TimmViT.maps`: block k of the channels is k φ(k⁻¹ x), of a φ that is not equivariant at all."""
    weight = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ks = [element(turns, flip) for flip in (False, True) for turns in range(4)]
    assert [(k.turns.item(), k.flip.item()) for k in ks] == DIHEDRAL
    blocks = [act(k, F.conv2d(act(~k, images), weight, stride=4)) for k in ks]
    return dict.fromkeys(layers, torch.cat(blocks, 1))
