"""What the losses need of tokens: their length, their precision, and which of them are valid."""

import math

import torch
from torch import Tensor

__all__ = ["places", "precision", "to_device", "token_scale"]

SHORTEST = 1e-12  # a token below this norm has no direction: all its similarities are 0, and so is its gradient


def token_scale(z: Tensor, temperature: float) -> Tensor:
    """(..., 1): what a token of (..., D) is multiplied by, so that products of two are logits."""
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=precision(z))
    length = torch.where(length < math.inf, length, math.nan)  # never a number from features that are none
    scale: Tensor = temperature**-0.5 / length.masked_fill(length < SHORTEST, math.inf)
    return scale


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the CPU on another device, without waiting for what a GPU has still to do."""
    if device.type == "cuda" and numbers.device.type == "cpu":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def precision(z: Tensor) -> torch.dtype:
    """In which these tokens are compared: double in double, all else in float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def places(valid: Tensor, device: torch.device) -> Tensor:
    """Numbers of the valid places of (B, N), row by row, on a device that need not be waited for."""
    return to_device(valid.cpu().flatten().nonzero().squeeze(1), device)
