"""Prefix tokens that wait beside a block: the forward that passes them by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["admit_prefix", "is_late", "pass_prefix_by"]


def is_late(module: nn.Module) -> bool:
    """Whether prefix tokens pass this module by."""
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _forward_patches


def pass_prefix_by(block: Any, prefix: int) -> None:
    """Let a block see the patches only, by a forward of this one instance.

    Hooks would do the same, but torch.compile does not guard on their absence: after a plain ViT was compiled, one
    with hooks silently runs the plain graph. It does guard on an instance's own `forward`.
    """
    block.forward = partial(_forward_patches, block.forward, prefix)


def admit_prefix(module: Any) -> None:
    """Undo `pass_prefix_by`."""
    if is_late(module):
        inner = module.forward.args[0]
        del module.forward
        if module.forward != inner:  # somebody else had replaced it before us
            module.forward = inner


def _forward_patches(
    forward: Callable[..., Tensor],
    prefix: int,
    tokens: Tensor,
    *args: Any,
    attn_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Run a block's `forward` on the patches, while the first `prefix` tokens pass by."""
    if attn_mask is not None:
        patches = tokens.shape[1] - prefix
        kwargs["attn_mask"] = attn_mask[..., -patches:, -patches:]
    return torch.cat([tokens[:, :prefix], forward(tokens[:, prefix:], *args, **kwargs)], dim=1)
