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

from ..distributed import (
    all_gather,
    all_gather_counts,
    all_reduce,
    mark_as_raised_on_all_ranks,
    rank_and_world_size,
)
from ..errors import SERError
from .streaming import accuracy, stream
from .tokens import places, precision, token_scale

__all__ = ["Contrast", "PatchNTXent", "contrast", "largest_square", "largest_value", "patch_ntxent"]


class Contrast(NamedTuple):
    """The loss, with two detached scalars that say how to read it.

    chance is log(number of candidates), averaged over the anchors of all ranks: the loss of features that tell
    nothing apart. accuracy is how often the positive beats every other candidate, over at most 256 evenly spaced
    anchors of this rank's z1; NaN on a rank without images. Where `valid` leaves fewer than two images over all ranks,
    so that nothing was compared, chance is 0 and accuracy NaN.
    """

    loss: Tensor
    chance: Tensor
    accuracy: Tensor


def patch_ntxent(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 0.3,
    valid: Tensor | None = None,
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
            matrices as `torch.set_float32_matmul_precision` has them). With `valid` also (T, D): the T tokens of its
            valid places alone, in their order, for who does not compute the others.
        temperature: above 0. The paper takes 0.3 (MoCo-v3, Barlow Twins) and 0.5 (DINO).
        valid: (B, N) bool, the places that both views have seen; by default all. The others are no anchors, no
            positives and no negatives: they are not looked at, whatever stands there, and get a gradient of zeros. An
            image without a valid place drops out. Best on the CPU: reading it from a GPU makes the host wait. How many
            there are decides about shapes, so that torch.compile breaks its graph here.
        chunk_size: side of a tile of logits, in tokens. It trades memory for speed and never touches the result.
            By default 1536 on a CPU (tiles of 9 MiB), 4096 elsewhere (64 MiB).
        group: the processes whose images make up the batch, by default all there are. Images, grid sizes and valid
            places may differ between ranks in any way, and a rank may have none, but every rank has to call, and then
            to go backward if one does. To compute the loss on one rank alone, give it a group of its own.

    Returns:
        Scalar, in nats, float32 (float64 for double): the mean over the anchors of both views. With several processes
        it is this rank's summand, such that its mean over ranks, and that of the gradients (which DDP takes), are
        exactly those of one process with the whole batch. There is nothing left to scale. Where `valid` leaves fewer
        than 2 images over all ranks, nothing can be told apart: 0, with a gradient of zeros.

    Raises:
        SERError: z1 and z2 unlike in shape, dtype or device; not floating; no tokens; fewer than 2 images over
            all ranks, none of which gives `valid`; temperature not above 0; chunk_size below 1; a `valid` that does
            not fit. Ranks that disagree, or of which one is given such input: on every rank. Features that are not
            finite, or too large to be squared: on a CPU in eager mode; elsewhere looking would make the host wait,
            and the loss is NaN. A gradient of the gradient: not implemented.

    Example:
        >>> z = torch.eye(6).reshape(2, 3, 6)  # 2 images of 3 tokens, all orthogonal
        >>> patch_ntxent(z, z, temperature=1.0)  # a perfect match against 6 negatives: log(e + 6) - 1
        tensor(1.1654)
        >>> patch_ntxent(z, z.roll(1, dims=1), temperature=1.0)  # positives like any other: log(7)
        tensor(1.9459)
        >>> seen = torch.tensor([[True, True, False], [False, True, True]])  # 4 negatives: log(e + 4) - 1
        >>> patch_ntxent(z, z, temperature=1.0, valid=seen)
        tensor(0.9048)
    """
    return _loss(z1, z2, temperature, valid, chunk_size, group).loss


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

    def forward(
        self, z1: Tensor, z2: Tensor, valid: Tensor | None = None, group: "dist.ProcessGroup | None" = None
    ) -> Tensor:
        """The loss of tokens (B, N, D), see `patch_ntxent`."""
        return patch_ntxent(z1, z2, self.temperature, valid, group=group)


def contrast(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    group: "dist.ProcessGroup | None" = None,
    valid: Tensor | None = None,
) -> Contrast:
    """`patch_ntxent`, same arguments, with its diagnostics: they cost one more look at up to 256 anchors."""
    loss, tokens, others, shards = _loss(z1, z2, temperature, valid, None, group)
    others = None if others is None else others.detach()
    total = sum(anchors for _, _, anchors, _ in shards)
    if any(chosen for *_, chosen in shards):  # how many tokens images of other ranks have, those ranks know
        here = tokens.offsets.diff().double()
        share = (here * torch.log1p(2 * (total - here))).sum().item() / max(1, total)
        chance = all_reduce(loss.new_full((), share), group)
    else:
        candidates = (images * each * math.log(1 + 2 * (total - each)) for images, each, *_ in shards)
        chance = loss.new_full((), sum(candidates) / total)
    first, second = tokens.first.detach(), tokens.second.detach()
    hits: Tensor = accuracy(first, second, others, tokens.offsets, temperature, None)
    if sum(images for images, *_ in shards) < 2:
        hits = torch.full_like(hits, math.nan)
    return Contrast(loss, chance, hits)


class _Tokens(NamedTuple):
    """Aligned tokens of both views, (T, D) each, image behind image; where each image begins and T at the end."""

    first: Tensor
    second: Tensor
    offsets: Tensor


class _Found(NamedTuple):
    """The loss, this rank's tokens, those of all other ranks, ready to be keys, and of every rank what it brought:
    images, places of each, valid places of all, and whether it was told which are valid."""

    loss: Tensor
    tokens: _Tokens
    others: Tensor | None
    shards: list[tuple[int, ...]]


def _loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    valid: Tensor | None,
    chunk_size: int | None,
    group: "dist.ProcessGroup | None",
) -> _Found:
    differentiate = torch.is_grad_enabled() and (z1.requires_grad or z2.requires_grad)
    rank, world_size = rank_and_world_size(group)
    call = f"patch_ntxent(z1, z2, temperature={temperature}, chunk_size={chunk_size})"
    error = _complaint(call, z1, z2, valid, temperature, chunk_size)
    tokens = _tokens(z1, z2, valid) if error is None else _Tokens(z1, z2, torch.zeros(1, dtype=torch.int64))
    error = _complaint_of_numbers(call, tokens) if error is None else error
    images, each = (tokens.offsets.shape[0] - 1, z1.shape[-2]) if error is None else (0, 0)
    mine = (images, each, tokens.first.shape[0], int(valid is not None))
    shards = _exchange(call, error, mine, tokens.first, temperature, differentiate, group)
    weight, others = 1.0, None
    if world_size > 1:
        anchors = [count for _, _, count, _ in shards]
        weight = world_size * anchors[rank] / max(1, sum(anchors))
        with torch.autocast(z1.device.type, enabled=False):
            keys = torch.cat([z * token_scale(z, temperature) for z in (tokens.first, tokens.second)])
        gathered = all_gather(keys, [2 * n for n in anchors], group)
        # An image lives on one rank, so what another rank holds is another image, wherever it stands in the list.
        others = torch.cat([shard for owner, shard in enumerate(gathered) if owner != rank])
    loss = stream(tokens.first, tokens.second, others, tokens.offsets, temperature, chunk_size, weight, differentiate)
    return _Found(loss, tokens, others, shards)


def _tokens(z1: Tensor, z2: Tensor, valid: Tensor | None) -> _Tokens:
    """The tokens that are compared."""
    if valid is None:
        return _Tokens(z1.flatten(0, 1), z2.flatten(0, 1), torch.arange(z1.shape[0] + 1) * z1.shape[1])
    counts = valid.cpu().sum(1)
    offsets = nn.functional.pad(counts[counts > 0].cumsum(0), (1, 0))
    if z1.ndim == 3:
        chosen = places(valid, z1.device)
        z1, z2 = (z.flatten(0, 1).index_select(0, chosen) for z in (z1, z2))
    return _Tokens(z1, z2, offsets)


def _exchange(
    call: str,
    error: SERError | None,
    mine: tuple[int, ...],
    z: Tensor,
    temperature: float,
    differentiate: bool,
    group: "dist.ProcessGroup | None",
) -> list[tuple[int, ...]]:
    """What every rank brings, once all input is found to be valid and alike where it has to be."""
    _, world_size = rank_and_world_size(group)
    if world_size == 1:
        if error is not None:
            raise error
        shards = [mine]
    else:
        alike = {
            "feature dimension": (z.shape[-1] if error is None else 0, "SERLoss(dim, projection_dim=512)"),
            "bits per number": (torch.finfo(precision(z)).bits, "z1.float(), z2.float()"),
            "temperature": (temperature if error is None else 0, "temperature=0.3"),
            "requires_grad": (differentiate, "torch.set_grad_enabled(True)"),
        }
        shards = all_gather_counts(call, error, mine, alike, z.device, group)
    images = sum(shard[0] for shard in shards)
    if images < 2 and not any(chosen for *_, chosen in shards):
        given = f"z1 ({mine[0]}, {mine[1]}, {z.shape[-1]}), {images} images in {world_size} processes"
        expected = "at least 2 images: negatives are tokens of other images"
        remedy = "partition_size(batch_size, ratio, world_size)  # never 1"
        raise mark_as_raised_on_all_ranks(SERError(call, given, expected, remedy))
    return shards


def _complaint(
    call: str, z1: Tensor, z2: Tensor, valid: Tensor | None, temperature: float, chunk_size: int | None
) -> SERError | None:
    """What is wrong on this rank. Returned, not raised, for the other ranks have to hear of it."""

    def wrong(expected: str, remedy: str, given: str = "") -> SERError:
        views = (f"{name} {tuple(z.shape)} {z.dtype} on {z.device}" for name, z in (("z1", z1), ("z2", z2)))
        return SERError(call, given or ", ".join(views), expected, remedy)

    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        return wrong("a finite temperature above 0", "temperature=0.3", f"temperature={temperature!r}")
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        return wrong("a tile of at least 1 token", "chunk_size=None  # automatic", f"chunk_size={chunk_size}")
    listed = valid is not None and z1.ndim == 2
    if not (z1.ndim == 3 or listed) or not (z2.ndim == 3 or listed):
        return wrong("token lists (B, N, D)", "z1.flatten(2).mT, z2.flatten(2).mT  # from maps (B, D, h, w)")
    if z1.shape != z2.shape:
        return wrong("equal shapes", "act(g, z1)  # first: it brings z1 onto the grid of z2")
    if z1.dtype != z2.dtype or not z1.is_floating_point():
        return wrong("one floating point dtype", "z1.float(), z2.float()")
    if z1.device != z2.device:
        return wrong("one device", "z1.to(z2.device)")
    if z1.shape[0] and not (z1.shape[-2] and z1.shape[-1]):
        return wrong("tokens with features", "z1 = patch_tokens(vit, images, layer).flatten(2).mT")
    if valid is None:
        return None
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        given = f"valid of {valid.dtype}" if isinstance(valid, Tensor) else f"valid is a {type(valid).__name__}"
        return wrong(
            "a bool tensor (B, N)", "valid.bool()" if isinstance(valid, Tensor) else "torch.tensor(valid)", given
        )
    if valid.ndim != 2 or not (listed or valid.shape == z1.shape[:2]):
        given = f"valid {tuple(valid.shape)}, z1 {tuple(z1.shape)}"
        return wrong("True or False for each token, (B, N)", "valid.flatten(1)  # from (B, h, w)", given)
    if listed and len(z1) != int(valid.sum()):
        given = f"{len(z1)} tokens, {int(valid.sum())} valid places"
        return wrong(
            "the tokens of all places (B, N, D), or those of the valid ones (T, D)", "z1[valid], z2[valid]", given
        )
    return None


def _complaint_of_numbers(call: str, tokens: _Tokens) -> SERError | None:
    """What is wrong with the numbers, where looking at them makes no host wait."""
    if tokens.first.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    for name, z in (("z1", tokens.first.detach()), ("z2", tokens.second.detach())):
        largest = largest_value(z)
        if not largest < math.inf:
            bad = (~z.isfinite()).any(-1)
            given = f"{name} with {int(bad.sum())} of {bad.numel()} tokens not finite"
            return SERError(call, given, "finite features", f"torch.isfinite({name}).all()  # and so on, upstream")
        if largest > largest_square(z):
            given, expected = f"{name} with values up to {largest:.1e}", "numbers that can be squared"
            remedy = f"torch.nn.functional.layer_norm({name}, {name}.shape[-1:])"
            return SERError(call, given, expected, remedy)
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
