"""Patch-wise NT-Xent (paper, Section 3.3, Equation 3): exact on any number of processes, and linear in memory.

Of R ranks, rank r holds some of the M anchors of the whole batch and returns

    L_r = R / M * (sum of the losses of its own anchors),

the candidates being the tokens of all ranks. DDP averages over ranks, and

    1/R * sum_r L_r = 1/M * (sum of the losses of all anchors),

the loss of one process that holds the whole batch. Gradients: the gather's backward sums, over ranks, what each L_s
says about a token, so rank r holds the gradient of sum_s L_s with respect to its own tokens, and carries it on to
the weights through its own images; DDP adds these and divides by R, which gives the gradient of 1/R * sum_s L_s. A mean
over local anchors would let the images of a small shard count for more; without the factor R the gradient would shrink
as ranks are added. Where gradients are summed over ranks instead of averaged, divide the loss by R. Gradient
accumulation is not a bigger batch: each micro-batch has its own negatives only.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import all_gather, all_gather_counts, mark_as_raised_on_all_ranks, rank_and_world_size
from ..errors import SERError
from .streaming import accuracy, precision, stream, token_scale

__all__ = ["Contrast", "PatchNTXent", "contrast", "largest_square", "largest_value", "patch_ntxent"]


class Contrast(NamedTuple):
    """The loss, with two detached scalars that say how to read it.

    chance is log(number of candidates), averaged over the anchors of all ranks: the loss of features that tell
    nothing apart. accuracy is how often the positive beats every other candidate, over at most 256 evenly spaced
    anchors of this rank's z1; NaN on a rank without images.
    """

    loss: Tensor
    chance: Tensor
    accuracy: Tensor


def patch_ntxent(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 0.3,
    chunk_size: int | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    r"""Patch-wise NT-Xent between two views' aligned tokens (paper, Section 3.3, Equation 3).

    An anchor z1[i, j] has to find its positive z2[i, j] among the tokens of all other images, in both views:

        loss[i, j] = logsumexp({s(z1[i, j], z2[i, j])} ∪ {s(z1[i, j], z1[m, n]), s(z1[i, j], z2[m, n]) : m ≠ i})
                     - s(z1[i, j], z2[i, j]),        s = cosine similarity / temperature,

    and likewise the other way round, with anchors from z2.

    Args:
        z1, z2: (B, N, D), N tokens of each of B images, token j of image i at the same place in both. Any floating
            dtype: double is computed in double, all else in float32, whatever autocast says (products of float32
            matrices as `torch.set_float32_matmul_precision` has them).
        temperature: above 0. The paper takes 0.3 (MoCo-v3, Barlow Twins) and 0.5 (DINO).
        chunk_size: side of a tile of logits, in tokens. It trades memory for speed and never touches the result.
            By default 1536 on a CPU (tiles of 9 MiB), 4096 elsewhere (64 MiB).
        group: the processes whose images make up the batch, by default all there are. Images and grid sizes may
            differ between ranks in any way, and a rank may have no image, but every rank has to call, and then to
            go backward if one does. To compute the loss on one rank alone, give it a group of its own.

    Returns:
        Scalar, in nats, float32 (float64 for double): the mean over the anchors of both views. With several processes
        it is this rank's summand, such that its mean over ranks, and that of the gradients (which DDP takes), are
        exactly those of one process with the whole batch. There is nothing left to scale.

    Raises:
        SERError: z1 and z2 unlike in shape, dtype or device; not floating; no tokens; fewer than 2 images over
            all ranks; temperature not above 0; chunk_size below 1. Ranks that disagree, or of which one is given
            such input: on every rank. Features that are not finite, or too large to be squared: on a CPU in eager
            mode; elsewhere looking would make the host wait, and the loss is NaN. A gradient of the gradient: not
            implemented.

    Example:
        >>> z = torch.eye(6).reshape(2, 3, 6)  # 2 images of 3 tokens, all orthogonal
        >>> patch_ntxent(z, z, temperature=1.0)  # a perfect match against 6 negatives: log(e + 6) - 1
        tensor(1.1654)
        >>> patch_ntxent(z, z.roll(1, dims=1), temperature=1.0)  # positives like any other: log(7)
        tensor(1.9459)
    """
    loss, _, _ = _loss(z1, z2, temperature, chunk_size, group)
    return loss


class PatchNTXent(nn.Module):
    """`patch_ntxent` as a module.

    Args:
        temperature: above 0.

    Example:
        >>> z = torch.eye(6).reshape(2, 3, 6)
        >>> PatchNTXent(temperature=1.0)(z, z)
        tensor(1.1654)
    """

    def __init__(self, temperature: float = 0.3) -> None:
        super().__init__()
        self.temperature = temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def forward(self, z1: Tensor, z2: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
        """The loss of tokens (B, N, D), see `patch_ntxent`."""
        return patch_ntxent(z1, z2, self.temperature, group=group)


def contrast(z1: Tensor, z2: Tensor, temperature: float, group: "dist.ProcessGroup | None" = None) -> Contrast:
    """`patch_ntxent`, same arguments, with its diagnostics: they cost one more look at up to 256 anchors."""
    loss, counts, others = _loss(z1, z2, temperature, None, group)
    tokens = sum(images * each for images, each in counts)
    chance = sum(images * each * math.log(1 + 2 * (tokens - each)) for images, each in counts) / tokens
    others = None if others is None else others.detach()
    flat1, flat2 = (z.detach().flatten(0, 1) for z in (z1, z2))
    hits: Tensor = accuracy(flat1, flat2, others, _offsets(z1), temperature, None)
    return Contrast(loss, loss.new_full((), chance), hits)


def _loss(
    z1: Tensor, z2: Tensor, temperature: float, chunk_size: int | None, group: "dist.ProcessGroup | None"
) -> tuple[Tensor, list[tuple[int, ...]], Tensor | None]:
    """The loss, (images, tokens of each) of every rank, and the tokens of all other ranks, ready to be keys."""
    differentiate = torch.is_grad_enabled() and (z1.requires_grad or z2.requires_grad)
    rank, world_size = rank_and_world_size(group)
    counts = _counts(z1, z2, temperature, chunk_size, differentiate, world_size, group)
    weight, others = 1.0, None
    if world_size > 1:
        anchors = [images * tokens for images, tokens in counts]
        weight = world_size * anchors[rank] / sum(anchors)
        with torch.autocast(z1.device.type, enabled=False):
            mine = torch.cat([(z * token_scale(z, temperature)).flatten(0, 1) for z in (z1, z2)])
        shards = all_gather(mine, [2 * n for n in anchors], group)
        # An image lives on one rank, so what another rank holds is another image, wherever it stands in the list.
        others = torch.cat([shard for owner, shard in enumerate(shards) if owner != rank])
    flat1, flat2 = z1.flatten(0, 1), z2.flatten(0, 1)
    loss = stream(flat1, flat2, others, _offsets(z1), temperature, chunk_size, weight, differentiate)
    return loss, counts, others


def _offsets(z: Tensor) -> Tensor:
    """Where each image of (B, N, D) begins among its B·N tokens, and their number."""
    return torch.arange(z.shape[0] + 1) * z.shape[1]


def _counts(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    chunk_size: int | None,
    differentiate: bool,
    world_size: int,
    group: "dist.ProcessGroup | None",
) -> list[tuple[int, ...]]:
    """(images, tokens of each) of every rank, once all input is found to be valid and alike where it has to be."""
    call = f"patch_ntxent(z1, z2, temperature={temperature}, chunk_size={chunk_size})"
    error = _complaint(call, z1, z2, temperature, chunk_size)
    if world_size == 1:
        if error is not None:
            raise error
        counts: list[tuple[int, ...]] = [(z1.shape[0], z1.shape[1])]
    else:
        images, tokens, width = z1.shape if error is None else (0, 0, 0)
        alike = {
            "feature dimension": (width, "SERLoss(dim, projection_dim=512)"),
            "bits per number": (torch.finfo(precision(z1)).bits, "z1.float(), z2.float()"),
            "temperature": (temperature if error is None else 0, "temperature=0.3"),
            "requires_grad": (differentiate, "torch.set_grad_enabled(True)"),
        }
        counts = all_gather_counts(call, error, (images, tokens), alike, z1.device, group)
    if sum(images for images, _ in counts) < 2:
        given = f"z1 {tuple(z1.shape)}, {sum(images for images, _ in counts)} images in {world_size} processes"
        expected = "at least 2 images: negatives are tokens of other images"
        remedy = "partition_size(batch_size, ratio, world_size)  # never 1"
        raise mark_as_raised_on_all_ranks(SERError(call, given, expected, remedy))
    return counts


def _complaint(call: str, z1: Tensor, z2: Tensor, temperature: float, chunk_size: int | None) -> SERError | None:
    """What is wrong on this rank. Returned, not raised, for the other ranks have to hear of it."""

    def wrong(expected: str, remedy: str, given: str = "") -> SERError:
        views = (f"{name} {tuple(z.shape)} {z.dtype} on {z.device}" for name, z in (("z1", z1), ("z2", z2)))
        return SERError(call, given or ", ".join(views), expected, remedy)

    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        return wrong("a finite temperature above 0", "temperature=0.3", f"temperature={temperature}")
    if chunk_size is not None and chunk_size < 1:
        return wrong("a tile of at least 1 token", "chunk_size=None  # automatic", f"chunk_size={chunk_size}")
    if z1.ndim != 3 or z2.ndim != 3:
        return wrong("token lists (B, N, D)", "z1.flatten(2).mT, z2.flatten(2).mT  # from maps (B, D, h, w)")
    if z1.shape != z2.shape:
        return wrong("equal shapes", "act(g, z1)  # first: it brings z1 onto the grid of z2")
    if z1.dtype != z2.dtype or not z1.is_floating_point():
        return wrong("one floating point dtype", "z1.float(), z2.float()")
    if z1.device != z2.device:
        return wrong("one device", "z1.to(z2.device)")
    if z1.shape[0] and not (z1.shape[1] and z1.shape[2]):
        return wrong("tokens with features", "z1 = patch_tokens(vit, images, layer).flatten(2).mT")
    if z1.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the host would have to wait
        for name, z in (("z1", z1.detach()), ("z2", z2.detach())):
            largest = largest_value(z)
            if not largest < math.inf:
                bad = (~z.isfinite()).any(-1)
                given = f"{name} with {int(bad.sum())} of {bad.numel()} tokens not finite"
                return wrong("finite features", f"torch.isfinite({name}).all()  # and so on, upstream", given)
            if largest > largest_square(z):
                given, expected = f"{name} with values up to {largest:.1e}", "numbers that can be squared"
                return wrong(expected, f"torch.nn.functional.layer_norm({name}, {name}.shape[-1:])", given)
    return None


def largest_value(z: Tensor) -> float:
    """The largest magnitude in a tensor, infinite if something in it is no number; the host waits for it."""
    if not z.numel():
        return 0.0
    low, high = (end.item() for end in z.detach().aminmax())  # which takes no memory, and keeps NaN
    return math.inf if math.isnan(low + high) else float(max(-low, high))


def largest_square(z: Tensor) -> float:
    """Up to which magnitude a million squares have a sum, in the precision in which tokens are compared."""
    return float(torch.finfo(precision(z)).max ** 0.5 / 1e3)
